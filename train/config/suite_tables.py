"""Tables of a plan that describe evaluation suites with texts of their own: `[unlearning]`, `[ravel]`, `[autointerp]`."""

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from hsae.cache.format.spec import (
    CacheConfig,
    Config,
    CorpusConfig,
    HookConfig,
    ModelConfig,
    StoreSpec,
    spec_of,
    store_spec,
)
from hsae.cache.suites.ravel_spec import EntitiesConfig

Positive = Annotated[float, Field(gt=0, strict=False)]
Share = Annotated[float, Field(gt=0, lt=1, strict=False)]
NonNegative = Annotated[float, Field(ge=0, strict=False)]
Side = Literal["forget", "retain"]
SIDES: tuple[Side, Side] = ("forget", "retain")
OPENAI_URL = "https://api.openai.com/v1"
FIRST_KEPT = 325
"""Documents of python-source and python-prose from here on: python-mix before 650 has none of them."""


class QAConfig(Config):
    """The `[unlearning.qa]` table: SAEBench's form, on multiple-choice questions and an instruction-tuned model."""

    forget: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = ("cais/wmdp:wmdp-bio",)
    """Question sets to be unlearned: `owner/name:subset` on the hub, or jsonl files with question, choices and answer."""
    retain: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = (
        "cais/mmlu:high_school_us_history",
        "cais/mmlu:college_computer_science",
        "cais/mmlu:high_school_geography",
        "cais/mmlu:human_aging",
    )
    """Question sets to be kept; their accuracies are pooled."""
    revisions: dict[str, str] = Field(default_factory=dict)
    """Hub data set -> revision; what is not named is taken as it is now."""
    retain_thresholds: Annotated[tuple[Positive, ...], Field(strict=False, min_length=1)] = (0.001, 0.01)
    """Latents that fire on at least this share of retain tokens are left alone."""
    n_features: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False, min_length=1)] = (10, 20)
    """Numbers of clamped latents."""
    multipliers: Annotated[tuple[Positive, ...], Field(strict=False, min_length=1)] = (25.0, 50.0, 100.0, 200.0)
    """An active latent is set to minus this (in the SAE's own units)."""
    permutations: int = Field(default=24, ge=1, le=24)
    """A question counts if it is answered correctly under so many orders of its choices (SAEBench: all 24)."""
    retain_accuracy: Share = 0.99
    """Configurations that keep less of the retain accuracy don't count."""


