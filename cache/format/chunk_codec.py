"""A chunk's numbers as the bytes of its file, and back: what zarr's `bytes`, `blosc` and `crc32c` codecs do, checked
against a list.

The crc32c of an encoded chunk ends its file and, once the store is complete, also stands in the store's list of
checksums (`checks`): a flipped bit disagrees with both, a chunk in another's place with the list.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hsae.cache.errors import DamagedFileError, TooLongError
from hsae.cache.files import crc32c
from hsae.cache.format.arrays import CRC_BYTES, ITEM_BYTES, ArraySpec
from hsae.cache.format.int8 import dequantise, quantise
from hsae.cache.storage.paths import Place, read_again

TORCH_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
    "int32": torch.int32,
    "uint32": torch.uint32,
}


class DamagedChunkError(DamagedFileError):
    """A chunk is missing or is not what was written."""


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


def check_sums(root: Place, path: Place, checksum: int, trailer: int, listed: int | None) -> None:
    """Raise DamagedChunkError unless a chunk's checksum is the one at its end and in the store's list, if any."""
    if checksum != trailer:
        raise DamagedChunkError(root, path, "fails its checksum")
    if listed is not None and checksum != listed:
        raise DamagedChunkError(root, path, "is another chunk, put in this one's place")


def decode_chunk(root: Place, path: Place, data: bytes, spec: ArraySpec, listed: int | None = None) -> bytes:
    """The numbers of an encoded chunk. Raises DamagedChunkError if a checksum or a length is wrong."""
    if spec.codec == "mappable" and len(data) != spec.chunk_bytes + CRC_BYTES:
        raise DamagedChunkError(root, path, f"is {len(data)} bytes long, not {spec.chunk_bytes + CRC_BYTES}")
    body = memoryview(data)[:-CRC_BYTES]
    if len(data) <= CRC_BYTES:
        raise DamagedChunkError(root, path, "fails its checksum")
    check_sums(root, path, crc32c(body), int.from_bytes(data[-CRC_BYTES:], "little"), listed)
    if spec.codec == "mappable":
        return bytes(body)
    try:
        return _decode_int8(body, spec) if spec.codec == "int8" else _decode_blosc(body, spec)
    except (RuntimeError, ValueError):
        raise DamagedChunkError(root, path, "does not decode to a chunk of this array") from None


def _decode_int8(body: memoryview, spec: ArraySpec) -> bytes:
    vectors = torch.from_numpy(dequantise(body, spec.shape[-1])).to(TORCH_DTYPES[spec.dtype])
    if vectors.numel() * ITEM_BYTES[spec.dtype] != spec.chunk_bytes:
        raise ValueError("another number of vectors")
    return bytes(vectors.flatten().view(torch.uint8).numpy().tobytes())


def _decode_blosc(body: memoryview, spec: ArraySpec) -> bytes:
    # The header of a blosc chunk states both sizes, and blosc believes it: a hostile one must not make it allocate
    # more or read beyond the end.
    decoded, encoded = int.from_bytes(body[4:8], "little"), int.from_bytes(body[12:16], "little")
    if len(body) < 16 or (decoded, encoded) != (spec.chunk_bytes, len(body)):
        raise ValueError("other sizes")
    return bytes(_blosc(ITEM_BYTES[spec.dtype]).decode(body))


def read_chunk(root: Place, spec: ArraySpec, index: int, listed: int | None = None) -> bytes:
    """The numbers of chunk `index`, fetched and checked. Raises DamagedChunkError."""
    return _fetched(root, spec, index, listed)[1]


def read_tensor(root: Place, spec: ArraySpec, index: int, listed: int | None = None) -> Tensor:
    """Chunk `index` in memory, [rows, ...] without padding, fetched and checked. Raises DamagedChunkError."""
    return to_tensor(read_chunk(root, spec, index, listed), spec, index)


def to_tensor(numbers: bytes, spec: ArraySpec, index: int) -> Tensor:
    """The numbers of chunk `index`, [rows, ...] without padding."""
    return torch.frombuffer(bytearray(numbers), dtype=TORCH_DTYPES[spec.dtype]).view(spec.chunks)[: spec.rows(index)]


def encoded_chunk(root: Place, spec: ArraySpec, index: int, listed: int | None = None) -> bytes:
    """The bytes of chunk `index`'s file, fetched and checked. Raises DamagedChunkError."""
    return _fetched(root, spec, index, listed)[0]


def _fetched(root: Place, spec: ArraySpec, index: int, listed: int | None) -> tuple[bytes, bytes]:
    """(the bytes of its file, its numbers)."""
    path, most = spec.chunk_file(root, index), 2 * spec.chunk_bytes + 4096  # more than any codec needs

    def read() -> tuple[bytes, bytes]:
        try:
            data = path.read_bytes() if isinstance(path, Path) else path.read_bytes(most)
        except TooLongError:
            raise DamagedChunkError(root, path, f"is more than {most} bytes long") from None
        return data, decode_chunk(root, path, data, spec, listed)

    try:
        return read_again(path, read, DamagedChunkError)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise DamagedChunkError(root, path, "is missing") from None
