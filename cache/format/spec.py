"""What determines an activation store: model, hooks, corpus, sizes. Frozen models, checked when they are made."""

import hashlib
import json
import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from hsae.cache.storage.paths import RemotePath, place

Split = Literal["train", "eval", "forget", "retain", "autointerp"]
Codec = Literal["mappable", "compact", "int8"]
Positive = Annotated[float, Field(gt=0, strict=False)]
NonNegative = Annotated[float, Field(ge=0, strict=False)]
ProperFraction = Annotated[float, Field(gt=0, lt=1, strict=False)]
HOOK_PATTERN = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")
FORMAT_VERSION = 1


class Config(BaseModel):
    """Base of every table of a plan file: unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


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


class HookConfig(Config):
    """The `[hook]` table."""

    names: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    """TransformerLens names; `blocks.{L}.hook_resid_post` is the output of layer L. The first one is trained on."""

    @field_validator("names")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if not HOOK_PATTERN.fullmatch(name):
                raise ValueError(
                    f"{name!r} is not a hook hsae knows; use blocks.<layer>.hook_resid_post or "
                    f"blocks.<layer>.hook_resid_pre"
                )
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
        if self.last_document is not None and self.last_document <= self.first_document:
            raise ValueError(
                f"last_document = {self.last_document} leaves nothing: it must be above first_document = "
                f"{self.first_document}"
            )
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
    """Rows of one forward pass, and SAEBench's batch_size_prompts: part of what the bits depend on."""
    chunk_mib: float = Field(default=32, gt=0)
    """Size of one chunk of activations; rounded to whole batches."""
    codec: Literal["auto"] | Codec = "auto"
    """mappable: raw bytes + crc32c. compact: blosc(lz4, bitshuffle) + crc32c, decoded into scratch when read. int8:
    lossy, half the bytes; made from a finished store by `hsae cache recode`. auto: mappable in a folder, compact at a
    URL.
    """
    train: TrainCacheConfig
    eval: EvalCacheConfig

    @property
    def stored_codec(self) -> Codec:
        """`codec`, with auto decided: chunks at a URL are fetched and decoded anyway, those in a folder are mapped
        where they lie.
        """
        if self.codec == "auto":
            return "compact" if isinstance(place(self.dir), RemotePath) else "mappable"
        return self.codec


class StoreSpec(Config):
    """One store: what `[model]`, `[hook]`, `[cache]` and `[cache.<split>]` come to. Its fingerprint names the store."""

    split: Split
    model: ModelConfig
    hooks: Annotated[tuple[str, ...], Field(strict=False)]
    corpus: CorpusConfig
    context: int
    prepend_bos: bool
    batch_rows: int
    chunk_mib: float
    codec: Codec
    rows: int
    """Rows in all."""
    clean_rows: int
    """The first so many rows also keep the clean loss, final vector and ablation constants (0 for train)."""
    rows_per_document: int | None = None
    """A row holds the text of one document, which gives at most so many rows; None packs documents one after the
    other.
    """

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits over every field and the format version."""
        unset = {"rows_per_document"} if self.rows_per_document is None else None  # it came later; names stay
        text = json.dumps({"format": FORMAT_VERSION, **self.model_dump(mode="json", exclude=unset)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """Directory name of the store, for example `gemma-3-270m-train-0123456789abcdef.zarr`."""
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", self.model.id.rstrip("/").split("/")[-1]).strip("-.").lower() or "model"
        return f"{slug}-{self.split}-{self.fingerprint}.zarr"


def store_spec(split: Literal["train", "eval"], model: ModelConfig, hook: HookConfig, cache: CacheConfig) -> StoreSpec:
    """The store a plan's tables ask for, for `split`."""
    if split == "train":
        part: CorpusConfig = cache.train
        rows, clean_rows = cache.train.rows, 0
    else:
        part = cache.eval
        clean_rows = cache.eval.batches_reconstruction * cache.batch_rows
        rows = clean_rows + cache.eval.batches_variance * cache.batch_rows
    corpus = CorpusConfig(**{name: getattr(part, name) for name in CorpusConfig.model_fields})
    return spec_of(split, model, hook.names, corpus, cache, rows=rows, clean_rows=clean_rows)


def spec_of(
    split: Split,
    model: ModelConfig,
    hooks: tuple[str, ...],
    corpus: CorpusConfig,
    cache: CacheConfig,
    *,
    rows: int,
    clean_rows: int,
    rows_per_document: int | None = None,
) -> StoreSpec:
    """A store of some text, in rows, batches, chunks and codec of `[cache]`."""
    return StoreSpec(
        split=split,
        model=model,
        hooks=hooks,
        corpus=corpus,
        context=cache.context,
        prepend_bos=cache.prepend_bos,
        batch_rows=cache.batch_rows,
        chunk_mib=cache.chunk_mib,
        codec=cache.stored_codec,
        rows=rows,
        clean_rows=clean_rows,
        rows_per_document=rows_per_document,
    )
