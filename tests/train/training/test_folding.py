"""Folding, saving, and what other tools see: pairwise different sizes (B=17, D=7, F1=13, F2=5, F3=3)."""

import json

import pytest
import torch

from hsae.cache.errors import UserError
from hsae.train.config.run_config import RunConfig
from hsae.train.model import saelens_folder
from hsae.train.model.model_files import load_model
from hsae.train.model.sae import SAE
from hsae.train.model.views import View
from hsae.train.training.folding import fold
from hsae.train.training.scaling import Scaling
from hsae.train.training.training_run import TrainingRun

B, D, F1, F2, F3 = 17, 7, 13, 5, 3
METADATA = {
    "model_name": "m",
    "hook_name": "blocks.1.hook_resid_post",
    "context_size": 9,
    "prepend_bos": True,
    "dataset_path": "d",
}


def trained(structure, activation="batchtopk", steps=12, **changes):
    widths, l0 = ((F1,), (3,)) if structure == "flat" else ((F1, F2, F3), (3, 2, 1))
    mode = "none" if structure == "flat" else "normalised"
    values = {"widths": widths, "l0": l0, "composition": {"mode": mode}, "precision": "float32", "warmup_steps": 2}
    config = RunConfig(number=0, name="r", structure=structure, activation=activation, **{**values, **changes})
    generator = torch.Generator().manual_seed(1)
    x = 0.2 * torch.randn(B, D, generator=generator) + torch.randn(D, generator=generator)
    scaling = Scaling(scale=5.0, median=x.median(0).values * 5, variance=float((x * 5).var(0).sum()))
    run = TrainingRun(config, scaling, steps=steps, seed=0, device="cpu")
    for _ in range(steps):
        run.step(x * 5)
    return run, x


