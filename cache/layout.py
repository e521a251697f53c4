"""The on-disk format of an activation store; the only module that knows it.

A store is a directory holding a zarr v3 group, written with zarr-python and readable by any zarr v3 reader that knows `bfloat16`:

    zarr.json                          group attributes, one key `hsae`: the header (see `Header`)
    tokens/                            int32   [R, T]         token ids
    acts/<hook>/                       dtype   [R, T, D]      residual at the hook
    clean/loss/                        float32 [C, T]         evaluation stores: next-token loss of the clean model, nats; last column 0
    clean/final/                       dtype   [C, T, D]      evaluation stores: normed residual just before unembedding
    ablation/<hook>/loss/, .../kl/     float32 [C, T]         split `eval` only: loss, and KL(clean||ablated), with the residual zeroed
    stats/<hook>/mean/, .../geometric_median/  float64 [D]    over a sample of non-special tokens
    stats/kept/                        uint32  [chunks]       non-special tokens of each chunk of `tokens`
    checks/                            uint32  [chunks]       finished stores: the crc32c that ends each chunk of the arrays above, array by
                                                              array in this order; the header holds the list's own crc32c

R rows, C <= R clean rows (the first ones), T context length, D residual width; dtype is the model's (`bfloat16`, `float32`, `float16`).
Losses hold what the model's dtype rounds to. Arrays with rows are cut into chunks of `chunk_rows` rows, never along T or D; chunk i
holds rows i*chunk_rows and following and lies at `<array>/c/<i>/0/0` (`/0` for each further axis). The last chunk is padded to full size.

Codec `mappable`: a chunk file is its numbers in C order, little-endian, then their crc32c in 4 bytes (little-endian). The numbers can
be memory-mapped at offset 0. Codec `compact` applies to acts and clean/final: blosc (lz4, bitshuffle), then crc32c. Codec `int8` applies to
acts (clean/final is compact then): see `int8`, then crc32c.

Stores of split `forget` and `retain` have a file `documents.json` beside: for each row, the number of its document in the corpus
window and its topic (or null).

Files are published by rename, so a chunk file is whole if it is there; its crc32c tells whether it is what was written, and the list of
checksums whether it is in its own place. A store is finished
when the header says `complete`. While it is being made, `packing.json` says how far the tokens are, and `tally/` what will become `checks`
and `stats/kept`. Nothing in it depends on when or in how many goes it was built.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from hsae.cache.config import FORMAT_VERSION, HOOK_PATTERN, Codec, Config, StoreSpec
from hsae.cache.errors import StoreError
from hsae.cache.remote import Place, numbered, size_of

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8, "int32": 4, "uint32": 4}
CRC_BYTES = 4
MOST_CHUNKS, LARGEST_CHUNK = 1 << 26, 1 << 36  # 64 GiB: nothing that hsae writes comes near
LARGEST = 1 << 40  # rows, widths or vocabularies beyond this are a damaged header, not a store


class HookSummary(Config):
    """Scalar statistics of one hook, over the sampled tokens."""

    mean_square_norm: float = Field(ge=0)
    """E||x||^2."""
    tokens: int = Field(ge=1)
    """Non-special tokens the statistics were taken over."""


class Header(Config):
    """What the group's attribute `hsae` holds."""

    format: int
    spec: StoreSpec
    d_model: int = Field(ge=1, le=1 << 24)
    vocab_size: int = Field(ge=1, le=1 << 31)
    bos_id: int = Field(ge=0, lt=1 << 31)
    special_ids: tuple[Annotated[int, Field(ge=0, lt=1 << 31)], ...] = Field(strict=False)
    """pad, EOS and BOS ids: left out of training and of most metrics."""
    model_digest: str
    tokenizer_digest: str
    corpus_digest: str
    versions: dict[str, str]
    """Libraries that determine the content."""
    statistics: dict[str, HookSummary] = Field(default_factory=dict)
    """Per hook; empty until the store is complete."""
    kept_tokens: int | None = Field(default=None, ge=0)
    """Non-special tokens in all, the sum of `stats/kept`; None while unfinished, and in stores that were made before there was one."""
    checks: int | None = Field(default=None, ge=0, lt=1 << 32)
    """crc32c of the list of checksums; None while unfinished, and in stores that were made before there was one."""
    codec_error: dict[str, float] = Field(default_factory=dict)
    """Codec int8: each hook's E||x - decoded||^2 / E||x - mean||^2 over a sample of chunks."""
    complete: bool = False


