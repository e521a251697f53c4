"""Writing a store: its metadata, whole chunks, and the header; everything appears by rename or by one PUT.

A chunk is never overwritten in part.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import hsae.cache.format.bfloat16  # noqa: F401  what is written here can be read with zarr
from hsae.cache.format.arrays import CRC_BYTES, ArraySpec
from hsae.cache.format.chunk_codec import TORCH_DTYPES, DamagedChunkError, encode_chunk
from hsae.cache.format.layout import METADATA, Header, checks_array, metadata
from hsae.cache.storage.paths import Place, create_file, map_parallel, publish, read_tail

__all__ = [
    "TORCH_DTYPES",
    "create",
    "encoded_json",
    "listed",
    "seal",
    "trailer",
    "write_chunk",
    "write_documents",
    "write_header",
    "write_json",
    "write_list",
    "write_metadata",
]


def create(target: Place, header: Header, specs: Iterable[ArraySpec]) -> None:
    """Write every zarr.json of a store, the one with the header last, unless another process was faster with that."""
    documents = metadata(header, specs)
    first = documents.pop(METADATA)
    write_documents(target, documents)
    create_file(target / METADATA, _encoded(first))


def write_metadata(target: Place, header: Header, specs: Iterable[ArraySpec]) -> None:
    """Write every zarr.json of a store, the one with the header last."""
    write_documents(target, metadata(header, specs))


def write_documents(target: Place, documents: Mapping[str, Any]) -> None:
    """Write some zarr.json, by their paths from the root."""
    for name, document in documents.items():
        publish(target / name, _encoded(document))


def _encoded(document: Any) -> bytes:
    return json.dumps(document, indent=2).encode()  # as zarr-python does


def write_chunk(target: Place, spec: ArraySpec, index: int, values: Tensor) -> int:
    """Publish chunk `index`, [rows, ...], padded with zeros, and return its checksum."""
    data = encode_chunk(spec, values)
    publish(spec.chunk_file(target, index), data)
    return int.from_bytes(data[-CRC_BYTES:], "little")


def seal(target: Place, specs: Sequence[ArraySpec], known: Mapping[str, NDArray[np.uint32]] = {}) -> int:
    """Write the list of the checksums that end the chunks of `specs`, and return the list's own. See `listed`."""
    return write_list(target, checks_array(specs), listed(target, specs, known))


def listed(
    target: Place, specs: Sequence[ArraySpec], known: Mapping[str, NDArray[np.uint32]] = {}
) -> NDArray[np.uint32]:
    """The checksums that end the chunks of `specs`, in order, read unless `known`. Raises DamagedChunkError."""
    checksums = []
    for spec in specs:
        numbers = known.get(spec.path)
        if numbers is None:
            read = map_parallel(lambda index, spec=spec: trailer(target, spec, index), range(spec.count))  # type: ignore[misc]
            numbers = np.fromiter(read, np.uint32, spec.count)
        checksums.append(numbers)
    return np.concatenate(checksums)


def write_list(target: Place, spec: ArraySpec, numbers: NDArray[np.uint32]) -> int:
    """Write an array of one chunk, and its metadata; returns the chunk's checksum."""
    publish(target / spec.path / METADATA, _encoded(spec.metadata))
    return write_chunk(target, spec, 0, torch.from_numpy(numbers.astype(np.uint32)))


def trailer(target: Place, spec: ArraySpec, index: int) -> int:
    """The checksum that ends chunk `index`. Raises DamagedChunkError if the chunk is missing."""
    path = spec.chunk_file(target, index)
    try:
        return int.from_bytes(read_tail(path, CRC_BYTES), "little")
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedChunkError(target, path, "is missing") from None


def write_header(target: Place, header: Header) -> None:
    """Make or replace the store's header."""
    write_metadata(target, header, ())


def write_json(target: Place, content: Any) -> None:
    """Make or replace a JSON file."""
    publish(target, encoded_json(content))


def encoded_json(content: Any) -> bytes:
    """A JSON file's bytes."""
    return json.dumps(content).encode()
