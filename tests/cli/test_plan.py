"""`hsae plan` and `hsae doctor`."""

import json
import tomllib

import pytest
from typer.testing import CliRunner

from hsae.cache import doctor
from hsae.cli.main import app
from hsae.train.config.plan import load_plan, packaged_plans


def run(*args):
    result = CliRunner().invoke(app, list(args))
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("name", packaged_plans())
def test_a_shown_plan_is_that_plan(name, tmp_path):
    file = tmp_path / "hsae.toml"
    file.write_text(run("plan", "show", "--plan", name, "--set", "train.seed=7"))
    plan, again = load_plan(name, ["train.seed=7"]), load_plan(str(file))
    for part in ("name", "model", "hook", "cache", "train", "runs", "tables"):
        assert getattr(again, part) == getattr(plan, part)
    assert json.loads(run("plan", "show", "--plan", name, "--json")) == tomllib.loads(
        run("plan", "show", "--plan", name)
    )


def test_keys():
    assert "cache.train.rows = must be given   (a whole number at least 1)" in run("plan", "keys", "cache.train")
    (key,) = json.loads(run("plan", "keys", "cache.context", "--json"))
    assert (key["name"], key["default"]) == ("cache.context", "128")


def test_check_says_how_far_runs_are(tiny_plan):
    text = run("plan", "check", "--plan", tiny_plan)
    assert "3 full" in text and "is sound: 24 steps of 250 tokens a run" in text
    result = CliRunner().invoke(app, ["plan", "check", "--plan", tiny_plan, "--set", "train.batch_tokens=6000"])
    assert result.exit_code != 0 and "its curriculum has" in str(result.exception)


@pytest.fixture
def tiny_plan(tmp_path):
    from places import GOLDEN

    file = tmp_path / "mine.toml"
    model = json.dumps(str(GOLDEN / "model"))
    file.write_text(
        f'extends = "tiny"\n[model]\nid = {model}\n[cache]\ndir = {json.dumps(str(tmp_path / "a"))}\n'
        f"[train]\ntokens = 6_000\ndir = {json.dumps(str(tmp_path / 'runs'))}\n"
    )
    return str(file)


def test_doctor_tells_no_secret(monkeypatch):
    monkeypatch.setenv("HSAE_TOKEN", "hidden-1")
    monkeypatch.setenv("OPENAI_API_KEY", "hidden-2")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "hidden-3")
    monkeypatch.setenv("HF_TOKEN", "hf_hidden4")
    shown, told = run("doctor"), run("doctor", "--json")
    assert "hidden" not in shown + told
    findings = {(finding["group"], finding["name"]): finding for finding in json.loads(told)}
    assert findings["credential", "S3"]["value"] == "set"
    assert findings["credential", "hub"]["value"] == "logged in"
    assert findings["version", "torch"]["value"] and not findings["version", "torch"]["is_bad"]


def test_doctor_finds_what_is_wrong(monkeypatch):
    monkeypatch.setattr(doctor, "requires", lambda name: ["numpy>=1000", "nothing-of-this-name; extra == 'report'"])
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    findings = {(finding["group"], finding["name"]): finding for finding in json.loads(result.output)}
    assert findings["version", "numpy"]["is_bad"] and "numpy>=1000 needed" in findings["version", "numpy"]["value"]
    assert findings["extra", "report"]["value"] == "nothing-of-this-name is missing; pip install 'hsae[report]'"
