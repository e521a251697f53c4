"""`hsae eval`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from hsae.cli import hierarchy, suite, synthetic
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
    named_runs,
    plus_minus,
    progress_bars,
    say,
    tell_common_text,
)
from hsae.cli.evaluations import EvaluationGroup, Screen

if TYPE_CHECKING:
    from hsae.eval.core.core_runs import Evaluated
    from hsae.eval.harness.envelope import CoreResult

app = typer.Typer(no_args_is_help=True, cls=EvaluationGroup)
app.command()(hierarchy.composition)
app.command()(hierarchy.stability)
app.command("all")(suite.every)


@app.callback()
def _group() -> None:
    """Measure trained SAEs."""


app.command(name="synthetic")(synthetic.synthetic)


@app.command()
def core(
    run: RunOption = None,
    all_runs: AllOption = False,
    seeds: SeedsOption = 1,
    sae: SaeOption = None,
    plan: PlanOption = None,
    overrides: SetOption = None,
    all_tokens: Annotated[
        bool,
        typer.Option("--all-tokens", help="Replace the residual of special tokens too (SAEBench's other setting)."),
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the results of --sae; default eval_results/core.")
    ] = None,
    faithful: Annotated[
        bool,
        typer.Option(
            "--faithful/--corrected",
            help="Which numbers to print: SAEBench's with all their quirks, or corrected ones with intervals. The files hold both.",
        ),
    ] = False,
    whole: Annotated[
        bool,
        typer.Option("--whole", help="Of a run only all levels together (of a stack level 1), not each level too."),
    ] = False,
    legacy: Annotated[
        bool, typer.Option("--legacy", help="Also write each result as SAEBench up to 0.1 did, into legacy/.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Compute anew what is there already.")] = False,
    device: DeviceOption = "auto",
) -> None:
    """SAEBench's core metrics, and corrected ones with intervals, from the evaluation store.

    Every trained run of the plan unless runs or SAE folders are named. Results are SAEBench's JSON files.

    Example: hsae eval core --run 3
    """
    from hsae.train.config.plan import load_plan

    check_sae_options(sae, seeds, out, whole)
    loaded = load_plan(plan, overrides or ())
    run = named_runs(loaded, run, all_runs, sae)

    from hsae.cache.device import pick_device
    from hsae.cache.language_model.lm import LanguageModel
    from hsae.cache.language_model.sources import at_commit
    from hsae.cache.reading.store import ActivationStore
    from hsae.eval.core.core import CoreOptions
    from hsae.eval.core.core_runs import evaluate_targets
    from hsae.eval.harness.envelope import write_core
    from hsae.eval.harness.targets import Selection, select_targets

    place = pick_device(device)
    chosen = Selection(run=run, seeds=seeds, folders=sae or (), out=out, whole=whole)
    targets = select_targets(loaded, chosen, "core", Screen("core").listener)
    store = ActivationStore.of(loaded.store("eval"), loaded.cache.dir)
    if not sae:
        tell_common_text(loaded, ("eval",))
    with _Screen() as screen:
        evaluated = evaluate_targets(
            targets,
            store,
            lambda: LanguageModel.load(at_commit(store.spec.model, store.header.model_commit), device=place),
            options=CoreOptions(exclude_special_tokens=not all_tokens),
            force=force,
            listener=screen,
            device=place,
        )
    if legacy:
        for item in evaluated:
            target = item.target
            write_core(
                item.result, target.folder / "legacy", release=target.release, sae_id=target.sae_id, layout="legacy",
                name=item.path.name,
            )  # fmt: skip
    console.print(_table(evaluated, faithful, all_tokens))
    say(f"on {store.spec.name}")
    for item in evaluated:
        if item.result.dead:
            text = " ".join(item.result.notes)
            say(f"{item.target.label}: {text}", style="yellow")
    for folder in dict.fromkeys(item.target.folder for item in evaluated):
        say("results in ", (str(folder), "bold"))
    if reused := sum(item.reused for item in evaluated):
        console.print(f"{reused} of {len(evaluated)} were there already; --force computes them anew")


def _table(evaluated: "list[Evaluated]", faithful: bool, all_tokens: bool) -> Table:
    title = "core, as SAEBench computes it" if faithful else "core, corrected; ± spans the 95 % interval over rows"
    table = Table(
        title=title + ("; residual of special tokens replaced too" if all_tokens else ""),
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("SAE", overflow="fold")
    for column in ("CE score", "KL score", "EV", "L0", "alive"):
        table.add_column(column, justify="right", no_wrap=True)
    for item in evaluated:
        result = item.result
        dead = result.measure("dead_fraction")
        alive = "-" if dead is None or dead.value is None else f"{1 - dead.value:.0%}"
        cells = [
            _cell(result, name, digits, faithful)
            for name, digits in (("ce_loss_score", 3), ("kl_div_score", 3), ("explained_variance", 3), ("l0", 1))
        ]
        table.add_row(item.target.label, *cells, alive, style="yellow" if result.dead else None)
    return table


def _cell(result: "CoreResult", name: str, digits: int, faithful: bool) -> str | Text:
    if faithful:
        value = result.metric(name)
        return "NaN" if value is None else f"{value:.{digits}f}"
    measure = result.measure(name)
    if measure is None or measure.value is None:
        return "undefined"
    text = f"{measure.value:.{digits}f}"
    if measure.low is not None and measure.high is not None:
        half = f"{max(measure.high - measure.value, measure.value - measure.low):.{digits}f}"
        return plus_minus(text, half.removeprefix("0") or "0")
    return text


class _Screen:
    """A progress bar for each phase, and warnings above them."""

    def __init__(self) -> None:
        self.bars = progress_bars(
            "{task.description}",
            BarColumn(),
            MofNCompleteColumn(),
            "batches",
            TimeRemainingColumn(compact=True),
        )
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "_Screen":
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def progress(self, phase: str, done: int, total: int) -> None:
        """Move the bar of a phase; it begins again for another hook."""
        if phase not in self.tasks:
            self.tasks[phase] = self.bars.add_task(phase, total=total)
        self.bars.update(self.tasks[phase], completed=done, total=total)

    def warning(self, view: str, message: str) -> None:
        """Print above the bars."""
        say(f"{view}: {message}", style="yellow")
