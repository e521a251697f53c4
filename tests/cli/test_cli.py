"""The commands as a user types them: what they print, where they stop, what they return."""

import contextlib
import io
import json
import os
import re
import sys
from types import SimpleNamespace
from unittest import mock

import huggingface_hub
import numpy as np
import pytest
from places import GOLDEN
from safetensors.numpy import save_file
from typer.testing import CliRunner

from hsae import registry
from hsae.cache import profiling
from hsae.cache.errors import UserError
from hsae.cache.reading import page_faults
from hsae.cli.main import app, main

PLAN = f"""
extends = "tiny"
name = "mine"
[model]
id = {json.dumps(str(GOLDEN / "model"))}
[train]
tokens = 6_000
"""


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No hub, and an empty cache of it at tmp_path/hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def hsae(*arguments, cwd):
    """`hsae ...` as a user types it, in this process: its status and what it prints."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["hsae", *arguments]),
        mock.patch.dict(os.environ, {"COLUMNS": "200"}),
        mock.patch.object(page_faults, "enable"),
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    return SimpleNamespace(returncode=ended.value.code or 0, stdout=stdout.getvalue(), stderr=stderr.getvalue())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, undrawn_for_all):
    """A folder with an hsae.toml in which the design's three commands, and the report, have been run as they are
    typed.
    """
    place = tmp_path_factory.mktemp("project")
    (place / "hsae.toml").write_text(PLAN)
    for command in ("cache build", "train --run 3", "train --run 0-1", "eval core", "report"):
        done = hsae(*command.split(), cwd=place)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        (place / f"{command.replace(' ', '-')}.out").write_text(done.stdout)
    return place


def printed(folder, command):
    return (folder / f"{command}.out").read_text()


def test_the_three_commands_work_as_typed_in_a_folder_with_a_plan(folder):
    assert re.search(r"eval store: activations/model-eval-[0-9a-f]{16}\.zarr", printed(folder, "cache-build"))
    assert "run 3 full: trained" in printed(folder, "train---run-3")
    table = printed(folder, "eval-core")
    for label in (
        "0 baseline sae",
        "1 stacked level1",
        "1 stacked level2",
        "3 full sae",
        "3 full level1",
        "3 full level2",
    ):
        assert label in table
    assert "not trained yet, left out: run 2, 4, 5" in table
    results = sorted(path.name for path in folder.glob("runs/*/eval/core/*.json"))
    assert results[0] == "hsae_mine_0-baseline_sae_eval_results.json" and len(results) == 6
    assert (folder / "report/index.html").is_file() and (folder / "report/summary.png").is_file()


def test_the_tables_tell_sizes_before_compute(folder):
    text = printed(folder, "cache-build")
    for word in ("rows", "tokens", "on disk", "free", "model", "time, about", "30", "1,200", "120", "4,800"):
        assert word in text


def test_what_is_there_is_used_again(folder):
    again = hsae("cache", "build", cwd=folder)
    assert again.returncode == 0 and "complete" in again.stdout and "tokens/s" not in again.stdout
    assert "already trained" in hsae("train", "--run", "3", cwd=folder).stdout
    assert "6 of 6 were there already" in hsae("eval", "core", cwd=folder).stdout


def test_profiles_show_where_time_goes_and_change_nothing(folder, monkeypatch):
    monkeypatch.setattr(profiling, "WARM_UP", 1)
    elsewhere = "--set", "cache.dir=elsewhere", "--set", "train.dir=elsewhere/runs", "--profile", "elsewhere/traces"
    for command in ("cache build --split train", "train --run 3", "cache build --split eval", "eval core --run 3"):
        done = hsae(*command.split(), *elsewhere, cwd=folder)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        assert re.search(r"products +[\d.]+ +\d+%", done.stdout) and "Python" in done.stdout
    traces = {path.name.removesuffix(".json.gz") for path in (folder / "elsewhere/traces").iterdir()}
    assert traces == {"build-batches", "train-steps", "core-reconstruction", "core-variance"}
    for name in ("3/model/model.safetensors", "3/eval/core/hsae_mine_3-full_sae_eval_results.json"):
        profiled, plain = ((folder / place / name).read_bytes() for place in ("elsewhere/runs", "runs"))
        if name.endswith(".json"):
            profiled, plain = (json.loads(text)["eval_result_metrics"] for text in (profiled, plain))
        assert profiled == plain


def test_without_a_plan_the_default_one_is_used_and_what_is_missing_is_said(tmp_path, offline):
    build = hsae("cache", "build", cwd=tmp_path)
    assert build.returncode == 2
    assert "Error: google/gemma-2-2b is neither on this machine nor is the hub reachable" in build.stderr
    train = hsae("train", "--run", "3", cwd=tmp_path)
    assert train.returncode == 2
    assert re.search(
        r"Error: no activation store at activations/gemma-2-2b-train-\w{16}\.zarr; make it with `hsae cache build`",
        train.stderr,
    )
    core = hsae("eval", "core", cwd=tmp_path)
    assert core.returncode == 2
    assert "no run of plan gemma-2-2b has been trained in runs; train them with: hsae train --all" in core.stderr
    assert not list(tmp_path.iterdir())
    for done in (build, train, core):
        assert "Traceback" not in done.stderr


def gemma_2_2b_in_the_hubs_cache(place):
    snapshot = place / "models--google--gemma-2-2b/snapshots/abc"
    snapshot.mkdir(parents=True)
    (place / "models--google--gemma-2-2b/refs").mkdir()
    (place / "models--google--gemma-2-2b/refs/main").write_text("abc")
    config = {
        "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "hidden_size": 2304, "num_hidden_layers": 26,
        "head_dim": 256,
        "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 9216, "vocab_size": 256000,
    }  # fmt: skip
    (snapshot / "config.json").write_text(json.dumps(config))
    save_file({"x": np.zeros(250, np.float32)}, snapshot / "model.safetensors")


def test_the_default_plans_sizes_are_told_without_reading_weights(tmp_path, offline):
    gemma_2_2b_in_the_hubs_cache(tmp_path / "hub")
    here = ("--set", "cache.eval.corpus='python-docs'")
    dry = ("cache", "build", "--dry-run", "--split", "eval")
    done = hsae(*dry, *here, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for number in ("35,200", "4,505,600", "22.67 GB", "google/gemma-2-2b in bfloat16"):
        assert number in done.stdout
    hook = hsae("cache", "build", "--set", "hook.names=['blocks.26.hook_resid_post']", cwd=tmp_path)
    assert hook.returncode == 2 and "google/gemma-2-2b has layers 0 to 25" in hook.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "say which runs to train: --run 3, --run 0-5, --run baseline, or --all"),
        (["train", "--run", "3", "--all"], "say which runs to train"),
        (["train", "--run", "99"], "no run '99' in plan mine (hsae.toml)"),
        (["train", "--run", "3", "--resume", "--restart"], "--resume and --restart exclude each other"),
        (["train", "--run", "3", "--set", "train.seed=1"], "holds a run of another configuration or store"),
        (["train", "--run", "3", "--set", "train.speed=1"], "[train] has no key 'speed'"),
        (["train", "--run", "3", "--plan", "nowhere"], "no plan 'nowhere': neither a file nor one of gemma-2-2b"),
        (["train", "--run", "3", "--device", "cuda"], "sees no GPU; use --device cpu"),
        (["cache", "build", "--device", "tpu"], "device 'tpu': use auto, cpu, cuda or cuda:N"),
        (["cache", "build", "--set", "model.dtype=float16"], "it would overflow"),
        (["cache", "info", "nowhere"], "no activation store at nowhere"),
        (["cache", "verify", "nowhere"], "no activation store at nowhere"),
        (["cache", "ls", "nowhere"], "there is no folder nowhere"),
        (["eval", "core", "--run", "2"], "run 2 (stacked-curriculum) of plan mine has not been trained to its end"),
        (["eval", "core", "--sae", "nowhere"], "nowhere is not a SAELens folder: there is no such folder"),
        (["eval", "core", "--run", "3", "--all"], "--run and --all exclude each other"),
        (["report", "--compare", "nowhere.json"], "nowhere.json can't be read"),
        (["report", "--compare", "hsae.toml"], "hsae.toml is not JSON"),
    ],
)
def test_mistakes_end_with_one_clear_line(folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=re.escape(message)):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


def test_usage_mistakes_and_damaged_stores_have_their_status(folder):
    assert hsae("train", "--speed", "3", cwd=folder).returncode == 2
    store = next(folder.glob("activations/*train*.zarr"))
    assert "all chunks are whole" in hsae("cache", "verify", str(store), cwd=folder).stdout
    chunk = store / "tokens/c/0/0"
    data = chunk.read_bytes()
    chunk.write_bytes(data[:-1])
    damaged = hsae("cache", "verify", str(store), cwd=folder)
    assert (
        damaged.returncode == 1
        and f"{store}/tokens/c/0/0 is {len(data) - 1} bytes long, not {len(data)}" in damaged.stdout
    )
    train = hsae("train", "--run", "4", cwd=folder)
    assert train.returncode == 2 and f"hsae cache verify {store.relative_to(folder)} --repair" in train.stderr
    mended = hsae("cache", "verify", str(store), "--repair", cwd=folder)
    assert mended.returncode == 0 and "1 of 1 damaged files repaired" in mended.stdout
    assert chunk.read_bytes() == data


def test_info_and_ls(folder):
    listed = hsae("cache", "ls", cwd=folder).stdout
    assert listed.count("complete") == 2
    info = hsae("cache", "info", str(next(folder.glob("activations/*eval*.zarr"))), cwd=folder).stdout
    for word in (
        "complete",
        "blocks.2.hook_resid_post",
        "python-docs",
        "30 of 40 tokens",
        "clean losses for 12",
        "root mean square",
    ):
        assert word in info


def commands(typer_app, prefix=()):
    for command in typer_app.registered_commands:
        yield (*prefix, command.name or command.callback.__name__)
    for group in typer_app.registered_groups:
        yield from commands(group.typer_instance, (*prefix, group.name))
        yield from ((*prefix, "eval", name) for name in registry.EVALUATIONS if group.name == "eval")


def test_every_command_has_help_with_an_example():
    names = list(commands(app))
    assert ("cache", "build") in names and ("eval", "core") in names and len(names) >= 8
    for name in names:
        text = CliRunner().invoke(app, [*name, "--help"]).output
        assert f"Example: hsae {' '.join(name)}" in " ".join(text.replace("│", " ").split()), name


def test_version():
    assert re.fullmatch(r"hsae \d+\.\d+\.\d+\n", CliRunner().invoke(app, ["--version"]).output)
