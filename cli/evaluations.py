"""`hsae eval NAME` for every registered evaluation: options, progress and tables follow from what it says of itself."""

import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer
from rich import get_console
from rich.box import SIMPLE_HEAD
from rich.progress import TaskID
from rich.status import Status
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from hsae import registry
from hsae.cli.common import (
    AllOption,
    DeviceOption,
    PlanOption,
    ProfileOption,
    RunOption,
    SaeOption,
    SeedsOption,
    SetOption,
    check_folder,
    error_console,
    named_runs,
    one_line,
    profile,
    progress_bars,
    say,
)
from hsae.eval.harness.listener import Listener
from hsae.eval.harness.options import OUT
from hsae.eval.harness.tables import PlusMinus
from hsae.eval.harness.tables import Table as ResultTable

if TYPE_CHECKING:
    from hsae.eval.harness.evaluate_all import Outcome
    from hsae.eval.harness.evaluation import Evaluation, Result
    from hsae.eval.harness.targets import Selection
    from hsae.train.config.plan import Plan

OutOption = Annotated[
    Path | None,
    typer.Option("--out", help=f"Folder for the results of --sae; each evaluation has its own in it; default {OUT}."),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Compute anew what is there already.")]
SHARED: dict[str, tuple[Any, Any]] = {
    "run": (RunOption, None),
    "all_runs": (AllOption, False),
    "seeds": (SeedsOption, 1),
    "sae": (SaeOption, None),
    "plan": (PlanOption, None),
    "overrides": (SetOption, None),
    "out": (OutOption, None),
    "force": (ForceOption, False),
    "device": (DeviceOption, "auto"),
}
"""Options of every evaluation's command, with their defaults."""


class EvaluationGroup(TyperGroup):
    """`hsae eval`: a registered evaluation is imported when its command is called; help needs its summary alone."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All names."""
        return [*super().list_commands(ctx), *registry.EVALUATIONS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command as the group's help shows it."""
        if cmd_name not in registry.EVALUATIONS:
            return super().get_command(ctx, cmd_name)
        return TyperCommand(cmd_name, help=registry.EVALUATIONS[cmd_name].summary, rich_markup_mode=None)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is called, and its arguments."""
        if args and args[0] in registry.EVALUATIONS:
            return args[0], evaluation_command(args[0]), args[1:]
        return super().resolve_command(ctx, args)


def evaluation_command(name: str) -> Any:
    """The command of a registered evaluation."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    help_text = f"{registry.EVALUATIONS[name].summary}\n\nExample: hsae eval {name} --run 3"
    app.command(name, help=help_text)(callback_of(name))
    return typer.main.get_command(app)


def callback_of(name: str) -> Callable[..., None]:
    """What the command of a registered evaluation does, with a signature that has its options."""
    kind: type[Evaluation[Any, Any]] = registry.resolve(registry.EVALUATIONS[name].kind)
    own = {field: option(field, info) for field, info in kind.options_kind.model_fields.items()}

    shared = {field: shared for field, shared in SHARED.items() if field not in kind.without}

    @with_options({**shared, "trace": (ProfileOption, None), **own})
    def command(*, force: bool = False, device: str = "auto", trace: Path | None = None, **values: Any) -> None:
        from hsae.eval.harness.evaluation import choose_options, evaluate_plan

        options = choose_options(kind, {field: values.pop(field) for field in own})
        plan, selection = load_selected(**values, whole=getattr(options, "whole", False))
        with profile(trace, kind.name), Screen(kind.name) as screen:
            results = evaluate_plan(kind, plan, selection, options, force=force, device=device, listener=screen)
        show(results)

    return command


def with_options(options: dict[str, tuple[Any, Any]]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a function a signature that has options, each with its type and default, which typer reads them off."""

    def give(function: Callable[..., None]) -> Callable[..., None]:
        function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                inspect.Parameter(field, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
                for field, (annotation, default) in options.items()
            ]
        )
        function.__annotations__ = {field: annotation for field, (annotation, _) in options.items()}
        return function

    return give


def option(field: str, info: Any) -> tuple[Any, Any]:
    """A field of an evaluation's options as an option of its command: type and default."""
    bounds = {type(part).__name__: part for part in info.metadata}
    shown = info.json_schema_extra or {}
    settings: dict[str, Any] = {
        "help": info.description,
        "metavar": shown.get("metavar", "N" if info.annotation is int else None),
        "envvar": shown.get("envvar"),
        "min": getattr(bounds.get("Ge"), "ge", None),
        "max": getattr(bounds.get("Le"), "le", None),
    }
    names = shown.get("flags", ["--" + field.replace("_", "-")])
    return Annotated[info.annotation, typer.Option(*names, **settings)], info.default


def load_selected(
    *,
    run: str | None = None,
    all_runs: bool = False,
    seeds: int = 1,
    sae: list[Path] | None = None,
    plan: str | None = None,
    overrides: list[str] | None = None,
    out: Path | None = None,
    whole: bool = False,
) -> "tuple[Plan, Selection]":
    """The plan, and what the options select. Raises UserError for options of runs with --sae, and of it without."""
    from hsae.cache.errors import UserError
    from hsae.eval.harness.targets import Selection
    from hsae.train.config.plan import load_plan

    if sae and seeds != 1:
        raise UserError(f"--seeds {seeds} is for runs; it doesn't go with --sae")
    if sae and whole:
        raise UserError("--whole is for runs, which have levels; it doesn't go with --sae")
    if out is not None:
        check_folder(out)
        if not sae:
            raise UserError(
                "--out is for results of --sae; those of a run lie in its own folder, <train.dir>/<number>/eval"
            )
    loaded = load_plan(plan, overrides or ())
    named = named_runs(loaded, run, all_runs, sae)
    return loaded, Selection(run=named, seeds=seeds, folders=sae or (), out=out or OUT, whole=whole)


class Screen(Listener):
    """Shows how an evaluation goes: what is under way, a bar for each phase, and lines above them."""

    def __init__(self, title: str) -> None:
        self._status = Status(Text(f"{title}: reading"), console=get_console())
        self._bars = progress_bars()
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()
        self._bars.stop()

    def status(self, text: str) -> None:
        """Show what is under way."""
        self._status.update(Text(text))

    def progress(self, phase: str, done: int, total: int) -> None:
        """Move the bar of a phase; it begins again for another hook."""
        from hsae.cache.profiling import step_done

        if phase not in self._tasks:
            self._status.stop()
            self._bars.start()
            self._tasks[phase] = self._bars.add_task(phase, total=total)
        self._bars.update(self._tasks[phase], completed=done, total=total)
        step_done(phase)

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        say(text)

    def warn(self, text: str) -> None:
        """Print a line that stands out."""
        say(text, style="yellow")

    def confirm(self, question: str) -> bool:
        """Ask at the terminal, False where there is none; no ends the command."""
        self._status.stop()
        return sys.stdin.isatty() and typer.confirm(question, abort=True)


def show(results: "list[Result[Any]]") -> None:
    """Print the tables of an evaluation, its notes, and where the files are; nothing of a dry run."""
    if not results:
        return
    evaluation = results[0].evaluation
    for table in evaluation.tables(results):
        get_console().print(draw(table))
        for line in table.notes:
            say(line)
    for note in evaluation.notes(results):
        say(note)
    for warning in evaluation.warnings(results):
        say(warning, style="yellow")
    for folder in dict.fromkeys(result.target.folder for result in results):
        say("results in ", (str(folder), "bold"))
    if reused := sum(result.is_reused for result in results):
        get_console().print(f"{reused} of {len(results)} were there already; --force computes them anew")


def draw(table: ResultTable) -> Table:
    """A table as rich draws it."""
    padding = 0 if table.is_dense else (0, 1)
    shown = Table(title=table.title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=padding)
    shown.add_column(table.columns[0], overflow="fold")
    for column in table.columns[1:]:
        shown.add_column(column, justify="right", no_wrap=True)
    gap = "" if table.is_dense else " "
    for row in table.rows:
        cells = (
            Text.assemble(cell.value, gap, (f"±{cell.half}", "dim")) if isinstance(cell, PlusMinus) else cell
            for cell in row.cells
        )
        shown.add_row(*cells, style="yellow" if row.is_doubtful else None)
    return shown


def summarise(names: Sequence[str], outcomes: "Iterable[Outcome]") -> int:
    """Show what each evaluation gave, then how each ended and how long it took; returns how many failed."""
    ended: dict[str, tuple[str, float]] = {}
    try:
        for outcome in outcomes:
            error = outcome.error
            try:
                show(list(outcome.results))
            except Exception as wrong:  # the others go on
                error = error or wrong
            ended[outcome.name] = _state(error), outcome.seconds
    finally:
        table = Table(title="summary", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("evaluation", no_wrap=True)
        table.add_column("time", justify="right", no_wrap=True)
        table.add_column("outcome", overflow="fold")
        under_way = iter(["interrupted"])  # the first that has not ended; those behind it were not begun
        for name in names:
            state, seconds = ended.get(name) or (next(under_way, "not begun"), 0.0)
            table.add_row(name, f"{seconds:.0f} s", state, style=_style(state))
        get_console().print(table)
    return sum(_style(state) == "red" for state, _ in ended.values())


def _state(error: Exception | None) -> str:
    """How an evaluation ended, in a line; what must be a bug shows its traceback too."""
    import traceback

    from hsae.cache.errors import NotApplicable

    if error is None:
        return "done"
    if isinstance(error, NotApplicable):
        return f"skipped: {error}"
    if (line := one_line(error)) is not None:
        return line
    error_console().print("".join(traceback.format_exception(error)))
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"


def _style(state: str) -> str | None:
    return None if state == "done" else "yellow" if state.startswith("skipped: ") else "red"
