"""The steps from a plan to a report. What is there already is not made again: a stopped pipeline goes on."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hsae import registry
from hsae.cache.config import Split
from hsae.cache.device import pick_device
from hsae.cache.errors import UserError, need
from hsae.eval.harness.evaluation import evaluate_plan
from hsae.eval.harness.targets import Selection
from hsae.eval.report.page import write_report
from hsae.eval.synthetic.compared_runs import Arms
from hsae.eval.synthetic.synthetic_evaluation import evaluate_synthetic
from hsae.train.config.plan import Plan, load_plan
from hsae.train.config.run_config import RunConfig
from hsae.train.runs.planned_runs import train_runs
from hsae.train.stores import plan_stores

QUICKSTART, QUICKSTART_RUNS = "gemma-3-270m", "0-5"


class Pipeline:
    """Each step as a function. The command line overrides them to show how they go."""

    def __init__(self, device: str = "auto") -> None:
        self.device = device

    def begin(self, step: str) -> None:
        """A step begins."""

    def build(self, plan: Plan, splits: Sequence[Split]) -> None:
        """Make activation stores. Raises UserError."""
        plan_stores(plan, splits, pick_device(self.device)).build()

    def train(self, plan: Plan, runs: Sequence[RunConfig], seeds: int = 1) -> None:
        """Train runs. Raises UserError, also for one that fails."""
        for result in train_runs(plan, runs, seeds=seeds, resume=True, device=self.device):
            if result.status == "failed":
                raise UserError(f"run {result.run.label} has failed: {result.detail}")

    def evaluate(self, name: str, plan: Plan, selection: Selection) -> None:
        """Run one of `hsae.registry.EVALUATIONS`. Raises UserError."""
        evaluate_plan(registry.resolve(registry.EVALUATIONS[name].kind), plan, selection, device=self.device)

    def evaluate_synthetic(self, arms: Arms, runs: Sequence[RunConfig], seeds: int, folder: Path) -> None:
        """Train and score runs on data whose features are known."""
        evaluate_synthetic(arms, runs, range(seeds), folder=folder, device=self.device)

    def report(self, plan: Plan, runs: Sequence[RunConfig], out: Path) -> None:
        """Write the report. Raises UserError."""
        write_report(plan, runs, out)


def run_quickstart(
    out: Path | str = "quickstart", overrides: Sequence[str] = (), pipeline: Pipeline | None = None
) -> dict[str, float]:
    """Cache real Gemma-3-270M on text that ships with Python, train runs 0-5, evaluate and report into `out`.

    No GPU, no hub. `overrides` are as `--set` takes them. A second call goes on from what is there. Returns the seconds
    of each step. Raises UserError.

    >>> hsae.eval.run_quickstart()  # doctest: +SKIP
    """
    for package in ("jinja2", "matplotlib"):
        need("the report at the end", package, "quickstart")
    folder, pipeline = Path(out), pipeline or Pipeline()
    places = [f"cache.dir={str(folder / 'activations')!r}", f"train.dir={str(folder / 'runs')!r}"]
    plan = load_plan(QUICKSTART, [*places, *overrides])
    runs = plan.select(QUICKSTART_RUNS)
    steps: dict[str, Callable[[], None]] = {
        "cache": lambda: pipeline.build(plan, ("eval", "train")),
        "train": lambda: pipeline.train(plan, runs),
        "core": lambda: pipeline.evaluate("core", plan, Selection(run=QUICKSTART_RUNS)),
        "report": lambda: pipeline.report(plan, runs, folder / "report"),
    }
    seconds = {}
    for number, (name, step) in enumerate(steps.items(), 1):
        pipeline.begin(f"{number}/{len(steps)} {name}")
        began = time.perf_counter()
        step()
        seconds[name] = time.perf_counter() - began
    return seconds