class RavelConfig(EntitiesConfig):
    """The `[ravel]` table: entities, and how latents are chosen that carry an attribute of them. The defaults are SAEBench's."""

    pairs: int = Field(default=5000, ge=8)
    """Pairs of prompts of each attribute that should change its answer; as many that should not."""
    train_share: Share = 0.7
    """Share of the pairs (SAEBench's numbers) or of the entities (hsae's) that the mask is trained on; the others test it."""
    batch_pairs: int = Field(default=8, ge=1)
    """Pairs of one optimiser step. SAEBench: 8 for Gemma; it changes the result."""
    epochs: int = Field(default=2, ge=1)
    learning_rate: Positive = 1e-3
    least_ceiling: float = Field(default=0.2, ge=0, le=1, strict=False)
    """Refuse a hook at which exchanging the whole residual of the entity changes fewer answers than this share."""
    seed: int = Field(default=42, ge=0)
    """Of pairs and splits."""


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
    latents: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False, min_length=1)] = (32,)
    """Numbers of clamped latents, n."""
    multipliers: Annotated[tuple[NonNegative, ...], Field(strict=False, min_length=1)] = (0.0, 1.0, 3.0)
    """An active latent is set to -m times its mean active value; 0 is ablation."""
    quantiles: Annotated[tuple[Share, ...], Field(strict=False)] = (0.95,)
    """Conditional clamping: only in rows whose firing rate exceeds this quantile of the retain rows' rates; static clamping comes besides."""
    retain_cap: Share = 0.02
    """Latents that fire on at least this share of retain tokens are left alone."""
    budgets: Annotated[tuple[Positive, ...], Field(strict=False, min_length=1)] = (0.005, 0.01, 0.02, 0.05)
    """Losses on retain, in nats a token, at which the loss on forget is reported."""
    topics: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Two topics of the forget text for the signature test; the two with the most documents unless given."""
    resamples: int = Field(default=1000, ge=10)
    """Bootstrap resamples of documents."""
    seed: int = Field(default=0, ge=0)
    """Of positions, random latents, permuted maps and the bootstrap."""
    qa: QAConfig = QAConfig()

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


class JudgeConfig(Config):
    """The `[autointerp.judge]` table: the chat model that explains latents and predicts from the explanations."""

    model: str = Field(default="gpt-4o-mini", min_length=1)
    """Its name at the endpoint."""
    base_url: str = OPENAI_URL
    """An OpenAI-compatible API, for example http://localhost:8000/v1. Its key comes from the environment (OPENAI_API_KEY) alone."""
    temperature: NonNegative | None = None
    """None leaves it to the endpoint, as SAEBench does."""
    token_limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """The endpoint's name for the limit of an answer."""
    spare_tokens: int = Field(default=0, ge=0)
    """Tokens an answer may have beyond what is asked of it, for models that think first."""
    concurrency: int = Field(default=10, ge=1, le=1000)
    """Requests under way at once."""
    timeout_s: Positive = 60.0
    """Seconds one request may take."""
    retries: int = Field(default=8, ge=0)
    """Further tries of a request after 429, 5xx, a time limit or a broken connection, with growing pauses."""
    attempts: int = Field(default=2, ge=1)
    """How often a question is asked until its answer has the form that was asked for (and a reply an answer in it)."""
    malformed_share: float = Field(default=0.1, ge=0, lt=1, strict=False)
    """An evaluation ends with an error when a larger share of latents has no answer of that form."""

    @field_validator("base_url")
    @classmethod
    def _plain(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError("write it as http://HOST:PORT/v1 or https://HOST/v1")
        if parts.username is not None or parts.password is not None:
            raise ValueError("a URL with a user or password would be stored; the key comes from OPENAI_API_KEY")
        return url.rstrip("/")


class AutointerpConfig(Config):
    """The `[autointerp]` table. Names and defaults are SAEBench's."""

    text: CorpusConfig | None = None
    """Text of its own, cached by `hsae cache build --suite autointerp`; None reads the evaluation store."""
    total_tokens: int = Field(default=2_000_000, ge=1, le=1 << 24)
    """Tokens that are read, in whole rows; fewer if the evaluation store has fewer."""
    n_latents: int = Field(default=1000, ge=1)
    """Latents that are explained: a sample of the alive ones."""
    dead_latent_threshold: int = Field(default=15, ge=0)
    """A latent is alive if it fires on more tokens than this."""
    buffer: int = Field(default=10, ge=1)
    """Tokens shown on either side of a window's centre, which is at least so far from the ends of its row."""
    act_threshold_frac: Share = 0.01
    """A token is active above this share of the latent's highest activation."""
    n_top_ex_for_generation: int = Field(default=10, ge=1)
    """Windows around the highest activations: shown to explain,"""
    n_top_ex_for_scoring: int = Field(default=2, ge=1)
    """and kept back to predict."""
    n_iw_sampled_ex_for_generation: int = Field(default=5, ge=0)
    """Windows around lower activations, drawn with probability as their square: shown,"""
    n_iw_sampled_ex_for_scoring: int = Field(default=2, ge=0)
    """and kept back."""
    n_random_ex_for_scoring: int = Field(default=10, ge=1)
    """Windows around random tokens, to predict."""
    max_tokens_in_explanation: int = Field(default=30, ge=1)
    """Tokens an explanation may have."""
    seed: int = Field(default=42, ge=0)
    """Of the sample of latents and of the windows."""
    judge: JudgeConfig = JudgeConfig()

    def spec(self, model: ModelConfig, hook: HookConfig, cache: CacheConfig) -> StoreSpec:
        """The store that is read."""
        if self.text is None:
            return store_spec("eval", model, hook, cache)
        rows = -(-self.total_tokens // cache.context)
        return spec_of("autointerp", model, hook.names, self.text, cache, rows=rows, clean_rows=0)
