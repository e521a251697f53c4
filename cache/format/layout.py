"""The on-disk format of an activation store; the only module that knows it.

A store is a directory holding a zarr v3 group, written as zarr-python writes it and readable by any zarr v3 reader
that knows `bfloat16`:

    zarr.json                          group attributes, one key `hsae`: the header (see `Header`) and its `checksum`
                                       (see `files.sealed`)
    tokens/              int32   [R, T]     token ids
    acts/<hook>/         dtype   [R, T, D]  residual at the hook
    clean/loss/          float32 [C, T]     evaluation stores: next-token loss of the clean model, nats; last column 0
    clean/final/         dtype   [C, T, D]  evaluation stores: normed residual just before unembedding
    ablation/<hook>/loss/, .../kl/
                         float32 [C, T]     split `eval` only: loss, and KL(clean||ablated), with the residual zeroed
    stats/<hook>/mean/, .../geometric_median/
                         float64 [D]        over a sample of non-special tokens
    stats/kept/          uint32  [chunks]   non-special tokens of each chunk of `tokens`
    checks/              uint32  [chunks]   finished stores: the crc32c that ends each chunk of the arrays above,
                                            array by array in this order; the header holds the list's own

R rows, C <= R clean rows (the first ones), T context length, D residual width; dtype is the model's (`bfloat16`,
`float32`, `float16`). Losses hold what the model's dtype rounds to. Arrays with rows are cut into chunks of
`chunk_rows` rows, never along T or D; chunk i holds rows i*chunk_rows and following and lies at `<array>/c/<i>/0/0`
(`/0` for each further axis). The last chunk is padded to full size.

Codec `mappable`: a chunk file is its numbers in C order, little-endian, then their crc32c in 4 bytes (little-endian).
The numbers can be memory-mapped at offset 0. Codec `compact` applies to acts and clean/final: blosc (lz4,
bitshuffle), then crc32c. Codec `int8` applies to acts (clean/final is compact then): see `quantised`, then crc32c.

Stores of split `forget` and `retain` have a file `documents.json` beside: for each row, the number of its document in
the corpus window and its topic (or null). The header holds its SHA-256.

Every zarr.json follows from the header, and is compared with what follows whenever a store is opened.

Files are published by rename, so a chunk file is whole if it is there; its crc32c tells whether it is what was
written, and the list of checksums whether it is in its own place. A store is finished when the header says
`complete`. While it is being made, `packing.json` says how far the tokens are, and `tally/` what will become `checks`
and `stats/kept`. Nothing in it depends on when or in how many goes it was built.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from hsae.cache.config import HOOK_PATTERN, Codec, Config
from hsae.cache.errors import DamagedFileError, StoreError, missing_is_damage
from hsae.cache.files import CHECKSUM, check_seal, parse_json, sealed
from hsae.cache.format.arrays import CRC_BYTES, ITEM_BYTES, ArraySpec
from hsae.cache.format.spec import FORMAT_VERSION, StoreSpec
from hsae.cache.storage.paths import Place, read_again

MOST_CHUNKS, LARGEST_CHUNK = 1 << 26, 1 << 36  # 64 GiB: nothing that hsae writes comes near
LARGEST = 1 << 40  # rows, widths or vocabularies beyond this are a damaged header, not a store
METADATA, DOCUMENTS = "zarr.json", "documents.json"
SUITES = {"forget": "unlearning", "retain": "unlearning", "autointerp": "autointerp"}
"""What `hsae cache build --suite` is given for a store of another split than train and eval."""


MALFORMED = (ValueError, KeyError, TypeError, AttributeError)  # what JSON of another shape leads to
DOCUMENT_ROWS = TypeAdapter(list[tuple[int, str | None]])


class LostHeaderError(StoreError):
    """A store's header is missing or damaged: a build writes it again, and keeps the chunks that are whole."""


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
    model_commit: str | None = None
    """The hub's commit of the model; None for models from elsewhere, and in older stores."""
    corpus_digest: str
    corpus_commit: str | None = None
    """The same for a data set on the hub."""
    versions: dict[str, str]
    """Libraries that determine the content."""
    statistics: dict[str, HookSummary] = Field(default_factory=dict)
    """Per hook; empty until the store is complete."""
    kept_tokens: int | None = Field(default=None, ge=0)
    """Non-special tokens in all, the sum of `stats/kept`; None while unfinished, and in older stores."""
    checks: int | None = Field(default=None, ge=0, lt=1 << 32)
    """crc32c of the list of checksums; None while unfinished, and in stores that were made before there was one."""
    codec_error: dict[str, float] = Field(default_factory=dict)
    """Codec int8: each hook's E||x - decoded||^2 / E||x - mean||^2 over a sample of chunks."""
    documents_digest: str | None = None
    """SHA-256 of `documents.json`; None while unfinished, without such a file, and in older stores."""
    complete: bool = False
    older: bool = False
    """Whether the store was begun before headers had a checksum: then its digests may be by that hsae's rules."""


