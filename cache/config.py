"""The tables of a plan that say what is cached: frozen models, checked when they are made."""

import re
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from hsae.cache.errors import ModelError

Split = Literal["train", "eval", "forget", "retain", "autointerp"]
Codec = Literal["mappable", "compact", "int8"]
Positive = Annotated[float, Field(gt=0, strict=False)]
NonNegative = Annotated[float, Field(ge=0, strict=False)]
ProperFraction = Annotated[float, Field(gt=0, lt=1, strict=False)]
HOOK_PATTERN = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")


def parse_hook(hook: str) -> tuple[int, str]:
    """(layer, `pre` or `post`) of a hook name. Raises ModelError for a name hsae doesn't know."""
    match = HOOK_PATTERN.fullmatch(hook)
    if match is None:
        raise ModelError(
            f"{hook!r} is not a hook hsae knows; use blocks.<layer>.hook_resid_post or blocks.<layer>.hook_resid_pre"
        )
    return int(match[1]), match[2]


class Config(BaseModel):
    """Base of every table of a plan file: unknown keys and wrong types are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelConfig(Config):
    """The `[model]` table."""

    id: str = Field(min_length=1)
    """A hub id, a local directory, a .gguf file, or a packaged model: `gemma-3-270m`, `smollm2-135m-instruct`."""
    revision: str | None = None
    """Hub revision (commit, tag or branch); None is the default branch."""
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """Type the model runs in and the activations are kept in."""
    attention: Literal["auto", "eager", "sdpa"] = "auto"
    """auto: eager where the model caps attention logits (Gemma-2) or has no sdpa, sdpa elsewhere."""

    @property
    def slug(self) -> str:
        """The model's name as part of a file name."""
        return re.sub(r"[^A-Za-z0-9.]+", "-", self.id.rstrip("/").split("/")[-1]).strip("-.").lower() or "model"


class HookConfig(Config):
    """The `[hook]` table."""

    names: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    """TransformerLens names; `blocks.{L}.hook_resid_post` is the output of layer L. The first one is trained on."""

    @field_validator("names")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            parse_hook(name)
        if len(set(names)) != len(names):
            raise ValueError("a hook is named twice")
        return names


class CorpusConfig(Config):
    """Where text comes from and which documents of it are used."""

    corpus: str = Field(min_length=1)
    """`python-docs`, `python-prose`, `python-source`, `python-mix`, a .txt, .jsonl, .csv, .tsv or .parquet file, a
    folder of those, or a Hugging Face data set id.
    """
    revision: str | None = None
    """Data set revision on the hub."""
    subset: str | None = None
    """Data set configuration on the hub."""
    split: str = "train"
    """Data set split on the hub."""
    column: str = "text"
    """Text column of all but .txt files."""
    shuffle_seed: int | None = None
    """Order of the shards of a hub data set; SAEBench uses 42. None keeps the order."""
    first_document: int = Field(default=0, ge=0)
    """Documents before this one are left out (0-based, in corpus order)."""
    last_document: int | None = Field(default=None, ge=1)
    """Documents from this one on are left out; None uses all."""

    @model_validator(mode="after")
    def _some(self) -> "CorpusConfig":
        first, last = self.first_document, self.last_document
        if last is not None and last <= first:
            raise ValueError(f"last_document = {last} leaves nothing: it must be above first_document = {first}")
        return self


class TrainCacheConfig(CorpusConfig):
    """The `[cache.train]` table."""

    rows: int = Field(ge=1)
    """Rows of `context` tokens."""


class EvalCacheConfig(CorpusConfig):
    """The `[cache.eval]` table: SAEBench core's two phases, one after the other."""

    batches_reconstruction: int = Field(default=200, ge=1)
    """Batches whose clean loss and final vector are kept (SAEBench's n_eval_reconstruction_batches)."""
    batches_variance: int = Field(default=2000, ge=1)
    """Batches after those (SAEBench's n_eval_sparsity_variance_batches)."""
    training_text: bool = False
    """Whether the store may be made of documents that are trained on."""


class CacheConfig(Config):
    """The `[cache]` table."""

    dir: str = "activations"
    """Folder the stores lie in."""
    context: int = Field(default=128, ge=2)
    """Tokens in a row."""
    prepend_bos: bool = True
    """BOS at the start of each row and before each document (SAEBench's packing)."""
    batch_rows: int = Field(default=16, ge=1)
    """Rows of SAEBench's batches (its batch_size_prompts), of which its numbers are means."""
    forward_rows: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Rows of one forward pass: part of what the bits depend on. auto: batch_rows on a processor, and on a GPU as many
    batches as make 8,192 tokens; a store that is there is used whichever of both it was made with.
    """
    compile: Literal["auto"] | bool = "auto"
    """Whether decoder layers run through torch.compile up to the hook: part of what the bits depend on. auto: on a GPU
    where torch.compile works; a store that is there is used whether it was made so or not.
    """
    chunk_mib: float = Field(default=32, gt=0)
    """Size of one chunk of activations; rounded to whole forward passes."""
    codec: Literal["auto"] | Codec = "auto"
    """mappable: raw bytes + crc32c. compact: blosc(lz4, bitshuffle) + crc32c, decoded into scratch when read. int8:
    lossy, half the bytes; made from a finished store by `hsae cache recode`. auto: mappable in a folder, compact at a
    URL.
    """
    train: TrainCacheConfig
    eval: EvalCacheConfig


ConfigT = TypeVar("ConfigT", ModelConfig, CorpusConfig)


def at_commit(config: ConfigT, commit: str | None) -> ConfigT:
    """The same model or data set of the hub at the commit that a store was made with, whatever its branch is now."""
    return config if commit is None else config.model_copy(update={"revision": commit})
