"""`hsae train`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich import get_console
from rich.table import Table

from hsae.cli.common import (
    AllOption,
    DeviceOption,
    PlanOption,
    ProfileOption,
    RunOption,
    SeedsOption,
    SetOption,
    error_console,
    profile,
    say,
)
from hsae.train.training.listener import ProgressBars, Result

if TYPE_CHECKING:
    from hsae.train.config.plan import Plan
    from hsae.train.config.run_config import RunConfig


def train(
    run: RunOption = None,
    all_runs: AllOption = False,
    seeds: SeedsOption = 1,
    plan: PlanOption = None,
    overrides: SetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from checkpoints where there are any.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away what the run directories hold.")] = False,
    device: DeviceOption = "auto",
    divide: Annotated[
        Literal["batch", "latents"],
        typer.Option("--divide", help="What several workers divide: every batch, or the latents of every level."),
    ] = "batch",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the plan and the store, show the runs, and stop.")
    ] = False,
    trace: ProfileOption = None,
) -> None:
    """Train runs of the plan from the cached activations; the language model is never loaded.

    All selected runs and seeds train in one pass over the cache, each exactly as if alone. Under torchrun or Slurm the
    workers share every batch or, for dictionaries that don't fit one device, the latents.

    Example: hsae train --run 3
    """
    from hsae.cache.errors import UserError
    from hsae.cache.launcher import share
    from hsae.train.config.plan import load_plan
    from hsae.train.parallel.workers import worker_group

    if (run is None) == (not all_runs):
        raise UserError("say which runs to train: --run 3, --run 0-5, --run baseline, or --all")
    with worker_group(share(), device) as workers:  # so that of several workers one tells what is wrong with the plan
        loaded = load_plan(plan, overrides or ())
        selected = list(loaded.runs.values()) if run is None else loaded.select(run)
        options = {"resume": resume, "restart": restart, "divide": divide, "dry_run": dry_run, "workers": workers}
        with profile(trace, "train"):
            status = train_on_screen(loaded, selected, seeds=seeds, device=device, **options)
    if status:
        raise typer.Exit(status)


def train_on_screen(plan: "Plan", runs: "Sequence[RunConfig]", **options: Any) -> int:
    """Call `train_runs` with these options, show how it goes, and return the exit status.

    1: a run failed. 130: Ctrl-C or SIGTERM stopped it, with checkpoints.
    """
    from hsae.train.runs.planned_runs import stop_on_signals, train_runs

    with _Screen() as screen, stop_on_signals(screen.tell_stop) as stop:
        results = train_runs(plan, runs, screen, should_stop=stop.is_set, **options)
    if any(result.status == "failed" for result in results):
        return 1
    return 130 if stop.is_set() or any(result.status == "stopped" for result in results) else 0


class _Screen(ProgressBars):
    """What is trained on what, a bar for every run, and how each ended."""

    has_started = False

    def __init__(self) -> None:
        super().__init__(get_console())

    def pass_started(self, plan: "Plan", runs: "Sequence[RunConfig]", seeds: int, place: str) -> None:
        """Show the runs."""
        from hsae.train.stores import common_texts

        self.has_started = True
        for text in common_texts(plan, ("eval",)):
            say(text, style="yellow")
        steps, batch_tokens = plan.train.steps, plan.train.batch_tokens
        each = f", {seeds} seeds each" if seeds > 1 else ""
        table = Table(title=f"plan {plan.name}: {steps:,} steps of {batch_tokens:,} tokens on {place}{each}")
        for column in ("run", "structure", "widths", "L0", "composition", "curriculum"):
            table.add_column(column)
        for config in runs:
            curriculum = config.curriculum if isinstance(config.curriculum, str) else f"{len(config.curriculum)} stages"
            table.add_row(
                f"{config.number} {config.name}",
                f"{config.structure}, {config.activation}",
                " + ".join(map(str, config.widths)),
                " + ".join(f"{value:g}" for value in config.l0),
                config.composition.mode,
                curriculum,
            )
        get_console().print(table)

    def tell_stop(self) -> None:
        """Say that a request to stop has come."""
        if self.has_started:  # of several workers, one
            error_console().print("stopping after this step; again to stop at once")

    def pass_ended(self, plan: "Plan", results: Sequence[Result]) -> None:
        """Say how the runs ended."""
        self.stop()
        for result in results:
            folder = plan.seeded(result.run.seed_index).run_dir(result.run.config)
            say(f"run {result.run.label}: {result.status} {result.detail} ", (str(folder), "dim"))
