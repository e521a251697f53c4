"""`hsae ablate`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from hsae.cli.common import DeviceOption, PlanOption, RunOption, SetOption, check_folder, console, say

if TYPE_CHECKING:
    from hsae.eval.ablation.table import AblationTable
    from hsae.train.config.plan import Plan
    from hsae.train.config.run_config import RunConfig

FORGETTING = (0, 3, 5, 11, 12)
PARTS = ("core", "composition", "synthetic", "unlearning")


def ablate(
    run: RunOption = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, max=1000, metavar="N", help="Seeds of every run.")] = 3,
    plan: PlanOption = None,
    overrides: SetOption = None,
    without: Annotated[
        list[str] | None,
        typer.Option("--without", metavar="PART", help=f"Leave out {', '.join(PARTS)}. Repeatable."),
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
    """Does the hierarchy help, and which component is responsible? Trains and evaluates what is missing of the plan, and answers.

    One table of all runs over several seeds, each hierarchy number beside its null, and a plain sentence for every component:
    helps, hurts, or no evidence and how many seeds it would take (Welch's t test, corrected for the number of comparisons; three seeds
    or more). A stopped command goes on where it was.

    Example: hsae ablate --plan study --run 0-13
    """
    from hsae.cache.errors import UserError, need
    from hsae.eval.ablation.significance import MIN_SEEDS
    from hsae.train.config.plan import load_plan

    left_out = set(without or ())
    if unknown := left_out - set(PARTS):
        raise UserError(f"--without {sorted(unknown)[0]}: it must be one of {', '.join(PARTS)}")
    check_folder(out)
    loaded = load_plan(plan, overrides or ())
    selected = loaded.select(run) if run is not None else list(loaded.runs.values())
    numbers = ",".join(str(config.number) for config in selected)
    forgetting = loaded.select(unlearning_run) if unlearning_run is not None else []
    if unlearning_run is None and "unlearning" not in left_out:
        forgetting = [config for config in selected if config.number in FORGETTING]
        if not forgetting:
            raise UserError(
                f"none of the runs {', '.join(map(str, FORGETTING))} is among those selected; name others with --unlearning-run, "
                "or leave it out with --without unlearning"
            )
    if strange := [f"{config.number} {config.name}" for config in forgetting if config not in selected]:
        raise UserError(
            f"--unlearning-run {unlearning_run}: run {strange[0]} is not among those selected with --run {run}"
        )
    if "unlearning" in left_out and (unlearning_run is not None or unlearning_seeds is not None):
        raise UserError("--unlearning-run and --unlearning-seeds don't go with --without unlearning")
    if unlearning_seeds is not None and unlearning_seeds > seeds:
        raise UserError(f"--unlearning-seeds {unlearning_seeds} is more than --seeds {seeds}")
    if seeds >= MIN_SEEDS:
        need("the tests behind ablate's verdicts", "scipy", "eval")
    need("ablations.png", "matplotlib", "report")

    from hsae.cli import cache, synthetic
    from hsae.cli.evaluations import callback_of
    from hsae.eval.synthetic.compared_runs import NUMBERS
    from hsae.eval.synthetic.tiers import read_results

    held = out / "synthetic" / "T2.json"
    if held.is_file():
        read_results(held)  # raises UserError for a damaged one
    common: dict[str, Any] = {"plan": plan, "overrides": overrides}
    arms = ",".join(str(config.number) for config in selected if config.number in NUMBERS)
    stages: dict[str, Callable[[], object]] = {
        "cache": lambda: cache.build(**common, device=device),
        "train": lambda: _train(loaded, selected, seeds=seeds, device=device),
        "core": lambda: callback_of("core")(run=numbers, seeds=seeds, whole=True, device=device, **common),
        "composition": lambda: callback_of("composition")(run=numbers, seeds=seeds, device=device, **common),
        "synthetic": lambda: synthetic.synthetic(
            tier="T2", run=arms, seeds=seeds, out=out / "synthetic", device=device
        ),
        "unlearning": lambda: callback_of("unlearning")(
            run=",".join(str(config.number) for config in forgetting),
            seeds=unlearning_seeds or seeds,
            device=device,
            **common,
        ),
    }
    if not arms:
        left_out.add("synthetic")
    for name, stage in stages.items():
        if name not in left_out:
            console.rule(name)
            if name == "unlearning":
                cache.build(suite="unlearning", device=device, **common)
            stage()

    from hsae.cache.files import write_atomically
    from hsae.eval.ablation.figure import save_figure
    from hsae.eval.ablation.results import read_table

    table = read_table(loaded, selected, seeds, read_results(held) if held.is_file() else None)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(
        out / "ablations.json", lambda path: path.write_text(json.dumps(table.to_dict(), indent=1, allow_nan=False))
    )
    write_atomically(out / "ablations.md", lambda path: path.write_text(table.markdown()))
    save_figure(table, out / "ablations.png")
    console.rule("ablations")
    _print(table)
    say("results in ", (str(out), "bold"), ": ablations.md, ablations.json, ablations.png")


def _train(plan: "Plan", runs: "list[RunConfig]", *, seeds: int, device: str) -> None:
    from hsae.cli.train import train_on_screen

    if status := train_on_screen(plan, runs, seeds=seeds, resume=True, device=device):
        raise typer.Exit(status)


def _print(table: "AblationTable") -> None:
    from hsae.eval.ablation.table import COLUMNS

    for kind in dict.fromkeys(column.kind for column in COLUMNS):
        columns = [column for column in table.columns if column.kind == kind]
        if not columns:
            continue
        drawn = Table(title=kind, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        drawn.add_column("run", no_wrap=True)
        for column in columns:
            drawn.add_column(column.title, justify="right")
        for row in table.rows:
            cells = [row.cells[column.key].text(column) for column in columns]
            if any(cells):
                drawn.add_row(row.label, *cells)
        console.print(drawn)
    console.print(
        f"mean ± standard deviation over {table.seeds} seeds, [the same of a map without structure], * of a map fitted to the codes\n"
    )
    for judgement in table.judgements:
        console.print(f"• {judgement.sentence}")
    console.print(f"\n{table.method}")
    if table.missing:
        say(f"not there, or of another model, text or store: {', '.join(table.missing)}", style="yellow")
