"""Options that several commands share, and all that they print with.

Text is printed as it is, square brackets included: styles are given beside it, so no name can vanish or break a table.
"""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import rich
import typer
from rich import get_console
from rich.console import Console
from rich.progress import Progress, ProgressColumn, TextColumn
from rich.text import Text

if TYPE_CHECKING:
    from hsae.train.config.plan import Plan

Part = str | Text | tuple[str, str]
"""Text, or text and its style."""


def use_plain_console(**settings: Any) -> None:
    """Let rich's console, which all commands print to, print text as it is; further settings are rich's."""
    rich.reconfigure(highlight=False, markup=False, emoji=False, **settings)


def error_console() -> Console:
    """What prints to stderr."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def say(*parts: Part, style: str = "") -> None:
    """Print one line, however long it is."""
    get_console().print(Text.assemble(*parts, style=style), soft_wrap=True)


def plus_minus(value: str, half: str, gap: str = " ") -> Text:
    """A number and half its interval."""
    return Text.assemble(value, gap, (f"±{half}", "dim"))


@contextmanager
def waiting(text: str) -> Iterator[Callable[[str], None]]:
    """A spinner with a text, and what changes the text."""
    with get_console().status(Text(text)) as status:
        yield lambda text: status.update(Text(text))


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
        what = _first_line(error)
        return f"the machine is out of memory; lower train.batch_tokens, or train fewer runs at once ({what})"
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


def progress_bars(*columns: str | ProgressColumn) -> Progress:
    """Progress bars; columns given as text are formats such as `{task.description}`."""
    made = [TextColumn(column, markup=False) if isinstance(column, str) else column for column in columns]
    return Progress(*made, console=get_console())


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

    given = {"--run": run is not None, "--all": all_runs, "--sae": bool(sae)}
    if sum(given.values()) > 1:
        raise UserError(f"{' and '.join(name for name, there in given.items() if there)} exclude each other")
    if run is not None:
        plan.select(run)
    return ",".join(map(str, plan.runs)) if all_runs else run


def check_sae_options(sae: list[Path] | None, seeds: int, out: Path | None, whole: bool = False) -> None:
    """Refuse options of runs with --sae, and of SAELens folders without it. Raises UserError."""
    from hsae.cache.errors import UserError

    if sae and seeds != 1:
        raise UserError(f"--seeds {seeds} is for runs; it doesn't go with --sae")
    if sae and whole:
        raise UserError("--whole is for runs, which have levels; it doesn't go with --sae")
    if out is not None:
        check_folder(out)
    if out is not None and not sae:
        raise UserError(
            "--out is for results of --sae; those of a run lie in its own folder, <train.dir>/<number>/eval"
        )
