"""The `[autointerp]` table of a plan."""

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from hsae.cache.config import (
    CacheConfig,
    Config,
    CorpusConfig,
    HookConfig,
    ModelConfig,
    NonNegative,
    Positive,
    ProperFraction,
    Split,
)
from hsae.cache.format.spec import StoreSpec, spec_of, store_spec

OPENAI_URL = "https://api.openai.com/v1"


class JudgeConfig(Config):
    """The `[autointerp.judge]` table: the chat model that explains latents and predicts from the explanations."""

    model: str = Field(default="gpt-4o-mini", min_length=1)
    """Its name at the endpoint."""
    base_url: str = OPENAI_URL
    """An OpenAI-compatible API, such as http://localhost:8000/v1. Its key comes from OPENAI_API_KEY alone."""
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
    act_threshold_frac: ProperFraction = 0.01
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

    def spec(self, split: Split, model: ModelConfig, hook: HookConfig, cache: CacheConfig) -> StoreSpec:
        """The store that is read."""
        if self.text is None:
            return store_spec("eval", model, hook, cache)
        rows = -(-self.total_tokens // cache.context)
        return spec_of("autointerp", model, hook.names, self.text, cache, rows=rows, clean_rows=0)