@pytest.mark.parametrize(
    ("structure", "activation"),
    [("flat", "relu"), ("flat", "topk"), ("flat", "batchtopk"), ("flat", "jumprelu"), ("flat", "gated"),
     ("additive", "relu"), ("additive", "batchtopk"), ("additive", "jumprelu"), ("additive", "topk"),
     ("stacked", "relu"), ("stacked", "topk"), ("stacked", "batchtopk"), ("stacked", "jumprelu")],
)  # fmt: skip
def test_the_folded_model_gives_the_trained_reconstructions_in_raw_units(structure, activation, tmp_path):
    run, x = trained(structure, activation)
    fold(run, METADATA, x * 5).save(tmp_path / "model")
    model = load_model(tmp_path / "model")
    run.model.eval()
    output = run.model(x * 5)
    views = model.views()
    for name, view in views.items():
        assert isinstance(view, View)
        level = 1 if name == "sae" else int(name.removeprefix("level"))
        if structure == "additive" and name != "sae":
            expected = output.levels[level].decoded + run.model.bias(1)
        else:
            expected = output.reconstructions[level]
        codes = view.encode(x)
        assert codes.shape == (B, view.d_sae)
        torch.testing.assert_close(view.decode(codes), expected / 5, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(view.W_dec.norm(dim=1), torch.ones(view.d_sae))
        if view.architecture not in ("stacked", "gated"):  # a stack has no one-layer form
            torch.testing.assert_close(view.W_enc, view.copy_to(dtype=torch.float64).W_enc.float())
    assert (
        set(views)
        == {
            "flat": {"sae"},
            "additive": {"sae", "level1", "level2", "level3"},
            "stacked": {"level1", "level2", "level3"},
        }[structure]
    )


@pytest.mark.parametrize("structure", ["flat", "additive", "stacked"])
def test_codes_reconstructions_and_directions_are_the_trained_ones(structure):
    run, x = trained(structure)
    model = fold(run, METADATA, x * 5)
    run.model.eval()
    output, codes = run.model(x * 5), model.codes(x)
    assert [code.shape[1] for code in codes] == list(run.config.widths)
    for number, code in enumerate(codes, 1):
        torch.testing.assert_close(code, output.levels[number].acts / 5, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            model.reconstruct(codes, above=number), output.reconstructions[number] / 5, rtol=1e-4, atol=1e-5
        )
        bumped = [code.clone() for code in codes]
        bumped[number - 1][:, 1] += 1
        change = model.reconstruct(bumped, above=number) - model.reconstruct(codes, above=number)
        torch.testing.assert_close(change, model.directions(number)[1].expand(B, D), rtol=1e-3, atol=1e-5)


def test_joint_selection_shares_one_threshold_and_keeps_the_total_l0(tmp_path):
    run, x = trained("additive", selection="joint", composition={"mode": "none"})
    output = run.last_output
    assert sum((level.acts > 0).sum().item() for level in output.levels.values()) == round(B * 6)
    fold(run, METADATA, x * 5).save(tmp_path)
    whole = load_model(tmp_path).views()["sae"]
    assert whole.architecture == "jumprelu" and len(set(whole.extra["threshold"].tolist())) == 1


def test_a_gated_child_fires_only_with_its_parent_in_training_and_in_the_saved_model(tmp_path):
    run, x = trained("additive", child_gate=True, steps=30)
    fold(run, METADATA, x * 5).save(tmp_path)
    model = load_model(tmp_path)
    assert [tuple(parents.shape) for parents in model.gates] == [(F1,), (F2,)]
    for fine, parents in enumerate(model.gates, 1):
        W = run.composition(fine + 1).W.detach()
        expected = [int(W[:, j].argmax()) if W[:, j].max() > 0 else -1 for j in range(W.shape[1])]
        assert parents.tolist() == expected
    trained_codes = [run.last_output.levels[number].acts for number in (1, 2, 3)]
    for codes in (trained_codes, model.codes(x)):
        for parents, fine, coarse in zip(model.gates, codes, codes[1:], strict=False):
            for j, parent in enumerate(parents.tolist()):
                if parent >= 0:
                    assert not (fine[:, j] > 0)[coarse[:, parent] == 0].any()
    assert any((code > 0).any() for code in model.codes(x)[:2])
    views = model.views()
    torch.testing.assert_close(views["sae"].encode(x), torch.cat(model.codes(x), 1))
    torch.testing.assert_close(views["sae"].decode(views["sae"].encode(x)), model.reconstruct(model.codes(x)))
    torch.testing.assert_close(
        views["level2"].copy_to(dtype=torch.float64).encode(x.double()).float(), model.codes(x)[1]
    )
    assert set(model.one_layer()) == {"level3"}  # the only level that no gate closes
    run.model.eval()
    torch.testing.assert_close(
        run.model(x * 5).reconstructions[1] / 5, model.reconstruct(model.codes(x)), rtol=1e-4, atol=1e-5
    )


def test_additive_topk_has_no_whole_form_for_other_tools():
    run, x = trained("additive", "topk")
    model = fold(run, METADATA, x * 5)
    assert set(model.one_layer()) == {"level1", "level2", "level3"}
    assert model.views()["sae"].architecture == "additive" and model.views()["sae"].d_sae == F1 + F2 + F3
    assert [(code > 0).sum(1).max().item() for code in model.codes(x)] == [3, 2, 1]


def test_unit_rows_of_a_stack_scale_its_code():
    run, x = trained("stacked", "relu")
    view = fold(run, METADATA, x * 5).views()["level2"]
    code = run.model.eval()(x * 5).levels[2].acts / 5
    rows = run.model.level(2).W_dec @ run.model.level(1).W_dec
    torch.testing.assert_close(view.encode(x), code * rows.norm(dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("structure", ["flat", "additive", "stacked"])
def test_saelens_folders_round_trip(structure, tmp_path):
    run, x = trained(structure)
    model = fold(run, METADATA, x * 5)
    saes = model.one_layer()
    assert (
        set(saes)
        == {
            "flat": {"sae"},
            "additive": {"sae", "level1", "level2", "level3"},
            "stacked": {"level1", "level2", "level3", "level2-effective", "level3-effective"},
        }[structure]
    )
    for name, sae in saes.items():
        saelens_folder.save(sae, tmp_path / name)
        again = saelens_folder.load(tmp_path / name)
        read = torch.randn(B, sae.d_in)
        assert torch.equal(again.decode(again.encode(read)), sae.decode(sae.encode(read)))
        config = json.loads((tmp_path / name / "cfg.json").read_text())
        assert config["architecture"] == "jumprelu" and config["metadata"]["sae_lens_version"] >= "6"
    if structure == "stacked":
        assert [saes[f"level{n}"].d_in for n in (1, 2, 3)] == [D, F1, F2]
        chained = saes["level2"].encode(saes["level1"].encode(x)) * model.views()["level2"].norms
        torch.testing.assert_close(model.views()["level2"].encode(x), chained)
        effective = saes["level2-effective"]
        assert effective.d_in == D
        assert (effective.encode(x) > 0).sum().item() == pytest.approx(B * 2, abs=1)
        assert torch.equal(effective.W_dec, model.views()["level2"].W_dec)


def test_composition_is_kept_in_the_codes_own_units(tmp_path):
    run, x = trained("additive", steps=40)
    fold(run, METADATA, x * 5).save(tmp_path)
    model = load_model(tmp_path)
    assert [(part.level, tuple(part.weight.shape)) for part in model.compositions] == [(2, (F2, F1)), (3, (F3, F2))]
    part, module = model.compositions[0], run.composition(2)
    alive = (module.rms_coarse > 0)[:, None] & (module.rms_fine > 0)
    torch.testing.assert_close(part.contributions, module.W.detach() * alive)
    torch.testing.assert_close(
        part.weight * module.rms_fine / module.rms_coarse.clamp_min(1e-8)[:, None], part.contributions
    )


def test_damaged_models_are_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="no trained model in"):
        load_model(tmp_path)
    run, x = trained("flat")
    fold(run, METADATA, x * 5).save(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="is damaged"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "crosscoder"}, "architecture 'crosscoder'; hsae reads standard, topk, jumprelu, gated"),
        (
            {"normalize_activations": "layer_norm"},
            "normalize_activations is 'layer_norm': hsae does not compute it; only 'none'",
        ),
        ({"d_sae": 99}, "cfg.json says d_in=7, d_sae=99"),
        ({"architecture": "gated"}, "tensors missing for architecture 'gated': b_gate, b_mag, r_mag"),
    ],
)
def test_foreign_saelens_folders_are_refused_clearly(change, message, tmp_path):
    run, x = trained("flat")
    saelens_folder.save(fold(run, METADATA, x * 5).one_layer()["sae"], tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=message):
        saelens_folder.load(tmp_path)
    (tmp_path / "cfg.json").unlink()
    with pytest.raises(UserError, match=r"is not a SAELens folder: cfg\.json is missing"):
        saelens_folder.load(tmp_path)


