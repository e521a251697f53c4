"""Finished stores behind which the model or the text has changed (FIX A4)."""

import json
import re
import shutil

import pytest
from safetensors.torch import load_file, save_file
from test_cache_store import GOLDEN, contents, spec

from hsae.cache.build import build
from hsae.cache.config import CorpusConfig, ModelConfig
from hsae.cache.errors import StoreError
from hsae.cache.lm import LanguageModel


def text_of(path, words):
    path.write_text("".join(json.dumps({"text": f"{words} " * 30}) + "\n" for _ in range(20)))


def weights(folder):
    held = load_file(folder / "model.safetensors")
    held = {name: tensor * 1.5 for name, tensor in held.items()}
    save_file(held, folder / "model.safetensors", {"format": "pt"})


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
