"""The steps from a plan to a report. What is there already is not made again: a stopped pipeline goes on."""

from collections.abc import Sequence
from pathlib import Path

from hsae import registry
from hsae.cache.config import Split
from hsae.cache.device import pick_device
from hsae.cache.errors import UserError
from hsae.eval.harness.evaluation import evaluate_plan
from hsae.eval.harness.targets import Selection
from hsae.eval.report.page import write_report
from hsae.eval.synthetic.compared_runs import Arms
from hsae.eval.synthetic.synthetic_evaluation import evaluate_synthetic
from hsae.train.config.plan import Plan
from hsae.train.config.run_config import RunConfig
from hsae.train.runs.planned_runs import train_runs
from hsae.train.stores import plan_stores


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
                raise UserError(f"run {result.run.number} ({result.run.name}) has failed: {result.detail}")

    def evaluate(self, name: str, plan: Plan, selection: Selection) -> None:
        """Run one of `hsae.registry.EVALUATIONS`. Raises UserError."""
        evaluate_plan(registry.resolve(registry.EVALUATIONS[name].kind), plan, selection, device=self.device)

    def evaluate_synthetic(self, arms: Arms, runs: Sequence[RunConfig], seeds: int, folder: Path) -> None:
        """Train and score runs on data whose features are known."""
        evaluate_synthetic(arms, runs, range(seeds), folder=folder, device=self.device)

    def report(self, plan: Plan, runs: Sequence[RunConfig], out: Path) -> None:
        """Write the report. Raises UserError."""
        write_report(plan, runs, out)
