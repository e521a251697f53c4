"""What determines an activation store."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from hsae.cache.config import CacheConfig, Codec, Config, CorpusConfig, HookConfig, ModelConfig, Split
from hsae.cache.storage.paths import Place, place

FORMAT_VERSION = 1
GPU_TOKENS = 8192
"""Tokens of a forward pass that keep a GPU busy (docs/decisions/0027)."""


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
    forward_rows: int | None = None
    """Rows of one forward pass; None: batch_rows."""
    compiled: bool = False
    """Whether decoder layers ran through torch.compile up to the hooks."""

    @model_serializer(mode="wrap")
    def _without_unset(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Fields that came later are written down where they are set: headers and fingerprints stay those of before."""
        content: dict[str, Any] = dump(self)
        unset = {"forward_rows": None, "compiled": False}
        return {key: value for key, value in content.items() if key not in unset or value != unset[key]}

    @property
    def pass_rows(self) -> int:
        """Rows of one forward pass."""
        return self.forward_rows or self.batch_rows

    @property
    def plain(self) -> "StoreSpec":
        """The store as a processor makes it; runs are known by it wherever theirs was made."""
        rows = None if self.forward_rows == gpu_rows(self.context, self.batch_rows) else self.forward_rows
        return self.model_copy(update={"forward_rows": rows, "compiled": False})

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


def gpu_rows(context: int, batch_rows: int) -> int | None:
    """Rows of a forward pass on a GPU, in whole batches of SAEBench; None where that is one."""
    batches = GPU_TOKENS // (context * batch_rows)
    return batches * batch_rows if batches > 1 else None


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
        forward_rows=None
        if cache.forward_rows == "auto" or cache.forward_rows == cache.batch_rows
        else cache.forward_rows,
        compiled=cache.compile is True,
        chunk_mib=cache.chunk_mib,
        codec=default_codec(cache.dir) if cache.codec == "auto" else cache.codec,
        rows=rows,
        clean_rows=clean_rows,
        rows_per_document=rows_per_document,
    )