def chunk_rows(spec: StoreSpec, d_model: int) -> int:
    """Rows of a chunk: about `chunk_mib` of activations, in whole forward passes."""
    row_bytes = spec.context * d_model * ITEM_BYTES[spec.model.dtype]
    passes = round(spec.chunk_mib * 2**20 / (row_bytes * spec.pass_rows))
    return max(1, passes) * spec.pass_rows


def arrays(spec: StoreSpec, d_model: int) -> dict[str, ArraySpec]:
    """Every array with rows that a store of this description has, by path."""
    rows, step, context = spec.rows, chunk_rows(spec, d_model), spec.context
    dtype, codec = spec.model.dtype, spec.codec
    lossless: Codec = "compact" if codec == "int8" else codec
    specs = [ArraySpec("tokens", (rows, context), "int32", (step, context))]
    for hook in spec.hooks:
        specs.append(ArraySpec(f"acts/{hook}", (rows, context, d_model), dtype, (step, context, d_model), codec))
    if clean := spec.clean_rows:
        specs.append(ArraySpec("clean/final", (clean, context, d_model), dtype, (step, context, d_model), lossless))
        names = ["clean/loss"]
        if spec.split == "eval":
            names += [f"ablation/{hook}/{kind}" for hook in spec.hooks for kind in ("loss", "kl")]
        specs.extend(ArraySpec(name, (clean, context), "float32", (step, context)) for name in names)
    return {array.path: array for array in specs}


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
    specs = list(arrays(header.spec, header.d_model).values())
    if header.complete:
        specs.extend(statistics_arrays(header.spec, header.d_model).values())
    if header.kept_tokens is not None:
        specs.append(kept_array(header.spec, header.d_model))
    return specs


def checks_array(specs: Sequence[ArraySpec]) -> ArraySpec:
    """The list of the checksums of all chunks of `specs`, in order."""
    total = sum(spec.count for spec in specs)
    return ArraySpec("checks", (total,), "uint32", (total,))


def total_bytes(spec: StoreSpec, d_model: int) -> int:
    """Bytes of all chunk files of a finished mappable store (an upper bound for a compact one)."""
    every = [*arrays(spec, d_model).values(), *statistics_arrays(spec, d_model).values(), kept_array(spec, d_model)]
    every.append(checks_array(every))
    return sum(array.count * (array.chunk_bytes + CRC_BYTES) for array in every)


def metadata(header: Header) -> dict[str, dict[str, Any]]:
    """Every zarr.json of a store of this header, by its path from the root; the one with the header is the last."""
    documents: dict[str, dict[str, Any]] = {}
    specs = every_array(header)
    for spec in specs if header.checks is None else [*specs, checks_array(specs)]:
        for folder in list(PurePosixPath(spec.path).parents)[-2::-1]:
            documents.setdefault(f"{folder}/{METADATA}", _group({}))
        documents[f"{spec.path}/{METADATA}"] = spec.metadata
    return {**documents, METADATA: _group({"hsae": sealed(header.model_dump(mode="json"))})}


def _group(attributes: dict[str, Any]) -> dict[str, Any]:
    return {"attributes": attributes, "zarr_format": 3, "node_type": "group"}


def read_header(root: Place, wanted: StoreSpec | None = None) -> Header:
    """A store's header. Raises LostHeaderError if it is missing or damaged, StoreError for another format, or if the
    store was not made for the `wanted` configuration.
    """
    path = root / METADATA

    def read() -> Header:
        content = parse_json(path.read_bytes())["attributes"]["hsae"]
        check_seal(content, required=False)
        older = {} if content.pop(CHECKSUM, None) else {"older": True}
        return Header(**{**content, **older})

    try:
        header = read_again(path, read, MALFORMED)
    except (FileNotFoundError, NotADirectoryError):
        raise LostHeaderError(f"no activation store at {root}; make it with `{build_command(root)}`") from None
    except (*MALFORMED, IsADirectoryError) as error:
        raise _lost(root, f"is not the header of an hsae store: {' '.join(str(error).splitlines()[:3])}") from None
    spec = header.spec
    if header.format != FORMAT_VERSION:
        raise StoreError(
            f"{root} has format {header.format}; this hsae reads format {FORMAT_VERSION}: move it away and build the "
            "store again"
        )
    if not spec.hooks or len(set(spec.hooks)) < len(spec.hooks) or not all(map(HOOK_PATTERN.fullmatch, spec.hooks)):
        raise _lost(root, f"names hooks hsae doesn't know: {', '.join(spec.hooks)}")
    possible = (
        all(0 < size <= LARGEST for size in (spec.rows, spec.context, spec.batch_rows, spec.pass_rows))
        and 0 <= spec.clean_rows <= spec.rows
        and 0 < spec.chunk_mib <= 1 << 20
    )
    if not possible or any(
        array.count > MOST_CHUNKS or array.chunk_bytes > LARGEST_CHUNK
        for array in arrays(spec, header.d_model).values()
    ):
        raise _lost(
            root,
            f"gives impossible sizes: {spec.rows} rows of {spec.context} tokens, {spec.clean_rows} of them clean, in "
            f"passes of {spec.pass_rows} and chunks of {spec.chunk_mib:g} MiB, width {header.d_model}",
        )
    if header.complete and set(header.statistics) != set(spec.hooks):
        raise _lost(root, f"says the store is complete, but has no statistics of {', '.join(spec.hooks)}")
    if wanted is not None and wanted != spec:
        key, actual, other = _difference(spec.model_dump(mode="json"), wanted.model_dump(mode="json"))
        raise StoreError(
            f"{root} was made for another configuration: its {key} is {actual!r}, not {other!r}. Move it away and "
            f"make the right one with `{build_command(root)}`, or use another folder with --set cache.dir=FOLDER"
        )
    return header


