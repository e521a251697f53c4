"""SAELens folders of every version: read as SAELens reads them, or refused in one line (FIX A3, FIX B and D6 for the
types).
"""

import json

import pytest
import torch
from safetensors.torch import save_file

from hsae.cache.errors import UserError
from hsae.eval.harness.fits import check_fits, doubts, same_hook, same_model
from hsae.train.model import saelens_folder

D, F, HOOK = 6, 9, "blocks.2.hook_resid_post"
SHAPE = {"d_in": D, "d_sae": F, "dtype": "float32"}
NEW = {**SHAPE, "architecture": "topk", "k": 4, "metadata": {"hook_name": HOOK, "sae_lens_version": "6.5.0"}}
OLD = {
    **SHAPE, "dtype": "torch.float32", "hook_name": HOOK, "hook_layer": 2, "hook_head_index": None,
    "model_name": "gpt2-small",
    "activation_fn_str": "relu", "activation_fn_kwargs": {}, "apply_b_dec_to_input": True,
    "finetuning_scaling_factor": False,
    "normalize_activations": "none", "sae_lens_training_version": "3.13.0", "prepend_bos": True, "noise_scale": 0.1,
}  # fmt: skip
TOPK = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}}


def weights():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(F, D, generator=generator)
    return {
        "W_enc": W.T.contiguous(),
        "W_dec": W.clone(),
        "b_enc": torch.randn(F, generator=generator),
        "b_dec": torch.randn(D, generator=generator),
    }


@pytest.fixture
def folder(tmp_path):
    """Write an SAE folder of a config with changes and more tensors."""

    def write(config, **tensors):
        text = config if isinstance(config, str | bytes) else json.dumps(config)
        (tmp_path / "cfg.json").write_bytes(text.encode() if isinstance(text, str) else text)
        save_file({**weights(), **tensors}, tmp_path / "sae_weights.safetensors")
        return tmp_path

    return write


def refusal(path):
    with pytest.raises(UserError) as caught:
        saelens_folder.load(path)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400 and str(path) in text
    return text


# ---- before version 6 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        TOPK,
        {"activation_fn": "topk", "activation_fn_str": None, "activation_fn_kwargs": {"k": 4.0}},
        {"architecture": "topk", **TOPK},
        {"architecture": "standard", **TOPK, "sae_lens_version": "5.10.7"},
    ],
)
def test_an_activation_function_of_topk_makes_the_sae_a_topk_one(folder, change):
    new = saelens_folder.load(folder(NEW))
    old = saelens_folder.load(folder({**OLD, **change}))
    assert (old.architecture, old.k, old.metadata["hook_name"]) == ("topk", 4, HOOK)
    x = torch.randn(5, D)
    assert torch.equal(old.decode(old.encode(x)), new.decode(new.encode(x)))
    assert old.metadata["model_name"] == "gpt2-small"


@pytest.mark.parametrize(
    ("change", "hook"),
    [
        ({}, HOOK),
        ({"hook_name": None, "hook_point": "blocks.0.hook_mlp_out"}, "blocks.0.hook_mlp_out"),
        ({"hook_name": None, "hook_point": "blocks.{layer}.hook_resid_pre", "hook_layer": None, "hook_point_layer": 3},
         "blocks.3.hook_resid_pre"),
    ],
)  # fmt: skip
def test_the_hook_of_an_old_folder_is_known(folder, change, hook):
    sae = saelens_folder.load(folder({**OLD, **change}))
    assert sae.architecture == "standard" and sae.metadata["hook_name"] == hook
    assert any("noise_scale" in remark for remark in sae.remarks)


