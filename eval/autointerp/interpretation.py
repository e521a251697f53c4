"""What a judge says of a latent, and what that is worth: SAEBench's score, and measures by what the latent really does."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hsae.eval.autointerp import explain
from hsae.eval.autointerp.config import AutointerpConfig
from hsae.eval.autointerp.judge import Answer, Question
from hsae.eval.autointerp.windows import Case
from hsae.eval.harness.estimates import UnitMean

MEASURES = ("balanced_accuracy", "accuracy", "sensitivity", "specificity")
Ask = Callable[[Question, int], Answer | None]


@dataclass(kw_only=True)
class Interpreted:
    """What the judge said of a latent."""

    case: Case
    explanation: str | None = None
    predicted: set[int] | None = None
    """Numbers of the tried windows, from 1; None if an answer was not of the form that was asked for."""
    answers: list[Answer] = field(default_factory=list)
    malformed: int = 0
    """Answers of another form."""
    log: list[str] = field(default_factory=list)

    def score(self) -> float:
        """SAEBench's: the share of windows rightly told, where random ones count as inactive."""
        return self._right([window.kind != "random" for window in self.case.tried])

    def _right(self, labels: Sequence[bool]) -> float:
        assert self.predicted is not None
        right = [(number in self.predicted) == label for number, label in enumerate(labels, 1)]
        return sum(right) / len(right)

    def fair(self) -> list[int]:
        """Numbers of the tried windows that have nothing in common with one that was shown."""
        shown = self.case.shown
        return [
            number
            for number, window in enumerate(self.case.tried, 1)
            if not any(window.shares(other) for other in shown)
        ]

    def measured(self) -> dict[str, float | None]:
        """By what the latent really does, on fair windows; None where there is none of a kind."""
        assert self.predicted is not None
        hits: dict[bool, list[bool]] = {True: [], False: []}
        for number in self.fair():
            active = self.case.tried[number - 1].active
            hits[active].append((number in self.predicted) == active)
        every = hits[True] + hits[False]
        sensitivity, specificity = (sum(part) / len(part) if part else None for part in (hits[True], hits[False]))
        both = sensitivity is not None and specificity is not None
        return {
            "balanced_accuracy": (sensitivity + specificity) / 2 if both else None,  # type: ignore[operator]
            "accuracy": sum(every) / len(every) if every else None,
            "sensitivity": sensitivity,
            "specificity": specificity,
        }


def interpret(case: Case, ask: Ask, config: AutointerpConfig) -> Interpreted:
    """Ask for an explanation and for predictions from it, each again while the answer has another form, `attempts` times at most."""
    done = Interpreted(case=case)

    def asked(question: Question, read: Callable[[str], Any]) -> Any:
        for attempt in range(config.judge.attempts):
            if (answer := ask(question, attempt)) is None:
                done.log.append(f"{question.user}\n\n> (no answer)")
                return None
            done.answers.append(answer)
            done.log.append(f"{question.user}\n\n> {answer.text}")
            if (found := read(answer.text)) is not None:
                return found
            done.malformed += 1
        return None

    done.explanation = asked(explain.explaining(case, config), explain.read_explanation)
    if done.explanation is not None:
        windows = len(case.tried)
        done.predicted = asked(
            explain.predicting(case, done.explanation), lambda text: explain.read_prediction(text, windows)
        )
    return done


def measures(scored: Sequence[Interpreted]) -> dict[str, dict[str, Any]]:
    """Means over latents with their intervals; `latents` is how many have the measure."""
    columns = {name: [item.measured()[name] for item in scored] for name in MEASURES}
    columns["autointerp_score"] = [item.score() for item in scored]
    found = {}
    for name, column in columns.items():
        values = torch.tensor([value for value in column if value is not None], dtype=torch.float64)
        estimate = UnitMean(values, torch.ones_like(values), "latents").estimate()
        found[name] = {"value": estimate.value, "low": estimate.low, "high": estimate.high, "latents": len(values)}
    return found


def told(item: Interpreted) -> dict[str, Any]:
    """SAEBench's entry of a latent."""
    assert item.predicted is not None
    return {
        "latent": item.case.latent,
        "explanation": item.explanation,
        "logs": "\n\n".join(item.log),
        "predictions": sorted(item.predicted),
        "correct seqs": [number for number, window in enumerate(item.case.tried, 1) if window.kind != "random"],
        "score": item.score(),
    }


def windows(item: Interpreted) -> dict[str, Any]:
    """Which windows were really active, which were left out because they share text with one shown, and what comes of it."""
    tried = item.case.tried
    fair = item.fair()
    return {
        "active": [number for number, window in enumerate(tried, 1) if window.active],
        "left_out": [number for number in range(1, len(tried) + 1) if number not in fair],
        "balanced_accuracy": item.measured()["balanced_accuracy"],
    }
