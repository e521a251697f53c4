"""Runs and stores on a stand-in for the hub."""

import json
import os
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import HOOK, made
from places import ROOT
from typer.testing import CliRunner

import hsae
from hsae.cache.building.build import build
from hsae.cache.errors import UserError
from hsae.cache.files import check_seal
from hsae.cli.main import app
from hsae.eval.core.core_evaluation import Core
from hsae.eval.harness.evaluation import evaluate_targets
from hsae.eval.harness.targets import run_targets
from hsae.eval.sharing.share import prepare, pull, push
from hsae.train.config.plan import load_plan
from hsae.train.run_record import damaged_files, read_run
from hsae.train.runs.planned_runs import train_runs

sys.path.insert(0, str(Path(__file__).parent))
from hub_server import TOKEN, serving

MODEL = "google/gemma-tiny"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """Run 3 of the tiny plan, trained and evaluated; its plan names the model by a relative path."""
    before, folder = Path.cwd(), tmp_path_factory.mktemp("shared")
    os.chdir(folder)
    try:
        Path("model").symlink_to(ROOT / "tests/golden/model")
        plan = load_plan("tiny", ["model.id=model", "train.tokens=4000"])
        build([plan.store("eval"), plan.store("train")], plan.cache.dir)
        train_runs(plan, plan.select("3"), device="cpu")
        store = hsae.ActivationStore.of(plan.store("eval"), plan.cache.dir)
        evaluate_targets(Core(store), run_targets(plan, plan.runs[3]))
        return folder / plan.run_dir(plan.runs[3])
    finally:
        os.chdir(before)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serving() as (hub, address):
        real = huggingface_hub.constants.ENDPOINT
        for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"):
            value = getattr(huggingface_hub.constants, name)
            monkeypatch.setattr(huggingface_hub.constants, name, value.replace(real, address))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def test_a_run_goes_and_comes_back(run_dir, hub, tmp_path):
    push(run_dir, "me/tiny-hsae", model=MODEL, private=True)
    files = hub.repositories["models/me/tiny-hsae"]
    assert "models/me/tiny-hsae" in hub.private
    assert {"README.md", "run.json", "metrics.jsonl", "model/model.safetensors", "training.png"} <= files.keys()
    assert not [name for name in files if "checkpoint" in name or name.startswith(".")]
    config = json.loads(files["saelens/sae/cfg.json"])
    assert config["metadata"]["model_name"] == MODEL
    (back,) = pull("me/tiny-hsae", tmp_path / "back")
    assert not (back / ".cache").exists()
    assert damaged_files(back, read_run(back)) == {}
    check_seal(read_run(back))
    x = torch.randn(5, 48)
    assert torch.equal(hsae.load(back).encode(x), hsae.load(run_dir).encode(x))
    assert read_run(back)["model"] == MODEL and read_run(run_dir)["model"] == "model"
    assert list(tmp_path.iterdir()) == [back]


def test_the_card(run_dir, hub):
    push(run_dir, "me/tiny-hsae", model=MODEL)
    card = hub.repositories["models/me/tiny-hsae"]["README.md"].decode()
    data = huggingface_hub.ModelCard(card).data
    assert (data.library_name, data.base_model) == ("saelens", MODEL)
    for words in (
        'SAE.from_pretrained("me/tiny-hsae", "saelens/sae")',
        "| 3 full |",
        "explained variance",
        " – ",
        "additive",
        "tokens = 4000",
        "![Training curves](training.png)",
        "blocks.2.hook_resid_post",
    ):
        assert words in card
    assert "None" not in card


def test_what_is_there_is_not_sent_again(run_dir, hub):
    push(run_dir, "me/tiny-hsae", model=MODEL)
    commits = hub.commits
    push(run_dir, "me/tiny-hsae", model=MODEL)
    assert hub.commits == commits


