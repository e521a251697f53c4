"""`hsae eval autointerp`."""

import json
import sys
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich import get_console
from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

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
    plus_minus,
    progress_bars,
    say,
    tell_common_text,
    waiting,
)
from hsae.cli.evaluations import OUT, ForceOption, OutOption, Screen

if TYPE_CHECKING:
    from hsae.eval.autointerp.evaluation import Estimate, Scored
    from hsae.eval.autointerp.judge import Judge, Prices


def autointerp(
    run: RunOption = None,
    all_runs: AllOption = False,
    seeds: SeedsOption = 1,
    sae: SaeOption = None,
    plan: PlanOption = None,
    overrides: SetOption = None,
    out: OutOption = None,
    whole: Annotated[
        bool,
        typer.Option("--whole", help="Of a run only all levels together (of a stack level 1), not each level too."),
    ] = False,
    judge: Annotated[
        str | None,
        typer.Option(
            "--judge", metavar="MODEL", envvar="HSAE_JUDGE_MODEL", help="Chat model; default autointerp.judge.model."
        ),
    ] = None,
    base_url: Annotated[
        str | None,
        typer.Option(
            "--base-url",
            metavar="URL",
            envvar="OPENAI_BASE_URL",
            help="OpenAI-compatible API; default autointerp.judge.base_url. Its key is read from OPENAI_API_KEY.",
        ),
    ] = None,
    price_in: Annotated[
        float | None, typer.Option("--price-in", min=0, metavar="X", help="Price of a million input tokens.")
    ] = None,
    price_out: Annotated[
        float | None, typer.Option("--price-out", min=0, metavar="X", help="Price of a million output tokens.")
    ] = None,
    max_cost: Annotated[
        float | None,
        typer.Option("--max-cost", min=0, metavar="X", help="Spend no more than this; then no question is asked here."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Start without asking.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be asked and what it costs.")] = False,
    force: ForceOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Let a chat model explain latents and predict from the explanations where they are active (SAEBench's autointerp).

    Every trained run of the plan, each level and the whole, unless runs or SAE folders are named. Reads the evaluation store; answers are
    kept, so what was interrupted goes on and nothing is paid for twice.

    Example: hsae eval autointerp --run 3 --judge gpt-4o-mini --price-in 0.15 --price-out 0.6 --dry-run
    """
    from hsae.cache.errors import UserError
    from hsae.train.config.plan import load_plan

    check_sae_options(sae, seeds, out, whole)
    if yes and dry_run:
        raise UserError("--yes and --dry-run exclude each other")
    if (price_in is None) != (price_out is None):
        raise UserError("--price-in and --price-out go together")
    if max_cost is not None and price_in is None:
        raise UserError("--max-cost needs prices: --price-in and --price-out, for a million tokens each")
    named = {"model": judge, "base_url": base_url}
    chosen = [f"autointerp.judge.{key}={json.dumps(value)}" for key, value in named.items() if value is not None]
    loaded = load_plan(plan, [*(overrides or ()), *chosen])
    run = named_runs(loaded, run, all_runs, sae)

    from hsae.cache.config import at_commit
    from hsae.cache.device import pick_device
    from hsae.cache.language_model.lm import load_tokenizer
    from hsae.cache.reading.provenance import check_tokenizer
    from hsae.cache.reading.store import ActivationStore
    from hsae.cache.storage.paths import place
    from hsae.eval.autointerp.config import AutointerpConfig
    from hsae.eval.autointerp.evaluation import Autointerp, noise_note
    from hsae.eval.autointerp.judge import Judge, Prices
    from hsae.eval.harness.result_files import describe_changes
    from hsae.eval.harness.targets import Selection, select_targets

    selection = Selection(run=run, seeds=seeds, folders=sae or (), out=(out or OUT) / "autointerp", whole=whole)
    targets = select_targets(loaded, selection, "autointerp", Screen("autointerp"))
    store = ActivationStore.of(loaded.store("autointerp"), loaded.cache.dir)
    if not sae:
        tell_common_text(loaded, ("autointerp",))
    tokenizer = load_tokenizer(at_commit(loaded.model, store.header.model_commit))
    check_tokenizer(store.root, store.header, tokenizer)
    prices = Prices(input=price_in, output=price_out) if price_in is not None and price_out is not None else None
    with Judge(
        loaded.table(AutointerpConfig).judge,
        place(loaded.cache.dir) / "answers",
        lambda text: len(tokenizer(text, verbose=False).input_ids),
        prices=prices,
        named=base_url is not None
        or any("judge.base_url" in override.partition("=")[0] for override in overrides or ()),
        most=max_cost,
    ) as asked:
        bench = Autointerp(store, tokenizer, loaded.table(AutointerpConfig), asked, pick_device(device))
        for target in targets:
            bench.check(target)
        results = {id(target): bench.found(target) for target in targets if not force}
        missing = [target for target in targets if results.get(id(target)) is None]
        with waiting("autointerp: reading") as tell:
            prepared = []
            for target in missing:
                tell(f"autointerp: {target.label}: drawing windows")
                prepared.append(bench.prepare(target))
            estimate = bench.estimate(prepared)
        if prepared:
            say(_estimate(estimate, asked, prices))
        if dry_run:
            return
        for text in describe_changes([(target.label, bench.changed(target)) for target in missing]):
            say(text)
        if estimate.requests:
            _agree(estimate, asked, prices, max_cost, yes)
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "latents")
        with progress_bars(*columns, TimeRemainingColumn(compact=True)) as bars:
            for item in prepared:
                task = bars.add_task(item.target.label, total=len(item.cases))
                results[id(item.target)] = bench.evaluate(item, partial(_move, bars, task))
    done = [result for target in targets if (result := results[id(target)]) is not None]
    _print(done)
    if prepared:
        spent = f", {asked.spent:.4f} spent" if prices else ""
        unread = f", {asked.unread} replies held no answer" if asked.unread else ""
        get_console().print(f"{asked.requests:,} requests sent{unread}{spent}")
    if note := noise_note(done):
        say(note)
    for folder in dict.fromkeys(result.target.folder for result in done):
        say("results in ", (str(folder), "bold"))
    if reused := sum(result.reused for result in done):
        get_console().print(f"{reused} of {len(done)} were there already; --force scores them anew")


def _move(bars: Progress, task: TaskID, done: int) -> None:
    bars.update(task, completed=done)


def _estimate(estimate: "Estimate", judge: "Judge", prices: "Prices | None") -> str:
    text = (
        f"{estimate.latents:,} latents: {estimate.requests:,} requests to {judge.config.model} at {judge.config.base_url}, about "
        f"{estimate.input_tokens:,} tokens in and at most {estimate.output_tokens:,} out; {estimate.kept:,} answers are there already"
    )
    if prices is not None:
        text += f"; at most {estimate.cost(prices):.4f} (more only for answers that are not of the form asked for)"
    return text


def _agree(estimate: "Estimate", judge: "Judge", prices: "Prices | None", max_cost: float | None, yes: bool) -> None:
    """Go on only if that is wanted. Raises UserError otherwise."""
    from hsae.cache.errors import UserError

    if prices is not None and max_cost is not None:
        if (cost := estimate.cost(prices)) > max_cost:
            raise UserError(
                f"this may cost {cost:.4f}, more than --max-cost {max_cost:g}; lower autointerp.n_latents, or name fewer runs"
            )
        return
    if yes:
        return
    if not sys.stdin.isatty():
        raise UserError(
            f"{estimate.requests:,} requests would be sent to {judge.config.base_url}; say --yes, or set a limit with --max-cost"
        )
    typer.confirm("Start?", abort=True)


def _print(results: "list[Scored]") -> None:
    from hsae.eval.autointerp.evaluation import HEADLINES

    table = Table(
        title="autointerp; ± spans the 95 % interval over latents",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("SAE", overflow="fold", min_width=12)
    for column in ("SAEBench", *(name.removesuffix("_accuracy") for name in HEADLINES), "latents"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        score = result.metric("autointerp_score")
        cells = [_cell(result.measures[name]) for name in HEADLINES]
        count = str(result.content["hsae"]["latents"]["scored"])
        table.add_row(result.target.label, "undefined" if score is None else f"{score:.3f}", *cells, count)
    get_console().print(table)
    for result in results:
        latents, judge = result.content["hsae"]["latents"], result.content["hsae"]["judge"]
        told = [f"{latents['alive']:,} latents alive, {latents['dead']:,} dead"]
        if latents["too_few_examples"]:
            told.append(f"{len(latents['too_few_examples'])} fire in too few places")
        if judge["malformed_answers"]:
            told.append(
                f"{judge['malformed_answers']} answers not as asked, {len(latents['malformed'])} latents left out for it"
            )
        say(f"{result.target.label}: {'; '.join(told)}")


def _cell(measure: "dict[str, float | None]") -> str | Text:
    value, low, high = measure["value"], measure["low"], measure["high"]
    if value is None:
        return "undefined"
    if low is None or high is None:
        return f"{value:.3f}"
    return plus_minus(f"{value:.3f}", f"{max(high - value, value - low):.3f}")
