"""Models that are in memory, and edits of their residual stream."""

import pytest
import torch
from places import GOLDEN_MODEL
from transformers import AutoModelForCausalLM, AutoTokenizer

from hsae.cache.config import ModelConfig
from hsae.cache.errors import ModelError
from hsae.cache.language_model.hooks import edit_residual, hook_module
from hsae.cache.language_model.lm import LanguageModel

HOOK = "blocks.2.hook_resid_post"
PROMPT = "The weather in the town is"


def in_memory(dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(GOLDEN_MODEL, dtype=dtype, attn_implementation="eager")
    return model, AutoTokenizer.from_pretrained(GOLDEN_MODEL)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def lm(request):
    return LanguageModel.of(*in_memory(request.param))


def tokens_of(lm):
    return torch.randint(5, 700, (3, 11), generator=torch.Generator().manual_seed(0))


def test_a_model_in_memory_is_cut_like_one_that_is_loaded(lm):
    loaded = LanguageModel.load(ModelConfig(id=str(GOLDEN_MODEL), dtype=str(lm.dtype).removeprefix("torch.")))
    tokens = tokens_of(lm)
    assert torch.equal(lm.prefix(tokens, [HOOK])[HOOK], loaded.prefix(tokens, [HOOK])[HOOK])
    assert not lm.model.training and not any(weight.requires_grad for weight in lm.model.parameters())
    assert (lm.bos_id, lm.special_ids, lm.folder) == (loaded.bos_id, loaded.special_ids, None)
    for what in ("model", "tokenizer"):
        assert loaded.digest_like(what, lm.digest_like(what, "")) == lm.digest_like(what, "")
        assert loaded.digest_like(what, "0" * 64) == getattr(loaded, f"{what}_digest")


def test_digests_of_models_in_memory_name_weights_configuration_and_vocabulary():
    model, tokenizer = in_memory()
    first = LanguageModel.of(model, tokenizer)
    tokenizer(["a", "longer text"], padding=True, truncation=True, max_length=3)
    model.config.use_cache = False
    again = LanguageModel.of(model, tokenizer)
    assert (again.model_digest, again.tokenizer_digest) == (first.model_digest, first.tokenizer_digest)
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[1, 2] += 1e-3
    tokenizer.add_tokens(["unheard"])
    changed = LanguageModel.of(model, tokenizer)
    assert changed.model_digest != first.model_digest and changed.tokenizer_digest != first.tokenizer_digest
    assert LanguageModel.of(model.bfloat16(), tokenizer).model_digest != changed.model_digest


def test_what_is_no_causal_model_in_one_type_on_one_device_is_refused():
    model, tokenizer = in_memory()
    mixed, _ = in_memory()
    mixed.lm_head.to(torch.bfloat16)
    for given, words, message in (
        (str(GOLDEN_MODEL), tokenizer, "str is no model of transformers"),
        (torch.nn.Linear(2, 3), tokenizer, "Linear is no model of transformers"),
        (model, str(GOLDEN_MODEL), "str is no tokenizer of transformers"),
        (model.model, tokenizer, "Gemma2Model is laid out in a way hsae can't cut"),
        (mixed, tokenizer, "weights of type bfloat16, float32; hsae needs one of bfloat16, float32, float16"),
        (in_memory()[0].to("meta"), tokenizer, "lies on meta; hsae needs it on one device"),
        (in_memory(torch.float16)[0], tokenizer, "float16 ends at 65,504"),
    ):
        with pytest.raises(ModelError, match=message):
            LanguageModel.of(given, words)


@pytest.mark.parametrize("hook", ["blocks.2.hook_resid_post", "blocks.2.hook_resid_pre", "blocks.0.hook_resid_pre"])
def test_an_edit_acts_like_the_same_residual_put_in_by_hand(lm, hook):
    tokens, vector = tokens_of(lm), 3 * torch.randn(lm.d_model, generator=torch.Generator().manual_seed(1))
    clean = lm.logits(tokens)
    after = hook.replace("0.hook_resid_pre", "0.hook_resid_post")
    with edit_residual(lm, hook, vector):
        logits, resid = lm.logits(tokens), lm.prefix(tokens, [after])[after]
    assert torch.equal(logits, lm.unembed(lm.suffix(after, resid))) and not torch.equal(logits, clean)
    if after == hook:
        assert torch.equal(resid, (lm.prefix(tokens, [hook])[hook] + vector).to(lm.dtype))
    with lm.products(), edit_residual(lm.model, hook, lambda resid: resid + vector):  # the bare model, a function
        assert torch.equal(lm.model(input_ids=tokens).logits, logits)
    assert torch.equal(lm.logits(tokens), clean)


def test_edits_nest_and_end_with_an_error(lm):
    tokens = tokens_of(lm)
    rows = torch.arange(3.0)[:, None, None].expand(3, 1, lm.d_model)
    clean = lm.prefix(tokens, [HOOK])[HOOK]
    with edit_residual(lm, HOOK, rows), edit_residual(lm, HOOK, lambda resid: 2 * resid):
        assert torch.equal(lm.prefix(tokens, [HOOK])[HOOK], 2 * (clean + rows).to(lm.dtype))
    for edit in (torch.zeros(lm.d_model + 1), lambda resid: resid[:, :1], torch.zeros(2, 3, 11, lm.d_model)):
        with pytest.raises(ModelError, match=r"shape .*\(3, 11, 48\)"), edit_residual(lm, HOOK, edit):
            lm.logits(tokens)
    with (
        pytest.raises(ModelError, match="the model has layers 0 to 4"),
        edit_residual(lm.model, "blocks.5.hook_resid_pre", rows),
    ):
        pass
    assert torch.equal(lm.prefix(tokens, [HOOK])[HOOK], clean)
    layer, kind = hook_module(lm.model, HOOK)
    assert kind == "post" and not layer._forward_hooks and not layer._forward_pre_hooks


def test_generation_with_a_cache_is_edited_at_each_token(lm):
    plain = lm.generate(PROMPT, max_new_tokens=12)
    assert plain == lm.generate(PROMPT, max_new_tokens=12) and isinstance(plain, str)
    seen = []

    def push(resid):
        seen.append(resid.shape[1])
        return resid + torch.linspace(-9, 9, lm.d_model)

    with edit_residual(lm, HOOK, push):
        steered = lm.generate(PROMPT, max_new_tokens=12, use_cache=True)
        assert steered == lm.generate(PROMPT, max_new_tokens=12, use_cache=False)
    assert steered != plain and seen[1:12] == [1] * 11
    assert lm.generate(PROMPT, max_new_tokens=12) == plain
