"""Faults around a store: folders and files that may not be touched, wrong clocks, two builders of one remote store."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from places import GOLDEN

from hsae.cache.building import builder as module
from hsae.cache.building.build import build
from hsae.cache.building.builder import Builder
from hsae.cache.building.contents import StoreContents, text_of
from hsae.cache.building.copying import copy
from hsae.cache.building.repair import repair
from hsae.cache.building.verification import verify
from hsae.cache.config import CorpusConfig, ModelConfig
from hsae.cache.errors import RemoteError, StoreError, UserError
from hsae.cache.format.layout import read_header
from hsae.cache.format.spec import StoreSpec
from hsae.cache.language_model.lm import LanguageModel
from hsae.cache.reading import scratch as scratch_module
from hsae.cache.reading.scratch import Scratch
from hsae.cache.reading.store import ActivationStore
from hsae.cache.storage.paths import place, sizes
from hsae.cli.main import main

HOOK = "blocks.3.hook_resid_post"
NOBODY = 65534
SPEC = StoreSpec(
    split="eval", model=ModelConfig(id=str(GOLDEN / "model"), dtype="float32"), hooks=("blocks.2.hook_resid_post",),
    corpus=CorpusConfig(corpus="python-docs", last_document=30), context=19, prepend_bos=True, batch_rows=3,
    chunk_mib=0.02,
    codec="mappable", rows=31, clean_rows=9,
)  # fmt: skip


def contents(root):
    return {
        name: hashlib.sha256((root / name).read_bytes()).hexdigest()
        for name in sizes(root)
        if not name.endswith(".lock")
    }


@contextmanager
def nobody():
    """Without root's rights, so that permissions hold; as who runs the tests otherwise."""
    root = os.geteuid() == 0
    if root:
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
            os.setegid(0)


