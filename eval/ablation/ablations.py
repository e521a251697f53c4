"""Does the hierarchy help, and which component? Trains and evaluates what is missing of a plan, and answers."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from hsae.cache.errors import UserError, need
from hsae.cache.files import write_atomically
from hsae.eval.ablation.figure import save_figure
from hsae.eval.ablation.results import read_table
from hsae.eval.ablation.significance import MIN_SEEDS
from hsae.eval.ablation.table import AblationTable
from hsae.eval.harness.targets import Selection
from hsae.eval.pipeline import Pipeline
from hsae.eval.synthetic.compared_runs import NUMBERS, load_arms
from hsae.eval.synthetic.synthetic_evaluation import read_results
from hsae.train.config.plan import Plan
from hsae.train.config.run_config import RunConfig

FORGETTING = (0, 3, 5, 11, 12)
"""Numbers of the runs that unlearning is measured on, unless others are named."""
PARTS = ("core", "composition", "synthetic", "unlearning")
TIER = "T2"


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
    folder, pipeline, left_out = Path(out), pipeline or Pipeline(), set(without)
    runs = plan.select(run) if run is not None else list(plan.runs.values())
    forgetting = _choose_unlearning(plan, run, runs, seeds, left_out, unlearning_run, unlearning_seeds)
    if seeds >= MIN_SEEDS:
        need("the tests behind ablate's verdicts", "scipy", "eval")
    need("ablations.png", "matplotlib", "report")
    synthetic = folder / "synthetic" / f"{TIER}.json"
    if synthetic.is_file():
        read_results(synthetic)  # raises UserError for a damaged one
    every = Selection(run=_numbers(runs), seeds=seeds)
    arms = [config for config in runs if config.number in NUMBERS]
    if not arms:
        left_out.add("synthetic")

    def evaluate_synthetic() -> None:
        tier = load_arms(TIER, ())
        pipeline.evaluate_synthetic(tier, tier.select(_numbers(arms)), seeds, synthetic.parent)

    def evaluate_unlearning() -> None:
        pipeline.build(plan, ("forget", "retain"))
        pipeline.evaluate("unlearning", plan, Selection(run=_numbers(forgetting), seeds=unlearning_seeds or seeds))

    steps: dict[str, Callable[[], None]] = {
        "cache": lambda: pipeline.build(plan, ("eval", "train")),
        "train": lambda: pipeline.train(plan, runs, seeds),
        "core": lambda: pipeline.evaluate("core", plan, Selection(run=every.run, seeds=seeds, whole=True)),
        "composition": lambda: pipeline.evaluate("composition", plan, every),
        "synthetic": evaluate_synthetic,
        "unlearning": evaluate_unlearning,
    }
    for name, step in steps.items():
        if name not in left_out:
            pipeline.begin(name)
            step()
    table = read_table(plan, runs, seeds, read_results(synthetic) if synthetic.is_file() else None)
    _write(table, folder)
    return table


def _choose_unlearning(
    plan: Plan,
    run: str | None,
    runs: Sequence[RunConfig],
    seeds: int,
    left_out: set[str],
    unlearning_run: str | None,
    unlearning_seeds: int | None,
) -> list[RunConfig]:
    """The runs that unlearning is measured on. Raises UserError for options that contradict each other."""
    if unknown := left_out - set(PARTS):
        raise UserError(f"--without {sorted(unknown)[0]}: it must be one of {', '.join(PARTS)}")
    chosen = plan.select(unlearning_run) if unlearning_run is not None else []
    if unlearning_run is None and "unlearning" not in left_out:
        chosen = [config for config in runs if config.number in FORGETTING]
        if not chosen:
            raise UserError(
                f"none of the runs {', '.join(map(str, FORGETTING))} is among those selected; name others with "
                "--unlearning-run, or leave it out with --without unlearning"
            )
    if strange := [f"{config.number} {config.name}" for config in chosen if config not in runs]:
        raise UserError(
            f"--unlearning-run {unlearning_run}: run {strange[0]} is not among those selected with --run {run}"
        )
    if "unlearning" in left_out and (unlearning_run is not None or unlearning_seeds is not None):
        raise UserError("--unlearning-run and --unlearning-seeds don't go with --without unlearning")
    if unlearning_seeds is not None and unlearning_seeds > seeds:
        raise UserError(f"--unlearning-seeds {unlearning_seeds} is more than --seeds {seeds}")
    return chosen


def _numbers(runs: Sequence[RunConfig]) -> str:
    return ",".join(str(config.number) for config in runs)


def _write(table: AblationTable, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps(table.to_dict(), indent=1, allow_nan=False)
    write_atomically(folder / "ablations.json", lambda path: path.write_text(content))
    write_atomically(folder / "ablations.md", lambda path: path.write_text(table.markdown()))
    save_figure(table, folder / "ablations.png")