def _lost(root: Place, problem: str) -> LostHeaderError:
    advice = f"`{build_command(root)}` with the store's plan writes it again and keeps the chunks that are whole"
    return LostHeaderError(f"{root / METADATA} {problem}; {advice}")


def build_command(root: Place) -> str:
    """The command that makes, with its plan, the store of this name."""
    suite = SUITES.get(("--" + root.name).rsplit("-", 2)[1])
    return "hsae cache build" + (f" --suite {suite}" if suite else "")


def is_finished(target: Place, spec: StoreSpec) -> bool:
    """Whether a store is complete. Raises StoreError if it was made for another configuration."""
    with contextlib.suppress(LostHeaderError):
        return read_header(target, spec).complete
    return False


def _difference(actual: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[str, Any, Any]:
    """The first key whose values differ, and both."""
    key = next(key for key in {**wanted, **actual} if actual.get(key) != wanted.get(key))
    if isinstance(actual.get(key), dict) and isinstance(wanted.get(key), dict):
        inner, *values = _difference(actual[key], wanted[key])
        return f"{key}.{inner}", *values
    return key, actual.get(key), wanted.get(key)


def is_sealed(root: Place) -> bool:
    """Whether the header, which has been read, has a checksum; older stores have none."""
    return CHECKSUM in parse_json((root / METADATA).read_bytes())["attributes"]["hsae"]


def check_array(root: Place, array: ArraySpec) -> None:
    """Raise DamagedFileError unless the array's own metadata is what the header leads one to expect."""
    check_metadata(root, f"{array.path}/{METADATA}", array.metadata)


def check_metadata(root: Place, name: str, wanted: Mapping[str, Any]) -> None:
    """Raise DamagedFileError unless a zarr.json holds this; the header within is `read_header`'s to check."""
    path = root / name

    def compare() -> None:
        data = path.read_bytes()
        try:
            stored = dict(parse_json(data))
            if name == METADATA:
                stored["attributes"]["hsae"] = wanted["attributes"]["hsae"]
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedFileError(root, path, f"can't be read ({error})") from None
        if wanted["node_type"] == "group" and stored.get("consolidated_metadata", 0) is None:
            del stored["consolidated_metadata"]  # older versions of zarr-python wrote that
        for key in {**wanted, **stored}:
            actual, right = (json.dumps(content.get(key), sort_keys=True) for content in (stored, wanted))
            if actual != right or (key in stored) != (key in wanted):
                raise DamagedFileError(root, path, f"says {key} is {actual[:200]}, the store's header leads to {right}")

    with missing_is_damage(root, path):
        read_again(path, compare, DamagedFileError)


def read_documents(root: Place, header: Header) -> list[tuple[int, str | None]]:
    """Number of document and topic of each row. Raises DamagedFileError if that is missing or damaged."""
    path = root / DOCUMENTS

    def read() -> list[tuple[int, str | None]]:
        data = path.read_bytes()
        if header.documents_digest not in (None, documents_digest(data)):
            raise ValueError("it fails its checksum")
        return DOCUMENT_ROWS.validate_json(data, strict=True)

    with missing_is_damage(root, path):
        try:
            rows = read_again(path, read, ValueError)
        except ValueError as error:
            raise DamagedFileError(root, path, f"is damaged ({' '.join(str(error).splitlines()[:3])})") from None
    if len(rows) != header.spec.rows:
        raise DamagedFileError(root, path, f"tells of {len(rows)} rows, the store has {header.spec.rows}")
    return rows


def documents_digest(data: bytes) -> str:
    """SHA-256 of a `documents.json`."""
    return hashlib.sha256(data).hexdigest()
