"""The ablation table: judged on numbers whose answer is known, and collected from what evaluations wrote.

FIX A11: one seed gives no verdict.
"""

import json

import pytest
from places import GOLDEN_MODEL
from typer.testing import CliRunner

from hsae.cache.errors import UserError
from hsae.eval.ablation.results import read_table
from hsae.eval.ablation.significance import compare
from hsae.eval.ablation.table import COLUMNS, AblationTable, Cell, Component, Row
from hsae.eval.ablation.verdicts import judge
from hsae.eval.harness.result_files import read_result, write_result
from hsae.eval.harness.saebench_file import envelope_text, read_envelope
from hsae.train.config.plan import load_plan


def line(number, name, **cells):
    every = {column.key: Cell() for column in COLUMNS}
    given = {key: Cell(values=tuple(values), seeds=tuple(range(len(values)))) for key, values in cells.items()}
    return Row(number=number, name=name, cells=every | given, compared=every | given)


LINES = {
    "full": line(3, "full", explained_variance=[0.90, 0.91, 0.92], or_agreement=[0.50, 0.51, 0.52],
        composition_fvu=[0.3, 0.3, 0.3]),
    "no-composition": line(5, "no-composition", explained_variance=[0.95, 0.96, 0.97], or_agreement=[0.2, 0.21, 0.22],
        composition_fvu=[0.31, 0.5, 0.2]),
    "frozen-w": line(6, "frozen-w", or_agreement=[0.3, 0.31, 0.32]),
    "probe-w": line(7, "probe-w", or_agreement=[0.49, 0.52, 0.51]),
}  # fmt: skip


def sample(*values):
    return dict(enumerate(values))


def test_tests_are_scipys_and_corrected_by_holm():
    stats = pytest.importorskip("scipy.stats")
    one, other, far = [1.0, 2.0, 4.0], [4.0, 4.5, 7.0], [41.0, 42.5, 40.0, 43.0]
    found = compare({"near": (sample(*one), sample(*other)), "far": (sample(*one), sample(*far))})
    near, beyond = found["near"], found["far"]
    welch = stats.ttest_ind(one, other, equal_var=False)
    assert (near.welch.t, near.welch.df, near.welch.p) == pytest.approx((welch.statistic, welch.df, welch.pvalue))
    assert beyond.welch.p == pytest.approx(2 * stats.ttest_ind(one, far, equal_var=False).pvalue)
    paired = stats.ttest_rel(one, other)
    assert (near.paired.t, near.paired.df, near.paired.p) == pytest.approx((paired.statistic, 2, paired.pvalue))
    assert beyond.paired is None  # other seeds
    assert near.difference == pytest.approx(sum(one) / 3 - sum(other) / 3)


def test_needed_seeds_find_the_seen_difference_four_times_of_five():
    stats = pytest.importorskip("scipy.stats")
    one, other = [0.0, 1.0, 2.0], [1.5, 2.5, 3.5]
    needs = compare({"one": (sample(*one), sample(*other))})["one"].needs

    def power(n):  # of a t test of two samples of n with variance 1
        df, shift = 2 * n - 2, 1.5 * (n / 2) ** 0.5
        return stats.nct.sf(stats.t.isf(0.025, df), df, shift)

    assert power(needs) >= 0.79 > power(needs - 2)
    assert compare({"one": (sample(*one), sample(*one))})["one"].needs is None


def test_a_component_helps_hurts_or_there_is_no_evidence():
    (judged,), tests = judge([Component(name="composition loss", present="full", absent="no-composition")], LINES)
    verdicts = {effect.column: effect.verdict for effect in judged.effects}
    assert verdicts == {"explained_variance": "hurts", "or_agreement": "helps", "composition_fvu": "no evidence"}
    assert tests == 3
    assert judged.sentence == (
        "Composition loss (run 3 full against 5 no-composition): helps OR (+0.300, t 36.7, df 4.0, p < 0.0001); "
        "hurts EV (-0.050, t -6.1, df 4.0, p 0.0072); no evidence on FVU (needs 183 seeds)."
    )


def test_nothing_is_claimed_that_does_not_beat_the_controls():
    component = Component(
        name="composition loss", present="full", absent="no-composition", controls=("frozen-w", "probe-w")
    )
    (judged,), tests = judge([component], LINES)
    effect = next(effect for effect in judged.effects if effect.column == "or_agreement")
    assert (effect.verdict, effect.unproven, tests) == ("no evidence", ("probe-w",), 5)
    assert "is no better than probe-w on OR, so nothing is claimed there; no evidence on FVU" in judged.sentence


@pytest.mark.parametrize(("seeds", "said"), [(1, "one seed: no interval"), (2, "2 seeds")])
def test_fewer_than_three_seeds_give_no_verdict(seeds, said):
    lines = {
        name: line(n, name, explained_variance=[value + 0.01 * seed for seed in range(seeds)])
        for n, (name, value) in enumerate([("full", 0.9), ("batchtopk", 0.1)])
    }
    judgements, tests = judge([Component(name="hierarchy", present="full", absent="batchtopk")], lines)
    assert judgements[0].sentence == (
        f"Hierarchy (run 0 full against 1 batchtopk): no verdict on EV ({said}; needs 3 seeds or more)."
    )
    table = AblationTable(plan="p", seeds=seeds, rows=[], judgements=judgements, comparisons=tests)
    assert table.method == "No test was made: a verdict needs 3 seeds or more."
    assert "no evidence" not in table.markdown()


