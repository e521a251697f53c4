"""`hsae report`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hsae.cli.common import AllOption, PlanOption, RunOption, SetOption, check_folder, named_runs, say
from hsae.cli.evaluations import Screen

if TYPE_CHECKING:
    from hsae.train.config.plan import Plan
    from hsae.train.config.run_config import RunConfig

MOST_WARNINGS = 12


def report(
    run: RunOption = None,
    all_runs: AllOption = False,
    plan: PlanOption = None,
    overrides: SetOption = None,
    compare: Annotated[
        list[Path] | None,
        typer.Option(
            "--compare",
            metavar="FILE",
            help="A core result written by SAEBench, old or new, as a further row. Repeatable.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for index.html, report.md and summary.png.")] = Path(
        "report"
    ),
) -> None:
    """Put the runs side by side in one self-contained HTML page and a Markdown table.

    Example: hsae report --compare other_eval_results.json
    """
    from hsae.train.config.plan import load_plan

    check_folder(out)
    loaded = load_plan(plan, overrides or ())
    named_runs(loaded, run, all_runs)
    report_on_screen(loaded, None if run is None else loaded.select(run), out, compare or ())


def report_on_screen(plan: "Plan", runs: "Sequence[RunConfig] | None", out: Path, compare: Sequence[Path] = ()) -> None:
    """Write the report, and say what is missing and where it is."""
    from hsae.eval.report.page import write_report

    with _Screen("report") as screen:
        path = write_report(plan, runs, out, compare=compare, listener=screen)
    if screen.warnings > MOST_WARNINGS:
        say(f"and {screen.warnings - MOST_WARNINGS} more such lines, which are in the page", style="yellow")
    say("report: ", (str(path), "bold"), f", table: {path.with_name('report.md')}")


class _Screen(Screen):
    """Shows the first warnings only."""

    warnings = 0

    def warn(self, text: str) -> None:
        """Print a line that stands out, if there have been few."""
        self.warnings += 1
        if self.warnings <= MOST_WARNINGS:
            super().warn(text)