def test_gated_and_rescaled_topk_follow_saelens():
    generator = torch.Generator().manual_seed(0)
    W_enc, W_dec = torch.randn(D, F1, generator=generator), torch.randn(F1, D, generator=generator)
    gate, magnitude, r, b_dec, x = (torch.randn(n, generator=generator) for n in (F1, F1, F1, D, D))
    extra = {"b_gate": gate, "b_mag": magnitude, "r_mag": r}
    sae = SAE(name="g", architecture="gated", W_enc=W_enc, W_dec=W_dec, b_enc=torch.zeros(F1), b_dec=b_dec, extra=extra)
    centred = x - b_dec
    expected = torch.stack([
        (centred @ W_enc[:, i] + gate[i] > 0) * torch.relu(centred @ (W_enc[:, i] * r[i].exp()) + magnitude[i])
        for i in range(F1)
    ])  # fmt: skip
    torch.testing.assert_close(sae.encode(x), expected)
    topk = SAE(
        name="t", architecture="topk", W_enc=W_enc, W_dec=W_dec, b_enc=gate, b_dec=b_dec, k=4,
        rescale_acts_by_decoder_norm=True, apply_b_dec_to_input=False,
    )  # fmt: skip
    pre = (x @ W_enc + gate) * W_dec.norm(dim=1)
    kept = pre >= pre.sort(descending=True).values[3]
    torch.testing.assert_close(topk.encode(x), torch.where(kept, pre.relu(), 0.0))
    torch.testing.assert_close(topk.decode(topk.encode(x)), (topk.encode(x) / W_dec.norm(dim=1)) @ W_dec + b_dec)
