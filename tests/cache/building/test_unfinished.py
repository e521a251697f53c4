"""Unfinished stores that were harmed between two goes: the build goes on and makes the bytes of one that was left
alone (FIX C6, C11)."""

import json
import shutil
from pathlib import Path

import pytest
from stores import HOOK, contents, spec

from hsae.cache.building import builder as module
from hsae.cache.building import sealing
from hsae.cache.building.build import build
from hsae.cache.errors import StoreError
from hsae.cache.files import PARTIAL, sealed
from hsae.cache.language_model.lm import LanguageModel
from hsae.cache.storage.paths import place, sizes

ACTS = f"acts/{HOOK}/c"


@pytest.fixture(scope="module")
def model():
    return LanguageModel.load(spec().model)


@pytest.fixture(autouse=True)
def one_model(model, monkeypatch):
    monkeypatch.setattr(LanguageModel, "load", lambda *arguments, **settings: model)
    monkeypatch.setattr(module.chunk_log, "EVERY", 0.0)


def stopped(folder, name, at):
    """The first build of a store in `folder`, stopped at the `at`th call of the writer's function `name`."""
    real, calls = getattr(module.writer, name), []

    def failing(*arguments, **settings):
        calls.append(arguments)
        if len(calls) > at:
            raise OSError(28, "No space left on device")
        return real(*arguments, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.writer, name, failing)
        patch.setattr(module, "PACKED_AT_ONCE", 1)
        patch.setattr("hsae.cache.storage.paths.LOCAL_AT_ONCE", 1)
        with pytest.raises(OSError, match="No space left"):
            build([spec()], folder)
    return place(folder) / spec().name


@pytest.fixture(scope="module")
def stores(tmp_path_factory, model):
    """(A finished store, one that lacks only its last step, one whose packing was stopped.)"""
    root = tmp_path_factory.mktemp("stores")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModel, "load", lambda *arguments, **settings: model)
        patch.setattr(module.chunk_log, "EVERY", 0.0)
        whole = build([spec()], root / "whole")[0]
        return whole, stopped(root / "last", "write_metadata", 1), stopped(root / "packing", "write_chunk", 3)


