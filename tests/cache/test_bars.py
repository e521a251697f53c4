"""Progress where there is no terminal."""

import io
import re

import pytest
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from hsae.cache.bars import LOG_EVERY, Bars


@pytest.fixture
def clock():
    return {"now": 0.0}


def shown_by(clock, steps, *, terminal=False):
    """What 100 steps, each of so many seconds, print before the bars stop."""
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=terminal)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
    )
    bars = Bars(*columns, console=console, get_time=lambda: clock["now"], auto_refresh=False)
    task = bars.add_task("train activations [x]", total=100)
    for done in range(1, 101):
        clock["now"] += steps
        bars.update(task, completed=done)
    return out.getvalue()


def test_a_line_every_thirty_seconds_and_one_at_the_end(clock):
    lines = shown_by(clock, 1.0).splitlines()
    assert len(lines) == 100 // LOG_EVERY + 1
    assert all(re.match(r"\d\d:\d\d:\d\d train activations \[x\]", line) for line in lines)
    assert ["30/100" in lines[0], "100/100" in lines[-1]] == [True, True]
    assert re.search(r"30/100 +01:\d\d", lines[0])  # and the time that is left


def test_short_work_prints_no_line(clock):
    assert shown_by(clock, 0.1) == ""


def test_in_a_terminal_bars_alone_tell(clock):
    assert not re.search(r"\d\d:\d\d:\d\d train", shown_by(clock, 1.0, terminal=True))
