"""The activation stores of a plan, as the library builds them."""

import json

import pytest
from places import GOLDEN_MODEL

import hsae
from hsae.cache.errors import CorpusError, UserError
from hsae.train.config.plan import load_plan
from hsae.train.stores import common_texts


def test_a_plan_builds_a_store_and_opens_what_is_there(tmp_path):
    overrides = [f"model.id={str(GOLDEN_MODEL)!r}", f"cache.dir={str(tmp_path)!r}", "cache.train.rows=40"]
    steps = []
    store = hsae.build("tiny", overrides=overrides, device="cpu", progress=steps.append)
    assert store.rows == 40 and store.spec.split == "train" and steps[-1].task == "train statistics"
    plan = load_plan("tiny", overrides)
    steps.clear()
    assert hsae.build(plan, device="cpu", progress=steps.append).root == store.root and steps == []
    with pytest.raises(UserError, match="load it with load_plan"):
        hsae.build(plan, overrides=overrides)
    with pytest.raises(UserError, match="a plan or a model, not both"):
        hsae.build(plan, model=object(), texts=[], hook="")


def test_a_plan_whose_evaluation_text_is_trained_on_is_refused_or_named(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"words {n}"}) + "\n" for n in range(9)))
    sets = [f"cache.{split}.corpus={str(tmp_path / 'a.jsonl')!r}" for split in ("train", "eval")]
    for apart in (sets, ["cache.train.corpus=nowhere.txt"], ["cache.eval.last_document=2"]):
        assert common_texts(load_plan("tiny", apart), ("eval", "autointerp"), refuse=True) == []
    plan = load_plan("tiny", [*sets, "cache.train.first_document=3"])
    overlap = (
        f"[cache.eval] and [cache.train] overlap: both read {str(tmp_path / 'a.jsonl')!r}, documents 3 to 79 of it. Set"
    )
    with pytest.raises(CorpusError, match=r"or allow it with --set cache\.eval\.training_text=true$") as raised:
        common_texts(plan, ("eval",), refuse=True)
    assert str(raised.value).startswith(overlap)
    assert [text.startswith(overlap) for text in common_texts(plan, ("eval", "autointerp"))] == [True, True]
    later = load_plan("tiny", [*sets, "cache.train.first_document=0", "cache.eval.first_document=5"])
    (common,) = common_texts(later, ("eval",), refuse=True)  # training rows may end before document 5
    assert "documents 5 to 79 of it" in common
    allowed = load_plan("tiny", [*sets, "cache.train.first_document=3", "cache.eval.training_text=true"])
    assert allowed.store("eval").name == plan.store("eval").name
    assert common_texts(allowed, ("eval",), refuse=True)[0].startswith(overlap)
    text = f"{{corpus = {str(tmp_path / 'a.jsonl')!r}, first_document = 5, last_document = 80}}"
    own = load_plan("tiny", [*sets, f"autointerp.text={text}", f"unlearning.forget={text}"])
    assert common_texts(own, ("autointerp", "forget", "retain")) == []
    own = load_plan(
        "tiny", [*sets, "cache.train.first_document=0", f"autointerp.text={text}", f"unlearning.forget={text}"]
    )
    shared = "\n".join(common_texts(own, ("autointerp", "forget", "retain")))
    assert (
        "[autointerp.text] and [cache.train] overlap" in shared
        and "[unlearning.forget] and [cache.train] overlap" in shared
    )
