"""Chunks as memory-mapped tensors: nothing is copied until someone gathers from them.

A chunk's crc32c is checked the first time this process maps it. Compact chunks can't be mapped: they are decoded once into
`$HSAE_HOME/scratch`, and mapped from there.
"""

import hashlib
import mmap
import os
from collections import OrderedDict
from pathlib import Path

import google_crc32c
import numpy as np
import torch
from torch import Tensor

from hsae.cache.errors import StoreError
from hsae.cache.layout import CRC_BYTES, ArraySpec
from hsae.cache.weights import home

MOST_MAPPED = 16384  # chunks one array keeps mapped; Linux allows a process about 65,000 maps
TORCH_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
    "int32": torch.int32,
}


class DamagedChunkError(StoreError):
    """A chunk is missing or is not what was written."""

    def __init__(self, root: Path, path: Path, problem: str) -> None:
        super().__init__(f"{path} {problem}; find and mend all such chunks with: hsae cache verify {root} --repair")
        self.path, self.problem = path, problem


class MappedArray:
    """One array of a store, chunk by chunk."""

    def __init__(self, root: Path, spec: ArraySpec) -> None:
        self.root, self.spec = root, spec
        self._chunks: OrderedDict[int, Tensor] = OrderedDict()
        self._checked: set[int] = set()

    def chunk(self, index: int) -> Tensor:
        """Chunk `index` as a tensor over mapped pages, without the padding of the last one. Writing to it changes no file."""
        if index not in self._chunks:
            rows = min(self.spec.chunks[0], self.spec.shape[0] - index * self.spec.chunks[0])
            self._chunks[index] = self._mapped(index)[:rows]
            self._checked.add(index)
            if len(self._chunks) > MOST_MAPPED:
                self._chunks.popitem(last=False)
        self._chunks.move_to_end(index)
        return self._chunks[index]

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start to stop: a view if one chunk holds them, else a copy."""
        if not 0 <= start <= stop <= self.spec.shape[0]:
            raise IndexError(f"rows {start} to {stop} of {self.spec.path}, which has {self.spec.shape[0]}")
        step = self.spec.chunks[0]
        parts = [
            self.chunk(index)[max(start - index * step, 0) : stop - index * step]
            for index in range(start // step, max(start // step + 1, -(-stop // step)))
            if index < self.spec.count
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _mapped(self, index: int) -> Tensor:
        path = self.spec.chunk_file(self.root, index)
        if self.spec.compact:
            path = self._decoded(path)
            return map_chunk(self.root, path, self.spec, trailer=0)  # checked when it was decoded
        return map_chunk(self.root, path, self.spec, check=index not in self._checked)

    def _decoded(self, path: Path) -> Path:
        """The scratch file with a compact chunk's numbers, made if it isn't there or its source changed."""
        source = check_length(self.root, path, None)
        stamp = f"{path.resolve()}:{source.st_size}:{source.st_mtime_ns}"
        scratch = home() / "scratch" / hashlib.sha256(stamp.encode()).hexdigest()[:32]
        if not scratch.is_file() or scratch.stat().st_size != self.spec.chunk_bytes:
            numbers = decode_compact(self.root, path, self.spec)
            scratch.parent.mkdir(parents=True, exist_ok=True)
            partial = scratch.with_name(f"{scratch.name}.{os.getpid()}.partial")
            try:
                partial.write_bytes(numbers)
                partial.replace(scratch)
            finally:
                partial.unlink(missing_ok=True)
        return scratch


def check_length(root: Path, path: Path, length: int | None) -> os.stat_result:
    """The file's status. Raises DamagedChunkError if it is missing or, given a length, has another."""
    try:
        status = path.stat()
    except OSError:
        raise DamagedChunkError(root, path, "is missing") from None
    if length is not None and status.st_size != length:
        raise DamagedChunkError(root, path, f"is {status.st_size} bytes long, not {length}")
    return status


def map_chunk(root: Path, path: Path, spec: ArraySpec, *, trailer: int = CRC_BYTES, check: bool = False) -> Tensor:
    """A file of one chunk's numbers, and `trailer` bytes of checksum, as a tensor over mapped pages. Raises DamagedChunkError."""
    size = spec.chunk_bytes
    check_length(root, path, size + trailer)
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # private: a write never reaches the file
    if check:
        view = memoryview(pages)
        if crc32c(view[:size]) != int.from_bytes(view[size:], "little"):
            raise DamagedChunkError(root, path, "fails its checksum")
    dtype = TORCH_DTYPES[spec.dtype]
    return torch.frombuffer(pages, dtype=dtype, count=size // dtype.itemsize).view(spec.chunks)


def crc32c(data: memoryview) -> int:
    """The crc32c checksum of some bytes."""
    return int(google_crc32c.value(np.frombuffer(data, dtype=np.uint8)))


def decode_compact(root: Path, path: Path, spec: ArraySpec) -> bytes:
    """The numbers of a compact chunk. Raises DamagedChunkError if its checksum or its length is wrong."""
    from numcodecs import Blosc

    data = path.read_bytes()
    body = memoryview(data)[:-CRC_BYTES]
    if len(data) <= CRC_BYTES or crc32c(body) != int.from_bytes(data[-CRC_BYTES:], "little"):
        raise DamagedChunkError(root, path, "fails its checksum")
    # the header of a blosc chunk states the decoded size; a hostile one must not make us allocate more
    if len(body) < 16 or int.from_bytes(body[4:8], "little") != spec.chunk_bytes:
        raise DamagedChunkError(root, path, "does not decode to a chunk of this array")
    return bytes(Blosc().decode(body))
