"""A measured value with its interval, and the bootstrap behind most intervals.

Shapes: R rows, U other units of resampling, B rows of a batch, C columns (sums kept), S the data and its resamples, the
data first.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

RESAMPLES = 1000
SEED = 0
LEVEL = 0.95
MOST_INDICES = 1 << 22  # of resampled units at a time
COUNTED_AT_ONCE = 1 << 16  # rows drawn and counted at a time: their counts stay in the processor's cache


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval. None where undefined."""

    value: float | None
    low: float | None = None
    high: float | None = None
    over: str | None = None
    """What was resampled or repeated: rows, documents, latents, seeds, ..."""
    draws: tuple[float | None, ...] = ()
    """The value under each seed, where seeds are what the interval is over."""

    def to_dict(self) -> dict[str, Any]:
        """As result files have it."""
        entry: dict[str, Any] = {"value": self.value, "low": self.low, "high": self.high}
        return {**entry, "seeds": list(self.draws)} if self.draws else entry

    @classmethod
    def of_dict(cls, entry: Mapping[str, Any]) -> "Estimate":
        """From a result file; what is not there is None."""
        draws = tuple(entry.get("seeds") or ())
        return cls(
            entry.get("value"), entry.get("low"), entry.get("high"), "seeds" if draws else entry.get("over"), draws
        )


