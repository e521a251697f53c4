"""What docs/python.md shows, on a model and texts in memory: no plan, no command line."""

import pytest
import torch
from places import GOLDEN_MODEL
from stores import HOOK
from transformers import AutoModelForCausalLM, AutoTokenizer

import hsae

TEXTS = [f"The list {n} has an item, and the file {n} is read by a method of the class." for n in range(90)]


def test_a_notebook(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN_MODEL)
    network = AutoModelForCausalLM.from_pretrained(GOLDEN_MODEL, dtype=torch.float32)
    given = {"model": network, "tokenizer": tokenizer, "hook": HOOK, "context": 24, "batch_rows": 4, "progress": False}
    train, held_out = (
        hsae.build(**given, texts=texts, split=split) for split, texts in (("train", TEXTS[30:]), ("eval", TEXTS[:30]))
    )
    model = hsae.fit(train, widths=[48, 12], l0=[6, 2], steps=60, batch_tokens=128, composition="normalised")
    model.save("saved")
    model = hsae.load("saved")
    lm = hsae.LanguageModel.of(network, tokenizer)

    result = hsae.evaluate(model, held_out, "core", lm=lm)
    assert 0.3 < result.measures["explained_variance"].value < 1 and "CE score" in str(result.table())
    assert result.save("results").is_file()
    strongest = model.children(level=2, latent=3)[0]
    contexts = hsae.top_contexts(model, held_out, (1, strongest.latent), lm=lm)[1, strongest.latent]
    assert all("«" in str(context) for context in contexts)
    assert hsae.logit_effects(model, lm, (2, 3)).promoted[0].logit > 0
    before = lm.generate("The list", max_new_tokens=6)
    with model.steer(lm, {(2, 3): 300.0}):
        assert lm.generate("The list", max_new_tokens=6) != before
    assert lm.generate("The list", max_new_tokens=6) == before
    for use in (lambda: hsae.evaluate(model, held_out, "core"), lambda: hsae.top_contexts(model, held_out, (2, 3))):
        with pytest.raises(hsae.UserError, match=r"was given in memory; give it again: lm=hsae.LanguageModel.of"):
            use()


def test_mistakes_are_said(tmp_path):
    model = hsae.fit(torch.randn(200, 8), widths=[16, 4], l0=[3, 1], steps=2, batch_tokens=64, progress=False)
    assert "unknown" not in repr(model)
    with pytest.raises(hsae.UserError, match=r"x has shape \(3, 9\); this model reads residuals \[\.\.\., 8\]"):
        model.encode(torch.randn(3, 9))
    with pytest.raises(hsae.UserError, match="give both: children"):
        model.children(level=2)
    with pytest.raises(hsae.UserError, match="no hook_name, so there is no place to steer at"):
        model.steer(None, {(2, 1): 1.0}).__enter__()


def test_contexts_of_a_stack_are_in_the_units_of_its_code(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN_MODEL)
    network = AutoModelForCausalLM.from_pretrained(GOLDEN_MODEL, dtype=torch.float32)
    options = {"hook": HOOK, "context": 24, "batch_rows": 4, "progress": False, "folder": tmp_path}
    store = hsae.build(model=network, tokenizer=tokenizer, texts=TEXTS[:40], **options)
    model = hsae.fit(store, widths=[48, 12], l0=[6, 2], steps=20, batch_tokens=128, structure="stacked", progress=False)
    lm = hsae.LanguageModel.of(network, tokenizer)
    code = model.codes(store.acts(HOOK, 0, store.rows).float())[1]
    code[store.special_mask(store.tokens(0, store.rows))] = 0
    latent = int(code.amax((0, 1)).argmax())
    for placed in (model, model.copy_to(dtype=torch.float64)):
        strongest = hsae.top_contexts(placed, store, (2, latent), count=1, lm=lm)[2, latent][0]
        assert strongest.activation == pytest.approx(code[..., latent].max().item(), rel=1e-4)
