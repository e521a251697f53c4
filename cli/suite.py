"""`hsae eval sparse-probing | scr | tpp | absorption | ravel | all`, and `hsae cache build --suite`."""

import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID
from rich.table import Table
from rich.text import Text

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
    console,
    errors,
    named_runs,
    one_line,
    plus_minus,
    progress_bars,
    say,
    waiting,
)

if TYPE_CHECKING:
    from hsae.cache.suites.suite_spec import Suite
    from hsae.eval.harness.targets import Target
    from hsae.eval.probing.probing_runs import SuiteResult
    from hsae.train.config.plan import Plan

OUT = Path("eval_results")
OutOption = Annotated[
    Path | None,
    typer.Option("--out", help=f"Folder for the results of --sae; each evaluation has its own in it; default {OUT}."),
]
DrawsOption = Annotated[
    int,
    typer.Option(
        "--draws", min=1, max=1000, metavar="N", help="Seeds of the evaluation's own draws: what intervals span."
    ),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Compute anew what is there already.")]
HELP = {
    "sparse-probing": "How much of a labelled class a few latents tell (SAEBench's sparse probing).",
    "scr": "Whether ablating a few latents removes a spurious correlation (SAEBench's SCR).",
    "tpp": "Whether ablating a few latents hurts one class's probe and no other (SAEBench's TPP).",
    "absorption": "Whether a letter's latents stay silent where others speak for it (SAEBench's absorption).",
}
RAVEL_HELP = "Whether exchanging a few latents changes one attribute of an entity and no other (SAEBench's RAVEL)."


def register(app: typer.Typer) -> None:
    """Add the commands to `hsae eval`."""
    for suite, text in HELP.items():
        app.command(suite, help=f"{text}\n\nExample: hsae eval {suite} --run 3")(_command(suite))
    app.command("ravel", help=f"{RAVEL_HELP}\n\nExample: hsae eval ravel --run 3")(_command("ravel"))
    app.command("all")(every)


def _command(suite: str) -> Callable[..., None]:
    def command(
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
        loaded, run = _loaded(plan, overrides, run, all_runs, seeds, sae, out)
        if suite == "ravel":
            ravel.evaluate(loaded, run, seeds, sae, out or OUT, draws, force, device)
        else:
            _evaluate(loaded, _suite(suite), run, seeds, sae, out or OUT, draws, force, device)

    return command


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
    """Core and every evaluation of the suite, unlearning and RAVEL where their stores are. One that fails does not stop the others; status 1 if any did.

    Example: hsae eval all --plan gemma-3-270m
    """
    from hsae.cli.eval import core

    loaded, run = _loaded(plan, overrides, run, all_runs, seeds, sae, out)
    folder = out or OUT
    jobs: dict[str, Callable[[], object]] = {
        "core": lambda: core(
            run=run,
            seeds=seeds,
            sae=sae,
            plan=plan,
            overrides=overrides,
            out=folder / "core" if sae else None,
            force=force,
            device=device,
        )
    }
    for suite in HELP:
        jobs[suite] = lambda suite=suite: _evaluate(  # type: ignore[misc]
            loaded, _suite(suite), run, seeds, sae, folder, draws, force, device
        )
    jobs["ravel"] = lambda: _ravel(loaded, run, seeds, sae, folder, draws, force, device)
    jobs["unlearning"] = lambda: _unlearning(loaded, run, seeds, sae, plan, overrides, force, device)
    outcomes: dict[str, tuple[str, float]] = {}
    try:
        for name, job in jobs.items():
            began = time.perf_counter()
            outcomes[name] = "interrupted", 0.0
            outcomes[name] = _outcome(job), time.perf_counter() - began
    finally:
        for name in jobs:
            outcomes.setdefault(name, ("not begun", 0.0))
        _print_summary(outcomes)
    if failed := sum(_style(state) == "red" for state, _ in outcomes.values()):
        say(f"{failed} of {len(jobs)} evaluations failed")
        raise typer.Exit(1)


def _outcome(job: Callable[[], object]) -> str:
    """Do it, and say in a line how it ended, whatever went wrong; what must be a bug shows its traceback too."""
    from hsae.cache.errors import NotApplicable

    try:
        job()
    except NotApplicable as error:
        return f"skipped: {error}"
    except Exception as error:
        line = one_line(error)
        if line is None:
            errors.print("".join(traceback.format_exception(error)))
            place = traceback.extract_tb(error.__traceback__)[-1]
            line = f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"
        return line
    return "done"


def _print_summary(outcomes: dict[str, tuple[str, float]]) -> None:
    table = Table(title="summary", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("evaluation", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("outcome", overflow="fold")
    for name, (state, seconds) in outcomes.items():
        table.add_row(name, f"{seconds:.0f} s", state, style=_style(state))
    console.print(table)


def _style(state: str) -> str | None:
    return None if state == "done" else "yellow" if state.startswith("skipped: ") else "red"


def _ravel(
    plan: "Plan", run: str | None, seeds: int, sae: list[Path] | None, out: Path, draws: int, force: bool, device: str
) -> None:
    ravel.check_store(plan)
    ravel.evaluate(plan, run, seeds, sae, out, draws, force, device)


def _unlearning(
    plan: "Plan",
    run: str | None,
    seeds: int,
    sae: list[Path] | None,
    source: str | None,
    overrides: list[str] | None,
    force: bool,
    device: str,
) -> None:
    from hsae.cache.errors import NotApplicable, StoreError
    from hsae.cache.storage.paths import exists
    from hsae.cli.unlearning import unlearning
    from hsae.eval.unlearning.runs import open_texts

    if sae:
        raise NotApplicable("unlearning compares the levels of trained runs; it takes no --sae")
    try:
        open_texts(plan)
    except StoreError as error:
        if any(exists(plan.store_path(split)) for split in ("forget", "retain")):
            raise  # begun, or damaged
        raise NotApplicable(str(error)) from None
    unlearning(run=run, seeds=seeds, plan=source, overrides=overrides, force=force, device=device)


def _loaded(
    plan: str | None,
    overrides: list[str] | None,
    run: str | None,
    all_runs: bool,
    seeds: int,
    sae: list[Path] | None,
    out: Path | None,
) -> "tuple[Plan, str | None]":
    """The plan, and the runs that are named."""
    from hsae.train.config.plan import load_plan

    check_sae_options(sae, seeds, out)
    loaded = load_plan(plan, overrides or ())
    return loaded, named_runs(loaded, run, all_runs, sae)


def _suite(name: str) -> "Suite":
    from hsae.cache.suites.suite_spec import SUITES

    return next(suite for suite in SUITES if suite == name)


def targets_of(
    plan: "Plan", suite: str, run: str | None, seeds: int, sae: list[Path] | None, out: Path
) -> "list[Target]":
    """The SAEs an evaluation is asked to evaluate."""
    from hsae.cli.eval import of_folders, of_runs
    from hsae.eval.probing.probing_runs import FOLDERS

    if sae:
        return of_folders(plan, sae, out / FOLDERS[suite])
    return of_runs(plan, run, seeds, evaluation=FOLDERS[suite])


def _evaluate(
    plan: "Plan",
    suite: "Suite",
    run: str | None,
    seeds: int,
    sae: list[Path] | None,
    out: Path,
    draws: int,
    force: bool,
    device: str,
) -> "list[SuiteResult]":
    from hsae.cache.device import pick_device
    from hsae.cache.suites.probe_store import ProbeStore
    from hsae.eval.probing.config import probe_spec
    from hsae.eval.probing.probing_runs import evaluate_suite

    targets = targets_of(plan, suite, run, seeds, sae, out)
    with waiting(f"{suite}: reading") as tell:
        results = evaluate_suite(
            targets,
            lambda: ProbeStore(probe_spec(plan, suite), plan.cache.dir),
            seeds=draws,
            force=force,
            device=pick_device(device),
            say=tell,
            warn=say,
        )
    print_results(results, suite)
    return results


def print_results(results: "list[SuiteResult]", suite: str) -> None:
    """The table of measures, what is within noise, and where the files are."""
    from hsae.eval.probing.probing_runs import noise_note

    console.print(_table(results, suite))
    for name in dict.fromkeys(result.content["hsae"]["store"]["path"] for result in results):
        say(f"on {name}")
    if note := noise_note(results, suite):
        say(note)
    for folder in dict.fromkeys(result.target.folder for result in results):
        say("results in ", (str(folder), "bold"))
    if reused := sum(result.reused for result in results):
        console.print(f"{reused} of {len(results)} were there already; --force computes them anew")


def _table(results: "list[SuiteResult]", suite: str) -> Table:
    from hsae.eval.probing.probing_runs import HEADLINES

    draws = results[0].content["hsae"]["inputs"]["seeds"]
    title = f"{suite}; ± spans the 95 % interval over {draws} draws"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("SAE", overflow="fold")
    shared = "_accuracy", "_metric", "_score", "mean_", "tpp_", "scr_", "test"
    for name in HEADLINES[suite]:
        short = name
        for part in shared:
            short = short.replace(part, "")
        table.add_column(short.strip("_").replace("_", " ") or "all", justify="right", no_wrap=True)
    for result in results:
        table.add_row(result.target.label, *(_cell(result.measures.get(name)) for name in HEADLINES[suite]))
    return table


def _cell(measure: "dict[str, float | None] | None") -> str | Text:
    if measure is None or measure["value"] is None:
        return "undefined"
    text = f"{measure['value']:.3f}"
    if measure["high"] is not None:
        return plus_minus(text, f"{measure['high'] - measure['value']:.3f}")
    return text


# ---- building -----------------------------------------------------------------------------------------------------------


def build(plan: "Plan", suite: str, device: str, *, dry_run: bool) -> None:
    """Make the probe store of one suite, or of all (`hsae cache build --suite`)."""
    from hsae.cache.language_model.lm import LanguageModel, pinned
    from hsae.cache.storage.paths import check_writable
    from hsae.cache.suites.probe_store import build_probe
    from hsae.cache.suites.suite_spec import SUITES, probe_folder
    from hsae.eval.probing.config import probe_spec

    _no_dry_run(dry_run)
    check_writable(probe_folder(plan.cache.dir))
    model = LanguageModel.load(pinned(plan.model, plan.cache.dir), device=device, say=say)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "texts")
    for name in SUITES if suite == "all" else (_suite(suite),):
        with progress_bars(*columns) as bars:
            shown: dict[str, TaskID] = {}

            def told(task: str, done: int, total: int, bars: Progress = bars, shown: dict[str, TaskID] = shown) -> None:
                if task not in shown:
                    shown[task] = bars.add_task(task, total=total)
                bars.update(shown[task], completed=done)

            path = build_probe(probe_spec(plan, name), plan.cache.dir, device=device, progress=told, model=model)
        say(f"{name} store: ", (str(path), "bold"))


def build_ravel(plan: "Plan", device: str, *, dry_run: bool) -> None:
    """Make RAVEL's store (`hsae cache build --suite ravel`)."""
    _no_dry_run(dry_run)
    ravel.build(plan, device)


def _no_dry_run(dry_run: bool) -> None:
    from hsae.cache.errors import UserError

    if dry_run:
        raise UserError("--dry-run doesn't go with --suite: what the texts come to is known once they are read")
