"""Does the hierarchy help, and which component? Trains and evaluates what is missing of a plan, and answers."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from hsae.cache.errors import UserError, need
from hsae.cache.files import write_atomically
from hsae.eval import figures
from hsae.eval.ablation.results import read_table
from hsae.eval.ablation.significance import MIN_SEEDS
from hsae.eval.ablation.table import AblationTable
from hsae.eval.harness.targets import Selection
from hsae.eval.pipeline import Pipeline
from hsae.eval.synthetic.compared_runs import load_arms
from hsae.eval.synthetic.synthetic_evaluation import read_results
from hsae.train.config.plan import Plan
from hsae.train.config.run_config import RunConfig

UNLEARNED = (0, 3, 5, 11, 12)
"""Numbers of the runs that unlearning is measured on, unless others are named."""
PARTS = ("core", "composition", "synthetic", "unlearning")
TIER = "T2"
PANELS_PER_ROW = 4


def run_ablations(
    plan: Plan,
    run: str | None = None,
    *,
    seeds: int = 3,
    without: Sequence[str] = (),
    unlearning_run: str | None = None,
    unlearning_seeds: int | None = None,
    out: Path | str = "ablations",
    pipeline: Pipeline | None = None,
) -> AblationTable:
    """Train and evaluate what is missing of the runs (all of the plan, or those named), and put them into one table.

    Every hierarchy number stands beside its null, and every component gets a sentence: helps, hurts, or no evidence and
    how many seeds it would take (Welch's t test with Holm's correction; three seeds or more). `without` leaves out
    some of `PARTS`. Writes ablations.json, ablations.md and ablations.png into `out`. A stopped call goes on where it
    was. Raises UserError, before any compute for what can't work.

    >>> hsae.eval.run_ablations(hsae.load_plan("study"), "0-13")  # doctest: +SKIP
    """
    folder, pipeline = Path(out), pipeline or Pipeline()
    if unknown := set(without) - set(PARTS):
        raise UserError(f"--without {min(unknown)}: it must be one of {', '.join(PARTS)}")
    runs = plan.select(run) if run is not None else list(plan.runs.values())
    if "unlearning" in without and (unlearning_run is not None or unlearning_seeds is not None):
        raise UserError("--unlearning-run and --unlearning-seeds don't go with --without unlearning")
    if unlearning_seeds is not None and unlearning_seeds > seeds:
        raise UserError(f"--unlearning-seeds {unlearning_seeds} is more than --seeds {seeds}")
    unlearned = _choose_unlearning(plan, run, runs, unlearning_run) if "unlearning" not in without else []
    if seeds >= MIN_SEEDS:
        need("the tests behind ablate's verdicts", "scipy", "eval")
    need("ablations.png", "matplotlib", "report")
    synthetic = folder / "synthetic" / f"{TIER}.json"
    if synthetic.is_file():
        read_results(synthetic)  # raises UserError for a damaged one
    every = Selection(run=_numbers(runs), seeds=seeds, whole=True)
    tier = load_arms(TIER)
    arms = [tier.runs[config.number] for config in runs if config.number in tier.runs]

    def evaluate_unlearning() -> None:
        pipeline.build(plan, ("forget", "retain"))
        pipeline.evaluate("unlearning", plan, Selection(run=_numbers(unlearned), seeds=unlearning_seeds or seeds))

    steps: dict[str, Callable[[], None]] = {
        "cache": lambda: pipeline.build(plan, ("eval", "train")),
        "train": lambda: pipeline.train(plan, runs, seeds),
        "core": lambda: pipeline.evaluate("core", plan, every),
        "composition": lambda: pipeline.evaluate("composition", plan, every),
        "synthetic": lambda: pipeline.evaluate_synthetic(tier, arms, seeds, synthetic.parent),
        "unlearning": evaluate_unlearning,
    }
    for name, step in steps.items():
        if name not in without and (arms or name != "synthetic"):
            pipeline.begin(name)
            step()
    table = read_table(plan, runs, seeds, read_results(synthetic) if synthetic.is_file() else None)
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps(table.to_dict(), indent=1, allow_nan=False)
    write_atomically(folder / "ablations.json", lambda path: path.write_text(content))
    write_atomically(folder / "ablations.md", lambda path: path.write_text(table.markdown()))
    _save_figure(table, folder / "ablations.png")
    return table


def _choose_unlearning(
    plan: Plan, run: str | None, runs: Sequence[RunConfig], unlearning_run: str | None
) -> list[RunConfig]:
    """The runs that unlearning is measured on. Raises UserError unless they are among `runs`, which `run` names."""
    if unlearning_run is not None:
        chosen = plan.select(unlearning_run)
        if strange := next((config for config in chosen if config not in runs), None):
            raise UserError(
                f"--unlearning-run {unlearning_run}: run {plan.label(strange)} is not among those selected with "
                f"--run {run}"
            )
        return chosen
    if chosen := [config for config in runs if config.number in UNLEARNED]:
        return chosen
    raise UserError(
        f"none of the runs {', '.join(map(str, UNLEARNED))} is among those selected; name others with "
        "--unlearning-run, or leave it out with --without unlearning"
    )


def _numbers(runs: Sequence[RunConfig]) -> str:
    return ",".join(str(config.number) for config in runs)


@figures.style()
def _save_figure(table: AblationTable, path: Path) -> None:
    """One panel a number: a dot a seed, a bar at the mean, a hollow mark at the null."""
    columns = table.columns
    labels = [row.label for row in table.rows]
    panel_rows = math.ceil(len(columns) / PANELS_PER_ROW)
    figure = figures.new_figure(3.1 * PANELS_PER_ROW, (0.22 * len(labels) + 0.7) * panel_rows)
    axes = figure.subplots(panel_rows, PANELS_PER_ROW, squeeze=False, sharey=True)
    for axis in axes.flat[len(columns) :]:
        axis.set_visible(False)
    for axis, column in zip(axes.flat, columns, strict=False):
        for place, row in enumerate(table.rows):
            cell = row.cells[column.key]
            if cell.mean is None:
                continue
            axis.plot(cell.values, [place] * len(cell.values), "o", color="#2563a8", markersize=3.5, alpha=0.6)
            axis.plot([cell.mean], [place], "|", color="#0b2540", markersize=11, markeredgewidth=1.6)
            if cell.null is not None:
                axis.plot([cell.null], [place], "D", color="#9a6a1f", markersize=4, fillstyle="none")
        arrow = {1: " ↑", -1: " ↓", 0: ""}[column.better]
        axis.set_title(f"{column.title}{arrow}" + (f" (◇ {column.null} map)" if column.null else ""), fontsize=9)
        axis.set_yticks(range(len(labels)), labels, fontsize=8)
        axis.set_ylim(len(labels) - 0.5, -0.5)
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    write_atomically(path, lambda partial: figures.save_png(figure, partial))
