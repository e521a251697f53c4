"""Writing a store: its metadata, whole chunks, and the header; everything appears by rename or by one PUT.

A chunk is never overwritten in part.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hsae.cache.errors import missing_is_damage
from hsae.cache.format.arrays import CRC_BYTES, ArraySpec
from hsae.cache.format.chunk_codec import encode_chunk
from hsae.cache.format.layout import METADATA, Header, checks_array, metadata
from hsae.cache.storage.paths import Place, map_parallel, publish, read_tail


def write_metadata(target: Place, header: Header, *, replace: bool = True) -> None:
    """Write every zarr.json of a store, the one with the header last; see `publish` for `replace`."""
    documents = metadata(header)
    first = documents.pop(METADATA)
    write_documents(target, documents)
    publish(target / METADATA, _encoded(first), replace=replace)


def write_header(target: Place, header: Header) -> None:
    """Make or replace the zarr.json with the header."""
    write_documents(target, {METADATA: metadata(header)[METADATA]})


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


def write_list(target: Place, spec: ArraySpec, numbers: NDArray[np.uint32]) -> int:
    """Write an array of one chunk, and its metadata; returns the chunk's checksum."""
    publish(target / spec.path / METADATA, _encoded(spec.metadata))
    return write_chunk(target, spec, 0, torch.from_numpy(numbers.astype(np.uint32)))


def seal(target: Place, specs: Sequence[ArraySpec], known: Mapping[str, NDArray[np.uint32]] = {}) -> int:
    """Write the list of the checksums that end the chunks of `specs`, read unless `known`; returns the list's own."""
    return write_list(target, checks_array(specs), read_trailers(target, specs, known))


def read_trailers(
    target: Place, specs: Sequence[ArraySpec], known: Mapping[str, NDArray[np.uint32]] = {}
) -> NDArray[np.uint32]:
    """The checksums that end the chunks of `specs`, in order, read unless `known`. Raises DamagedFileError."""

    def read(spec: ArraySpec) -> NDArray[np.uint32]:
        trailers = map_parallel(lambda index: trailer(target, spec, index), range(spec.count))
        return np.fromiter(trailers, np.uint32, spec.count)

    return np.concatenate([known[spec.path] if spec.path in known else read(spec) for spec in specs])


def trailer(target: Place, spec: ArraySpec, index: int) -> int:
    """The checksum that ends chunk `index`. Raises DamagedFileError if the chunk is missing."""
    path = spec.chunk_file(target, index)
    with missing_is_damage(target, path):
        return int.from_bytes(read_tail(path, CRC_BYTES), "little")
