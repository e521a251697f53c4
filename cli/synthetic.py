"""`hsae eval synthetic`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import get_console
from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from hsae.cli.common import DeviceOption, RunOption, SetOption, check_folder, progress_bars, say

if TYPE_CHECKING:
    from hsae.eval.synthetic.compared_runs import Arms
    from hsae.train.config.run_config import RunConfig

TABLES = (
    (
        "features",
        (
            ("parent F1", "parent_f1"),
            ("child F1", "child_f1"),
            ("MMC", "mmc"),
            ("absorbed", "absorption"),
            ("EV", "ev"),
        ),
    ),
    (
        "edges; permuted and random are nulls of F1, firing reads every arm alike",
        (
            ("P", "edge_precision"),
            ("R", "edge_recall"),
            ("F1", "edge_f1"),
            ("permuted", "edge_f1_permuted"),
            ("random", "edge_f1_random"),
            ("firing", "firing_edge_f1"),
        ),
    ),
)


def synthetic(
    tier: Annotated[str, typer.Option("--tier", help="T1, T2, T3 (1,024 features), or T3-full (16,384).")] = "T2",
    run: RunOption = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, max=1000, help="Seeds of each arm, from 0.")] = 3,
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
    from hsae.cache.errors import UserError
    from hsae.eval.synthetic.compared_runs import load_arms

    if tokens is not None and any(value.strip().startswith("train.tokens") for value in overrides or ()):
        raise UserError("--tokens and --set train.tokens exclude each other")
    check_folder(out)
    length = [] if tokens is None else [f"train.tokens={tokens}"]
    arms = load_arms(tier, [*(overrides or ()), *length])
    selected = list(arms.runs.values()) if run is None else arms.select(run)
    evaluate_on_screen(arms, selected, seeds, out, force=force, device=device)


def evaluate_on_screen(
    arms: "Arms", selected: "Sequence[RunConfig]", seeds: int, out: Path, *, force: bool = False, device: str = "auto"
) -> None:
    """Train and score runs on a tier of synthetic data, and show their scores."""
    from hsae.eval.synthetic.tiers import run_tier

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
    settings = content["settings"]
    get_console().print(
        f"{arms.tier.name}: {arms.tier.features:,} features in {arms.tier.width} dimensions, {settings['tokens']:,} vectors; "
        "mean ± standard deviation over seeds"
    )
    for title, columns in TABLES:
        get_console().print(_table(title, columns, content["arms"], selected))
    for arm in selected:
        for row in content["arms"][arm.name]["seeds"]:
            if "failure" in row:
                say(f"{arm.name}, seed {row['seed']}: {row['failure']}", style="yellow")
    say("results in ", (f"{out / arms.tier.name}.json", "bold"))


def _table(
    title: str, columns: tuple[tuple[str, str], ...], held: dict[str, Any], selected: "Sequence[RunConfig]"
) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("arm", no_wrap=True)
    for heading, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    if title == "features":
        table.add_column("L0", justify="right", no_wrap=True)
    for arm in selected:
        scores = held[arm.name]
        cells = [_cell(scores, name) for _, name in columns]
        if title == "features":
            cells.append("+".join(f"{value:.1f}" for value in scores["mean"].get("l0", ())))
        table.add_row(f"{arm.number} {arm.name}", *cells)
    return table


def _cell(scores: dict[str, Any], name: str) -> str | Text:
    value, spread = scores["mean"].get(name), scores["sd"].get(name)
    if value is None:
        return "-"
    text = f"{value:.3f}".replace("0.", ".", 1)
    return text if spread is None else Text.assemble(text, (f"±{f'{spread:.2f}'.removeprefix('0')}", "dim"))


class _Screen:
    """A bar over arms and seeds, and one over the steps of what trains now."""

    def __init__(self, total: int) -> None:
        self.bars = progress_bars(
            "{task.description}",
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
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