@pytest.mark.parametrize("config", [OLD, NEW])
@pytest.mark.parametrize("name", ["scaling_factor", "finetuning_scaling_factor"])
def test_scaling_factors_are_used_as_saelens_5_did(folder, config, name):
    scale = torch.linspace(0.5, 3, F)
    plain = saelens_folder.load(folder(config))
    sae = saelens_folder.load(folder({**config, "finetuning_scaling_factor": True}, **{name: scale}))
    x = torch.randn(5, D)
    torch.testing.assert_close(sae.decode(sae.encode(x)), (plain.encode(x) * scale) @ plain.W_dec + plain.b_dec)
    assert torch.equal(saelens_folder.load(folder(config, **{name: torch.ones(F)})).W_dec, plain.W_dec)
    assert "not 1, but cfg.json has no finetuning_scaling_factor true" in refusal(folder(config, **{name: scale}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"activation_fn_str": "tanh-relu"}, "activation_fn 'tanh-relu'"),
        ({"activation_fn_str": "topk"}, "needs a whole number k of 1 or more, not None"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": "4"}}, "not '4'"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": True}}, "not True"),
        ({**TOPK, "architecture": "jumprelu"}, "activation_fn 'topk' in the architecture 'jumprelu'"),
        ({**TOPK, "k": 5}, "two values for k: 5 and 4"),
        ({"activation_fn_kwargs": {"postact_fn": "tanh"}}, "activation_fn_kwargs has 'postact_fn'"),
        ({"activation_fn": "topk"}, "two values for activation_fn"),
        ({"hook_point": "blocks.1.hook_resid_post"}, "two values for hook_name"),
        ({"metadata": {"hook_name": "blocks.1.hook_resid_post"}}, "two values for hook_name"),
        ({"hook_head_index": 3}, "hook_head_index is 3"),
        ({"hook_name_out": "blocks.2.hook_mlp_out"}, "a transcoder"),
        ({"reshape_activations": "hook_z"}, "reshape_activations is 'hook_z'"),
        ({"normalize_activations": True}, "normalize_activations is 'expected_average_only_in'"),
        ({"sae_lens_version": "six"}, "sae_lens_version 'six' is no version"),
    ],
)  # fmt: skip
def test_what_an_old_folder_can_ask_for_and_hsae_does_not_do_is_named(folder, change, said):
    assert said in refusal(folder({**OLD, **change}))


# ---- version 6 and types --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("none", [False, None, "none"])
def test_no_normalisation_in_all_its_spellings(folder, none):
    assert saelens_folder.load(folder({**NEW, "normalize_activations": none, "k": 4.0})).k == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"k": "4"}, "k: Input should be a valid integer, not '4'"),
        ({"k": True}, "k: Input should be a valid integer, not True"),
        ({"k": 4.5}, "k: Input should be a valid integer, not 4.5"),
        ({"k": 0}, "k: Input should be greater than or equal to 1, not 0"),
        ({"d_in": "6"}, "d_in: Input should be a valid integer"),
        ({"d_sae": None}, "d_sae: Input should be a valid integer"),
        ({"metadata": "x"}, "metadata: Input should be a valid dictionary, not 'x'"),
        ({"metadata": {"hook_name": 3}}, "metadata.hook_name: Input should be a valid string, not 3"),
        ({"apply_b_dec_to_input": "no"}, "apply_b_dec_to_input: Input should be a valid boolean, not 'no'"),
        ({"apply_b_dec_to_input": 0}, "apply_b_dec_to_input: Input should be a valid boolean, not 0"),
        ({"rescale_acts_by_decoder_norm": "false"}, "rescale_acts_by_decoder_norm: Input should be a valid boolean"),
        ({"normalize_activations": "expected_average_only_in"}, "fold_activation_norm_scaling_factor first"),
        ({"normalize_activations": "constant_norm_rescale"}, "normalize_activations is 'constant_norm_rescale'"),
        ({"dtype": "int8"}, "dtype is 'int8'; allowed: float32"),
        ({"architecture": "matryoshka_batchtopk"}, "architecture 'matryoshka_batchtopk'; hsae reads standard, topk"),
        ({"architecture": "transcoder"}, "architecture 'transcoder'"),
        ({"architecture": ["topk"]}, "architecture: Input should be a valid string"),
        ({"architecture": "standard", "k": None, **TOPK}, "activation_fn 'topk' in the architecture 'standard'"),
        ({"architecture": "standard", "rescale_acts_by_decoder_norm": True}, "goes with the architecture 'topk'"),
    ],
)  # fmt: skip
def test_a_wrong_type_or_an_unknown_way_is_one_line(folder, change, said):
    assert said in refusal(folder({**NEW, **change}))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a":' * 5000 + "1" + "}" * 5000, "nested too deeply"),
        ('{"k": ' + "1" * 5000 + "}", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        ("[]", "holds no JSON object"),
        ("", "is not JSON"),
    ],
)
def test_text_that_is_no_config_is_one_line(folder, text, said):
    assert said in refusal(folder(text))


