"""`hsae train`."""

import contextlib
import signal
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn
from rich.table import Table

from hsae.cli.common import (
    AllOption,
    DeviceOption,
    PlanOption,
    RunOption,
    SeedsOption,
    SetOption,
    console,
    errors,
    progress_bars,
    say,
    tell_common_text,
)

if TYPE_CHECKING:
    from hsae.train.config.plan import Plan
    from hsae.train.config.run_config import RunConfig
    from hsae.train.training.trainer import Divide
    from hsae.train.training.workers import Workers


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
) -> None:
    """Train runs of the plan from the cached activations; the language model is never loaded.

    All selected runs train in one pass over the cache, each exactly as if alone; every further seed is a pass of its own. Under
    torchrun or Slurm the workers share every batch or, for dictionaries that don't fit one device, the latents.

    Example: hsae train --run 3
    """
    from hsae.cache.errors import UserError
    from hsae.cache.launcher import share

    if (run is None) == (not all_runs):
        raise UserError("say which runs to train: --run 3, --run 0-5, --run baseline, or --all")
    if resume and restart:
        raise UserError("--resume and --restart exclude each other")
    with contextlib.ExitStack() as stack:
        workers = None
        if (own := share()).world > 1:
            from hsae.train.training.workers import joined

            workers = stack.enter_context(joined(own, device))
            console.quiet = not workers.leads
        status = _train(run, seeds, plan, overrides, resume, restart, device, divide, dry_run, workers)
    if status:
        raise typer.Exit(status)


def _train(
    run: str | None,
    seeds: int,
    plan: str | None,
    overrides: list[str] | None,
    resume: bool,
    restart: bool,
    device: str,
    divide: "Divide",
    dry_run: bool,
    workers: "Workers | None",
) -> int:
    """Train, and return the exit status; `workers` is None without a launcher."""
    from hsae.train.config.plan import load_plan

    loaded = load_plan(plan, overrides or ())
    selected = list(loaded.runs.values()) if run is None else loaded.select(run)

    from hsae.cache.device import pick_device
    from hsae.cache.reading.store import ActivationStore
    from hsae.train.training.trainer import check
    from hsae.train.training.trainer import train as train_runs
    from hsae.train.training.workers import ALONE

    workers = workers or ALONE
    store = ActivationStore.of(loaded.store("train"), loaded.cache.dir)
    check(loaded, selected, store, workers.world, divide)
    if workers.leads:
        tell_common_text(loaded, ("eval",))
    place = pick_device(device) if workers.world == 1 else f"{workers.world} workers, {pick_device(device)}"
    table = Table(
        title=f"plan {loaded.name}: {loaded.train.steps:,} steps of {loaded.train.batch_tokens:,} tokens on {place}"
    )
    for column in ("run", "structure", "widths", "L0", "composition", "curriculum"):
        table.add_column(column)
    for config in selected:
        curriculum = config.curriculum if isinstance(config.curriculum, str) else f"{len(config.curriculum)} stages"
        widths, l0 = " + ".join(map(str, config.widths)), " + ".join(f"{value:g}" for value in config.l0)
        table.add_row(
            f"{config.number} {config.name}",
            f"{config.structure}, {config.activation}",
            widths,
            l0,
            config.composition.mode,
            curriculum,
        )
    console.print(table)
    if dry_run:
        return 0
    results = []
    with _StopFlag(workers.leads) as stop:
        for seeded in (loaded.seeded(index) for index in range(seeds)):
            with _Screen(seeded) as screen:
                ended = train_runs(
                    seeded,
                    selected,
                    screen,
                    device=device,
                    resume=resume,
                    restart=restart,
                    should_stop=stop.wished,
                    workers=workers,
                    divide=divide,
                )
            for result in ended:
                say(
                    f"run {seeded.label(result.run)}: {result.status} {result.detail} ",
                    (str(seeded.run_dir(result.run)), "dim"),
                )
            results += ended
            if workers.any(stop.asked):
                stop.asked = True
                break
    if any(result.status == "failed" for result in results):
        return 1
    return 130 if stop.asked else 0


class _StopFlag:
    """Turns the first Ctrl-C or SIGTERM into a wish to stop after the current step."""

    def __init__(self, tells: bool) -> None:
        self.asked, self.tells = False, tells

    def __enter__(self) -> "_StopFlag":
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def wished(self) -> bool:
        """Whether someone wants it to stop."""
        return self.asked

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if self.tells:
            errors.print("stopping after this step; again to stop at once")

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class _Screen:
    """One progress bar a run: loss, explained variance, L0 and dead share of each level, speed, data-loading share."""

    def __init__(self, plan: "Plan") -> None:
        self.plan = plan
        self.progress = progress_bars(
            "{task.description}",
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            "{task.fields[text]}",
        )
        self.tasks: dict[int, Any] = {}

    def __enter__(self) -> "_Screen":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def started(self, run: "RunConfig", step: int, steps: int) -> None:
        """Add the run's bar."""
        self.tasks[run.number] = self.progress.add_task(self.plan.label(run), total=steps, completed=step, text="")

    def metrics(self, run: "RunConfig", metrics: dict[str, Any]) -> None:
        """Move the run's bar."""
        l0 = "/".join("-" if value is None else f"{value:.0f}" for value in metrics["l0"])
        dead = "/".join(f"{value:.0%}" for value in metrics["dead"])
        text = f"loss {metrics['loss']:.3f}  EV {metrics['explained_variance']:.3f}  L0 {l0}  dead {dead}"
        if metrics["time"]:
            text += f"  {metrics['time']['tokens_per_s']:,.0f} tok/s  data {metrics['time']['data_loading_share']:.0%}"
        self.progress.update(self.tasks[run.number], completed=metrics["step"], text=text)

    def warning(self, run: "RunConfig", message: str) -> None:
        """Print a warning above the bars."""
        say(f"run {self.plan.label(run)}: {message}", style="yellow")