@pytest.fixture
def reachable():
    """A folder that everyone may enter; pytest's own are their owner's only."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    shutil.rmtree(folder)


def closed(folder):
    """Take all writing from a folder and what is in it."""
    for path in (*folder.rglob("*"), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)


@pytest.fixture
def one_model(monkeypatch):
    model = LanguageModel.load(SPEC.model)
    monkeypatch.setattr(LanguageModel, "load", lambda *_, **__: model)
    return model


# ---- permissions ---------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["mappable", "compact"])
def test_a_store_that_can_only_be_read_is_read(make_store, reachable, monkeypatch, codec, record_property):
    root, values = make_store(reachable / "stores", codec=codec)
    (reachable / "home").mkdir()
    (reachable / "home").chmod(0o777)
    monkeypatch.setenv("HSAE_HOME", str(reachable / "home"))
    before = contents(root)
    closed(reachable / "stores")
    with nobody():
        with pytest.raises(PermissionError):
            (root / "x").touch()
        assert verify(root) == []
        assert torch.equal(ActivationStore.open(root).acts(HOOK, 0, 23), values[f"acts/{HOOK}"])
    assert contents(root) == before
    record_property("injected", 1)


def test_nothing_is_computed_for_a_folder_that_can_not_be_written(make_store, reachable, monkeypatch, record_property):
    root, _ = make_store(reachable / "stores")
    near, _ = make_store(reachable / "other", rows=11)
    chunk = root / "tokens/c/1/0"
    chunk.write_bytes(b"harmed")
    before, damages = contents(reachable), verify(root)
    closed(reachable)
    monkeypatch.setattr(LanguageModel, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    with nobody():
        for work in (
            lambda: build([SPEC], root.parent),
            lambda: repair(root, damages),
            lambda: copy(near, root.parent),
        ):
            with pytest.raises(
                StoreError, match=rf"nothing can be written in {root.parent} \(Permission denied\); use another folder"
            ):
                work()
            record_property("injected", 1)
        with pytest.raises(PermissionError, match=rf"{reachable}/new"):
            build([SPEC], reachable / "new")
    assert contents(reachable) == before


@pytest.mark.parametrize("name", ["zarr.json", f"acts/{HOOK}/zarr.json", f"acts/{HOOK}/c/1/0/0", "checks/c/0"])
def test_a_file_that_may_not_be_read_is_named_and_not_taken_for_damage(
    make_store, reachable, name, record_property, capsys, monkeypatch
):
    root, _ = make_store(reachable)
    before = contents(root)
    (root / name).chmod(0)
    with nobody():
        for command in (["verify"], ["verify", "--repair"]):
            monkeypatch.setattr(sys, "argv", ["hsae", "cache", *command, str(root)])
            with pytest.raises(SystemExit) as ended:
                main()
            told = " ".join(capsys.readouterr().err.split())
            assert ended.value.code in (1, 2) and told.startswith("Error:") and "Permission denied" in told
            assert str(root / name).replace(" ", "") in told.replace(" ", "")
            record_property("injected", 1)
    (root / name).chmod(0o644)
    assert contents(root) == before


def test_a_scratch_folder_that_can_not_be_written_is_named(make_store, reachable, monkeypatch, record_property):
    root, values = make_store(reachable / "stores", codec="compact")
    home = reachable / "home"
    monkeypatch.setenv("HSAE_HOME", str(home))
    message = rf"nothing can be written in the scratch folder {home}/scratch \(Permission denied\); set HSAE_HOME to"
    home.mkdir()
    for harm in ("nothing there", "somebody else's"):
        if harm == "somebody else's":
            assert torch.equal(ActivationStore.open(root).acts(HOOK, 0, 4), values[f"acts/{HOOK}"][:4])
        closed(home)
        with nobody(), pytest.raises(UserError, match=message):
            ActivationStore.open(root).acts(HOOK, 0, 23)
        home.chmod(0o755)
        record_property("injected", 1)


# ---- clocks ---------------------------------------------------------------------


@pytest.mark.parametrize("year", [1971, 2099])
def test_a_store_s_times_mean_nothing(tmp_path, one_model, monkeypatch, year, record_property):
    whole = build([SPEC], tmp_path / "whole")[0]
    real, count = module.writer.write_chunk, iter(range(100))

    def failing(*arguments):
        if next(count) == 9:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(module.writer, "write_chunk", failing)
    with pytest.raises(OSError, match="No space left"):
        build([SPEC], tmp_path / "cut")
    monkeypatch.setattr(module.writer, "write_chunk", real)
    root, when = tmp_path / "cut" / whole.name, (year - 1970) * 365.25 * 86400
    for path in (*root.rglob("*"), root):
        os.utime(path, (when, when))
        record_property("injected", 1)
    build([SPEC], root.parent)
    assert contents(root) == contents(whole) and verify(root) == []


def test_scratch_files_from_the_future_go_first_and_the_others_in_their_order(tmp_path, record_property):
    held, now = Scratch(tmp_path, 1000), time.time()
    for number in range(9):
        path = held.fetch(f"key {number}", 96, lambda number=number: bytes([number]) * 96)
        when = now + 1e8 + number if number in (3, 5) else now - 100 + number
        os.utime(path, (when, when))
        record_property("injected", int(number in (3, 5)))
    held.fetch("key 9", 96, lambda: bytes(96))
    made = []
    for number in (8, 7, 6, 4, 2, 1):  # of nine, 900 bytes hold eight with the new one: 3 and 5 went, and nobody else
        held.fetch(f"key {number}", 96, lambda number=number: made.append(number) or bytes(96))
    assert (
        made == []
        and sum(path.stat().st_size for path in tmp_path.iterdir() if scratch_module.OURS.fullmatch(path.name)) <= 1000
    )


def test_s3_that_refuses_a_wrong_clock_is_told_at_once(s3, make_store, scratch_home, record_property):
    far, _ = make_store(f"s3://bucket/{uuid.uuid4().hex}")
    s3.skewed = True
    s3.faults.clear()
    for work in (
        lambda: verify(far),
        far.is_dir,
        lambda: (far / "zarr.json").is_file(),
        lambda: (far / "x").write_bytes(b""),
    ):
        with pytest.raises(
            RemoteError,
            match=r"^s3://\S+ is refused \(PermissionError: .*clock is 60 minutes behind the server's; set it\)$",
        ):  # fmt: skip
            work()
    assert s3.faults["skewed"] < 40  # no request was tried for minutes
    record_property("injected", s3.faults["skewed"])
    s3.skewed = False
    assert verify(far) == []


# ---- two builders of one remote store ---------------------------------------------------------------------


def test_two_builders_of_one_remote_store_make_the_bytes_of_one(tmp_path, one_model, monkeypatch, record_property):
    """The second begins when the first has written `begin` chunks, and dies after `end` of its own, or finishes."""
    wanted = contents(build([SPEC], tmp_path)[0])
    real = module.writer.write_chunk
    monkeypatch.setattr("hsae.cache.storage.paths.IN_FLIGHT", 1)  # so that what comes before what is known
    for begin, end in ((0, None), (0, 3), (2, 9), (4, None), (6, 1), (11, None), (17, 2)):
        folder, written = f"memory://{uuid.uuid4().hex}", []

        def write(*arguments, begin=begin, end=end, folder=folder, written=written):
            written.append(arguments)
            if len(written) == begin + 1:
                mine = []

                def second(*others):
                    if len(mine) == end:
                        raise ConnectionError("killed")
                    mine.append(others)
                    return real(*others)

                monkeypatch.setattr(module.writer, "write_chunk", second)
                try:
                    build([SPEC], folder)
                except ConnectionError:
                    assert len(mine) == end
                monkeypatch.setattr(module.writer, "write_chunk", write)
            return real(*arguments)

        monkeypatch.setattr(module.writer, "write_chunk", write)
        target = build([SPEC], folder)[0]
        assert len(written) > begin and contents(target) == wanted and verify(target) == []
        record_property("injected", 1)


@pytest.mark.parametrize("protocol", ["memory", "s3"])
def test_of_two_that_begin_at_once_with_other_libraries_the_second_is_refused(
    one_model, s3, scratch_home, monkeypatch, protocol, record_property
):
    folder = f"{protocol}://bucket/{uuid.uuid4().hex}"
    first = Builder(StoreContents(SPEC, one_model, text_of(SPEC, None)), place(folder) / SPEC.name)
    first.prepare()
    before = contents(first.target)
    real = StoreContents.header
    monkeypatch.setattr(
        StoreContents,
        "header",
        lambda self: (held := real(self)).model_copy(update={"versions": {**held.versions, "torch": "0"}}),
    )
    monkeypatch.setattr(module, "exists", lambda target: False)  # both looked before either had begun
    with pytest.raises(StoreError, match=r"was begun with torch \S+ \(now 0\); nothing was written"):
        build([SPEC], folder)
    assert contents(first.target) == before and not read_header(first.target).complete
    record_property("injected", 1)


@pytest.mark.slow
def test_two_processes_that_build_one_store_on_s3_at_once(s3, scratch_home, tmp_path, record_property):
    url = f"s3://bucket/{uuid.uuid4().hex}"
    code = (
        "import sys; from hsae.cache.building.build import build; from hsae.cache.format.spec import StoreSpec; "
        "build([StoreSpec.model_validate_json(sys.argv[1])], sys.argv[2])"
    )
    command = [sys.executable, "-c", code, SPEC.model_dump_json()]
    builders = [
        subprocess.Popen([*command, where], stderr=subprocess.PIPE, text=True) for where in (url, url, str(tmp_path))
    ]
    ended = [builder.communicate() for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0, 0], [error[-2000:] for _, error in ended]
    assert contents(place(url) / SPEC.name) == contents(tmp_path / SPEC.name)
    assert verify(f"{url}/{SPEC.name}") == []
    record_property("injected", 1)
