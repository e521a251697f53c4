"""Who is told how training goes. Light: neither torch nor numpy is imported here."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from hsae.cache.bars import Bars

if TYPE_CHECKING:
    from hsae.train.config.plan import Plan
    from hsae.train.config.run_config import RunConfig

Status = Literal["trained", "already trained", "stopped", "failed"]


@dataclass(frozen=True, kw_only=True)
class SeededRun:
    """A run of a plan, with one of its seeds."""

    config: "RunConfig"
    seed_index: int = 0
    """0 for the plan's own seed."""

    @property
    def number(self) -> int:
        """The run's number in the plan."""
        return self.config.number

    @property
    def label(self) -> str:
        """`3 full`, `3 full seed 1`."""
        seed = f" seed {self.seed_index}" if self.seed_index else ""
        return f"{self.config.number} {self.config.name}{seed}"


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a run ended."""

    run: SeededRun
    status: Status
    detail: str = ""


class Listener:
    """Hears how runs train and does nothing; a subclass overrides what it wants to hear."""

    def pass_started(self, plan: "Plan", runs: "Sequence[RunConfig]", seeds: int, place: str) -> None:
        """All has been checked, and runs of a plan begin, each with so many seeds, on `place`, in words."""

    def started(self, run: SeededRun, step: int, steps: int) -> None:
        """A run begins, or goes on, at `step` of `steps`."""

    def metrics(self, run: SeededRun, metrics: dict[str, Any]) -> None:
        """A line of metrics was made, as docs/metrics.md describes it."""

    def warning(self, run: SeededRun, message: str) -> None:
        """Something is wrong with a run."""

    def pass_ended(self, plan: "Plan", results: Sequence[Result]) -> None:
        """All runs of the pass have ended."""


class ProgressBars(Listener):
    """One progress bar a run: loss, explained variance, L0 and dead share of each level, speed, data-loading share."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, markup=False, emoji=False)
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Leave the bars as they are; the next run to start begins new ones."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def started(self, run: SeededRun, step: int, steps: int) -> None:
        """Add the run's bar."""
        if self._bars is None:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=16),
                MofNCompleteColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[text]}", markup=False),
            )
            self._bars, self._tasks = Bars(*columns, console=self.console), {}
            self._bars.start()
        self._tasks[run.label] = self._bars.add_task(run.label, total=steps, completed=step, text="")

    def metrics(self, run: SeededRun, metrics: dict[str, Any]) -> None:
        """Move the run's bar."""
        l0 = "/".join("-" if value is None else f"{value:.0f}" for value in metrics["l0"])
        dead = "/".join(f"{value:.0%}" for value in metrics["dead"])
        text = f"loss {metrics['loss']:.3f}  EV {metrics['explained_variance']:.3f}  L0 {l0}  dead {dead}"
        if metrics["time"]:
            text += f"  {metrics['time']['tokens_per_s']:,.0f} tok/s  data {metrics['time']['data_loading_share']:.0%}"
        if self._bars is not None:
            self._bars.update(self._tasks[run.label], completed=metrics["step"], text=text)

    def warning(self, run: SeededRun, message: str) -> None:
        """Print a warning above the bars."""
        self.console.print(Text(f"run {run.label}: {message}", style="yellow"), soft_wrap=True)
