"""Stores, runs and results that an earlier hsae wrote open with today's, and give equal numbers
(tests/golden/README.md, before/).
"""

import json
import shutil

import pytest
import torch
from commands import invoke
from places import GOLDEN
from safetensors.torch import load_file

import hsae
from hsae.cache.storage.paths import place
from hsae.cache.storage.paths import sizes as file_sizes

VALUES = {
    "model.id": "model",
    "cache.chunk_mib": 0.05,
    "cache.batch_rows": 3,
    "cache.train.corpus": "text.jsonl",
    "cache.train.first_document": 60,
    "cache.train.rows": 9,
    "cache.eval.corpus": "text.jsonl",
    "cache.eval.last_document": 60,
    "cache.eval.batches_reconstruction": 1,
    "cache.eval.batches_variance": 2,
    "train.tokens": 1500,
}
SETTINGS = ["--plan", "tiny", *(part for key, value in VALUES.items() for part in ("--set", f"{key}={value}"))]
VOLATILE = {"eval_id", "datetime_epoch_millis", "sae_bench_commit_hash", "time", "checksum", "hsae_version"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of what was written, with its model beside it, as the working directory."""
    shutil.copytree(GOLDEN / "before", tmp_path / "before")
    shutil.copytree(GOLDEN / "model", tmp_path / "before" / "model")
    monkeypatch.chdir(tmp_path / "before")
    return tmp_path / "before"


def hsae_command(*arguments):
    done = invoke(*arguments)
    assert done.exit_code == 0, (arguments, done.output, done.exception)
    return done.output


def contents(root):
    return {name: (root / name).read_bytes() for name in file_sizes(place(str(root))) if not name.endswith(".lock")}


def numbers(path):
    """The numbers and words of a result, without those of the moment it was written, by where they stand."""

    def leaves(value, where):
        if isinstance(value, dict):
            for key, part in value.items():
                if key not in VOLATILE:
                    yield from leaves(part, f"{where}.{key}")
        elif isinstance(value, list):
            for index, part in enumerate(value):
                yield from leaves(part, f"{where}[{index}]")
        else:
            yield where, value

    return dict(leaves(json.loads(path.read_text()), ""))


def test_stores_are_whole_and_a_new_build_makes_the_same_bytes(folder):
    stores = sorted((folder / "activations").glob("*.zarr"))
    before = {store.name: contents(store) for store in stores}
    for store in stores:
        assert "all chunks are whole" in hsae_command("cache", "verify", store)
        opened = hsae.ActivationStore.open(str(store))
        residuals = opened.acts("blocks.2.hook_resid_post", 0, opened.rows)
        assert residuals.shape == (9, 40, 48) and torch.isfinite(residuals).all()
    assert "complete" in hsae_command("cache", "build", *SETTINGS, "--device", "cpu")
    assert {store.name: contents(store) for store in stores} == before
    hsae_command("cache", "build", *SETTINGS, "--device", "cpu", "--set", "cache.dir=new")
    for store in stores:
        assert (folder / "new" / store.name / "tokens/c/0/0").read_bytes() == before[store.name]["tokens/c/0/0"]
        one, other = (hsae.ActivationStore.open(str(where / store.name)) for where in (folder / "new", store.parent))
        hook = one.spec.hooks[0]
        torch.testing.assert_close(one.acts(hook, 0, one.rows), other.acts(hook, 0, one.rows))


def test_runs_and_results_are_found_and_used_again(folder):
    before = contents(folder / "runs")
    assert hsae_command("train", *SETTINGS, "--run", "2,3", "--device", "cpu").count("already trained") == 2
    assert "5 of 5 were there already" in hsae_command("eval", "core", *SETTINGS, "--run", "2,3", "--device", "cpu")
    hsae_command("eval", "composition", *SETTINGS, "--run", "2,3", "--device", "cpu")
    assert contents(folder / "runs") == before


def test_evaluating_anew_gives_equal_numbers(folder):
    results = sorted((folder / "runs").glob("*/eval/**/*.json"))
    before = {path: numbers(path) for path in results}
    assert len(before) == 7
    for path in results:
        path.unlink()
    for evaluation in ("core", "composition"):
        hsae_command("eval", evaluation, *SETTINGS, "--run", "2,3", "--device", "cpu")
    for path, wanted in before.items():
        found = numbers(path)
        assert found.keys() == wanted.keys(), path
        for where, value in wanted.items():
            close = pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float) else value
            assert found[where] == close, (path, where)


def test_runs_train_to_equal_models(folder):
    hsae_command("train", *SETTINGS, "--run", "2,3", "--device", "cpu", "--set", "train.dir=new")
    for number in ("2", "3"):
        new, old = (load_file(folder / runs / number / "model/model.safetensors") for runs in ("new", "runs"))
        torch.testing.assert_close(new, old, rtol=1e-3, atol=1e-4)
