import json
import re

import pytest
import torch
from places import GOLDEN_MODEL

from hsae.cache.config import ModelConfig
from hsae.cache.errors import ModelError
from hsae.cache.language_model import loading, model_files, sources
from hsae.cache.language_model.lm import LanguageModel, _forwarding
from hsae.cache.language_model.loading import special_tokens

B, T = 3, 29


def tokens_for(model, seed=0):
    tokens = torch.randint(5, min(model.vocab_size, 5000), (B, T), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = model.bos_id
    return tokens


def check_cut(model, layer):
    """Prefix and suffix against the whole model with its own hidden states, to the last bit."""
    tokens = tokens_for(model)
    with model.products():
        whole = model.model(input_ids=tokens, output_hidden_states=True, use_cache=False)
    hooks = [f"blocks.{layer}.hook_resid_post", f"blocks.{layer}.hook_resid_pre", "blocks.0.hook_resid_pre"]
    found = model.prefix(tokens, hooks)
    for hook, expected in zip(hooks, (layer + 1, layer, 0), strict=True):
        assert torch.equal(found[hook], whole.hidden_states[expected]), hook
    for hook in hooks[:2]:
        assert torch.equal(model.unembed(model.suffix(hook, found[hook])), whole.logits)
    assert torch.equal(model.logits(tokens), whole.logits)  # the model is whole again afterwards


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prefix_and_suffix_are_bit_equal_to_the_whole_tiny_gemma_2(dtype):
    model = LanguageModel.load(ModelConfig(id=str(GOLDEN_MODEL), dtype=dtype))
    assert model.config._attn_implementation == "eager"  # Gemma-2 caps attention logits
    assert (model.layers, model.d_model, model.vocab_size, model.bos_id, model.special_ids) == (
        5,
        48,
        800,
        2,
        (0, 1, 2),
    )
    check_cut(model, 2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when it compiles
def test_compiled_layers_agree_and_the_suffix_goes_on_to_the_logits_of_the_same_layers():
    model = LanguageModel.load(ModelConfig(id=str(GOLDEN_MODEL), dtype="float32"))
    tokens, hooks = tokens_for(model), ["blocks.1.hook_resid_pre", "blocks.3.hook_resid_post"]
    logits = model.logits(tokens)
    model.check_compiled(hooks, B, T)
    with torch.inference_mode():
        found, again = (model.prefix(tokens, hooks, compiled=True) for _ in range(2))
        for hook, eager in model.prefix(tokens, hooks).items():
            assert torch.equal(found[hook], again[hook])
            torch.testing.assert_close(found[hook], eager, rtol=1e-4, atol=1e-5)
        last = model.unembed(model.suffix(hooks[1], found[hooks[1]]))
        layers = list(model.model.get_decoder().layers)[:4]
        with _forwarding(dict(zip(layers, model._compiled_forwards[:4], strict=True))):
            assert torch.equal(model.logits(tokens), last)
    torch.testing.assert_close(last, logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.logits(tokens), logits)  # the model is as it was


def test_after_inference_mode_gradients_go_through_the_suffix():
    model = LanguageModel.load(ModelConfig(id=str(GOLDEN_MODEL), dtype="bfloat16"))
    hook = "blocks.1.hook_resid_post"
    with torch.inference_mode():
        model.unembed(model.suffix(hook, model.prefix(tokens_for(model), [hook])[hook]))
    resid = model.prefix(tokens_for(model), [hook])[hook].requires_grad_()
    model.unembed(model.suffix(hook, resid, grad=True), grad=True).float().square().sum().backward()
    assert resid.grad is not None and resid.grad.any()


def test_prefix_and_suffix_are_bit_equal_for_llama(tmp_path):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=3, vocab_size=800, bos_token_id=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(GOLDEN_MODEL).save_pretrained(tmp_path)
    check_cut(LanguageModel.load(ModelConfig(id=str(tmp_path), dtype="float32")), 1)


def test_a_late_tokenizer_is_read_when_it_is_used_and_no_earlier(monkeypatch):
    read = []
    monkeypatch.setattr(
        loading, "read_tokenizer", lambda *args, own=loading.read_tokenizer: read.append(1) or own(*args)
    )
    config = ModelConfig(id=str(GOLDEN_MODEL), dtype="float32")
    early, late = LanguageModel.load(config), LanguageModel.load(config, late_tokenizer=True)
    assert (len(read), late.tokenizer_digest) == (1, early.tokenizer_digest)
    late.prefix(tokens_for(early), ["blocks.1.hook_resid_post"])
    assert len(read) == 1
    assert (late.bos_id, late.special_ids) == (early.bos_id, early.special_ids)
    assert late.tokenizer is late.tokenizer
    assert len(read) == 2


@pytest.mark.slow
def test_prefix_and_suffix_are_bit_equal_to_the_whole_gemma_3_270m():
    model = LanguageModel.load(ModelConfig(id="gemma-3-270m"))
    assert (model.layers, model.d_model, model.vocab_size) == (18, 640, 262144)
    check_cut(model, 12)
    zero = model.unembed(model.suffix("blocks.12.hook_resid_post", torch.zeros(1, 1, 640, dtype=torch.bfloat16)))
    assert torch.equal(zero, torch.zeros_like(zero))  # so a zeroed residual means the uniform distribution


def test_only_the_layers_up_to_the_deepest_hook_run():
    model = LanguageModel.load(ModelConfig(id=str(GOLDEN_MODEL), dtype="float32"))
    hooks = ["blocks.2.hook_resid_post", "blocks.1.hook_resid_post"]
    model.check_hooks(hooks)
    ran = []
    for index, layer in enumerate(model._layers):
        layer.register_forward_hook(lambda module, inputs, output, index=index: ran.append(index))
    model.model.model.norm.register_forward_hook(lambda *_: ran.append("norm"))
    found = model.prefix(tokens_for(model), hooks)
    assert ran == [0, 1, 2]
    ran.clear()
    model.suffix("blocks.2.hook_resid_post", found["blocks.2.hook_resid_post"])
    assert ran == [3, 4, "norm"]


def test_hooks_that_do_not_exist_are_named_with_what_does():
    model = LanguageModel.load(ModelConfig(id=str(GOLDEN_MODEL), dtype="float32"))
    with pytest.raises(
        ModelError,
        match=re.escape("hook 'blocks.5.hook_resid_post': the model has layers 0 to 4; use for example blocks.3"),
    ):
        model.prefix(tokens_for(model), ["blocks.5.hook_resid_post"])
    with pytest.raises(ModelError, match="is not a hook hsae knows"):
        model.prefix(tokens_for(model), ["blocks.1.hook_mlp_out"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nowhere",
            "no such folder; give a local folder, a .gguf file, a hub id such as google/gemma-2-2b, or a packaged "
            "model",
        ),
        ("absent.gguf", "there is no such file"),
        ("{empty}", "is a folder without config.json"),
        ("{pickled}", "has no .safetensors files; other weight formats can run code and are not read"),
    ],
)
def test_models_that_cannot_be_had_are_said_before_loading(name, message, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled/config.json").write_text("{}")
    (tmp_path / "pickled/pytorch_model.bin").write_bytes(b"x")
    name = name.format(empty=tmp_path / "empty", pickled=tmp_path / "pickled")
    with pytest.raises(ModelError, match=re.escape(message)):
        LanguageModel.load(ModelConfig(id=name))


def test_a_hub_that_cannot_be_reached_is_said_with_a_way_out(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ModelError, match=r"owner/model is neither on this machine nor is the hub reachable .*--plan gemma-3-270m"
    ):
        LanguageModel.load(ModelConfig(id="owner/model"))


def test_gated_and_missing_repositories_are_told_apart():
    import httpx2 as httpx
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    response = httpx.Response(403, request=httpx.Request("GET", "https://hub.test"))
    for error, message in (
        (GatedRepoError("gated", response=response), "google/gemma-2-2b is gated: accept its terms"),
        (RepositoryNotFoundError("absent", response=response), "the hub has no model 'google/gemma-2-2b'"),
    ):
        with pytest.raises(ModelError, match=message), sources._clear_hub_errors(ModelConfig(id="google/gemma-2-2b")):
            raise error


def test_the_hubs_own_cache_is_used_without_a_network(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--google--gemma-2-2b/snapshots/abc"
    snapshot.mkdir(parents=True)
    for file in GOLDEN_MODEL.iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    (tmp_path / "models--google--gemma-2-2b/refs").mkdir()
    (tmp_path / "models--google--gemma-2-2b/refs/main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = LanguageModel.load(ModelConfig(id="google/gemma-2-2b"))
    assert (model.layers, model.dtype) == (5, torch.bfloat16)


def test_float16_is_refused_for_gemma():
    with pytest.raises(ModelError, match=r"float16 ends at 65,504: it would overflow; use bfloat16 or float32"):
        LanguageModel.load(ModelConfig(id=str(GOLDEN_MODEL), dtype="float16"))


def test_digests_name_the_content_and_are_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("HSAE_HOME", str(tmp_path / "home"))
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({}))
        (folder / "model.safetensors").write_bytes(b"weights")
    assert model_files.weights_digest(first) == model_files.weights_digest(second)
    (second / "model.safetensors").write_bytes(b"weight2")
    assert model_files.weights_digest(first) != model_files.weights_digest(second)
    monkeypatch.setattr("hsae.cache.files._file_crc32c", None)
    assert len(model_files.weights_digest(first)) == 64  # from memory: the file is not read again


def test_bos_falls_back_to_eos():
    class Tokens:
        bos_token_id, eos_token_id, pad_token_id = None, 7, None

    assert special_tokens(Tokens()) == (7, (7,))
    Tokens.eos_token_id = None
    with pytest.raises(ModelError, match="neither a BOS nor an EOS"):
        special_tokens(Tokens())
