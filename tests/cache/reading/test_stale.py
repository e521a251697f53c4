"""Finished stores behind which the model or the text has changed (FIX A4)."""

import json
import re
import shutil

import pytest
import torch
from places import GOLDEN
from safetensors.torch import load_file, save_file
from stores import contents, spec

from hsae.cache.building.build import build
from hsae.cache.building.repair import repair
from hsae.cache.building.verification import verify
from hsae.cache.config import CorpusConfig, ModelConfig
from hsae.cache.errors import StoreError
from hsae.cache.files import files_digest, sealed
from hsae.cache.format.layout import is_sealed, read_header
from hsae.cache.language_model.lm import LanguageModel
from hsae.cache.reading.provenance import check_model, check_tokenizer
from hsae.cache.text.corpora import open_corpus


def text_of(path, words):
    path.write_text("".join(json.dumps({"text": f"{words} " * 30}) + "\n" for _ in range(20)))


def weights(folder, name="model.safetensors"):
    held = load_file(folder / name)
    save_file({key: tensor * 1.5 for key, tensor in held.items()}, folder / name, {"format": "pt"})


def tokenizer(folder):
    (folder / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text() + " ")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(Folder of the store, its spec): made of a model and a text in files of their own."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(GOLDEN / "model", folder / "model")
    text_of(folder / "text.jsonl", "one two three")
    model = ModelConfig(id=str(folder / "model"), dtype="bfloat16")
    wanted = spec(model=model, corpus=CorpusConfig(corpus=str(folder / "text.jsonl")), rows=10, clean_rows=5)
    build([wanted], folder / "stores")
    return folder, wanted


CHANGES = {
    "model": lambda folder: weights(folder / "model"),
    "tokenizer": lambda folder: tokenizer(folder / "model"),
    "corpus": lambda folder: text_of(folder / "text.jsonl", "green ideas sleep"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_store_of_another_model_or_text_than_there_is_now_is_not_called_complete(finished, monkeypatch, what):
    folder, wanted = finished
    monkeypatch.setattr(LanguageModel, "load", None)  # nothing is loaded to find out
    kept, before, told = folder.with_name("kept"), contents(folder / "stores"), []
    assert build([wanted], folder / "stores", say=told.append) and told == []
    shutil.copytree(folder, kept)
    try:
        CHANGES[what](folder)
        with pytest.raises(
            StoreError,
            match=rf"made from another {what} than {re.escape(str(folder))}\S+ is now; nothing was written. Delete",
        ):
            build([wanted], folder / "stores")
        assert contents(folder / "stores") == before
    finally:
        shutil.rmtree(folder)
        kept.rename(folder)


def test_what_is_not_on_this_machine_is_not_compared_and_that_is_said(finished):
    folder, wanted = finished
    for name, what in (("model", "model"), ("text.jsonl", "corpus")):
        told = []
        (folder / name).rename(folder / "elsewhere")
        assert build([wanted], folder / "stores", say=told.append) == [folder / "stores" / wanted.name]
        assert len(told) == 1 and told[0].startswith(
            f"{wanted.name}: its {what} was not compared with what there is now ("
        )
        (folder / "elsewhere").rename(folder / name)


# ---- stores of an hsae that had other rules for digests ------------------------------------------------------------


@pytest.fixture
def older(tmp_path):
    """(Root, spec) of a store such as an hsae without checksums of headers made, of a model and a text with files
    that it did not look at."""
    folder = tmp_path / "older"
    model, text = folder / "model", folder / "text"
    shutil.copytree(GOLDEN / "model", model)
    text.mkdir()
    text_of(text / "a.jsonl", "ab abc ab")
    for name in ("tokenizer.json", "special_tokens_map.json"):
        (model / name).unlink(missing_ok=True)
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    vocabulary = {token: number for number, token in enumerate(["<|endoftext|>", "a", "b", "c", "ab", "Ġ"])}
    (model / "vocab.json").write_text(json.dumps(vocabulary))
    (model / "merges.txt").write_text("#version: 0.2\na b\n")
    (model / "model.safetensors").rename(model / "part.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(model / "part.safetensors"), "part.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"other": torch.zeros(1)}, model / "left_over.safetensors")
    wanted = spec(
        model=ModelConfig(id=str(model), dtype="bfloat16"), corpus=CorpusConfig(corpus=str(text)), rows=10, clean_rows=5
    )
    root = build([wanted], folder / "stores")[0]
    weight_files = [model / name for name in ("config.json", "left_over.safetensors", "part.safetensors")]
    digests = {
        "model_digest": files_digest(weight_files),
        "tokenizer_digest": files_digest([model / "tokenizer_config.json"]),
    }
    in_header(root, digests, "checksum", "older", "model_commit", "corpus_commit")
    (text / "b.csv").write_text("text\ngreen ideas\n")
    return root, wanted


def in_header(root, update, *without):
    held = json.loads((root / "zarr.json").read_text())
    content = {**held["attributes"]["hsae"], **update}
    held["attributes"]["hsae"] = {key: value for key, value in content.items() if key not in without}
    (root / "zarr.json").write_text(json.dumps(held))


def test_a_store_whose_digests_are_by_older_rules_has_not_changed(older):
    root, wanted = older
    model = LanguageModel.load(wanted.model)
    before = contents(root)
    assert build([wanted], root.parent, say=refuse) == [root] and contents(root) == before
    check_model(root, read_header(root), model)
    check_tokenizer(root, read_header(root), model.tokenizer)
    chunk = root / "tokens/c/0/0"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:-1])
    assert not repair(root, verify(root), say=lambda text: None)  # which writes a checksum of the header too
    assert chunk.read_bytes() == whole and is_sealed(root)
    assert build([wanted], root.parent, say=refuse) == [root]
    weights(root.parent.with_name("model"), "part.safetensors")
    for remade in (
        lambda: build([wanted], root.parent),
        lambda: check_model(root, read_header(root), LanguageModel.load(wanted.model)),
    ):
        with pytest.raises(StoreError, match=r"was made (from another model|with other weights)"):
            remade()


def test_a_store_of_older_rules_that_is_not_finished_goes_on_with_the_text_it_was_begun_with(older):
    root, wanted = older
    before, told = contents(root), []
    in_header(root, {"complete": False, "statistics": {}, "kept_tokens": None, "checks": None})
    (root / "tokens/c/0/0").unlink()
    assert build([wanted], root.parent, say=told.append) == [root]
    assert {name: data for name, data in contents(root).items() if name != "zarr.json"} == {
        name: data for name, data in before.items() if name != "zarr.json"
    }
    assert any("files read: 1, those that the older hsae read which began the store" in line for line in told)
    assert build([wanted], root.parent, say=refuse) == [root]


def test_older_rules_are_not_those_of_newer_stores(older):
    root, wanted = older
    held = json.loads((root / "zarr.json").read_text())["attributes"]["hsae"]
    in_header(root, sealed({**held, "older": False}))
    with pytest.raises(StoreError, match="made from another model"):
        build([wanted], root.parent)


def test_an_older_corpus_has_the_files_of_its_time(tmp_path):
    for name in ("b.txt", ".hidden.txt", "c.csv", "d.txt.gz"):
        (tmp_path / name).write_bytes(b"text\nwords\n")
    corpus = open_corpus(CorpusConfig(corpus=str(tmp_path)), older=True)
    assert corpus.digest == files_digest([tmp_path / ".hidden.txt", tmp_path / "b.txt"])
    assert [document.topic for document in corpus.documents()] == [".hidden", "b"]


def refuse(text):
    raise AssertionError(text)