def test_weights_that_are_cut_or_of_another_architecture_are_one_line(folder):
    path = folder(NEW, threshold=torch.ones(F))
    assert "tensors that architecture 'topk' has no use for: threshold" in refusal(path)
    path = folder({**NEW, "dtype": None}, b_enc=torch.ones(F, dtype=torch.int64))
    assert "b_enc is of type torch.int64" in refusal(path)
    data = (path / "sae_weights.safetensors").read_bytes()
    for cut in (0, 5, 100, len(data) - 7):
        (path / "sae_weights.safetensors").write_bytes(data[:cut])
        assert "can't be read" in refusal(path)


def test_weights_are_cast_to_the_type_of_the_config(folder):
    assert saelens_folder.load(folder({**NEW, "dtype": "torch.bfloat16"})).W_dec.dtype == torch.bfloat16
    assert saelens_folder.load(folder({**NEW, "dtype": None})).W_dec.dtype == torch.float32


def test_a_folder_without_an_sae_says_what_it_is(folder, tmp_path):
    assert "there is no such folder" in refusal(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "cfg.json is missing" in refusal(tmp_path / "empty")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    assert "it is a run of hsae; evaluate it with --run" in refusal(tmp_path / "run")
    (tmp_path / "many" / "layer_3").mkdir(parents=True)
    (tmp_path / "many" / "layer_3" / "cfg.json").write_text("{}")
    assert "SAEs lie in folders in it (layer_3)" in refusal(tmp_path / "many")


# ---- hook and model -------------------------------------------------------------------------------------------------


def test_what_enters_a_layer_is_what_left_the_one_before():
    assert same_hook("blocks.3.hook_resid_pre", "blocks.2.hook_resid_post")
    assert not same_hook("blocks.0.hook_resid_pre", "blocks.0.hook_resid_post")
    assert not same_hook("blocks.3.hook_mlp_out", "blocks.3.hook_resid_post")


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("gemma-2-2b", "google/gemma-2-2b", True),
        ("gemma-2-2b", "/models/Gemma_2_2B/", True),
        ("gpt2-small", "openai-community/gpt2", True),
        ("meta-llama/Meta-Llama-3.1-8B", "Llama-3.1-8B", True),
        ("gemma-2-2b", "google/gemma-2-2b-it", False),
        ("gemma-2-2b", "google/gemma-2-9b", False),
        ("gpt2-small", "gpt2-medium", False),
        ("gemma-2-2b", "/models/mine", None),
        ("checkpoints/a/b", "google/gemma-2-9b", None),
    ],
)
def test_names_of_models_are_compared_by_what_they_mean(first, second, same):
    assert same_model(first, second) is same and same_model(second, first) is same


def test_an_sae_of_another_model_is_refused_and_a_doubtful_one_is_told(folder):
    sae = saelens_folder.load(folder(OLD))
    check_fits(sae, "blocks.3.hook_resid_pre", D, "gpt2")
    with pytest.raises(UserError, match=r"made for the model gpt2-small; these are activations of google/gemma-2-2b"):
        check_fits(sae, HOOK, D, "google/gemma-2-2b")
    assert doubts(sae, HOOK, "gpt2") == []
    assert "can't be told" in doubts(sae, HOOK, "/models/mine")[0]
    unnamed = saelens_folder.load(folder({**NEW, "metadata": {}}))
    assert doubts(unnamed, HOOK, "gpt2") == [f"its cfg.json names no hook; evaluated at {HOOK}"]
    kwargs = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    assert "center_writing_weights" in saelens_folder.load(folder({**OLD, **kwargs})).remarks[-1]
