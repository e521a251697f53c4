import uuid

import pytest
import torch
from typer.testing import CliRunner

from hsae.cache.building.copying import copy
from hsae.cache.building.verification import verify
from hsae.cache.building.writer import write_header
from hsae.cache.errors import StoreError
from hsae.cache.files import PARTIAL
from hsae.cache.format.layout import read_header
from hsae.cache.reading.store import ActivationStore
from hsae.cache.storage.paths import place, publish, sizes
from hsae.cli.main import app

HOOK = "blocks.3.hook_resid_post"


def contents(root):
    return {name: (root / name).read_bytes() for name in sizes(root) if not name.endswith(".lock")}


def test_there_and_back_again_gives_the_same_bytes(make_store, s3, scratch_home, tmp_path):
    near, values = make_store(tmp_path / "near")
    url = f"s3://bucket/{uuid.uuid4().hex}"
    told = CliRunner().invoke(app, ["cache", "copy", str(near), url])
    assert told.exit_code == 0 and f"copied and checked: {url}/{near.name}" in told.output
    far = place(url) / near.name
    assert contents(far) == contents(near)
    assert contents(copy(far, tmp_path / "back")) == contents(near)
    assert torch.equal(ActivationStore.open(tmp_path / "back" / near.name).acts(HOOK, 0, 23), values[f"acts/{HOOK}"])


def test_commands_take_urls(make_store, wide):
    url = f"memory://{uuid.uuid4().hex}"
    target, _ = make_store(url)
    run = CliRunner()
    told = run.invoke(app, ["cache", "ls", url])
    assert told.exit_code == 0 and target.name in told.output and "complete" in told.output
    told = run.invoke(app, ["cache", "info", str(target)])
    assert told.exit_code == 0 and "6 of 4 rows, mappable" in told.output
    assert run.invoke(app, ["cache", "verify", str(target)]).exit_code == 0
    chunk = target / "tokens/c/3/0"
    chunk.write_bytes((target / "tokens/c/2/0").read_bytes())
    told = run.invoke(app, ["cache", "verify", str(target)])
    assert told.exit_code == 1
    assert f"damaged {chunk} is another chunk, put in this one's place" in told.output
    with pytest.raises(StoreError, match="there is no folder memory://nowhere; stores are made by `hsae cache build`"):
        run.invoke(app, ["cache", "ls", "memory://nowhere"], catch_exceptions=False)


def test_recoding_is_lossless_and_names_the_store_a_plan_of_that_codec_looks_for(make_store, scratch_home, tmp_path):
    near, values = make_store(tmp_path / "near")
    compact = copy(near, tmp_path / "other", codec="compact")
    made, _ = make_store(tmp_path / "made", codec="compact")
    assert compact.name == made.name and contents(compact) == contents(made)
    assert torch.equal(ActivationStore.open(compact).acts(HOOK, 0, 23), values[f"acts/{HOOK}"])
    assert contents(copy(compact, tmp_path / "back", codec="mappable")) == contents(near)


def test_a_copy_that_was_interrupted_is_no_store_and_goes_on_with_what_is_missing(make_store, tmp_path, monkeypatch):
    near, _ = make_store(tmp_path / "near")
    written = []

    def failing(target, data):
        if len(written) == 5:
            raise OSError(28, "No space left on device")
        written.append(target)
        publish(target, data)

    monkeypatch.setattr("hsae.cache.building.copying.publish", failing)
    with pytest.raises(OSError, match="No space left"):
        copy(near, tmp_path / "far")
    with pytest.raises(StoreError, match="no activation store at"):
        read_header(tmp_path / "far" / near.name)
    began = set(written)
    written.clear()
    monkeypatch.setattr(
        "hsae.cache.building.copying.publish", lambda target, data: (written.append(target), publish(target, data))
    )
    far = copy(near, tmp_path / "far")
    assert contents(far) == contents(near) and not began & set(written)
    written.clear()
    copy(near, tmp_path / "far")
    assert [path.parent.parent.name for path in written] == ["checks"]


def test_what_a_killed_copy_left_half_written_goes_with_the_next(make_store, tmp_path):
    """FIX C11"""
    near, _ = make_store(tmp_path / "near")
    left = tmp_path / "far" / near.name / "tokens/c/0" / f".0.0123456789abcdef{PARTIAL}"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    assert contents(copy(near, tmp_path / "far")) == contents(near)


def test_a_damaged_source_is_not_copied(make_store, tmp_path):
    near, _ = make_store(tmp_path / "near")
    first, second = (near / f"acts/{HOOK}/c/{index}/0/0" for index in (0, 1))
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    with pytest.raises(StoreError, match=r"acts/.*/c/0/0/0 is another chunk, put in this one's place"):
        copy(near, tmp_path / "far")
    first.write_bytes(data)
    far = copy(near, tmp_path / "far")
    (far / "tokens/c/2/0").write_bytes(
        (far / "tokens/c/1/0").read_bytes()
    )  # right length: found when the same command looks again
    assert contents(copy(near, tmp_path / "far")) == contents(near)


def test_what_cannot_be_copied_is_refused(make_store, tmp_path):
    near, _ = make_store(tmp_path / "near")
    with pytest.raises(StoreError, match="is already there; give another folder, or another codec"):
        copy(near, near.parent)
    other, _ = make_store(tmp_path / "far", seed=1)
    write_header(other, read_header(other).model_copy(update={"corpus_digest": "other"}))
    with pytest.raises(StoreError, match="is another store of the same name; move it away, or copy to another folder"):
        copy(near, other.parent)
    write_header(near, read_header(near).model_copy(update={"complete": False}))
    with pytest.raises(StoreError, match="is not finished; go on with `hsae cache build`"):
        copy(near, tmp_path / "else")
    assert verify(other) == []
