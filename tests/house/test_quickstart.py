"""The quickstart on real Gemma-3-270M, as a user runs it, with less text and fewer tokens unless HSAE_QUICKSTART is
set.
"""

import json
import os
import subprocess
import sys

import pytest

from hsae.eval.core.core_result import read_core

pytestmark = pytest.mark.slow(minutes=10)
COMMAND = [sys.executable, "-c", "from hsae.cli.main import main; main()", "quickstart"]
PACKAGED = "HSAE_QUICKSTART" in os.environ
"""Whether the quickstart runs at its own sizes (half an hour of one core): only then are its numbers those of the
README.
"""
if not PACKAGED:
    for setting in ("cache.batch_rows=4", "cache.train.rows=256", "train.tokens=150_000"):
        COMMAND += ["--set", setting]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the quickstart ran."""
    folder = tmp_path_factory.mktemp("quickstart")
    done = subprocess.run(COMMAND, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (folder / "screen.txt").write_text(done.stdout)
    return folder / "quickstart"


def results(place, run):
    return {result.name: result for result in map(read_core, (place / "runs" / str(run) / "eval/core").glob("*.json"))}


def test_it_tells_the_time_of_each_stage_and_where_to_look(place):
    text = (place.parent / "screen.txt").read_text()
    for words in ("1/4 cache", "2/4 train", "3/4 core", "4/4 report", "total", "report/index.html"):
        assert words in text
    assert (place / "report/index.html").stat().st_size > 100_000
    assert (place / "report/report.md").read_text().count("\n|") == 2 + 14


def test_the_baseline_is_alive_and_good_at_its_target_l0(place):
    baseline = results(place, 0)["sae"]
    assert not baseline.dead
    assert baseline.measure("explained_variance").value > (0.6 if PACKAGED else 0.35)
    assert baseline.measure("l0").value == pytest.approx(32, rel=0.25)
    assert baseline.measure("ce_loss_score").low > (0.7 if PACKAGED else 0.5)
    assert baseline.measure("dead_fraction").value < 0.1


def test_every_level_of_every_hsae_is_alive_and_contributes(place):
    for run in (1, 2, 3, 4, 5):
        views = results(place, run)
        for name, result in views.items():
            assert result.measure("dead_fraction").value < 0.2, (run, name)
            assert result.measure("explained_variance").low > 0, (run, name)
        if run >= 3:  # additive: the whole explains more than either level alone
            whole = views["sae"].measure("explained_variance")
            for level in ("level1", "level2"):
                assert whole.low > views[level].measure("explained_variance").high, (run, level)


def test_no_number_is_missing(place):
    count = 0
    for path in (place / "runs").glob("*/eval/core/*.json"):
        content = json.loads(path.read_text())
        assert not [
            value for category in content["eval_result_metrics"].values() for value in category.values() if value == -1
        ]
        result = read_core(path)
        undefined = [name for category in result.metrics.values() for name in category if result.metric(name) is None]
        assert undefined == [], (path, undefined)
        assert all(entry["value"] is not None for entry in content["hsae"]["measures"].values())
        count += 1
    assert count == 14


def test_a_second_call_finds_everything_there(place):
    done = subprocess.run(COMMAND, cwd=place.parent, capture_output=True, text=True, check=True)
    assert done.stdout.count("already trained") == 6 and "14 of 14 were there already" in done.stdout
