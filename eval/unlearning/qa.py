"""SAEBench's unlearning score: accuracy on questions to be forgotten, where accuracy on questions to be kept survives.

    score = 1 - min over configurations of accuracy(forget); those that keep less than 99 % of retain count as 1

Accuracies are over the questions that the model answers under every tried order of the choices. Latents are chosen on
text, by SAEBench's sparsity rule; an active one is set to minus a multiplier. A question on which nothing fires keeps
its answer.

Shapes: T tokens of a prompt, D residual width, F latents, A chosen latents, V vocabulary.
"""

import hashlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hsae.cache.errors import UserError
from hsae.cache.language_model.lm import LanguageModel
from hsae.eval.harness.listener import Progress
from hsae.eval.unlearning import questions, selection
from hsae.eval.unlearning.config import SIDES, QAConfig, Side
from hsae.eval.unlearning.intervention import Dictionary, Intervention, changed
from hsae.eval.unlearning.questions import Question


class Exam:
    """Both sets of questions, put once to the unchanged model; what it answers right under every tried order is asked
    again. Raises UserError if that is nothing.
    """

    def __init__(
        self,
        language: LanguageModel,
        hook: str,
        sets: dict[Side, list[Question]],
        config: QAConfig,
        progress: Progress,
    ) -> None:
        self.language, self.hook, self.passes, self.spared = language, hook, 0, 0
        self.letters = questions.letter_tokens(language.tokenizer)
        self.totals = {side: len(sets[side]) for side in SIDES}
        self.answered: dict[Side, list[tuple[Question, Tensor]]] = {side: [] for side in SIDES}
        """The questions with their residuals at the hook, [T, D]."""
        for side, total in self.totals.items():
            for done, question in enumerate(sets[side]):
                progress(f"asking {side} questions", done, total)
                if (resid_TD := self._answers(question, config.permutations)) is not None:
                    self.answered[side].append((question, resid_TD))
            progress(f"asking {side} questions", total, total)
            if not self.answered[side]:
                raise UserError(
                    f"the model answers none of the {total} {side} questions under all {config.permutations} "
                    "orders of their choices, so there is nothing to measure; use a stronger model or easier questions"
                    ", or lower the demand with --set unlearning.qa.permutations=1"
                )

    def _answers(self, question: Question, most: int) -> Tensor | None:
        """The residuals of the question as given if the model is right under every order, else None."""
        first_TD = None
        for order in question.orders(most):
            permuted = question.permuted(order)
            tokens_1T = torch.tensor([questions.prompt(permuted, self.language.tokenizer)])
            resid_TD = self.language.prefix(tokens_1T, [self.hook])[self.hook][0]
            self.passes += 1
            if self.answer(permuted, resid_TD) != permuted.answer:
                return None
            first_TD = resid_TD.cpu() if first_TD is None else first_TD
        return first_TD

    def answer(self, question: Question, resid_TD: Tensor) -> int:
        """The choice the model takes from these residuals on."""
        final_D = self.language.suffix(self.hook, resid_TD[None])[0, -1]
        return questions.predicted(self.language.unembed(final_D[None])[0], self.letters, len(question.choices))

    def accuracy(self, side: Side, dictionary: Dictionary, intervention: Intervention) -> float:
        """Share of the questions that are still answered right."""
        right = 0
        for question, resid_TD in self.answered[side]:
            x_1TD = resid_TD[None]
            acts_1TA = dictionary.encode(x_1TD)[..., list(intervention.latents)]
            fired_1TA = intervention.fired(acts_1TA, torch.ones(x_1TD.shape[:2], dtype=torch.bool))
            if not fired_1TA.any():
                self.spared += 1
                right += 1
                continue
            after_1TD = changed(x_1TD, intervention.delta(acts_1TA, fired_1TA, dictionary.directions_FD), fired_1TA)
            self.passes += 1
            right += self.answer(question, after_1TD[0]) == question.answer
        return right / len(self.answered[side])


def digest(sets: dict[Side, list[Question]]) -> str:
    """SHA-256 over all questions."""
    text = repr([(side, question) for side in SIDES for question in sets[side]])
    return hashlib.sha256(text.encode()).hexdigest()


def read_sets(config: QAConfig) -> dict[Side, list[Question]]:
    """Both sets of questions. Raises UserError if one can't be had."""
    return {
        side: [q for name in getattr(config, side) for q in questions.read_questions(name, config.revisions)]
        for side in SIDES
    }


def score(configurations: Sequence[dict[str, Any]], least: float) -> float:
    """1 - the smallest forget accuracy where the retain accuracy is `least` or more; elsewhere it counts as 1."""
    accuracies = [entry["forget_accuracy"] for entry in configurations if entry["retain_accuracy"] >= least]
    return 1.0 - min(accuracies, default=1.0)


def evaluate(
    dictionary: Dictionary,
    among: Sequence[int],
    densities: dict[Side, Tensor],
    exam: Exam,
    config: QAConfig,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """The score of the latents `among`, with every configuration behind it.

    `densities` are the latents' on the two texts; as SAEBench keeps them, to six decimals.
    """
    forget_F, retain_F = (selection.rounded(densities[side]) for side in SIDES)
    entries: list[dict[str, Any]] = []
    accuracies: dict[tuple[tuple[int, ...], float], dict[str, float]] = {}
    rankings = {cap: selection.ranking(forget_F, retain_F, cap, among) for cap in config.retain_thresholds}
    every = list(itertools.product(config.retain_thresholds, config.n_features, config.multipliers))
    for done, (threshold, count, multiplier) in enumerate(every):
        progress(done, len(every))
        latents = tuple(rankings[threshold][:count])
        if (latents, multiplier) not in accuracies:
            clamp = Intervention(latents=latents, values=(-multiplier,) * len(latents))
            both = {f"{side}_accuracy": exam.accuracy(side, dictionary, clamp) for side in SIDES}
            accuracies[latents, multiplier] = both
        setting = {
            "retain_threshold": threshold,
            "n_features": count,
            "clamped": len(latents),
            "multiplier": multiplier,
        }
        entries.append(setting | accuracies[latents, multiplier])
    progress(len(every), len(every))
    return {"unlearning_score": score(entries, config.retain_accuracy), "configurations": entries}