@dataclass(frozen=True)
class ArraySpec:
    """Shape, type and chunking that an array of a store must have."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...]
    codec: Codec = "mappable"

    @property
    def count(self) -> int:
        """Number of chunks (all lie along the first axis)."""
        return -(-self.shape[0] // self.chunks[0])

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk's numbers."""
        size = ITEM_BYTES[self.dtype]
        for length in self.chunks:
            size *= length
        return size

    @property
    def codecs(self) -> list[dict[str, Any]]:
        """Codec metadata that zarr must show, without what a reader may add."""
        names = {"mappable": ["bytes"], "compact": ["bytes", "blosc"], "int8": ["hsae.int8"]}
        return [{"name": name} for name in (*names[self.codec], "crc32c")]

    def lengths(self, root: Place) -> NDArray[np.int64]:
        """Bytes of each chunk's file or object, -1 where there is none: one listing, 8 bytes a chunk."""
        folder = root / self.path / "c"
        if isinstance(folder, Path):
            found = (size_of(Path(f"{folder}/{self.key(index)}")) for index in range(self.count))
            return np.fromiter((-1 if size is None else size for size in found), np.int64, self.count)
        lengths = np.full(self.count, -1, np.int64)
        for name, size in numbered(folder, self.count):
            index = name.partition("/")[0]
            if index.isdecimal() and int(index) < self.count and name == self.key(int(index)):
                lengths[int(index)] = size
        return lengths

    def written(self, root: Place) -> NDArray[np.bool_]:
        """For each chunk, whether it is there and, where its length is known, whole. One listing."""
        lengths = self.lengths(root)
        return lengths == self.chunk_bytes + CRC_BYTES if self.codec == "mappable" else lengths >= 0

    def is_written(self, root: Place, index: int) -> bool:
        """Whether chunk `index` is there, and, where its length is known, is whole."""
        size = size_of(self.chunk_file(root, index))
        return size is not None and (self.codec != "mappable" or size == self.chunk_bytes + CRC_BYTES)

    def key(self, index: int) -> str:
        """Path of chunk `index` below the array's `c`."""
        return "/".join([str(index), *["0"] * (len(self.shape) - 1)])

    def chunk_file(self, root: Place, index: int) -> Place:
        """File or object of chunk `index`."""
        return root / self.path / "c" / self.key(index)


def chunk_rows(spec: StoreSpec, d_model: int) -> int:
    """Rows of a chunk: about `chunk_mib` of activations, in whole batches."""
    row_bytes = spec.context * d_model * ITEM_BYTES[spec.model.dtype]
    batches = round(spec.chunk_mib * 2**20 / (row_bytes * spec.batch_rows))
    return max(1, batches) * spec.batch_rows


def arrays(spec: StoreSpec, d_model: int) -> dict[str, ArraySpec]:
    """Every array with rows that a store of this description has, by path."""
    rows, step, context = spec.rows, chunk_rows(spec, d_model), spec.context
    dtype, codec = spec.model.dtype, spec.codec
    lossless: Codec = "compact" if codec == "int8" else codec
    found = [ArraySpec("tokens", (rows, context), "int32", (step, context))]
    for hook in spec.hooks:
        found.append(ArraySpec(f"acts/{hook}", (rows, context, d_model), dtype, (step, context, d_model), codec))
    if clean := spec.clean_rows:
        found.append(ArraySpec("clean/final", (clean, context, d_model), dtype, (step, context, d_model), lossless))
        names = ["clean/loss"]
        if spec.split == "eval":
            names += [f"ablation/{hook}/{kind}" for hook in spec.hooks for kind in ("loss", "kl")]
        found.extend(ArraySpec(name, (clean, context), "float32", (step, context)) for name in names)
    return {array.path: array for array in found}


def statistics_arrays(spec: StoreSpec, d_model: int) -> dict[str, ArraySpec]:
    """The arrays of statistics, by path."""
    names = [f"stats/{hook}/{kind}" for hook in spec.hooks for kind in ("mean", "geometric_median")]
    return {name: ArraySpec(name, (d_model,), "float64", (d_model,)) for name in names}