class Resampler:
    """How often each of R rows is drawn in each resample with replacement; the first "resample" is the data itself.

    Every SAE is resampled with the same draws, so intervals of several SAEs can be compared.
    """

    def __init__(self, rows: int, device: str = "cpu", resamples: int | None = None, seed: int = SEED) -> None:
        generator = torch.Generator().manual_seed(seed)
        resamples = RESAMPLES if resamples is None else resamples
        counts_SR = torch.ones(1 + resamples, rows, dtype=torch.uint8)
        step = max(1, COUNTED_AT_ONCE // max(1, rows))
        for some_SR in torch.split(counts_SR[1:], step):
            drawn_SR = torch.randint(rows, some_SR.shape, generator=generator)
            drawn_SR += torch.arange(len(some_SR))[:, None] * rows  # one count for all of them
            counts_R = drawn_SR.flatten().bincount(minlength=some_SR.numel()).clamp_max(255)
            some_SR.copy_(counts_R.view(some_SR.shape))
        self.counts_SR = counts_SR.to(device)

    def weights(self, start: int, stop: int) -> Tensor:
        """[1 + S, stop - start] float64."""
        return self.counts_SR[:, start:stop].double()


class ResampledSums:
    """Sums of per-row columns, of the data and of every resample; memory does not grow with the rows."""

    def __init__(self, resampler: Resampler, columns: int) -> None:
        counts = resampler.counts_SR
        self.resampler = resampler
        self.sums_SC = torch.zeros(len(counts), columns, dtype=torch.float64, device=counts.device)

    def add(self, start: int, values_BC: Tensor) -> None:
        """Take in the rows `start`, `start + 1`, ..."""
        self.sums_SC += self.resampler.weights(start, start + len(values_BC)) @ values_BC.double()


@dataclass(frozen=True)
class UnitMean:
    """sum `above` / sum `below` over the U units with `below` > 0, which are resampled: latents, for example."""

    above_U: Tensor
    below_U: Tensor
    over: str
    """What the units are."""

    def value(self) -> float | None:
        """None if there is no unit, or the mean is not a number."""
        below = float(self.below_U.sum())
        value = float(self.above_U[self.below_U > 0].sum()) / below if below > 0 else math.nan
        return value if math.isfinite(value) else None

    def estimate(self) -> Estimate:
        """The value with its interval over units."""
        value, used_U = self.value(), self.below_U > 0
        sums_U2 = torch.stack([self.above_U[used_U], self.below_U[used_U]], 1).double().cpu()
        units = len(sums_U2)
        if units < 2 or value is None:
            return Estimate(value)
        generator = torch.Generator().manual_seed(SEED)
        step = max(1, MOST_INDICES // units)
        resampled_S2 = torch.cat(
            [
                sums_U2[torch.randint(units, (min(step, RESAMPLES - start), units), generator=generator)].sum(1)
                for start in range(0, RESAMPLES, step)
            ]
        )
        values_S = torch.cat([torch.tensor([value], dtype=torch.float64), resampled_S2[:, 0] / resampled_S2[:, 1]])
        return estimate_of(values_S, self.over)


def estimate_of(values_S: Tensor, over: str = "rows") -> Estimate:
    """Value and percentile interval from a statistic of the data (first) and of the resamples (the rest)."""
    value, resampled = values_S[0].item(), values_S[1:]
    if not math.isfinite(value):
        return Estimate(None)
    if not len(resampled) or not torch.isfinite(resampled).all():
        return Estimate(value)
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64, device=resampled.device)
    low, high = torch.quantile(resampled, ends).tolist()
    return Estimate(value, low, high, over)


def mean_over_seeds(values: Sequence[float | None]) -> Estimate:
    """A measure from its value under each seed: the mean, and the 95 % interval in which one seed's value is expected.

    The spread is that of one evaluation repeated with other draws (Student's t times the standard deviation over
    seeds), not that of the mean. Undefined if it is under any seed.
    """
    defined = [value for value in values if value is not None and math.isfinite(value)]
    if len(defined) < len(values) or not defined:
        return Estimate(None, over="seeds", draws=tuple(values))
    value = sum(defined) / len(defined)
    if len(defined) == 1:
        return Estimate(value, over="seeds", draws=tuple(defined))
    half = _spread(defined)
    return Estimate(value, value - half, value + half, "seeds", tuple(defined))


def _spread(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval for one more value of the kind."""
    from scipy.stats import t

    centre = sum(values) / len(values)
    deviation = math.sqrt(sum((value - centre) ** 2 for value in values) / (len(values) - 1))
    return float(t.ppf((1 + LEVEL) / 2, len(values) - 1)) * deviation


def differ_by_noise_only(one: Estimate, other: Estimate) -> bool | None:
    """Whether two SAEs' measures differ no more than noise can make them; None if that can't be told.

    Over seeds the same draws are shared, so the differences under each seed are compared: what the draws do to both
    cancels. Other intervals are compared by their halves.
    """
    if one.over == other.over == "seeds":
        pairs = list(zip(one.draws, other.draws, strict=False))
        gaps = [a - b for a, b in pairs if a is not None and b is not None]
        return abs(sum(gaps) / len(gaps)) <= _spread(gaps) if len(gaps) == len(pairs) >= 2 else None
    if one.value is None or other.value is None or None in (one.low, one.high, other.low, other.high):
        return None
    halves = [(e.high - e.low) / 2 for e in (one, other)]  # type: ignore[operator]
    return bool(abs(one.value - other.value) <= (halves[0] ** 2 + halves[1] ** 2) ** 0.5)


def describe_noise(name: str, measures: Mapping[str, Estimate]) -> str | None:
    """Which SAEs can't be told from the one with the highest measure `name`; None with fewer than two."""
    values = {label: measure.value for label, measure in measures.items() if measure.value is not None}
    if len(values) < 2:
        return None
    best = max(values, key=lambda label: values[label])
    verdicts = {label: differ_by_noise_only(measures[best], measures[label]) for label in values if label != best}
    text = f"{name}: the highest is {best}"
    if same := [label for label, verdict in verdicts.items() if verdict]:
        text += f"; within noise of it: {', '.join(same)}"
    if apart := [label for label, verdict in verdicts.items() if verdict is False]:
        text += f"; apart from it: {', '.join(apart)}"
    if None in verdicts.values():
        text += "; one draw gives no measure of noise, use --draws 2 or more"
    return text
