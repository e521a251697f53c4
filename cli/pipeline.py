"""The steps of the pipeline, shown on the screen."""

from collections.abc import Sequence
from pathlib import Path

import typer
from rich import get_console

from hsae import registry
from hsae.cache.config import Split
from hsae.cli.cache import build_on_screen
from hsae.cli.evaluations import Screen, show
from hsae.cli.report import report_on_screen
from hsae.cli.synthetic import evaluate_on_screen
from hsae.cli.train import train_on_screen
from hsae.eval.harness.evaluation import evaluate_plan
from hsae.eval.harness.targets import Selection
from hsae.eval.pipeline import Pipeline
from hsae.eval.synthetic.compared_runs import Arms
from hsae.train.config.plan import Plan
from hsae.train.config.run_config import RunConfig


class ShownPipeline(Pipeline):
    """Shows each step as its own command does."""

    def begin(self, step: str) -> None:
        """Draw a line with the step's name."""
        get_console().rule(step)

    def build(self, plan: Plan, splits: Sequence[Split]) -> None:
        """As `hsae cache build`."""
        build_on_screen(plan, splits, self.device)

    def train(self, plan: Plan, runs: Sequence[RunConfig], seeds: int = 1) -> None:
        """As `hsae train --resume`; ends the program where that would fail."""
        if status := train_on_screen(plan, runs, seeds=seeds, resume=True, device=self.device):
            raise typer.Exit(status)

    def evaluate(self, name: str, plan: Plan, selection: Selection) -> None:
        """As `hsae eval NAME`."""
        with Screen(name) as screen:
            kind = registry.resolve(registry.EVALUATIONS[name].kind)
            results = evaluate_plan(kind, plan, selection, device=self.device, listener=screen)
        show(results)

    def evaluate_synthetic(self, arms: Arms, runs: Sequence[RunConfig], seeds: int, folder: Path) -> None:
        """As `hsae eval synthetic`."""
        evaluate_on_screen(arms, runs, seeds, folder, device=self.device)

    def report(self, plan: Plan, runs: Sequence[RunConfig], out: Path) -> None:
        """As `hsae report`."""
        report_on_screen(plan, runs, out)