def test_a_broken_off_push_leaves_no_record(run_dir, hub, tmp_path):
    hub.refuses = 1
    with pytest.raises(UserError, match=r"the hub refuses me/tiny-hsae \(status 400\)"):
        push(run_dir, "me/tiny-hsae", model=MODEL)
    with pytest.raises(UserError, match=r"holds no run of hsae: it has no run\.json"):
        pull("me/tiny-hsae", tmp_path / "back")
    assert list(tmp_path.iterdir()) == []
    hub.refuses = None
    push(run_dir, "me/tiny-hsae", model=MODEL)
    assert pull("me/tiny-hsae", tmp_path / "back") == [tmp_path / "back"]


def test_damage_on_the_way_is_found(run_dir, hub, tmp_path):
    push(run_dir, "me/tiny-hsae", model=MODEL)
    files = hub.repositories["models/me/tiny-hsae"]
    files["model/model.safetensors"] = files["model/model.safetensors"][:-1] + b"x"
    with pytest.raises(UserError, match=r"model/model\.safetensors of me/tiny-hsae fails its checksum"):
        pull("me/tiny-hsae", tmp_path / "back")
    assert list(tmp_path.iterdir()) == []


def test_a_store_goes_and_comes_back(hub, tmp_path):
    place, numbers = made(tmp_path / "here")
    push(place, "datasets/me/acts")
    (back,) = pull("datasets/me/acts", tmp_path / "there")
    acts = hsae.ActivationStore.open(back).acts(HOOK, 0, 23)
    assert torch.equal(acts, numbers[f"acts/{HOOK}"].view_as(acts))
    assert back.name == place.name and sorted(path.name for path in back.parent.iterdir()) == [place.name]
    with pytest.raises(UserError, match="is there already"):
        pull("datasets/me/acts", tmp_path / "there")


def test_secrets_and_paths_stay_here(run_dir, hub, monkeypatch, tmp_path):
    copy = shutil.copytree(run_dir, tmp_path / "3")
    log = copy / "metrics.jsonl"
    lines = log.read_text()
    monkeypatch.setenv("SOME_API_KEY", "sk-very-secret")
    for private in ("sk-very-secret", f"{Path.home()}/data", TOKEN):
        log.write_text(lines + json.dumps({"kind": "warning", "step": 99, "message": private}) + "\n")
        with pytest.raises(UserError, match=r"metrics\.jsonl holds .*; nothing was sent") as caught:
            push(copy, "me/tiny-hsae", model=MODEL)
        assert "sk-very" not in str(caught.value) and TOKEN not in str(caught.value)
    assert hub.repositories == {}


def test_what_is_refused(run_dir, hub, tmp_path, monkeypatch):
    for arguments, words in (
        ((run_dir, "me"), "'me' names no repository: write owner/name"),
        ((run_dir, "datasets/me/x"), "is a run: its repository is written owner/name"),
        ((run_dir, "me/x"), "trained on 'model', which is no id of the hub"),
        ((tmp_path, "me/x"), "holds no trained run"),
        ((tmp_path / "nothing", "me/x"), "there is no run and no store"),
    ):
        with pytest.raises(UserError, match=words):
            prepare(*arguments)
    with pytest.raises(UserError, match="the hub has no me/nothing that you may use"):
        pull("me/nothing", tmp_path / "back")
    monkeypatch.setenv("HF_TOKEN", "hf_somebody_else")
    with pytest.raises(UserError, match=r"\(status 401\); log in with|that you may use"):
        push(run_dir, "me/tiny-hsae", model=MODEL)


def test_a_dry_run_shows_what_would_go(run_dir, hub):
    result = CliRunner().invoke(app, ["push", str(run_dir), "me/tiny-hsae", "--model", MODEL, "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "model/model.safetensors" in result.output and "would go to me/tiny-hsae" in result.output
    assert hub.repositories == {}


def test_commands(run_dir, hub, tmp_path):
    for arguments in (["push", str(run_dir), "me/a", "--model", MODEL], ["pull", "me/a", str(tmp_path / "b")]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
    assert (tmp_path / "b" / "run.json").is_file()
