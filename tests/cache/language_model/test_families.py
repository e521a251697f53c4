"""A sample of the table of model families (FIX A5, A6): what is cut rightly is so to the bit, what is not is refused
in one line."""

import importlib.util
import json

import pytest
import torch
from places import ROOT

from hsae.cache.config import ModelConfig
from hsae.cache.errors import ModelError
from hsae.cache.language_model.lm import LanguageModel

HOOK = "blocks.2.hook_resid_post"
where = importlib.util.spec_from_file_location("families", ROOT / "benchmarks/families.py")
families = importlib.util.module_from_spec(where)
where.loader.exec_module(families)


@pytest.mark.parametrize(
    "family", ["granite", "cohere", "hyperclovax", "minicpm3", "gemma3_text", "mixtral", "gpt_neox"]
)
def test_families_that_agree_do_so_to_the_bit(family, tmp_path):
    families.make(family, tmp_path / family)
    for dtype in ("float32", "bfloat16"):
        assert families.try_cut(tmp_path / family, dtype) == ("to the bit", "")


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("nanochat", "the residual it gives there is not the layer's"),
        ("gemma4_text", "its code ends in"),
        ("opt", "the residual it gives there is not the layer's"),
        ("falcon_h1", "the residual it gives there is not the layer's"),
        ("gpt2", "is laid out in a way hsae can't cut"),
    ],
)
def test_families_that_do_not_are_refused_in_one_line(family, why, tmp_path):
    families.make(family, tmp_path / family)
    for dtype in ("float32", "bfloat16"):
        found, note = families.try_cut(tmp_path / family, dtype)
        assert found == "refused" and why in note and "\n" not in note


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_scale_of_the_logits_that_is_left_out_is_noticed(tmp_path, monkeypatch, dtype):
    families.make("granite", tmp_path / "granite")
    monkeypatch.setattr(LanguageModel, "unembed", lambda self, vectors: self.model.get_output_embeddings()(vectors))
    model = LanguageModel.load(ModelConfig(id=str(tmp_path / "granite"), dtype=dtype))
    with pytest.raises(
        ModelError,
        match=r"'granite' can't be cut at .*: what follows from the residual there is not the model's logits",
    ):
        model.check_hooks([HOOK])


def test_a_model_whose_tokens_see_later_ones_is_refused(tmp_path):
    families.make("gemma3_text", tmp_path / "both")
    config = json.loads((tmp_path / "both/config.json").read_text())
    (tmp_path / "both/config.json").write_text(json.dumps({**config, "use_bidirectional_attention": True}))
    model = LanguageModel.load(ModelConfig(id=str(tmp_path / "both"), dtype="float32"))
    with pytest.raises(ModelError, match="its tokens see later ones"):
        model.check_hooks([HOOK])


def test_a_zeroed_residual_must_say_the_same_at_every_position(monkeypatch):
    model = LanguageModel.load(ModelConfig(id=str(ROOT / "tests/golden/model"), dtype="float32"))
    model.check_ablation([HOOK])
    real = model.suffix
    monkeypatch.setattr(
        model, "suffix", lambda hook, resid, **rest: real(hook, resid, **rest) + torch.ones_like(resid).cumsum(1)
    )
    with pytest.raises(ModelError, match="what follows from a zeroed residual depends on the position"):
        model.check_ablation([HOOK])
