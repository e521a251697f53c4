"""Whether two runs differ by more than their seeds do: t tests, corrected for their number, and the seeds they need."""

import math
from bisect import bisect_left
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, variance
from typing import TypeVar

LEVEL = 0.05
"""Chance of one false finding or more in the whole table."""
POWER = 0.8
MIN_SEEDS = 3
"""Fewer seeds give no verdict."""
ROUNDING = 1e-9
"""What varies less than this share of the difference does not vary."""
MANY = 1000
"""More seeds than this are not counted."""
Key = TypeVar("Key", bound=Hashable)
Sample = Mapping[int, float]
"""A number for each seed."""


@dataclass(frozen=True, kw_only=True)
class TTest:
    """A two-sided t test."""

    t: float
    df: float
    p: float
    """Corrected by Holm's method for all tests of its kind in the table."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One number of two runs."""

    difference: float
    """Of the means over seeds."""
    seeds: int
    """The smaller number of seeds."""
    welch: TTest | None
    """Of the two means, variances unequal; None below MIN_SEEDS, or if neither run varies."""
    paired: TTest | None
    """Of the differences seed by seed; None unless both runs have the same seeds, MIN_SEEDS or more, and they vary."""
    needs: int | None
    """Seeds a run that would find such a difference with a chance of POWER; None above MANY or without Welch's test."""


def compare(pairs: Mapping[Key, tuple[Sample, Sample]]) -> dict[Key, Comparison]:
    """Test each pair of samples, none of them empty; the number of pairs is what p and `needs` are corrected for."""
    welch = _corrected({key: _welch(list(one.values()), list(other.values())) for key, (one, other) in pairs.items()})
    paired = _corrected({key: _paired(one, other) for key, (one, other) in pairs.items()})
    level = LEVEL / max(1, sum(test is not None for test in welch.values()))
    return {
        key: Comparison(
            difference=fmean(one.values()) - fmean(other.values()),
            seeds=min(len(one), len(other)),
            welch=welch[key],
            paired=paired[key],
            needs=None if welch[key] is None else _needs(list(one.values()), list(other.values()), level),
        )
        for key, (one, other) in pairs.items()
    }


def _welch(one: Sequence[float], other: Sequence[float]) -> TTest | None:
    n, m = len(one), len(other)
    if min(n, m) < MIN_SEEDS:
        return None
    return _test(fmean(one) - fmean(other), variance(one) / n, variance(other) / m, n, m)


def _paired(one: Sample, other: Sample) -> TTest | None:
    if len(one) < MIN_SEEDS or one.keys() != other.keys():
        return None
    gaps = [value - other[seed] for seed, value in one.items()]
    return _test(fmean(gaps), variance(gaps) / len(gaps), 0.0, len(gaps), len(gaps))


def _test(difference: float, one: float, other: float, n_one: int, n_other: int) -> TTest | None:
    """The test of a difference whose squared standard error is `one` + `other`, with Welch's degrees of freedom."""
    from scipy.stats import t

    error = math.sqrt(one + other)
    if not error > ROUNDING * abs(difference):
        return None
    score, df = difference / error, _df(one, other, n_one, n_other)
    return TTest(t=score, df=df, p=float(2 * t.sf(abs(score), df)))


def _df(one: float, other: float, n_one: int, n_other: int) -> float:
    """Welch and Satterthwaite's degrees of freedom."""
    share = one / (one + other)
    return 1 / (share**2 / (n_one - 1) + (1 - share) ** 2 / (n_other - 1))


def _corrected(tests: Mapping[Key, TTest | None]) -> dict[Key, TTest | None]:
    """The tests with Holm's p: the k-th smallest of n times n + 1 - k, and no smaller than those before it."""
    made = sorted(((key, test) for key, test in tests.items() if test is not None), key=lambda item: item[1].p)
    corrected, p = dict(tests), 0.0
    for rank, (key, test) in enumerate(made):
        p = max(p, min(1.0, (len(made) - rank) * test.p))
        corrected[key] = replace(test, p=p)
    return corrected


def _needs(one: Sequence[float], other: Sequence[float], level: float) -> int | None:
    """Seeds a run at which Welch's test finds a difference such as this at `level` with a chance of POWER, if the
    variances are the true ones.
    """
    from scipy.stats import t

    difference, spread = fmean(one) - fmean(other), (variance(one), variance(other))

    def is_enough(n: int) -> bool:
        df = _df(spread[0] / n, spread[1] / n, n, n)
        return bool(abs(difference) >= (t.isf(level / 2, df) + t.ppf(POWER, df)) * math.sqrt(sum(spread) / n))

    counts = range(MIN_SEEDS, MANY + 1)
    first = bisect_left(counts, True, key=is_enough)
    return counts[first] if first < len(counts) else None
