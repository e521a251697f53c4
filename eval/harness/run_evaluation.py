"""Evaluations of whole trained runs: all levels of a model together, one result file a run."""

from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

from hsae.cache.errors import NotApplicable, UserError
from hsae.eval.harness.evaluation import Evaluation
from hsae.eval.harness.listener import Listener
from hsae.eval.harness.result_files import changes, read_result
from hsae.eval.harness.targets import ResultPlace, RunTarget, Selection, trained_runs
from hsae.train.config.plan import Plan

StoreT = TypeVar("StoreT")


class RunEvaluation(Evaluation[StoreT, RunTarget]):
    """An evaluation of trained runs; its results are files of one name in the folders `eval` of the runs."""

    file: ClassVar[str]
    without = frozenset({"sae", "out"})

    @classmethod
    def select(cls, plan: Plan, selection: Selection, listener: Listener) -> Sequence[RunTarget]:
        """The runs that are selected. Raises UserError if one is not trained, NotApplicable for SAELens folders."""
        if selection.folders:
            raise NotApplicable(f"{cls.name} is of trained runs, all levels together; it takes no --sae")
        runs = trained_runs(plan, selection.run, selection.seeds, listener.say)
        return [RunTarget.of(seeded, config) for seeded, config in runs]

    def find(self, target: RunTarget) -> ResultPlace:
        """Where the target's result belongs, and whether it is there."""
        path = target.folder / self.file
        try:
            content = read_result(path, f"hsae eval {self.name}")
        except UserError:
            return ResultPlace(path)  # missing or damaged: made anew
        if self.is_current(target, content):
            return ResultPlace(path, content)
        before = content.get("inputs")
        return ResultPlace(path, changed=changes(self.inputs(target), before) if isinstance(before, dict) else "")

    def is_current(self, target: RunTarget, content: dict[str, Any]) -> bool:
        """Whether a result that lies there is made of the same inputs."""
        return bool(content.get("inputs") == self.inputs(target))
