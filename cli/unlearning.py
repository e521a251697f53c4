"""`hsae eval unlearning`."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from hsae.cli.common import (
    DeviceOption,
    PlanOption,
    RunOption,
    SeedsOption,
    SetOption,
    console,
    plus_minus,
    progress_bars,
    say,
    tell_common_text,
)

if TYPE_CHECKING:
    from hsae.eval.unlearning.runs import Unlearned
    from hsae.eval.unlearning.sweep import Progress as Told


def unlearning(
    run: RunOption = None,
    seeds: SeedsOption = 1,
    plan: PlanOption = None,
    overrides: SetOption = None,
    qa: Annotated[
        bool,
        typer.Option(
            "--qa",
            help="SAEBench's form instead: multiple-choice questions, an instruction-tuned model ([unlearning.qa]).",
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Compute anew what is there already.")] = False,
    device: DeviceOption = "auto",
) -> None:
    """Make the model forget one text and keep another by clamping latents; every way of choosing them side by side.

    Every trained run of the plan unless runs are named. Needs the stores of `hsae cache build --suite unlearning`.

    Example: hsae eval unlearning --run 3 --plan gemma-3-270m
    """
    from hsae.train.config.plan import load_plan

    loaded = load_plan(plan, overrides or ())

    from hsae.cache.device import pick_device
    from hsae.cache.language_model.lm import LanguageModel, pinned
    from hsae.cache.language_model.sources import at_commit
    from hsae.eval.harness.targets import trained_runs

    place = pick_device(device)
    if qa:
        from hsae.eval.unlearning import qa_runs

        sets = qa_runs.check(loaded)
        runs = trained_runs(loaded, run, seeds, say)
        with _Screen() as screen:
            scored = qa_runs.evaluate_runs(
                runs,
                sets,
                lambda: LanguageModel.load(pinned(loaded.model, loaded.cache.dir), device=place),
                force=force,
                device=place,
                progress=screen.listener(None),
                say=say,
            )
        _print_scores(scored)
        return
    from hsae.eval.unlearning.config import SIDES
    from hsae.eval.unlearning.runs import evaluate_runs, open_texts

    open_texts(loaded)
    tell_common_text(loaded, SIDES)
    chosen = trained_runs(loaded, run, seeds, say)
    with _Screen() as screen:
        done = evaluate_runs(
            chosen,
            lambda store: LanguageModel.load(at_commit(store.spec.model, store.header.model_commit), device=place),
            force=force,
            device=place,
            progress=screen.listener,
            say=say,
        )
    for item in done:
        console.print(_table(item))
        _print_signature(item)
        passes = item.result["passes"]
        note = " (there already; --force computes it anew)" if item.reused else ""
        console.print(
            f"{passes['run']:,} rows passed through the suffix, {passes['spared']:,} spared because nothing fired; "
            f"{passes['unembedded']:,} positions unembedded",
        )
        say("results in ", (str(item.folder), "bold"), note)


def _table(item: "Unlearned") -> Table:
    """Forget loss added at each budget of retain loss, with intervals over documents."""
    table = Table(
        title=f"run {item.plan.label(item.run)}: loss added on forget text, nats a token, within a budget of loss added on retain "
        "text; ± spans the 95 % interval over documents",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("arm", no_wrap=True)
    arms = item.result["arms"]
    budgets = list(arms["none"]["at_retain"])
    for budget in budgets:
        table.add_column(f"≤ {budget}", justify="right", no_wrap=True)
    table.add_column("area", justify="right", no_wrap=True)
    for name, arm in arms.items():
        cells = [_cell({"value": entry["forget_dce"], **entry}, 2) for entry in (arm["at_retain"][b] for b in budgets)]
        table.add_row(name, *cells, _cell(arm["area"], 2))
    return table


def _cell(entry: dict[str, float | None], digits: int = 3) -> str | Text:
    if entry["value"] is None:
        return "undefined"
    text, low, high = f"{entry['value']:.{digits}f}", entry["low"], entry["high"]
    if entry["value"] and low is not None and high is not None:
        half = f"{max(high - entry['value'], entry['value'] - low):.2f}"
        return plus_minus(text, half.removeprefix("0") or "0")
    return text


def _print_signature(item: "Unlearned") -> None:
    signature = item.result["signature"]
    if signature["explanation"] is not None:
        console.print(f"no signature test: {signature['explanation']}")
    for pair in signature["pairs"]:
        table = Table(
            title=f"latents chosen on {pair['selected_on']}, tested on {pair['tested_on']}: loss added",
            title_justify="left",
            box=SIMPLE_HEAD,
            pad_edge=False,
        )
        for column in ("arm", "own topic", "sibling", "carried over", "retain"):
            table.add_column(column, justify="left" if column == "arm" else "right")
        for name, arm in pair["arms"].items():
            table.add_row(name, *(_cell(arm[key]) for key in ("own", "sibling", "carried", "retain")))
        console.print(table)


def _print_scores(done: "list[Unlearned]") -> None:
    from hsae.eval.unlearning.config import UnlearningConfig

    table = Table(
        title="SAEBench's unlearning score: 1 - the smallest forget accuracy that keeps retain accuracy",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for column in ("SAE", "score", "forget", "retain", "best configuration"):
        table.add_column(column, justify="right" if column in ("score", "forget", "retain") else "left")
    for item in done:
        least = item.plan.table(UnlearningConfig).qa.retain_accuracy
        for name, arm in item.result["arms"].items():
            kept = [entry for entry in arm["configurations"] if entry["retain_accuracy"] >= least]
            best = min(kept, key=lambda entry: entry["forget_accuracy"], default=None)
            cells = ("-", "-", f"none keeps {least:.0%} of retain")
            if best is not None:
                clamp = f"{best['clamped']} latents at -{best['multiplier']:g}, retain threshold {best['retain_threshold']:g}"
                cells = (f"{best['forget_accuracy']:.3f}", f"{best['retain_accuracy']:.3f}", clamp)
            table.add_row(f"{item.plan.label(item.run)} {name}", f"{arm['unlearning_score']:.3f}", *cells)
    console.print(table)
    for item in done:
        asked, passes = item.result["questions"], item.result["passes"]
        console.print(
            f"answered as it is: {asked['forget']['answered']} of {asked['forget']['given']} forget questions, "
            f"{asked['retain']['answered']} of {asked['retain']['given']} retain questions; {passes['run']:,} prompts passed, "
            f"{passes['spared']:,} spared because nothing fired"
        )
        say("results in ", (str(item.folder), "bold"))


class _Screen:
    """A progress bar for each arm."""

    def __init__(self) -> None:
        self.bars = progress_bars(
            "{task.description}",
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )

    def __enter__(self) -> "_Screen":
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def listener(self, label: str | None) -> "Told":
        """What hears how one run goes."""
        tasks = {}

        def told(arm: str, done: int, total: int) -> None:
            if arm not in tasks:
                tasks[arm] = self.bars.add_task(arm if label is None else f"{label}: {arm}", total=total)
            self.bars.update(tasks[arm], completed=done)

        return told