def test_numbers_that_never_vary_are_not_tested():
    lines = {
        name: line(n, name, explained_variance=[value] * 3) for n, (name, value) in enumerate([("a", 0.9), ("b", 0.1)])
    }
    (judged,), _ = judge([Component(name="hierarchy", present="a", absent="b")], lines)
    assert judged.sentence.endswith("no verdict on EV (no test: neither run varies over seeds).")


def test_ablate_says_before_compute_that_verdicts_need_scipy(tmp_path, monkeypatch):
    from hsae.cache import errors
    from hsae.cli.main import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(errors, "find_spec", lambda name: None if name == "scipy" else name)
    result = CliRunner().invoke(app, ["ablate", "--plan", "tiny", "--without", "unlearning"])
    assert isinstance(result.exception, errors.UserError)
    assert "the package scipy; run: pip install 'hsae[eval]'" in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_cells_show_spread_null_and_whether_the_map_was_fitted():
    column = next(column for column in COLUMNS if column.key == "or_agreement")
    assert Cell(values=(0.5, 0.7), nulls=(0.1, 0.1), fitted=True).text(column) == "0.600 ± 0.141 [0.100]*"
    assert Cell(values=(0.5,)).text(column) == "0.500"
    assert Cell().text(column) == ""
    table = AblationTable(plan="p", seeds=3, rows=list(LINES.values()), judgements=[], missing=["core of 3 full"])
    page = table.markdown()
    assert "| 3 full | 0.910 ± 0.010 | 0.300 ± 0.000 | 0.510 ± 0.010 |" in page
    assert "Not there, or of another model, text or store: core of 3 full." in page


def test_ablate_trains_and_evaluates_what_is_missing_and_answers(tmp_path, monkeypatch):
    from hsae.cli.main import app

    monkeypatch.chdir(tmp_path)
    command = [
        "ablate",
        "--plan",
        "tiny",
        "--run",
        "0,3,5",
        "--seeds",
        "1",
        "--without",
        "unlearning",
        "--without",
        "synthetic",
    ]
    command += ["--set", f"model.id={str(GOLDEN_MODEL)!r}", "--set", "train.tokens=20_000", "--device", "cpu"]
    first = CliRunner().invoke(app, command, env={"COLUMNS": "160"})
    assert first.exit_code == 0, first.output
    found = json.loads((tmp_path / "ablations" / "ablations.json").read_text())
    assert [(run["number"], len(run["measures"]["explained_variance"]["values"])) for run in found["runs"]] == [
        (0, 1), (3, 1), (5, 1),
    ]  # fmt: skip
    full = found["runs"][1]["measures"]
    assert full["composition_fvu"]["null"] is not None and full["composition_fvu"]["fitted"] is False
    assert found["runs"][2]["measures"]["composition_fvu"]["fitted"] is True
    assert found["missing"] == []
    assert "one seed: no interval; needs 3 seeds or more" in " ".join(first.output.split())
    assert "no evidence" not in first.output
    assert (
        "Composition loss (run 3 full against 5 no-composition):"
        in (tmp_path / "ablations" / "ablations.md").read_text()
    )
    assert (tmp_path / "ablations" / "ablations.png").read_bytes()[:4] == b"\x89PNG"
    again = CliRunner().invoke(app, command, env={"COLUMNS": "160"})
    assert again.exit_code == 0 and "already trained" in again.output
    assert json.loads((tmp_path / "ablations" / "ablations.json").read_text()) == found

    # FIX A7: results of other texts than the others' are neither averaged nor compared with them
    plan = load_plan("tiny", [f"model.id={str(GOLDEN_MODEL)!r}", "train.tokens=20_000"])
    runs = plan.select("0,3,5")

    def collected():
        return read_table(plan, runs, 1).missing

    assert collected() == []
    (core,) = (plan.run_dir(plan.runs[3]) / "eval" / "core").glob("*_eval_results.json")
    held = core.read_text()
    content = read_envelope(core, "")
    content["hsae"]["inputs"]["corpus"] = "0" * 64
    core.write_text(envelope_text(content))
    assert collected() == ["core of 3 full"]  # the store tells which text is the plan's
    (tmp_path / plan.cache.dir).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"are of different models or evaluation texts.*with: hsae eval co.* --seeds 1"):
        collected()
    core.write_text(held)
    assert collected() == []
    composition = plan.run_dir(plan.runs[5]) / "eval" / "composition.json"
    content = read_result(composition, "")
    content["inputs"]["read_from"] = "reconstruction rows"
    write_result(composition, content)
    with pytest.raises(
        UserError, match="composition of 3 full and composition of 5 no-composition are of different texts"
    ):
        collected()


def test_ablate_refuses_unknown_parts_before_anything_is_computed(tmp_path, monkeypatch):
    from hsae.cli.main import app

    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["ablate", "--plan", "tiny", "--without", "sleep"])
    assert isinstance(result.exception, UserError)
    assert str(result.exception) == "--without sleep: it must be one of core, composition, synthetic, unlearning"
    assert list(tmp_path.iterdir()) == []


def test_damaged_synthetic_results_are_told_before_anything_is_computed(tmp_path, monkeypatch):
    """FIX C3."""
    from hsae.cli.main import app

    monkeypatch.chdir(tmp_path)
    damaged = tmp_path / "ablations" / "synthetic" / "T2.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("{")
    result = CliRunner().invoke(app, ["ablate", "--plan", "tiny"])
    assert isinstance(result.exception, UserError) and "T2.json is not a result file" in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["ablations"]
