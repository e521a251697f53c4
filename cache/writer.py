"""Writing a store: its metadata as zarr writes it, whole chunks, and the header; everything appears by rename or by one PUT.

A chunk is never overwritten in part.
"""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from torch import Tensor
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from hsae.cache.codec import TORCH_DTYPES, DamagedChunkError, encode_chunk
from hsae.cache.dtype import NUMPY_BFLOAT16
from hsae.cache.int8 import Int8Codec
from hsae.cache.layout import CRC_BYTES, ITEM_BYTES, ArraySpec, Header, checks_array
from hsae.cache.remote import Place, RemotePath, many, publish

__all__ = [
    "TORCH_DTYPES",
    "create",
    "seal",
    "trailer",
    "write_chunk",
    "write_header",
    "write_json",
    "write_list",
    "write_metadata",
]


def create(target: Place, header: Header, specs: Iterable[ArraySpec]) -> bool:
    """Make an empty store with all its arrays; it appears whole or not at all. False if another process was faster."""
    if isinstance(target, RemotePath):
        documents = _documents(header, specs)
        first = documents.pop("zarr.json")
        for name, document in documents.items():
            publish(target / name, document)
        return (target / "zarr.json").create_bytes(first)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed; the builder holds the store's lock
    try:
        write_metadata(partial, header, specs)
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def write_metadata(target: Place, header: Header, specs: Iterable[ArraySpec]) -> None:
    """Write every zarr.json of a store, the one with the header last."""
    documents = _documents(header, specs)
    for name in sorted(documents, key=lambda name: name == "zarr.json"):
        publish(target / name, documents[name])


def _documents(header: Header, specs: Iterable[ArraySpec]) -> dict[str, bytes]:
    """Every zarr.json of a store, by its path from the root."""
    kept: dict[str, Buffer] = {}
    group = zarr.create_group(MemoryStore(kept), zarr_format=3, attributes={"hsae": header.model_dump(mode="json")})
    for spec in specs:
        _create_array(group, spec)
    return {name: buffer.to_bytes() for name, buffer in kept.items()}


def _create_array(group: zarr.Group, spec: ArraySpec) -> None:
    compact = BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle", typesize=ITEM_BYTES[spec.dtype])
    group.create_array(
        spec.path,
        shape=spec.shape,
        chunks=spec.chunks,
        dtype=NUMPY_BFLOAT16 if spec.dtype == "bfloat16" else np.dtype(spec.dtype),
        filters=(),
        serializer=Int8Codec() if spec.codec == "int8" else BytesCodec(endian="little"),
        compressors=(*((compact,) if spec.codec == "compact" else ()), Crc32cCodec()),
        fill_value=0,
    )


def write_chunk(target: Place, spec: ArraySpec, index: int, values: Tensor) -> None:
    """Publish chunk `index`, [rows, ...]; missing rows of the last chunk are padded with zeros."""
    publish(spec.chunk_file(target, index), encode_chunk(spec, values))


def seal(target: Place, specs: Sequence[ArraySpec], known: Mapping[str, NDArray[np.uint32]] = {}) -> int:
    """Write the list of the checksums that end the chunks of `specs`, and return the list's own.

    Those of an array that `known` has are taken from there, others are read. Raises DamagedChunkError if a chunk is missing.
    """
    listed = []
    for spec in specs:
        found = known.get(spec.path)
        if found is None:
            read = many(lambda index, spec=spec: trailer(target, spec, index), range(spec.count))  # type: ignore[misc]
            found = np.fromiter(read, np.uint32, spec.count)
        listed.append(found)
    return write_list(target, checks_array(specs), np.concatenate(listed))


def write_list(target: Place, spec: ArraySpec, numbers: NDArray[np.uint32]) -> int:
    """Write an array of one chunk, and its metadata; returns the chunk's checksum."""
    kept: dict[str, Buffer] = {}
    _create_array(zarr.create_group(MemoryStore(kept), zarr_format=3), spec)
    publish(target / spec.path / "zarr.json", kept[f"{spec.path}/zarr.json"].to_bytes())
    data = encode_chunk(spec, torch.from_numpy(numbers.astype(np.uint32)))
    publish(spec.chunk_file(target, 0), data)
    return int.from_bytes(data[-CRC_BYTES:], "little")


def trailer(target: Place, spec: ArraySpec, index: int) -> int:
    """The checksum that ends chunk `index`. Raises DamagedChunkError if the chunk is missing."""
    path = spec.chunk_file(target, index)
    try:
        if isinstance(path, RemotePath):
            return int.from_bytes(path.read_tail(CRC_BYTES), "little")
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - CRC_BYTES))
            return int.from_bytes(file.read(CRC_BYTES), "little")
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedChunkError(target, path, "is missing") from None


def write_header(target: Place, header: Header) -> None:
    """Replace the store's header."""
    document = json.loads((target / "zarr.json").read_text())
    document["attributes"]["hsae"] = header.model_dump(mode="json")
    publish(target / "zarr.json", json.dumps(document, indent=2).encode())


def write_json(target: Place, content: Any) -> None:
    """Make or replace a JSON file."""
    publish(target, json.dumps(content).encode())
