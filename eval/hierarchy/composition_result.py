"""The hierarchy measures of a model as `eval/composition.json` holds them; docs/measures.md says what each means."""

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Annotated

from pydantic import BaseModel, ConfigDict, PlainSerializer

from hsae.eval.harness.estimates import Estimate

Interval = Annotated[Estimate, PlainSerializer(lambda estimate: {**estimate.to_dict(), "over": estimate.over})]
"""A value, its interval, and what the interval is over."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class Null(_Part):
    """A measure over draws of a map without structure; z: by how many of their sd the value exceeds them."""

    mean: float
    sd: float
    z: float | None
    """None if all draws give the same."""

    @classmethod
    def of(cls, value: float | None, draws: Sequence[float]) -> "Null":
        """A value beside the draws of its null."""
        mean, sd = fmean(draws), stdev(draws)
        z = None if value is None or sd <= 1e-12 * max(1.0, abs(mean)) else (value - mean) / sd
        return cls(mean=mean, sd=sd, z=z)


class Measured(_Part):
    """One measure with its interval and its nulls by name; `reason` says why there is no value or no null."""

    value: float | None
    low: float | None = None
    high: float | None = None
    over: str | None = None
    """What the interval was bootstrapped over."""
    nulls: dict[str, Null] = {}
    reason: str | None = None


class Reading(_Part):
    """All measures of one map."""

    measures: dict[str, Measured]
    participation: list[float]
    """Participation ratio of each coarse latent, 0 for an empty row."""
    null_participation: list[float]
    """Likewise of the first random map."""


class PairResult(_Part):
    """The measures of level `level` and the one below."""

    level: int
    coarse: int
    fine: int
    alive_fine: int
    """Fine latents that fire on the text on which maps are read."""
    readings: dict[str, Reading]
    reasons: dict[str, str]
    """Why a reading is not there."""
    facts: dict[str, float | None]
    """energy_ratio: E|h_l|^2 / E|h_{l-1}|^2; of the learned map mixture_energy: E|W h|^2 / E|h_l|^2, and
    visible_weights: the share of its entries with |C| > VISIBLE."""
    probes: dict[str, int | float]
    """candidates, sampled, valid; accuracy: their mean balanced accuracy on held-out tokens."""


class LevelResult(_Part):
    """What levels >= `level` are worth together, and how the level itself fires."""

    level: int
    latents: int
    l0: Interval
    silent: float
    """Share of latents that never fire on the measured rows."""
    explained_variance: Interval
    """Of the residual by levels >= `level`; stacked: decoded from this level down."""
    ce_loss_score: Interval = Estimate(None)
    """Likewise; taken from a core result, if there is one."""


class CompositionResult(_Part):
    """All hierarchy measures of a model."""

    structure: str
    levels: list[LevelResult]
    """Finest first."""
    pairs: list[PairResult]
    """For levels 2 to L."""
    tokens: dict[str, int]
    """read: tokens on which maps were read; measured: tokens on which they were measured."""
