"""A chunk's numbers as the bytes of its file, and back: what zarr's `bytes`, `blosc` and `crc32c` codecs do, checked
against a list.

The crc32c of an encoded chunk ends its file and, once the store is complete, also stands in the store's list of
checksums (`checks`): a flipped bit disagrees with both, a chunk in another's place with the list.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hsae.cache.errors import DamagedFileError, TooLongError, missing_is_damage
from hsae.cache.files import crc32c
from hsae.cache.format.arrays import CRC_BYTES, ITEM_BYTES, ArraySpec
from hsae.cache.format.quantised import dequantise, quantise
from hsae.cache.storage.paths import Place, read_again

TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ITEM_BYTES}
Checks = Sequence[int] | NDArray[np.integer[Any]]
"""The checksum that each chunk of an array should have; of a chunk whose number is negative, it is not known."""


@cache
def _blosc(item_bytes: int) -> Any:
    from numcodecs import Blosc

    return Blosc(cname="lz4", clevel=5, shuffle=Blosc.BITSHUFFLE, typesize=item_bytes)


def encode_chunk(spec: ArraySpec, values: Tensor, mean_D: Tensor | None = None) -> bytes:
    """The bytes of a chunk's file, [rows, ...], padded with zeros. `int8` needs the mean [D]."""
    padded = values.to(TORCH_DTYPES[spec.dtype]).contiguous()
    if values.shape != spec.chunks:
        padded = torch.zeros(spec.chunks, dtype=TORCH_DTYPES[spec.dtype])
        padded[: len(values)] = values
    body: Any = padded.flatten().view(torch.uint8).numpy().data  # no copy: a chunk is large
    if spec.codec == "int8":
        assert mean_D is not None
        body = quantise(padded.float().numpy(), mean_D.float().numpy())
    elif spec.codec == "compact":
        body = _blosc(ITEM_BYTES[spec.dtype]).encode(body)
    return b"".join((body, crc32c(body).to_bytes(CRC_BYTES, "little")))


def listed_checksum(checks: Checks | None, index: int) -> int | None:
    """The checksum that chunk `index` should have, where it is known."""
    return None if checks is None or checks[index] < 0 else int(checks[index])


def check_sums(root: Place, path: Place, checksum: int, trailer: int, listed: int | None) -> None:
    """Raise DamagedFileError unless a chunk's checksum is the one at its end and in the store's list, if any."""
    if checksum != trailer:
        raise DamagedFileError(root, path, "fails its checksum")
    if listed is not None and checksum != listed:
        raise DamagedFileError(root, path, "is another chunk, put in this one's place")


def decode_chunk(root: Place, path: Place, data: bytes, spec: ArraySpec, listed: int | None = None) -> bytes:
    """The numbers of an encoded chunk. Raises DamagedFileError if a checksum or a length is wrong."""
    if spec.codec == "mappable" and len(data) != spec.chunk_bytes + CRC_BYTES:
        raise DamagedFileError(root, path, f"is {len(data)} bytes long, not {spec.chunk_bytes + CRC_BYTES}")
    if len(data) <= CRC_BYTES:
        raise DamagedFileError(root, path, "fails its checksum")
    body = memoryview(data)[:-CRC_BYTES]
    check_sums(root, path, crc32c(body), int.from_bytes(data[-CRC_BYTES:], "little"), listed)
    if spec.codec == "mappable":
        return bytes(body)
    try:
        return _decode_int8(body, spec) if spec.codec == "int8" else _decode_blosc(body, spec)
    except (RuntimeError, ValueError):
        raise DamagedFileError(root, path, "does not decode to a chunk of this array") from None


def _decode_int8(body: memoryview, spec: ArraySpec) -> bytes:
    vectors = torch.from_numpy(dequantise(body, spec.shape[-1])).to(TORCH_DTYPES[spec.dtype])
    if vectors.nbytes != spec.chunk_bytes:
        raise ValueError("another number of vectors")
    return bytes(vectors.flatten().view(torch.uint8).numpy().tobytes())


def _decode_blosc(body: memoryview, spec: ArraySpec) -> bytes:
    # The header of a blosc chunk states both sizes, and blosc believes it: a hostile one must not make it allocate
    # more or read beyond the end.
    decoded, encoded = int.from_bytes(body[4:8], "little"), int.from_bytes(body[12:16], "little")
    if len(body) < 16 or (decoded, encoded) != (spec.chunk_bytes, len(body)):
        raise ValueError("other sizes")
    return bytes(_blosc(ITEM_BYTES[spec.dtype]).decode(body))


def read_tensor(root: Place, spec: ArraySpec, index: int, checks: Checks | None = None) -> Tensor:
    """Chunk `index` in memory, [rows, ...] without padding, fetched and checked. Raises DamagedFileError."""
    return to_tensor(fetch_chunk(root, spec, index, checks)[1], spec, index)


def to_tensor(numbers: bytes, spec: ArraySpec, index: int) -> Tensor:
    """The numbers of chunk `index`, [rows, ...] without padding."""
    return torch.frombuffer(bytearray(numbers), dtype=TORCH_DTYPES[spec.dtype]).view(spec.chunks)[: spec.rows(index)]


def fetch_chunk(root: Place, spec: ArraySpec, index: int, checks: Checks | None = None) -> tuple[bytes, bytes]:
    """(the bytes of chunk `index`'s file, its numbers), checked. Raises DamagedFileError."""
    path, most = spec.chunk_file(root, index), 2 * spec.chunk_bytes + 4096  # more than any codec needs

    def read() -> tuple[bytes, bytes]:
        try:
            data = path.read_bytes() if isinstance(path, Path) else path.read_bytes(most)
        except TooLongError:
            raise DamagedFileError(root, path, f"is more than {most} bytes long") from None
        return data, decode_chunk(root, path, data, spec, listed_checksum(checks, index))

    with missing_is_damage(root, path):
        return read_again(path, read, DamagedFileError)
