"""Known ways in which a hierarchical run fails, by name. docs/measures.md says what each looks like.

W-collapsed, scale-drain, copy: of the learned map, as training itself warns of them, here from evaluation text.
dead-coarse, wrong-k-split: of a level. coarse-hurts-fine: of the run, beside one that is compared with.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from hsae.eval.harness.estimates import Estimate
from hsae.eval.hierarchy.composition_result import CompositionResult, PairResult
from hsae.train.config.run_config import RunConfig
from hsae.train.training.training_run import map_failures

NAMES = ("W-collapsed", "scale-drain", "copy", "dead-coarse", "wrong-k-split", "coarse-hurts-fine")
DEAD_SHARE = 0.5  # of a coarse level's latents
SPLIT_FACTOR = 2.0  # by which a level's L0 may miss its share
SATURATED = 0.5  # share of a level's latents that fire on a token
HURT = 0.01  # explained variance lost against the run compared with


@dataclass(frozen=True)
class Failure:
    """A named failure of one level, or of the run (level 1: what the whole model reconstructs)."""

    name: str
    level: int
    text: str


@dataclass(frozen=True)
class Verdict:
    """The failures that a run shows, and, for those that could not be looked for, why not."""

    failures: list[Failure]
    unchecked: dict[str, str]


def find_failures(
    result: CompositionResult,
    config: RunConfig,
    log: Sequence[dict[str, Any]] = (),
    comparison: tuple[str, Estimate] | None = None,
) -> Verdict:
    """Every known failure that a run shows.

    `log` is its metrics.jsonl. `comparison`: label and explained variance of a flat run of equal width and L0.
    """
    unchecked: dict[str, str] = {}
    if len(result.levels) == 1:
        return Verdict([], dict.fromkeys(NAMES, "the run has one level"))
    failures = [failure for pair in result.pairs for failure in _of_map(pair)]
    if not any("learned" in pair.readings for pair in result.pairs):
        unchecked |= dict.fromkeys(NAMES[:3], "the run learned no W")
    failures += [*_dead_coarse(result, log), *_wrong_split(result, config)]
    if comparison is None:
        unchecked["coarse-hurts-fine"] = "no flat run of the same activation is trained to compare with"
    else:
        failures += _hurt(result.levels[0].explained_variance, *comparison)
    return Verdict(failures, unchecked)


def _of_map(pair: PairResult) -> Iterator[Failure]:
    if (reading := pair.readings.get("learned")) is None:
        return
    filled = [ratio for ratio in reading.participation if ratio > 0]
    error = reading.measures["composition_fvu"].value
    health = {
        "nonzero": pair.facts["visible_weights"] or 0.0,
        "unexplained": 1.0 if error is None else error,
        "participation": median(filled) if filled else 0.0,
    }
    yield from (Failure(name, pair.level, text) for name, text in map_failures(pair.level, health).items())


def _dead_coarse(result: CompositionResult, log: Sequence[dict[str, Any]]) -> Iterator[Failure]:
    last = next((line["dead"] for line in reversed(log) if line["kind"] == "metrics"), [0.0] * len(result.levels))
    for level, dead in zip(result.levels[1:], last[1:], strict=True):
        if max(level.silent, dead) > DEAD_SHARE:
            yield Failure(
                "dead-coarse",
                level.level,
                f"dead-coarse: {level.silent:.0%} of level {level.level}'s {level.latents} latents never fire on the "
                f"rows measured; {dead:.0%} were dead at the end of training",
            )


def _wrong_split(result: CompositionResult, config: RunConfig) -> Iterator[Failure]:
    for level, target in zip(result.levels, config.l0, strict=True):
        l0 = level.l0.value
        if l0 is None:
            continue
        text = f"wrong-k-split: level {level.level} has L0 {l0:.3g}"
        is_off = l0 > SPLIT_FACTOR * target or l0 < target / SPLIT_FACTOR
        if l0 > SATURATED * level.latents:
            yield Failure("wrong-k-split", level.level, f"{text} of {level.latents} latents: it is saturated")
        elif is_off and config.selection == "level":  # a joint selection shares L0 out as it likes
            yield Failure("wrong-k-split", level.level, f"{text} where {target:g} were meant")


def _hurt(own: Estimate, label: str, other: Estimate) -> Iterator[Failure]:
    if own.value is None or other.value is None or own.value > other.value - HURT:
        return
    if own.high is not None and other.low is not None and own.high > other.low:
        return  # within the intervals
    values = f"all levels together explain {own.value:.3f} of the variance, run {label} {other.value:.3f}"
    yield Failure("coarse-hurts-fine", 1, f"coarse-hurts-fine: {values}")