def kept_array(spec: StoreSpec, d_model: int) -> ArraySpec:
    """The list of the non-special tokens of each chunk."""
    count = arrays(spec, d_model)["tokens"].count
    return ArraySpec("stats/kept", (count,), "uint32", (count,))


def every_array(header: Header) -> list[ArraySpec]:
    """The arrays whose chunks a store of this header has, in the order of the list of checksums."""
    found = list(arrays(header.spec, header.d_model).values())
    if header.complete:
        found.extend(statistics_arrays(header.spec, header.d_model).values())
    if header.kept_tokens is not None:
        found.append(kept_array(header.spec, header.d_model))
    return found


def checks_array(specs: Sequence[ArraySpec]) -> ArraySpec:
    """The list of the checksums of all chunks of `specs`, in order."""
    total = sum(spec.count for spec in specs)
    return ArraySpec("checks", (total,), "uint32", (total,))


def total_bytes(spec: StoreSpec, d_model: int) -> int:
    """Bytes of all chunk files of a finished mappable store (an upper bound for a compact one)."""
    every = [*arrays(spec, d_model).values(), *statistics_arrays(spec, d_model).values(), kept_array(spec, d_model)]
    every.append(checks_array(every))
    return sum(array.count * (array.chunk_bytes + CRC_BYTES) for array in every)


def read_header(root: Place) -> Header:
    """The header of the store at `root`. Raises StoreError if there is none or it can't be trusted."""
    path = root / "zarr.json"
    try:
        header = Header(**json.loads(path.read_text())["attributes"]["hsae"])
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(f"no activation store at {root}; make it with `hsae cache build`") from None
    except StoreError:
        raise
    except (ValidationError, ValueError, KeyError, TypeError, RecursionError, IsADirectoryError) as error:
        detail = str(error).splitlines()
        raise StoreError(f"{path} is not the header of an hsae store: {' '.join(detail[:3])}") from None
    spec = header.spec
    if header.format != FORMAT_VERSION:
        raise StoreError(
            f"{root} has format {header.format}; this hsae reads format {FORMAT_VERSION}: build the store again"
        )
    if not spec.hooks or len(set(spec.hooks)) < len(spec.hooks) or not all(map(HOOK_PATTERN.fullmatch, spec.hooks)):
        raise StoreError(f"{path} names hooks hsae doesn't know: {', '.join(spec.hooks)}")
    if not (
        0 <= spec.clean_rows <= spec.rows <= LARGEST
        and spec.rows > 0
        and 0 < spec.context <= LARGEST
        and 0 < spec.batch_rows <= LARGEST
        and 0 < spec.chunk_mib <= 1 << 20
        and all(
            array.count <= MOST_CHUNKS and array.chunk_bytes <= LARGEST_CHUNK
            for array in arrays(spec, header.d_model).values()
        )
    ):
        raise StoreError(
            f"{path} gives impossible sizes: {spec.rows} rows of {spec.context} tokens, {spec.clean_rows} of them clean, in batches of "
            f"{spec.batch_rows} and chunks of {spec.chunk_mib:g} MiB, width {header.d_model}"
        )
    if header.complete and set(header.statistics) != set(spec.hooks):
        raise StoreError(f"{path} says the store is complete, but has no statistics of {', '.join(spec.hooks)}")
    return header


def check_array(root: Place, array: ArraySpec) -> None:
    """Raise StoreError unless the array's own metadata is what the header leads one to expect."""
    path = root / array.path / "zarr.json"
    try:
        held = json.loads(path.read_text())
        given = {
            "shape": tuple(held["shape"]),
            "data_type": held["data_type"],
            "chunks": tuple(held["chunk_grid"]["configuration"]["chunk_shape"]),
            "codecs": [{"name": codec["name"]} for codec in held["codecs"]],
        }
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreError(f"{path} can't be read ({type(error).__name__}: {error}); run `hsae cache verify`") from None
    wanted = {"shape": array.shape, "data_type": array.dtype, "chunks": array.chunks, "codecs": array.codecs}
    for key, value in wanted.items():
        if given[key] != value:
            raise StoreError(f"{path}: {key} is {given[key]!r}, but the store's header leads to {value!r}")
