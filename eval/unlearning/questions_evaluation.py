"""`hsae eval unlearning --qa`: SAEBench's unlearning score of every level of a run, and of all levels together.

A run's result is `eval/unlearning_qa.json` in its directory.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Self

from hsae.cache.language_model.lm import load_tokenizer
from hsae.cache.reading.provenance import pin_commit
from hsae.eval.harness.evaluation import Result, cached_method
from hsae.eval.harness.listener import SILENT, Listener
from hsae.eval.harness.options import Options
from hsae.eval.harness.tables import Table
from hsae.eval.harness.targets import RunTarget
from hsae.eval.unlearning import qa, selection
from hsae.eval.unlearning.config import SIDES, Side, UnlearningConfig
from hsae.eval.unlearning.intervention import of_model
from hsae.eval.unlearning.questions import Question, check_template
from hsae.eval.unlearning.text_pair import TextPairEvaluation
from hsae.train.config.plan import Plan


class UnlearningQuestions(TextPairEvaluation):
    """How many questions on what is to be forgotten are still answered, where those to be kept are."""

    file = "unlearning_qa.json"
    sets: dict[Side, list[Question]]

    @classmethod
    def of_plan(
        cls, plan: Plan, options: Options | None = None, *, device: str = "cpu", listener: Listener = SILENT
    ) -> Self:
        """The evaluation as a plan describes it. Raises UserError for a model that is not instruction-tuned, too."""
        check_template(load_tokenizer(pin_commit(plan.model, plan.cache.dir)), plan.model.id)
        sets = qa.read_sets(plan.table(UnlearningConfig).qa)
        evaluation = super().of_plan(plan, options, device=device, listener=listener)
        evaluation.sets = sets
        return evaluation

    def inputs(self, target: RunTarget) -> dict[str, Any]:
        """All that a result depends on, by content."""
        return {**super().inputs(target), "config": self.config.qa.digest, "questions": qa.digest(self.sets)}

    @cached_method
    def exam(self, hook: str) -> qa.Exam:
        """The questions that the model answers as it is."""
        return qa.Exam(self.language, hook, self.sets, self.config.qa, self.listener.progress)

    def measure(self, target: RunTarget) -> dict[str, Any]:
        """The score of every level, and of all levels together."""
        exam, model, rows = self.exam(target.hook), target.load(), self.rows(target)
        dictionary = of_model(model, self.device)
        densities = {side: selection.densities(dictionary, rows[side].batches())[0] for side in SIDES}
        levels = range(1, len(dictionary.widths) + 1) if len(dictionary.widths) > 1 else ()
        arms = {f"level{number}": dictionary.level(number) for number in levels}
        if model.is_nested:
            arms = {"sae": range(sum(dictionary.widths)), **arms}
        scores = {}
        for name, among in arms.items():
            progress = partial(self.listener.progress, f"{target.label}: {name}")
            scores[name] = qa.evaluate(dictionary, among, densities, exam, self.config.qa, progress)
        counts = {side: {"given": exam.totals[side], "answered": len(exam.answered[side])} for side in SIDES}
        passes = {"run": exam.passes, "spared": exam.spared}
        return self.result("unlearning", target, {"arms": scores, "questions": counts, "passes": passes})

    def tables(self, results: Sequence[Result[RunTarget]]) -> list[Table]:
        """The score of every arm with its best configuration."""
        title = "SAEBench's unlearning score: 1 - the smallest forget accuracy that keeps retain accuracy"
        table = Table(title, ("SAE", "score", "forget", "retain", "best configuration"))
        for item in results:
            for name, arm in item.content["arms"].items():
                table.add(f"{item.label} {name}", f"{arm['unlearning_score']:.3f}", *self._best(arm["configurations"]))
        return [table]

    def _best(self, configurations: Sequence[dict[str, Any]]) -> tuple[str, str, str]:
        """Both accuracies and the settings of the configuration that the score is of."""
        least = self.config.qa.retain_accuracy
        eligible = [entry for entry in configurations if entry["retain_accuracy"] >= least]
        best = min(eligible, key=lambda entry: entry["forget_accuracy"], default=None)
        if best is None:
            return "-", "-", f"none keeps {least:.0%} of retain"
        clamp = f"{best['clamped']} latents at -{best['multiplier']:g}, retain threshold {best['retain_threshold']:g}"
        return f"{best['forget_accuracy']:.3f}", f"{best['retain_accuracy']:.3f}", clamp

    def notes(self, results: Sequence[Result[RunTarget]]) -> list[str]:
        """How many questions the model answers, and the passes."""
        lines = []
        for item in results:
            counts, passes = item.content["questions"], item.content["passes"]
            answered = (f"{counts[side]['answered']} of {counts[side]['given']} {side} questions" for side in SIDES)
            lines.append(
                f"{item.label}: answered as it is: {', '.join(answered)}; {passes['run']:,} prompts passed, "
                f"{passes['spared']:,} spared because nothing fired"
            )
        return lines
