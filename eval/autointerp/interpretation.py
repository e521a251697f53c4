"""What a judge says of a latent, and what that is worth: SAEBench's score, and measures by what the latent does."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import torch

from hsae.cache.errors import UserError
from hsae.eval.autointerp import explain
from hsae.eval.autointerp.config import AutointerpConfig, JudgeConfig
from hsae.eval.autointerp.judge import Answer, Judge, Question
from hsae.eval.autointerp.windows import Case
from hsae.eval.harness.estimates import UnitMean

MEASURES = ("balanced_accuracy", "accuracy", "sensitivity", "specificity")
GRACE = 3.0
"""Seconds that answers under way have to arrive after a failure."""
Ask = Callable[[Question, int], Answer | None]
"""Answers a question at its n-th attempt."""


@dataclass(kw_only=True)
class Interpretation:
    """What the judge said of a latent. Windows that were tried are numbered from 1."""

    case: Case
    explanation: str | None = None
    predicted: set[int] | None = None
    """Numbers of windows; None if an answer was not of the form that was asked for."""
    answers: list[Answer] = field(default_factory=list)
    malformed: int = 0
    """Answers of another form."""
    log: list[str] = field(default_factory=list)

    def _is_right(self, number: int, is_active: bool) -> bool:
        assert self.predicted is not None
        return (number in self.predicted) == is_active

    @property
    def score(self) -> float:
        """SAEBench's: the share of windows predicted rightly, where random ones count as inactive."""
        right = [self._is_right(number, window.kind != "random") for number, window in enumerate(self.case.tried, 1)]
        return sum(right) / len(right)

    @cached_property
    def left_out(self) -> list[int]:
        """Windows that have something in common with one that was shown."""
        return [
            number
            for number, window in enumerate(self.case.tried, 1)
            if any(window.shares(other) for other in self.case.shown)
        ]

    @cached_property
    def measures(self) -> dict[str, float | None]:
        """By what the latent really does, without the windows left out; None where there is none of a kind."""
        hits: dict[bool, list[bool]] = {True: [], False: []}
        for number, window in enumerate(self.case.tried, 1):
            if number not in self.left_out:
                hits[window.active].append(self._is_right(number, window.active))
        accuracy, sensitivity, specificity = (
            sum(part) / len(part) if part else None for part in (hits[True] + hits[False], hits[True], hits[False])
        )
        balanced = None if sensitivity is None or specificity is None else (sensitivity + specificity) / 2
        return dict(zip(MEASURES, (balanced, accuracy, sensitivity, specificity), strict=True))

    def saebench_entry(self) -> dict[str, Any]:
        """SAEBench's entry of the latent."""
        assert self.predicted is not None
        return {
            "latent": self.case.latent,
            "explanation": self.explanation,
            "logs": "\n\n".join(self.log),
            "predictions": sorted(self.predicted),
            "correct seqs": [number for number, window in enumerate(self.case.tried, 1) if window.kind != "random"],
            "score": self.score,
        }

    def windows_entry(self) -> dict[str, Any]:
        """Which windows were really active, which were left out, and what comes of it."""
        return {
            "active": [number for number, window in enumerate(self.case.tried, 1) if window.active],
            "left_out": self.left_out,
            "balanced_accuracy": self.measures["balanced_accuracy"],
        }


def interpret(case: Case, ask: Ask, config: AutointerpConfig) -> Interpretation:
    """Ask for an explanation and for predictions from it, each `attempts` times at most until the form is right."""
    result = Interpretation(case=case)

    def read_answer(question: Question, read: Callable[[str], Any]) -> Any:
        for attempt in range(config.judge.attempts):
            if (answer := ask(question, attempt)) is None:
                result.log.append(f"{question.user}\n\n> (no answer)")
                return None
            result.answers.append(answer)
            result.log.append(f"{question.user}\n\n> {answer.text}")
            if (content := read(answer.text)) is not None:
                return content
            result.malformed += 1
        return None

    result.explanation = read_answer(explain.explaining(case, config), explain.read_explanation)
    if result.explanation is not None:
        result.predicted = read_answer(
            explain.predicting(case, result.explanation),
            lambda text: explain.read_prediction(text, len(case.tried)),
        )
    return result


def interpret_all(
    cases: Sequence[Case], judge: Judge, config: AutointerpConfig, progress: Callable[[int], None]
) -> list[Interpretation]:
    """Every case in order, several under way; the first failure ends all of them. `progress` hears how many are done.

    Threads are daemons: one that sleeps until a further try must not keep a failed command from ending.
    """
    waiting, done = SimpleQueue[int](), SimpleQueue[tuple[int, Interpretation | BaseException]]()
    for index in range(len(cases)):
        waiting.put(index)

    def work() -> None:
        with suppress(Empty):
            while not judge.is_stopped:
                index = waiting.get_nowait()
                try:
                    done.put((index, interpret(cases[index], judge.ask, config)))
                except BaseException as error:
                    done.put((index, error))

    threads = [
        Thread(target=work, name="hsae-judge", daemon=True) for _ in range(min(config.judge.concurrency, len(cases)))
    ]
    for thread in threads:
        thread.start()
    results: dict[int, Interpretation] = {}
    try:
        while len(results) < len(cases):
            index, result = done.get()
            if isinstance(result, BaseException):
                raise result
            results[index] = result
            check_form([item for item in results.values() if item.predicted is None], len(cases), config.judge)
            progress(len(results))
    except BaseException:
        judge.stop()
        until = time.monotonic() + GRACE
        for thread in threads:  # what is under way is paid for: let it arrive
            thread.join(max(0.0, until - time.monotonic()))
        raise
    return [results[index] for index in range(len(cases))]


def check_form(failed: Sequence[Interpretation], count: int, judge: JudgeConfig) -> None:
    """Raise UserError if too many of `count` latents have no answer of the right form."""
    if len(failed) > judge.malformed_share * count:
        last = failed[-1].log[-1].rpartition("\n> ")[2]
        raise UserError(
            f"{judge.model} at {judge.base_url} did not answer as asked for {len(failed)} of {count} latents "
            f"(autointerp.judge.malformed_share allows {judge.malformed_share:g}); "
            f"the last time it said {last[:120]!r}. Use another model, "
            "give it room with autointerp.judge.spare_tokens if it thinks first, or raise that share"
        )


def measures(scored: Sequence[Interpretation]) -> dict[str, dict[str, Any]]:
    """Means over latents with their intervals; `latents` is how many have the measure."""
    columns = {name: [item.measures[name] for item in scored] for name in MEASURES}
    columns["autointerp_score"] = [item.score for item in scored]
    entries = {}
    for name, column in columns.items():
        values = torch.tensor([value for value in column if value is not None], dtype=torch.float64)
        estimate = UnitMean(values, torch.ones_like(values), "latents").estimate()
        entries[name] = {**estimate.to_dict(), "latents": len(values)}
    return entries
