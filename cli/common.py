"""Options that several commands share, and all that they print with.

Text is printed as it is, square brackets included: styles are given beside it, so no name can vanish or break a table.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import rich
import typer
from rich import get_console
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from hsae.cache.bars import Bars

if TYPE_CHECKING:
    from hsae.train.config.plan import Plan


def use_plain_console(**settings: Any) -> None:
    """Let rich's console, which all commands print to, print text as it is; further settings are rich's."""
    rich.reconfigure(highlight=False, markup=False, emoji=False, **settings)


def error_console() -> Console:
    """What prints to stderr."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def say(*parts: str | tuple[str, str], style: str = "") -> None:
    """Print one line, however long it is. A part is text, or text and its style."""
    get_console().print(Text.assemble(*parts, style=style), soft_wrap=True)


def one_line(error: BaseException) -> str | None:
    """What ended a command, if that is the user's, the machine's or the network's doing; None for a bug."""
    from hsae.cache.errors import UserError

    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return _failed_call(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for this
        return "the GPU is out of memory; lower train.batch_tokens, or train fewer runs at once"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error)):
        advice = "lower train.batch_tokens, or train fewer runs at once"
        return f"the machine is out of memory; {advice} ({_first_line(error)})"
    return None


def _failed_call(error: OSError) -> str:
    """The file if it is known, and else what to look at."""
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    said = f"{' -> '.join(names)}: {error.strerror}" if names else _first_line(error)
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{said}; too many files are open at once: raise the limit with `ulimit -n 65536`"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = "" if names else "; of cache.dir, train.dir, --out, $HSAE_HOME and the temporary folder one is full"
        return f"{said}{where}; make room (`df -h` shows where), and the same command goes on"
    if isinstance(error, FileExistsError | NotADirectoryError):
        return f"{said}; a file is where a folder must be"
    if not names and error.errno is not None and type(error) is OSError:  # and not one of the network's
        return f"{said} (the system names no file; `ulimit -a` and `df -h` show common causes)"
    return said


def _first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def progress_bars() -> Bars:
    """A bar for each task, with what is done of it and the time that is left."""
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()
    return Bars(*columns, TimeRemainingColumn(compact=True), console=get_console())


PlanOption = Annotated[
    str | None,
    typer.Option(
        "--plan", metavar="NAME|FILE", help="Packaged plan or TOML file; default ./hsae.toml, else gemma-2-2b."
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a value of the plan, e.g. --set cache.train.rows=2000. Repeatable."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
RunOption = Annotated[
    str | None, typer.Option("--run", metavar="RUNS", help="Runs by number or name: 3, 0-5, baseline, or a list 0,3.")
]
AllOption = Annotated[
    bool, typer.Option("--all", help="Every run of the plan (default of evaluations: those that are trained).")
]
SaeOption = Annotated[
    list[Path] | None,
    typer.Option("--sae", metavar="FOLDER", help="A SAELens folder to evaluate instead of runs. Repeatable."),
]
SeedsOption = Annotated[
    int,
    typer.Option(
        "--seeds",
        min=1,
        max=1000,
        metavar="N",
        help="Seeds train.seed to train.seed + N - 1; seed i lies in <train.dir>/seed<i>.",
    ),
]
ProfileOption = Annotated[
    Path | None,
    typer.Option(
        "--profile", metavar="FOLDER", help="Trace a few steps into this folder, and say where their time goes."
    ),
]


@contextmanager
def profile(folder: Path | None, command: str) -> Iterator[None]:
    """Trace what is done meanwhile, if there is a folder for it, and show where its time went."""
    if folder is None:
        yield
        return
    from hsae.cache.profiling import profiled

    with profiled(folder, command) as summaries:
        yield
    for summary in summaries:
        machine = "GPU" if summary.on_gpu else "processor"
        table = Table(title=f"{summary.phase}: {summary.steps} steps on a {machine}", box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("time in")
        table.add_column("ms a step", justify="right")
        table.add_column("share", justify="right")
        for kind, ms in summary.ms.items():
            table.add_row(kind, f"{ms:,.2f}", f"{ms / summary.step_ms:.0%}")
        table.add_row("all", f"{summary.step_ms:,.2f}", "100%")
        get_console().print(table)
        say("trace: ", (str(summary.trace), "bold"))
    if not summaries:
        say("--profile: too few steps for a trace", style="yellow")


def check_folder(folder: Path) -> None:
    """Refuse a folder that results can't be written to, before they are computed. Raises UserError."""
    from hsae.cache.errors import UserError

    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"--out {folder}: {nearest} is not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"--out {folder}: {nearest} may not be written to")


def named_runs(plan: "Plan", run: str | None, all_runs: bool, sae: list[Path] | None = None) -> str | None:
    """The runs that the options name, with --all every one; None if they name none.

    Raises UserError if options exclude each other, or the plan has no such run.
    """
    from hsae.cache.errors import UserError

    used = [name for name, value in {"--run": run is not None, "--all": all_runs, "--sae": sae}.items() if value]
    if len(used) > 1:
        raise UserError(f"{' and '.join(used)} exclude each other")
    if run is not None:
        plan.select(run)
    return ",".join(map(str, plan.runs)) if all_runs else run