def exchange(first, second):
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def flip(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def written(root):
    return next((root / "written").iterdir())


HARMS = {
    "nothing": lambda root: None,
    "two chunks of activations exchanged": lambda root: exchange(root / ACTS / "0/0/0", root / ACTS / "2/0/0"),
    "two chunks of tokens exchanged": lambda root: exchange(root / "tokens/c/0/0", root / "tokens/c/1/0"),
    "a chunk of losses is another's": lambda root: exchange(root / "clean/loss/c/0/0", root / "clean/loss/c/1/0"),
    "a chunk cut": lambda root: (root / ACTS / "1/0/0").write_bytes((root / ACTS / "1/0/0").read_bytes()[:-3]),
    "a bit of the tally": lambda root: flip(root / "tally/0", 4),
    "a bit of the tally's checksum": lambda root: flip(root / "tally/0"),
    "the tally cut": lambda root: (root / "tally/0").write_bytes(b""),
    "a bit of what is written down": lambda root: flip(written(root), 60),
    "what is written down is gone": lambda root: shutil.rmtree(root / "written"),
    "a digit of an array's metadata": lambda root: (root / "tokens/zarr.json").write_text(
        (root / "tokens/zarr.json").read_text().replace("3", "4", 1)
    ),
    "metadata of a group is gone": lambda root: (root / "acts/zarr.json").unlink(),
    "what is written down is not JSON": lambda root: written(root).write_bytes(b"[" * 100_000),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_store_harmed_before_its_last_step_ends_with_the_same_bytes(stores, tmp_path, harm):
    whole, last, _ = stores
    root = Path(shutil.copytree(last, tmp_path / last.name))
    HARMS[harm](root)
    build([spec()], tmp_path)
    assert contents(root) == contents(whole)


def test_a_chunk_exchanged_in_the_last_step_is_computed_again(stores, tmp_path, monkeypatch):
    whole, last, _ = stores
    root, real = Path(shutil.copytree(last, tmp_path / last.name)), sealing.write_parts

    def late(*arguments):
        monkeypatch.setattr(sealing, "write_parts", real)
        exchange(root / ACTS / "0/0/0", root / ACTS / "2/0/0")
        return real(*arguments)

    monkeypatch.setattr(sealing, "write_parts", late)
    build([spec()], tmp_path)
    assert contents(root) == contents(whole)


def test_a_chunk_exchanged_after_its_checksum_was_taken_down_is_noticed(stores, tmp_path, monkeypatch):
    _, last, _ = stores
    root, real = Path(shutil.copytree(last, tmp_path / last.name)), sealing.collect_parts

    def late(*arguments):
        exchange(root / ACTS / "0/0/0", root / ACTS / "2/0/0")
        return real(*arguments)

    monkeypatch.setattr(sealing, "collect_parts", late)
    with pytest.raises(StoreError, match="another chunk, put in this one's place"):
        build([spec()], tmp_path)
    monkeypatch.undo()


STATES = {
    "a digit": lambda state: {**state, "taken": state["taken"] + 3},
    "no checksum": lambda state: {key: value for key, value in state.items() if key != "checksum"},
    "endless": lambda state: sealed({**state, "row": [], "documents": 10**9, "chunks": 0}),
    "beyond the end": lambda state: sealed({**state, "chunks": 10**6}),
    "another position": lambda state: sealed({**state, "chunks": state["chunks"] + 1}),
    "other tokens": lambda state: sealed({**state, "tokens": state["tokens"] ^ 1}),
    "another store": lambda state: sealed({**state, "store": "0" * 16}),
}


@pytest.mark.parametrize("harm", STATES)
def test_a_state_of_packing_that_is_not_this_store_s_is_packed_anew(stores, tmp_path, harm):
    whole, _, packing = stores
    root = Path(shutil.copytree(packing, tmp_path / packing.name))
    state = json.loads((root / "packing.json").read_text())
    assert state["chunks"] == 3
    (root / "packing.json").write_text(json.dumps(STATES[harm](state)))
    build([spec()], tmp_path)
    assert contents(root) == contents(whole)


def test_packing_goes_on_where_it_was_unless_its_chunks_changed(stores, tmp_path, monkeypatch):
    whole, _, packing = stores
    begun, real = [], module.Packer.pack
    monkeypatch.setattr(module.Packer, "pack", lambda self, rows: begun.append(self.documents) or real(self, rows))
    for harm in (False, True):
        root = Path(shutil.copytree(packing, tmp_path / str(harm) / packing.name))
        if harm:
            exchange(root / "tokens/c/0/0", root / "tokens/c/1/0")
        build([spec()], root.parent)
        assert contents(root) == contents(whole)
    assert begun[0] > 0 and begun[1] == 0


def test_what_a_kill_after_the_last_step_leaves_goes_with_the_next_build(stores, tmp_path, monkeypatch):
    whole, last, _ = stores
    root = Path(shutil.copytree(last, tmp_path / last.name))
    (root / ACTS / f"0/0/.0.0123456789abcdef{PARTIAL}").write_bytes(b"half")
    monkeypatch.setattr(module, "clear", lambda target: None)
    build([spec()], tmp_path)
    assert (root / "written").is_dir() and not list(root.rglob(f"*{PARTIAL}"))
    monkeypatch.undo()
    build([spec()], tmp_path)
    assert contents(root) == contents(whole)


def test_it_is_the_same_on_a_remote_store(stores, model, monkeypatch):
    monkeypatch.setattr(LanguageModel, "load", lambda *arguments, **settings: model)
    root = stopped("memory://unfinished", "write_metadata", 1)
    first, second = (root / ACTS / f"{number}/0/0" for number in (0, 2))
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    assert build([spec()], "memory://unfinished") == [root]
    assert {name: (root / name).read_bytes() for name in sizes(root)} == {
        path.relative_to(stores[0]).as_posix(): path.read_bytes() for path in stores[0].rglob("*") if path.is_file()
    }
