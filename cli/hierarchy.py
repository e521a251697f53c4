"""`hsae eval composition` and `hsae eval stability`."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from hsae.cli.common import (
    AllOption,
    DeviceOption,
    PlanOption,
    RunOption,
    SeedsOption,
    SetOption,
    console,
    named_runs,
    plus_minus,
    say,
    waiting,
)

if TYPE_CHECKING:
    from hsae.eval.hierarchy.composition import CompositionResult, PairResult, Progress
    from hsae.eval.hierarchy.measures import Estimate
    from hsae.eval.hierarchy.runs import RunComposition
    from hsae.eval.hierarchy.stability import Agreement


def composition(
    run: RunOption = None,
    all_runs: AllOption = False,
    seeds: SeedsOption = 1,
    plan: PlanOption = None,
    overrides: SetOption = None,
    compare: Annotated[
        str | None,
        typer.Option(
            "--compare",
            metavar="RUN",
            help="The flat run a hierarchy must not fall behind; default the first trained one of the same activation.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Compute anew what is there already.")] = False,
    device: DeviceOption = "auto",
) -> None:
    """How a run's levels are composed of each other, beside what chance gives, and its known failures by name.

    Needs no language model: the evaluation store, and the training store where it is there. docs/measures.md explains each number.

    Example: hsae eval composition --run 3
    """
    from hsae.cache.errors import UserError
    from hsae.train.config.plan import load_plan

    loaded = load_plan(plan, overrides or ())
    run = named_runs(loaded, run, all_runs)
    flat = loaded.select(compare) if compare is not None else []
    if compare is not None and (len(flat) != 1 or flat[0].levels != 1):
        raise UserError(f"--compare {compare}: name one run without levels (structure flat)")

    from hsae.cache.device import pick_device
    from hsae.eval.harness.targets import trained_runs
    from hsae.eval.hierarchy.runs import Sources, evaluate_runs

    place = pick_device(device)
    runs = trained_runs(loaded, run, seeds, say)
    sources = Sources.of(loaded)
    if sources.lacking is not None and any(config.levels > 1 for _, config in runs):
        say(
            f"{sources.lacking}; maps that are not there yet are read on the evaluation store's reconstruction rows",
            style="yellow",
        )
    with waiting("composition") as tell:

        def progress(label: str) -> "Progress":
            return lambda name, done, total: tell(f"{label}: {name}, batch {done} of {total}")

        done = evaluate_runs(
            runs, sources, compare=flat[0] if flat else None, force=force, device=place, progress=progress
        )
    for item in done:
        _print(item)
    if reused := sum(item.reused for item in done):
        console.print(f"{reused} of {len(done)} were there already; --force computes them anew")


def _print(item: "RunComposition") -> None:
    say("\n", (f"run {item.label}", "bold"), "  ", (str(item.path), "dim"))
    console.print(_level_table(item.result))
    for pair in item.result.pairs:
        for name, reason in pair.reasons.items():
            say(f"{name} map of level {pair.level}: none, {reason}", style="dim")
        for name, reading in pair.readings.items():
            console.print(_pair_table(pair, name))
            for key, entry in reading.measures.items():
                if entry.reason is not None:
                    say(f"{key.replace('_', ' ')} is undefined: {entry.reason}", style="dim")
    for failure in item.verdict.failures:
        say(failure.text, style="yellow")
    if len(item.result.levels) > 1 and not item.verdict.failures:
        console.print("no known failure")
    if len(item.result.levels) == 1:
        say("one level: there is nothing to compose", style="dim")
        return
    for reason in dict.fromkeys(item.verdict.unchecked.values()):
        names = [name for name, why in item.verdict.unchecked.items() if why == reason]
        say(f"not looked for: {', '.join(names)} ({reason})", style="dim")


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _level_table(result: "CompositionResult") -> Table:
    title = "levels; EV and CE score: " + (
        "decoded from this level" if result.structure == "stacked" else "this level and all coarser ones"
    )
    table = _table(title, "level", "latents", "L0", "silent", "EV", "CE score")
    for level in reversed(result.levels):
        table.add_row(
            str(level.level),
            str(level.latents),
            _shown(level.l0),
            f"{level.silent:.1%}",
            _shown(level.explained_variance),
            "no result" if level.ce_loss_score.value is None else _shown(level.ce_loss_score),
        )
    return table


def _pair_table(pair: "PairResult", name: str) -> Table:
    title = f"level {pair.level} ({pair.coarse}) of level {pair.level - 1} ({pair.alive_fine} of {pair.fine} alive), {name} map"
    table = _table(title, "measure", "value", "permuted", "z", "random", "z")
    for key, entry in pair.readings[name].measures.items():
        cells: list[str | Text] = []
        for null in (entry.nulls.get("permuted"), entry.nulls.get("random")):
            cells += (
                ["", ""] if null is None else [_spread(null.mean, null.sd), "" if null.z is None else f"{null.z:+.1f}"]
            )
        value = "undefined" if entry.value is None else _interval(entry.value, entry.low, entry.high)
        table.add_row(key.replace("_", " "), value, *cells)
    return table


def _shown(estimate: "Estimate") -> str | Text:
    if estimate.value is None:
        return "undefined"
    return _interval(estimate.value, estimate.low, estimate.high)


def _interval(value: float, low: float | None, high: float | None) -> str | Text:
    return _spread(value, None if low is None or high is None else max(high - value, value - low))


def _spread(value: float, half: float | None) -> str | Text:
    """A number with as many digits as are worth reading, and half its interval or its spread in the same."""
    digits = 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    text = f"{value:.{digits}f}"
    return text if half is None else plus_minus(text, f"{half:.{digits}f}".removeprefix("0") or "0")


def stability(
    run: RunOption = None,
    seeds: SeedsOption = 3,
    plan: PlanOption = None,
    overrides: SetOption = None,
) -> None:
    """How alike a run's seeds are: latents matched one to one, and the edges between them, beside what chance gives.

    Example: hsae eval stability --run 3 --seeds 3
    """
    from hsae.cache.errors import UserError, need
    from hsae.train.config.plan import load_plan

    need("matching latents", "scipy", "eval")
    loaded = load_plan(plan, overrides or ())
    if run is None:
        raise UserError("name the runs: --run 3")
    if seeds < 2:
        raise UserError(f"stability compares two seeds or more, not --seeds {seeds}")
    selected = loaded.select(run)

    from hsae.eval.hierarchy.runs import stability_of

    for config in selected:
        with waiting(f"run {loaded.label(config)}"):
            path, found = stability_of(loaded, config, seeds)
        console.print(_stability_table(f"run {loaded.label(config)}, {seeds} seeds", found))
        say(str(path), style="dim")


def _stability_table(title: str, found: "list[Agreement]") -> Table:
    table = _table(title, "measure", "level", "value", "sd over pairs", "chance")
    for item in found:
        z = "" if item.null.z is None else f" z {item.null.z:+.1f}"
        sd = "" if item.sd is None else f"{item.sd:.3f}"
        name = item.name.replace("_", " ")
        table.add_row(
            name,
            str(item.level),
            f"{item.value:.3f}",
            sd,
            Text.assemble(f"{item.null.mean:.3f} ±{item.null.sd:.3f}", (z, "dim")),
        )
    return table
