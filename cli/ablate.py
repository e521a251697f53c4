"""`hsae ablate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import get_console
from rich.box import SIMPLE_HEAD
from rich.table import Table

from hsae.cli.common import DeviceOption, PlanOption, RunOption, SetOption, check_folder, say

if TYPE_CHECKING:
    from hsae.eval.ablation.table import AblationTable


def ablate(
    run: RunOption = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, max=1000, metavar="N", help="Seeds of every run.")] = 3,
    plan: PlanOption = None,
    overrides: SetOption = None,
    without: Annotated[
        list[str] | None,
        typer.Option(
            "--without", metavar="PART", help="Leave out core, composition, synthetic, unlearning. Repeatable."
        ),
    ] = None,
    unlearning_run: Annotated[
        str | None,
        typer.Option(
            "--unlearning-run",
            metavar="RUNS",
            help="The runs that unlearning is measured on; default 0, 3, 5, 11 and 12 where they are among them.",
        ),
    ] = None,
    unlearning_seeds: Annotated[
        int | None, typer.Option("--unlearning-seeds", min=1, max=1000, metavar="N", help="Their seeds; default all.")
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", help="Folder for ablations.json, ablations.md and ablations.png.")
    ] = Path("ablations"),
    device: DeviceOption = "auto",
) -> None:
    """Does the hierarchy help, and which component is responsible? Trains and evaluates what is missing, and answers.

    One table of all runs over several seeds, each hierarchy number beside its null, and a plain sentence for every
    component: helps, hurts, or no evidence and how many seeds it would take (Welch's t test, corrected for the number
    of comparisons; three seeds or more). A stopped command goes on where it was.

    Example: hsae ablate --plan study --run 0-13
    """
    from hsae.cli.pipeline import ShownPipeline
    from hsae.eval.ablation.ablations import run_ablations
    from hsae.train.config.plan import load_plan

    check_folder(out)
    table = run_ablations(
        load_plan(plan, overrides or ()),
        run,
        seeds=seeds,
        without=without or (),
        unlearning_run=unlearning_run,
        unlearning_seeds=unlearning_seeds,
        out=out,
        pipeline=ShownPipeline(device),
    )
    get_console().rule("ablations")
    _print(table)
    say("results in ", (str(out), "bold"), ": ablations.md, ablations.json, ablations.png")


def _print(table: "AblationTable") -> None:
    from hsae.eval.ablation.table import COLUMNS

    for kind in dict.fromkeys(column.kind for column in COLUMNS):
        columns = [column for column in table.columns if column.kind == kind]
        if not columns:
            continue
        shown = Table(title=kind, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        shown.add_column("run", no_wrap=True)
        for column in columns:
            shown.add_column(column.title, justify="right")
        for row in table.rows:
            cells = [row.cells[column.key].text(column) for column in columns]
            if any(cells):
                shown.add_row(row.label, *cells)
        get_console().print(shown)
    get_console().print(
        f"mean ± standard deviation over {table.seeds} seeds, [the same of a map without structure], "
        "* of a map fitted to the codes\n"
    )
    for judgement in table.judgements:
        get_console().print(f"• {judgement.sentence}")
    get_console().print(f"\n{table.method}")
    if table.missing:
        say(f"not there, or of another model, text or store: {', '.join(table.missing)}", style="yellow")
