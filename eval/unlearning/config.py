"""The `[unlearning]` table of a plan."""

import hashlib
import json
from typing import Annotated, Literal, TypeVar

from pydantic import Field

from hsae.cache.config import (
    CacheConfig,
    Config,
    CorpusConfig,
    HookConfig,
    ModelConfig,
    NonNegative,
    Positive,
    ProperFraction,
)
from hsae.cache.format.spec import StoreSpec, spec_of

ItemT = TypeVar("ItemT")
NonEmpty = Annotated[tuple[ItemT, ...], Field(strict=False, min_length=1)]
Count = Annotated[int, Field(ge=1)]
Side = Literal["forget", "retain"]
SIDES: tuple[Side, Side] = ("forget", "retain")
FIRST_KEPT = 325
"""Documents of python-source and python-prose from here on: python-mix before 650 has none of them."""


class QAConfig(Config):
    """The `[unlearning.qa]` table: SAEBench's form, on multiple-choice questions and an instruction-tuned model."""

    forget: NonEmpty[str] = ("cais/wmdp:wmdp-bio",)
    """Question sets to be unlearned: `owner/name:subset` on the hub, jsonl files, or packaged sets."""
    retain: NonEmpty[str] = (
        "cais/mmlu:high_school_us_history",
        "cais/mmlu:college_computer_science",
        "cais/mmlu:high_school_geography",
        "cais/mmlu:human_aging",
    )
    """Question sets to be kept; their accuracies are pooled."""
    revisions: dict[str, str] = Field(default_factory=dict)
    """Hub data set -> revision; what is not named is taken as it is now."""
    retain_thresholds: NonEmpty[Positive] = (0.001, 0.01)
    """Latents that fire on at least this share of retain tokens are left alone."""
    n_features: NonEmpty[Count] = (10, 20)
    """Numbers of clamped latents."""
    multipliers: NonEmpty[Positive] = (25.0, 50.0, 100.0, 200.0)
    """An active latent is set to minus this (in the SAE's own units)."""
    permutations: int = Field(default=24, ge=1, le=24)
    """A question counts if it is answered correctly under so many orders of its choices (SAEBench: all 24)."""
    retain_accuracy: ProperFraction = 0.99
    """Configurations that keep less of the retain accuracy don't count."""

    @property
    def digest(self) -> str:
        """What the settings are known by in results; questions are known by their content."""
        content = self.model_dump_json(exclude={"forget", "retain", "revisions"})
        return hashlib.sha256(content.encode()).hexdigest()[:16]


class UnlearningConfig(Config):
    """The `[unlearning]` table: what is to be forgotten, what kept, and what is tried."""

    forget: CorpusConfig = CorpusConfig(corpus="python-source", first_document=FIRST_KEPT)
    """Text to be forgotten."""
    retain: CorpusConfig = CorpusConfig(corpus="python-prose", first_document=FIRST_KEPT)
    """Text to be kept."""
    rows: int = Field(default=160, ge=6)
    """Rows of `cache.context` tokens of each; a row holds one document's text."""
    rows_per_document: int = Field(default=4, ge=1)
    """Rows taken from the beginning of one document."""
    tune_rows: int = Field(default=16, ge=2)
    """Rows of each on which settings are chosen; whole documents."""
    test_rows: int = Field(default=32, ge=2)
    """Rows of each on which they are reported; whole documents. What is left over selects latents."""
    positions_per_row: int = Field(default=12, ge=1)
    """Positions of a row, drawn once with `seed`, at which the loss is taken: unembedding is the dearest part."""
    latents: NonEmpty[Count] = (32,)
    """Numbers of clamped latents, n."""
    multipliers: NonEmpty[NonNegative] = (0.0, 1.0, 3.0)
    """An active latent is set to -m times its mean active value; 0 is ablation."""
    quantiles: Annotated[tuple[ProperFraction, ...], Field(strict=False)] = (0.95,)
    """Conditional clamping, beside static: only in rows whose firing rate exceeds this quantile of the retain rows'."""
    retain_cap: ProperFraction = 0.02
    """Latents that fire on at least this share of retain tokens are left alone."""
    budgets: NonEmpty[Positive] = (0.005, 0.01, 0.02, 0.05)
    """Losses on retain, in nats a token, at which the loss on forget is reported."""
    topics: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Two topics of the forget text for the signature test; the two with the most documents unless given."""
    resamples: int = Field(default=1000, ge=10)
    """Bootstrap resamples of documents."""
    seed: int = Field(default=0, ge=0)
    """Of positions, random latents, permuted maps and the bootstrap."""
    qa: QAConfig = QAConfig()

    @property
    def digest(self) -> str:
        """What the settings are known by in results; texts are known by their content."""
        content = self.model_dump(mode="json", exclude={"qa", *SIDES})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def spec(self, side: Side, model: ModelConfig, hook: HookConfig, cache: CacheConfig) -> StoreSpec:
        """The store of one side: tune and test rows first, with clean losses, then the rows that select."""
        return spec_of(
            side,
            model,
            hook.names[:1],
            getattr(self, side),
            cache,
            rows=self.rows,
            clean_rows=self.tune_rows + self.test_rows,
            rows_per_document=self.rows_per_document,
        )
