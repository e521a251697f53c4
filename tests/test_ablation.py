"""The ablation table: judged on numbers whose answer is known, and collected from what evaluations wrote."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hsae.eval.report.ablation import COLUMNS, Ablations, Cell, Component, Line, judge, markdown, text, z_score

GOLDEN_MODEL = Path(__file__).parent / "golden" / "model"


def line(number, name, **cells):
    every = {column.key: Cell() for column in COLUMNS}
    given = {key: Cell(values=tuple(values)) for key, values in cells.items()}
    return Line(number=number, name=name, cells=every | given, compared=every | given)


LINES = {
    "full": line(3, "full", explained_variance=[0.90, 0.91, 0.92], or_agreement=[0.50, 0.51, 0.52], composition_fvu=[0.3, 0.3, 0.3]),
    "no-composition": line(5, "no-composition", explained_variance=[0.95, 0.96, 0.97], or_agreement=[0.2, 0.21, 0.22], composition_fvu=[0.31, 0.5, 0.2]),
    "frozen-w": line(6, "frozen-w", or_agreement=[0.3, 0.31, 0.32]),
    "probe-w": line(7, "probe-w", or_agreement=[0.49, 0.52, 0.51]),
}  # fmt: skip


def test_z_is_the_difference_of_means_in_standard_errors():
    one, other = Cell(values=(1.0, 2.0, 3.0)), Cell(values=(4.0, 4.0, 7.0))
    assert z_score(one, other) == pytest.approx((2.0 - 5.0) / ((1.0 + 3.0) / 3) ** 0.5)
    assert z_score(one, Cell(values=(4.0,))) is None
    assert z_score(Cell(values=(1.0, 1.0)), Cell(values=(1.0, 1.0))) is None


def test_a_component_helps_hurts_or_there_is_no_evidence():
    judged = judge(Component(name="composition loss", present="full", absent="no-composition"), LINES)
    verdicts = {effect.column: effect.verdict for effect in judged.effects}
    assert verdicts == {"explained_variance": "hurts", "or_agreement": "helps", "composition_fvu": "no evidence"}
    assert judged.sentence == (
        "Composition loss (run 3 full against 5 no-composition): helps OR (+0.300, 36.7 σ); hurts EV (-0.050, 6.1 σ); no evidence on FVU."
    )


def test_nothing_is_claimed_that_does_not_beat_the_controls():
    component = Component(
        name="composition loss", present="full", absent="no-composition", controls=("frozen-w", "probe-w")
    )
    judged = judge(component, LINES)
    effect = next(effect for effect in judged.effects if effect.column == "or_agreement")
    assert (effect.verdict, effect.unproven) == ("no evidence", ("probe-w",))
    assert judged.sentence == (
        "Composition loss (run 3 full against 5 no-composition): hurts EV (-0.050, 6.1 σ); "
        "is no better than probe-w on OR, so nothing is claimed there; no evidence on FVU."
    )


def test_one_seed_is_no_evidence():
    lines = {
        name: line(n, name, explained_variance=[value])
        for n, (name, value) in enumerate([("full", 0.9), ("batchtopk", 0.1)])
    }
    judged = judge(Component(name="hierarchy", present="full", absent="batchtopk"), lines)
    assert judged.sentence == "Hierarchy (run 0 full against 1 batchtopk): no evidence at 3 σ for any effect (EV)."


def test_cells_show_spread_null_and_whether_the_map_was_fitted():
    column = next(column for column in COLUMNS if column.key == "or_agreement")
    assert text(Cell(values=(0.5, 0.7), nulls=(0.1, 0.1), fitted=True), column) == "0.600 ± 0.141 [0.100]*"
    assert text(Cell(values=(0.5,)), column) == "0.500"
    assert text(Cell(), column) == ""
    table = Ablations(plan="p", seeds=3, lines=list(LINES.values()), judgements=[], missing=["core of 3 full"])
    page = markdown(table)
    assert "| 3 full | 0.910 ± 0.010 | 0.300 ± 0.000 | 0.510 ± 0.010 |" in page
    assert "Not there: core of 3 full." in page


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
        "2",
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
        (0, 2), (3, 2), (5, 2),
    ]  # fmt: skip
    full = found["runs"][1]["measures"]
    assert full["composition_fvu"]["null"] is not None and full["composition_fvu"]["fitted"] is False
    assert found["runs"][2]["measures"]["composition_fvu"]["fitted"] is True
    assert found["missing"] == []
    assert (
        "Composition loss (run 3 full against 5 no-composition):"
        in (tmp_path / "ablations" / "ablations.md").read_text()
    )
    assert (tmp_path / "ablations" / "ablations.png").read_bytes()[:4] == b"\x89PNG"
    again = CliRunner().invoke(app, command, env={"COLUMNS": "160"})
    assert again.exit_code == 0 and "already trained" in again.output
    assert json.loads((tmp_path / "ablations" / "ablations.json").read_text()) == found


def test_ablate_refuses_unknown_parts_before_anything_is_computed(tmp_path, monkeypatch):
    from hsae.cache.errors import UserError
    from hsae.cli.main import app

    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["ablate", "--plan", "tiny", "--without", "sleep"])
    assert isinstance(result.exception, UserError)
    assert str(result.exception) == "--without sleep: it must be one of core, composition, synthetic, unlearning"
    assert list(tmp_path.iterdir()) == []
