"""What people hold of a trained model: the same interface for every structure, its hierarchy, its files, steering."""

import copy
import json

import pytest
import torch
from models import HOOK, changed, random_model
from places import GOLDEN
from torch import nn
from transformers import AutoModelForCausalLM

import hsae
from hsae.cache.errors import UserError
from hsae.train.model import saelens_folder
from hsae.train.model.hierarchical_sae import STRUCTURES, FlatSAE

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
structures = pytest.mark.parametrize("structure", list(STRUCTURES))


@structures
def test_every_structure_is_one_kind_of_module(structure):
    model = random_model(structure)
    codes = model.encode(X)
    assert codes.shape == (5, model.d_sae) and model.W_dec.shape == (model.d_sae, 8) == model.W_enc.T.shape
    assert all(torch.equal(part, code) for part, code in zip(model.split(codes), model.codes(X), strict=True))
    assert torch.equal(model(X), model.decode(codes)) and torch.equal(model(X), model.reconstruct(model.codes(X)))
    assert list(nn.Module.children(model)) == list(model.children()) == [*model.levels, *model.compositions]
    with pytest.raises(UserError, match="the code has 3 latents"):
        model.decode(torch.zeros(5, 3))
    with pytest.raises(UserError, match=r"has no view 'level9'; it has (sae|level1)"):
        model.view("level9")


@structures
def test_to_moves_all_of_it_and_copy_to_leaves_it(structure):
    model = random_model(structure)
    wide = model.copy_to(dtype=torch.float64)
    assert model.dtype == torch.float32 and wide.dtype == torch.float64
    assert model.cfg.dtype == "float32"
    assert model.to("cpu", torch.bfloat16) is model and model.cfg.dtype == "bfloat16"
    assert {part.weight.dtype for part in model.compositions} <= {torch.bfloat16}
    assert model.encode(X).dtype == model(X).dtype == torch.bfloat16
    assert all(view(X).dtype == torch.bfloat16 for view in model.views().values())


@structures
def test_saebench_sees_a_custom_sae(structure):
    model = random_model(structure)
    for view in (model, *model.views().values()):
        assert (view.cfg.hook_name, view.cfg.hook_layer, view.cfg.d_in, view.cfg.d_sae) == (HOOK, 1, 8, view.d_sae)
        assert {"model_name", "dtype", "device", "architecture"} <= view.cfg.to_dict().keys()
        assert view.W_enc.shape == (8, view.d_sae) and view.b_enc.shape == (view.d_sae,)


@pytest.mark.parametrize("structure", ["additive", "stacked"])
def test_children_and_parents_are_the_two_ends_of_the_composition(structure):
    model = random_model(structure, widths=(32, 6, 3))
    children = model.children(level=2, latent=5)
    assert [edge.level for edge in children] == [1] * 32
    assert [edge.contribution for edge in children] == sorted((e.contribution for e in children), reverse=True)
    for edge in children:
        (back,) = [parent for parent in model.parents(level=1, latent=edge.latent) if parent.latent == 5]
        assert (back.level, back.weight, back.contribution) == (2, edge.weight, edge.contribution)
    with pytest.raises(UserError, match=r"level 1 is the finest and has no children.*from 2 to 3"):
        model.children(level=1, latent=0)
    with pytest.raises(UserError, match=r"level 3 is the coarsest and has no parents.*from 1 to 2"):
        model.parents(level=3, latent=0)
    with pytest.raises(UserError, match="level 2 has no latent 6; it has latents 0 to 5"):
        model.children(level=2, latent=6)
    unmapped = STRUCTURES[structure](model.levels)
    with pytest.raises(UserError, match="has no learned composition of level 2"):
        unmapped.children(level=2, latent=0)


@structures
def test_a_saved_model_is_loaded_as_it_was(structure, tmp_path):
    model = random_model(structure)
    model.save(tmp_path / "m")
    again = hsae.load(tmp_path / "m")
    assert type(again) is type(model) and torch.equal(again(X), model(X)) and repr(again) == repr(model)
    assert list(again.state_dict()) == list(model.state_dict())
    assert json.loads((tmp_path / "m" / "model.json").read_text())["format"] == 2


@pytest.mark.parametrize(
    "changes", [{"apply_b_dec_to_input": False}, {"architecture": "topk", "k": 4, "rescale_acts_by_decoder_norm": True}]
)
def test_a_foreign_saelens_folder_is_a_flat_model_and_stays_what_it_computes(changes, tmp_path):
    sae = changed(random_model("flat").levels[0], **changes)
    saelens_folder.save(sae, tmp_path / "foreign")
    model = hsae.load(tmp_path / "foreign")
    assert isinstance(model, FlatSAE) and torch.equal(model(X), sae(X))
    model.save(tmp_path / "m")
    assert torch.equal(hsae.load(tmp_path / "m")(X), sae(X))
    assert json.loads((tmp_path / "m" / "model.json").read_text())["format"] == 3  # older versions refuse it


def test_what_is_no_model_is_said(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        hsae.load(tmp_path / "none")
    saelens_folder.save(random_model("flat").levels[0], tmp_path / "level1")
    with pytest.raises(UserError, match=r"is no trained model.*SAEs lie in folders in it \(level1\)"):
        hsae.load(tmp_path)


@structures
def test_steering_adds_directions_while_it_is_entered(structure):
    lm = AutoModelForCausalLM.from_pretrained(GOLDEN / "model", dtype=torch.float32).eval()
    model, ids = random_model(structure, d_in=lm.config.hidden_size), torch.arange(5, 15)[None]
    level = len(model.levels)
    change = 4 * model.direction((level, 3)) - model.direction((1, 2))
    plain = lm(ids).logits
    with lm.model.layers[1].register_forward_hook(
        lambda module, given, out: (out[0] + change, *out[1:]) if isinstance(out, tuple) else out + change
    ):
        expected = lm(ids).logits
    with model.steer(lm, {(level, 3): 4.0, (1, 2): -1.0}):
        steered = lm(ids).logits
        assert lm.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 13)
    torch.testing.assert_close(steered, expected)
    assert torch.equal(lm(ids).logits, plain) and not torch.equal(steered, plain)
    with pytest.raises(UserError, match="there is no level 9"), model.steer(lm, {(9, 3): 4.0}):
        pass


@pytest.mark.parametrize("structure", list(STRUCTURES))
def test_a_view_is_a_module_of_its_own_and_is_copied_after_saebench_has_read_it(structure):
    model = random_model(structure)
    for name, view in model.views().items():
        assert view.cfg.d_sae == view.d_sae and model.cfg.d_sae == model.d_sae
        assert copy.deepcopy(view).cfg.d_sae == view.d_sae
        assert view.copy_to(dtype=torch.float64).cfg.dtype == "float64" and view.cfg.dtype == "float32"
        view.to(torch.bfloat16)
        assert {tensor.dtype for tensor in view.state_dict().values() if tensor.is_floating_point()} == {torch.bfloat16}
        assert model.view(name).dtype == model.dtype == torch.float32
    assert model.copy_to(dtype=torch.float64).cfg.dtype == "float64"
