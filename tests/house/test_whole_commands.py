"""`hsae train` and `hsae eval` with their stores on S3 and behind HTTP: the results of the local stores, bit for
bit.
"""

import json
import os
import time
import uuid

import pytest
from places import GOLDEN
from typer.testing import CliRunner

from hsae.cache.building.copying import copy
from hsae.cache.reading import token_stream
from hsae.cache.storage.paths import place, sizes
from hsae.cli import train as cli_train
from hsae.cli.main import app

pytestmark = pytest.mark.slow  # half a minute

VOLATILE = {"time", "eval_id", "datetime_epoch_millis", "dir", "checksum"}


def hsae(folder, command, **settings):
    """Run a command in this process; settings are keys of the plan."""
    tables = {
        "model.id": str(GOLDEN / "model"),
        "cache.codec": "mappable",
        "train.dir": str(folder),
        "train.tokens": "2000",
        **settings,
    }
    options = [part for key, value in tables.items() for part in ("--set", f"{key}={value}")]
    done = CliRunner().invoke(app, [*command.split(), "--plan", "tiny", *options])
    assert done.exit_code == 0, (command, done.output, done.exception)


def results(folder):
    """Every file of a run folder: JSON without times, random ids and the folders' names, anything else as bytes."""

    def lasting(tree):
        if isinstance(tree, dict):
            return {key: lasting(value) for key, value in tree.items() if key not in VOLATILE}
        return [lasting(value) for value in tree] if isinstance(tree, list) else tree

    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock")):
        content = path.read_bytes()
        if path.suffix in (".json", ".jsonl"):
            documents = [content] if path.suffix == ".json" else content.splitlines()
            content = [lasting(json.loads(document)) for document in documents]
        found[path.relative_to(folder).as_posix()] = content
    return found


def commands(folder, **settings):
    for command in ("train --run 3", "eval core --run 3", "eval composition --run 3"):
        hsae(folder, command, **settings)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """(the folder of stores, what the commands leave)."""
    folder = tmp_path_factory.mktemp("local")
    hsae(folder / "runs", "cache build", **{"cache.dir": folder / "activations"})
    commands(folder / "runs", **{"cache.dir": folder / "activations"})
    return folder / "activations", results(folder / "runs")


def same(found, wanted):
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []
    names = " ".join(wanted)
    assert "model/" in names and "eval/core/" in names and "composition" in names


def contents(root):
    return {name: (root / name).read_bytes() for name in sizes(root) if not name.endswith(".lock")}


def test_on_s3(local, s3, scratch_home, tmp_path, record_property):
    url = f"s3://bucket/{uuid.uuid4().hex}"
    hsae(tmp_path, "cache build", **{"cache.dir": url})
    assert contents(place(url)) == contents(local[0])
    s3.rate = 0.1
    s3.faults.clear()
    commands(tmp_path / "runs", **{"cache.dir": url})
    same(results(tmp_path / "runs"), local[1])
    assert s3.faults.total() > 0
    record_property("injected", s3.faults.total())


def test_s3_goes_away_in_the_middle_of_training(local, s3, scratch_home, tmp_path, monkeypatch, record_property):
    """Windows of one chunk, so that chunks are fetched all the time; the run is that of a training which nothing
    disturbs.
    """
    monkeypatch.setattr(token_stream, "WINDOW_BYTES", 1)
    outage, real, gone = float(os.environ.get("HSAE_OUTAGE", "1.5")), cli_train._Screen.metrics, 0

    def metrics(self, run, told):
        nonlocal gone
        real(self, run, told)
        if told["step"] == 4:
            gone = s3.gone_until = time.monotonic() + outage

    found = []
    for name, screen in (("quiet", real), ("disturbed", metrics)):
        url = f"s3://bucket/{uuid.uuid4().hex}"
        for store in local[0].glob("*-train-*.zarr"):
            copy(store, url)
        monkeypatch.setattr(cli_train._Screen, "metrics", screen)
        s3.faults.clear()
        hsae(tmp_path / name, "train --run 3", **{"cache.dir": url, "train.tokens": 4500})
        found.append(results(tmp_path / name))
    assert found[0] == found[1] and "3/model/model.safetensors" in found[0]
    assert 0 < gone < time.monotonic() and s3.faults["gone"] > 1
    record_property("injected", s3.faults["gone"])


def test_over_http(local, serve, token, scratch_home, tmp_path):
    with serve(local[0]) as (url, process, printed):
        commands(tmp_path / "runs", **{"cache.dir": url, "cache.codec": "auto"})  # served as it was built in a folder
    same(results(tmp_path / "runs"), local[1])
    assert token not in "".join(printed) and process.returncode == 130
