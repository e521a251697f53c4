"""`hsae plan`: show, keys, check."""

import json
from typing import Annotated

import typer
from rich import get_console
from rich.table import Table

from hsae.cli.cache import build_on_screen
from hsae.cli.common import DeviceOption, JsonOption, PlanOption, SetOption, say

app = typer.Typer(no_args_is_help=True)


@app.command()
def show(plan: PlanOption = None, overrides: SetOption = None, as_json: JsonOption = False) -> None:
    """Print a plan as one TOML file: with what it extends and what --set says, without the defaults of other keys.

    Example: hsae plan show --plan gemma-3-270m --set cache.train.rows=2000 > hsae.toml
    """
    import tomli_w

    from hsae.train.config.plan import planned_tables

    _, tables = planned_tables(plan, overrides or ())
    typer.echo(json.dumps(tables, indent=2) if as_json else tomli_w.dumps(tables), nl=as_json)


@app.command()
def keys(
    prefix: Annotated[str, typer.Argument(metavar="[KEY]", help="A table or a key, for example cache.train.")] = "",
    as_json: JsonOption = False,
) -> None:
    """List the keys that a plan may have: what each holds, its default and what it means.

    A key of [runs.N] may also stand in [train], for all runs.

    Example: hsae plan keys cache.train
    """
    from dataclasses import asdict

    from hsae.train.config.reference import plan_keys

    found = plan_keys(prefix.strip())
    if as_json:
        return typer.echo(json.dumps([asdict(key) for key in found], indent=2))
    for key in found:
        default = "must be given" if key.default is None else key.default
        say((key.name, "bold"), f" = {default}   ({key.holds})")
        say(f"    {key.meaning}", style="dim")


@app.command()
def check(plan: PlanOption = None, overrides: SetOption = None, device: DeviceOption = "auto") -> None:
    """Check a plan and its text without computing anything, and show how far its stores and runs are.

    Example: hsae plan check --plan gemma-3-270m
    """
    from hsae.train.config.plan import load_plan
    from hsae.train.runs.run_directory import describe
    from hsae.train.training.loop import check_run

    loaded = load_plan(plan, overrides or ())
    for run in loaded.runs.values():
        check_run(run, loaded.train, where=f"run {run.number}", tokens="train.tokens")
    build_on_screen(loaded, ("eval", "train"), device, dry_run=True)
    table = Table("run", "state", "structure", "widths", "L0")
    for run in loaded.runs.values():
        widths, l0 = (" + ".join(f"{value:g}" for value in values) for values in (run.widths, run.l0))
        table.add_row(loaded.label(run), describe(loaded, run), f"{run.structure}, {run.activation}", widths, l0)
    get_console().print(table)
    say(f"{loaded.source} is sound: {loaded.train.steps:,} steps of {loaded.train.batch_tokens:,} tokens a run")
