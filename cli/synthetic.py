"""`hsae eval synthetic`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from hsae.cli.common import DeviceOption, RunOption, SetOption, console

if TYPE_CHECKING:
    from hsae.train.config import RunConfig

COLUMNS = (
    ("parent F1", "parent_f1"),
    ("child F1", "child_f1"),
    ("MMC", "mmc"),
    ("edge P", "edge_precision"),
    ("edge R", "edge_recall"),
    ("edge F1", "edge_f1"),
    ("permuted", "edge_f1_permuted"),
    ("random", "edge_f1_random"),
    ("firing F1", "firing_edge_f1"),
    ("absorbed", "absorption"),
    ("EV", "ev"),
)


def synthetic(
    tier: Annotated[str, typer.Option("--tier", help="T1, T2, T3 (1,024 features), or T3-full (16,384).")] = "T2",
    run: RunOption = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Seeds of each arm, from 0.")] = 3,
    tokens: Annotated[int | None, typer.Option("--tokens", min=1, help="Vectors an arm is trained on.")] = None,
    overrides: SetOption = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the results.")] = Path("eval_results/synthetic"),
    force: Annotated[bool, typer.Option("--force", help="Compute anew what is there already.")] = False,
    device: DeviceOption = "auto",
) -> None:
    """Train every arm of the run plan on synthetic data, and score it against the true features and the true tree.

    Nothing has to be cached. Results are kept seed by seed; a stopped command goes on where it was.

    Example: hsae eval synthetic --tier T2 --run full,batchtopk
    """
    from hsae.train.arms import load_arms

    length = [] if tokens is None else [f"train.tokens={tokens}"]
    arms = load_arms(tier, [*(overrides or ()), *length])
    selected = list(arms.runs.values()) if run is None else arms.select(run)

    from hsae.eval.tiers import run_tier

    with _Screen(len(selected) * seeds) as screen:
        content = run_tier(
            arms.tier,
            selected,
            range(seeds),
            stream=arms.train,
            folder=out,
            force=force,
            device=device,
            listener=screen,
        )
    console.print(_table(content, selected))
    console.print(f"results in [bold]{escape(str(out / arms.tier.name))}.json[/]")


def _table(content: dict[str, Any], selected: "list[RunConfig]") -> Table:
    settings = content["settings"]
    table = Table(
        title=f"{content['tier']}: {settings['tokens']:,} vectors; mean ± standard deviation over seeds; "
        "permuted and random are the nulls of edge F1; firing F1 reads the edges of every arm alike",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("arm", no_wrap=True)
    for title, _ in COLUMNS:
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("L0", justify="right", no_wrap=True)
    for arm in selected:
        held = content["arms"][arm.name]
        failures = [row for row in held["seeds"] if "failure" in row]
        if failures:
            console.print(
                f"[yellow]{escape(arm.name)}, seed {failures[0]['seed']}: {escape(failures[0]['failure'])}[/]"
            )
        cells = [_cell(held, name) for _, name in COLUMNS]
        l0 = " + ".join(f"{value:.2f}" for value in held["mean"].get("l0", ()))
        table.add_row(f"{arm.number} {escape(arm.name)}", *cells, l0)
    return table


def _cell(held: dict[str, Any], name: str) -> str:
    value, spread = held["mean"].get(name), held["sd"].get(name)
    if value is None:
        return "-"
    text = f"{value:.3f}"
    return text if spread is None else f"{text} [dim]±{f'{spread:.3f}'.removeprefix('0')}[/]"


class _Screen:
    """A bar over arms and seeds, and one over the steps of what trains now."""

    def __init__(self, total: int) -> None:
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            console=console,
        )
        self.all = self.bars.add_task("arms x seeds", total=total)
        self.now = self.bars.add_task("", total=None)

    def __enter__(self) -> "_Screen":
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def progress(self, arm: str, seed: int, step: int, steps: int) -> None:
        """Move the bars."""
        if step % 50 == 0 or step == steps:
            self.bars.update(self.now, description=f"{arm}, seed {seed}", completed=step, total=steps)
        if step == steps:
            self.bars.advance(self.all)
