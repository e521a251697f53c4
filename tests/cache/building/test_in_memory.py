"""A store of a model and texts that are in memory."""

from contextlib import nullcontext

import pytest
import torch
from places import GOLDEN_MODEL
from stores import HOOK, contents
from transformers import AutoModelForCausalLM, AutoTokenizer

from hsae.cache.building.in_memory import build_in_memory
from hsae.cache.building.verification import verify
from hsae.cache.errors import CorpusError, ModelError, StoreError, UserError
from hsae.cache.language_model.lm import LanguageModel
from hsae.cache.reading.provenance import check_model

TEXTS = [
    f"The list {number} has an item, and the file {number} is read by a method of the class." for number in range(60)
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(GOLDEN_MODEL)


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(GOLDEN_MODEL, dtype=torch.float32)


def made(model, tokenizer, folder, **changes):
    options = {"texts": TEXTS, "hook": HOOK, "context": 21, "batch_rows": 5, "chunk_mib": 0.05, "progress": False}
    return build_in_memory(model, tokenizer, folder=folder, **(options | changes))


def test_what_is_stored_is_what_the_model_computes(model, tokenizer, tmp_path):
    steps = []
    model.train()
    store = made(model, tokenizer, tmp_path, split="eval", progress=steps.append)
    assert all(module.training for module in model.modules()) and all(part.requires_grad for part in model.parameters())
    model.eval()
    tokens = store.tokens(0, store.rows)
    expected = model(tokens[:7].long(), output_hidden_states=True).hidden_states[3]
    torch.testing.assert_close(store.acts(HOOK, 0, 7), expected.detach(), rtol=1e-4, atol=1e-4)
    assert (tokens[:, 0] == tokenizer.bos_token_id).all()
    assert tokenizer.decode(tokens[0], skip_special_tokens=True).startswith("The list 0 has")
    assert store.clean_rows == max(1, store.rows // 11 // 5) * 5 and store.clean("loss", 0, 5).mean() > 1
    assert verify(store.root) == [] and next(store.batches(batch_tokens=8)).dtype == torch.float32
    assert {step.task for step in steps} == {"eval tokens", "eval activations", "eval statistics"}
    assert steps[-1].done == steps[-1].total == 1


def test_the_same_call_opens_the_same_store_and_any_change_makes_another(model, tokenizer, tmp_path, monkeypatch):
    first = made(model, tokenizer, tmp_path / "a")
    again = made(model, tokenizer, tmp_path / "b", texts=iter(TEXTS))
    assert again.root.name == first.root.name and contents(again.root) == contents(first.root)
    with monkeypatch.context() as patch:
        patch.setattr("hsae.cache.building.build.Builder", None)  # nothing is built
        assert made(model, tokenizer, tmp_path / "a").root == first.root
    names = {first.root.name}
    names.add(
        made(
            model, tokenizer, tmp_path, texts=[*TEXTS[:-1], "Another last text, of about the same length as that."]
        ).root.name
    )
    names.add(made(model, tokenizer, tmp_path, rows=9).root.name)
    with torch.no_grad():
        model.get_input_embeddings().weight[5] += 1
    other = made(model, tokenizer, tmp_path)
    assert len(names | {other.root.name}) == 4
    check_model(other.root, other.header, LanguageModel.of(model, tokenizer))
    with pytest.raises(StoreError, match="made with other weights"):
        check_model(first.root, first.header, LanguageModel.of(model, tokenizer))


def test_texts_are_read_until_the_rows_are_full(model, tokenizer, tmp_path):
    def endless():
        for number in range(10**9):
            yield TEXTS[number % 60]

    store = made(model, tokenizer, tmp_path, texts=endless(), rows=12, hook=[HOOK, "blocks.1.hook_resid_pre"])
    assert store.rows == 12 and store.hooks == (HOOK, "blocks.1.hook_resid_pre")


def test_an_interrupted_build_goes_on(model, tokenizer, tmp_path, monkeypatch):
    whole = made(model, tokenizer, tmp_path / "whole")
    done = []

    def interrupt(step):
        done.append(step)
        if step.task == "train activations" and step.done > step.total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(model, tokenizer, tmp_path / "part", progress=interrupt)
    steps = []
    assert contents(made(model, tokenizer, tmp_path / "part", progress=steps.append).root) == contents(whole.root)
    assert min(step.done for step in steps if step.task == "train activations") > 0


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"texts": "one text"}, CorpusError, "texts is one string; give documents"),
        ({"texts": ["a", 3]}, CorpusError, "text 1 is a int, not a string"),
        ({"texts": ["short"]}, CorpusError, "1 texts of .* tokens fill 0 rows of 21 tokens; 1 were asked for"),
        ({"rows": 10_000}, CorpusError, "60 texts of .* 10,000 were asked for: lower rows or context"),
        ({"context": 100_000}, ModelError, "the model has positions for"),
        ({"hook": "blocks.99.hook_resid_post"}, ModelError, "the model has layers 0 to"),
        ({"batch_rows": 0}, UserError, "batch_rows=0"),
        ({"split": "eval", "clean_rows": 10_000}, CorpusError, "can't be clean rows"),
        ({"folder": "https://example.org/stores"}, StoreError, "can only be read"),
    ],
)
def test_what_can_not_be_built_is_refused_and_leaves_nothing(model, tokenizer, tmp_path, changes, error, text):
    with pytest.raises(error, match=text):
        made(model, tokenizer, **{"folder": tmp_path, **changes})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("texts", [TEXTS, []])
def test_the_model_keeps_its_modes_and_gradient_flags(model, tokenizer, tmp_path, texts):
    model.train().model.layers[0].eval()
    model.lm_head.requires_grad_(False)

    def flags():
        modes = [module.training for module in model.modules()]
        return modes, [parameter.requires_grad for parameter in model.parameters()]

    before = flags()
    with nullcontext() if texts else pytest.raises(CorpusError):
        made(model, tokenizer, tmp_path, texts=texts)
    assert flags() == before and model.training and not model.model.layers[0].training


def test_a_tokenizer_without_bos_and_a_quantised_model_are_refused(model, tokenizer, tmp_path):
    other = AutoTokenizer.from_pretrained(GOLDEN_MODEL)
    other.bos_token = other.eos_token = None
    with pytest.raises(ModelError, match="neither a BOS nor an EOS"):
        made(model, other, tmp_path)
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ModelError, match="is quantised"):
        made(model, tokenizer, tmp_path)
