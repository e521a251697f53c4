"""How far long work is: bars in a terminal or a notebook, a function of the caller's, or nothing."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class Step:
    """One report of how far work is."""

    task: str
    """What is being done, for example `train activations`."""
    done: int
    total: int
    unit: str = ""
    """What is counted."""
    tokens: int = 0
    """Tokens of one unit, where a speed in tokens tells something."""
    bytes: int = 0
    """Bytes of one unit."""


Progress = Callable[[Step], None]


def silent(step: Step) -> None:
    """Report nothing."""


@contextmanager
def shown(progress: bool | Progress) -> Iterator[Progress]:
    """What to call with each step: a function as it is; for True bars, where someone watches; for False nothing."""
    if callable(progress):
        yield progress
        return
    from rich.console import Console

    console = Console()
    if not progress or not (console.is_terminal or console.is_jupyter):
        yield silent
        return
    with bars(console) as report:
        yield report


@contextmanager
def bars(console: "Console") -> Iterator[Progress]:
    """Progress bars, one a task, with its speed since it began; without a terminal a line now and then."""
    from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn

    from hsae.cache.bars import Bars

    texts = (
        "{task.description}",
        "{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}",
        "{task.fields[speed]}",
    )
    task_column, count_column, speed_column = (TextColumn(text, markup=False) for text in texts)
    columns = (task_column, BarColumn(), count_column, TimeRemainingColumn(compact=True), speed_column)
    tasks: dict[str, tuple[TaskID, float, int]] = {}
    with Bars(*columns, console=console) as display:

        def report(step: Step) -> None:
            if step.task not in tasks:
                task = display.add_task(step.task, total=step.total, unit=step.unit, speed="")
                tasks[step.task] = (task, time.perf_counter(), step.done)
            task, since, first = tasks[step.task]
            speed = ""
            if step.tokens and step.done > first:
                rate = (step.done - first) / (time.perf_counter() - since)
                speed = f"{rate * step.tokens:,.0f} tokens/s  {rate * step.bytes / 1e9:.4f} GB/s"
            display.update(task, completed=step.done, speed=speed)

        yield report


def format_bytes(count: int | None) -> str:
    """A number of bytes for people; `?` for None."""
    return "?" if count is None else f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"
