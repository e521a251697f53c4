"""`hsae eval all`, and `hsae cache build --suite`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TaskID

from hsae.cli import ravel
from hsae.cli.common import (
    AllOption,
    DeviceOption,
    PlanOption,
    RunOption,
    SaeOption,
    SeedsOption,
    SetOption,
    check_sae_options,
    named_runs,
    progress_bars,
    say,
)
from hsae.cli.evaluations import ForceOption, OutOption, Screen, summarise

if TYPE_CHECKING:
    from hsae.cache.suites.specs import Suite
    from hsae.train.config.plan import Plan

DrawsOption = Annotated[
    int,
    typer.Option(
        "--draws", min=1, max=1000, metavar="N", help="Seeds of the evaluation's own draws: what intervals span."
    ),
]


def every(
    run: RunOption = None,
    all_runs: AllOption = False,
    seeds: SeedsOption = 1,
    sae: SaeOption = None,
    plan: PlanOption = None,
    overrides: SetOption = None,
    out: OutOption = None,
    draws: DrawsOption = 5,
    force: ForceOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Core and every evaluation of the suite, unlearning and RAVEL where their stores are.

    One that fails does not stop the others; status 1 if any did.

    Example: hsae eval all --plan gemma-3-270m
    """
    from hsae.eval.harness.evaluate_all import evaluate_all, names_in_all
    from hsae.eval.harness.targets import Selection
    from hsae.train.config.plan import load_plan

    check_sae_options(sae, seeds, out)
    loaded = load_plan(plan, overrides or ())
    run = named_runs(loaded, run, all_runs, sae)
    selection = Selection(run=run, seeds=seeds, folders=sae or (), out=out)
    outcomes = evaluate_all(loaded, selection, draws=draws, force=force, device=device, listen=Screen)
    if failed := summarise(names_in_all(), outcomes):
        say(f"{failed} of {len(names_in_all())} evaluations failed")
        raise typer.Exit(1)


def _suite(name: str) -> "Suite":
    from hsae.cache.suites.specs import SUITES

    return next(suite for suite in SUITES if suite == name)


# ---- building ----------------------------------------------------------------------------------------------------


def build(plan: "Plan", suite: str, device: str, *, dry_run: bool) -> None:
    """Make the store of one suite, or of all (`hsae cache build --suite`)."""
    from hsae.cache.suites.build import build_suites
    from hsae.cache.suites.specs import SUITES
    from hsae.eval.probing.config import probe_spec

    _no_dry_run(dry_run)
    with _text_bars() as report:
        specs = [probe_spec(plan, name) for name in (SUITES if suite == "all" else (_suite(suite),))]
        paths = build_suites(specs, plan.cache.dir, device=device, progress=report, say=say)
    for spec, path in zip(specs, paths, strict=True):
        say(f"{spec.suite} store: ", (str(path), "bold"))


def build_ravel(plan: "Plan", device: str, *, dry_run: bool) -> None:
    """Make RAVEL's store (`hsae cache build --suite ravel`)."""
    from hsae.cache.suites.build import build_suites
    from hsae.eval.ravel.config import ravel_spec

    _no_dry_run(dry_run)
    with _text_bars() as report:
        (path,) = build_suites([ravel_spec(plan)], plan.cache.dir, device=device, progress=report, say=say)
    ravel.print_counts(plan)
    say("ravel store: ", (str(path), "bold"))


@contextmanager
def _text_bars() -> "Iterator[Callable[[str, int, int], None]]":
    """A progress bar for each set of texts."""
    with progress_bars("{task.description}", BarColumn(), MofNCompleteColumn(), "texts") as bars:
        tasks: dict[str, TaskID] = {}

        def report(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done)

        yield report


def _no_dry_run(dry_run: bool) -> None:
    from hsae.cache.errors import UserError

    if dry_run:
        raise UserError("--dry-run doesn't go with --suite: what the texts come to is known once they are read")
