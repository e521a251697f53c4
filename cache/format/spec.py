"""What determines an activation store."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from hsae.cache.config import CacheConfig, Codec, Config, CorpusConfig, HookConfig, ModelConfig, Split
from hsae.cache.storage.paths import Place, place

FORMAT_VERSION = 1


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
    """A row holds the text of one document, which gives at most so many; None packs documents together."""

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits over every field and the format version."""
        unset = {"rows_per_document"} if self.rows_per_document is None else None  # it came later; names stay
        text = json.dumps({"format": FORMAT_VERSION, **self.model_dump(mode="json", exclude=unset)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """Directory name of the store, for example `gemma-3-270m-train-0123456789abcdef.zarr`."""
        return f"{self.model.slug}-{self.split}-{self.fingerprint}.zarr"


def default_codec(folder: str | Place) -> Codec:
    """Chunks at a URL are fetched and decoded anyway; those in a folder are mapped where they lie."""
    return "mappable" if isinstance(place(folder), Path) else "compact"


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
        codec=default_codec(cache.dir) if cache.codec == "auto" else cache.codec,
        rows=rows,
        clean_rows=clean_rows,
        rows_per_document=rows_per_document,
    )
