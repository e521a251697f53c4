"""`hsae eval all`, and `hsae cache build --suite`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID

from hsae import registry
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
from hsae.cli.evaluations import ForceOption, OutOption, evaluate, show, summarise

if TYPE_CHECKING:
    from hsae.cache.suites.suite_spec import Suite
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
    """Core and every evaluation of the suite, unlearning and RAVEL where their stores are. One that fails does not stop the others; status 1 if any did.

    Example: hsae eval all --plan gemma-3-270m
    """
    from hsae.train.config.plan import load_plan

    check_sae_options(sae, seeds, out)
    loaded = load_plan(plan, overrides or ())
    run = named_runs(loaded, run, all_runs, sae)
    shared: dict[str, Any] = {
        "run": run,
        "seeds": seeds,
        "sae": sae,
        "plan": plan,
        "overrides": overrides,
        "force": force,
        "device": device,
    }
    jobs: dict[str, Callable[[], object]] = {}
    for name in registry.EVALUATIONS:
        jobs[name] = partial(_registered, name, draws, out=out, **shared)
    jobs["unlearning"] = lambda: _unlearning(loaded, run, seeds, sae, plan, overrides, force, device)
    if failed := summarise(jobs):
        say(f"{failed} of {len(jobs)} evaluations failed")
        raise typer.Exit(1)


def _registered(name: str, draws: int, **given: Any) -> None:
    kind = registry.resolve(registry.EVALUATIONS[name].kind)
    options = {"draws": draws} if "draws" in kind.options_kind.model_fields else {}
    show(evaluate(kind, kind.options_kind(**options), **given))


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


def _suite(name: str) -> "Suite":
    from hsae.cache.suites.suite_spec import SUITES

    return next(suite for suite in SUITES if suite == name)


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
