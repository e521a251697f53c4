"""Chunks as memory-mapped tensors: nothing is copied until someone gathers from them.

A chunk's checksums are tested the first time this process maps it. A local, mappable chunk is mapped where it lies;
any other from its decoded copy in the scratch folder.
"""

import errno
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hsae.cache.errors import DamagedFileError, missing_is_damage
from hsae.cache.files import crc32c
from hsae.cache.format.arrays import CRC_BYTES, ArraySpec
from hsae.cache.format.chunk_codec import TORCH_DTYPES, Checks, check_sums, fetch_chunk, listed_checksum
from hsae.cache.format.layout import Header, checks_array, every_array
from hsae.cache.reading import page_faults
from hsae.cache.reading.scratch import Scratch, named_checksum, scratch
from hsae.cache.storage.paths import Place, map_parallel

MOST_MAPPED = 16384  # chunks one array keeps mapped; Linux allows a process about 65,000 maps


class MappedArray:
    """One array of a store, chunk by chunk."""

    def __init__(self, root: Place, spec: ArraySpec, checks: Checks | None = None) -> None:
        self.root, self.spec, self.checks = root, spec, checks
        page_faults.note(str(root))
        self.in_place = spec.codec == "mappable" and isinstance(root, Path)
        self._chunks: OrderedDict[int, Tensor] = OrderedDict()
        self._files: dict[int, Path] = {}  # scratch files of the chunks in `_chunks`
        self._checked = bytearray(spec.count if self.in_place else 0)  # 1 for each chunk whose checksums were tested
        self._fetched = 0

    def chunk(self, index: int) -> Tensor:
        """Chunk `index` over mapped pages, without padding. Writing to it changes no file."""
        if index not in self._chunks:
            if self.in_place:
                chunk = map_chunk(self.root, self.spec, index, self.checks, check=not self._checked[index])
                self._checked[index] = 1
            else:
                self._forget_evicted()
                pages, self._files[index] = scratch_pages(partial(self.fetch, index), self.spec.chunk_bytes)
                chunk = tensor_of(pages, self.spec)
            self._chunks[index] = chunk[: self.spec.rows(index)]
            if len(self._chunks) > MOST_MAPPED:
                dropped, _ = self._chunks.popitem(last=False)
                self._files.pop(dropped, None)
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

    def fetch(self, index: int) -> Path:
        """The scratch file of a chunk that can't be mapped in place, made if need be. Raises DamagedFileError."""
        spec, listed = self.spec, listed_checksum(self.checks, index)
        key = f"{self.root}|{spec.path}|{index}|{spec.chunks}|{spec.dtype}|{listed}{self._stamp(index)}"
        return self._scratch.fetch(key, spec.chunk_bytes, lambda: fetch_chunk(self.root, spec, index, self.checks)[1])

    @cached_property
    def _scratch(self) -> Scratch:
        return scratch()

    def _stamp(self, index: int) -> str:
        """What tells a changed source from the decoded one; empty for a remote chunk with a listed checksum."""
        path = self.spec.chunk_file(self.root, index)
        with missing_is_damage(self.root, path):
            if isinstance(path, Path):
                status = path.stat()
                return f"|{status.st_size}:{status.st_mtime_ns}"
            if self.checks is not None:
                return ""
            info, names = path.status(), ("size", "ETag", "etag", "mtime", "created", "LastModified")
            return "|".join(str(info.get(name)) for name in names)

    def _forget_evicted(self) -> None:
        """Unmap chunks whose scratch files are gone: mapped, they take room on the disk."""
        self._fetched += 1
        if self._fetched % 64 == 0:
            for index in [index for index, path in self._files.items() if not path.exists()]:
                del self._files[index]
                self._chunks.pop(index, None)


def kept_tokens(
    root: Place, spec: ArraySpec, index: int, special_ids: Sequence[int], checks: Checks | None = None
) -> tuple[int, int]:
    """(non-special tokens of chunk `index` of the tokens, its checksum). Raises DamagedFileError."""
    data, _ = fetch_chunk(root, spec, index, checks)
    tokens = np.frombuffer(data, "<i4", spec.rows(index) * spec.chunks[1])
    return int(np.isin(tokens, special_ids, invert=True).sum()), int.from_bytes(data[-CRC_BYTES:], "little")


def count_kept(
    root: Place, spec: ArraySpec, special_ids: Sequence[int], checks: Checks | None = None
) -> NDArray[np.int64]:
    """Non-special tokens of each chunk, by reading all tokens. Raises DamagedFileError."""
    counts = map_parallel(lambda index: kept_tokens(root, spec, index, special_ids, checks)[0], range(spec.count))
    return np.fromiter(counts, np.int64, spec.count)


def read_checks(root: Place, header: Header) -> dict[str, NDArray[np.uint32]]:
    """The listed checksums of each array's chunks, empty without a list. Raises DamagedFileError."""
    return {} if header.checks is None else split_checks(root, every_array(header), [header.checks])


def split_checks(root: Place, specs: Sequence[ArraySpec], checks: Checks | None) -> dict[str, NDArray[np.uint32]]:
    """The list of checksums of the chunks of `specs`, by array; `checks` is the list's own. Raises DamagedFileError."""
    numbers = np.frombuffer(fetch_chunk(root, checks_array(specs), 0, checks)[1], dtype="<u4")
    ends = np.cumsum([array.count for array in specs])[:-1]
    return dict(zip((array.path for array in specs), np.split(numbers, ends), strict=True))


def mapped_pages(path: Path, size: int) -> Tensor:
    """A file's bytes as private mapped pages, without an open descriptor. Raises ValueError for another size."""
    with path.open("rb") as file:
        if (length := os.fstat(file.fileno()).st_size) != size:
            raise ValueError(f"{path} is {length} bytes long, not {size}")
        try:  # by the number: a name may have bytes that torch can't take
            return torch.from_file(f"/dev/fd/{file.fileno()}", shared=False, size=size, dtype=torch.uint8)
        except RuntimeError as error:
            raise OSError(errno.ENOMEM, f"can't be mapped ({str(error).splitlines()[0]})", str(path)) from None


def scratch_pages(fetch: Callable[[], Path], size: int) -> tuple[Tensor, Path]:
    """(the pages of a scratch file, the file); it is fetched again if it is damaged."""
    for _ in range(8):
        path = fetch()
        try:
            pages = mapped_pages(path, size + CRC_BYTES)
        except (FileNotFoundError, ValueError):  # evicted between the two, or cut short
            path.unlink(missing_ok=True)
            continue
        view = pages.numpy().data
        if named_checksum(crc32c(view[:size]), path) == int.from_bytes(view[size:], "little"):
            return pages, path
        path.unlink(missing_ok=True)  # damaged: fetched again
    raise OSError(f"the scratch folder {path.parent} does not keep what is written to it; is its disk full or failing?")


def tensor_of(pages: Tensor, spec: ArraySpec) -> Tensor:
    """Mapped pages, which begin with a chunk's numbers, as a tensor."""
    return pages[: spec.chunk_bytes].view(TORCH_DTYPES[spec.dtype]).view(spec.chunks)


def map_chunk(root: Place, spec: ArraySpec, index: int, checks: Checks | None, *, check: bool = True) -> Tensor:
    """The file of a mappable chunk as a tensor over mapped pages. Raises DamagedFileError."""
    path, size = spec.chunk_file(root, index), spec.chunk_bytes
    assert isinstance(path, Path)
    with missing_is_damage(root, path):
        try:
            pages = mapped_pages(path, size + CRC_BYTES)
        except ValueError:
            problem = f"is {path.stat().st_size} bytes long, not {size + CRC_BYTES}"
            raise DamagedFileError(root, path, problem) from None
    if check:
        view = pages.numpy().data
        trailer = int.from_bytes(view[size:], "little")
        check_sums(root, path, crc32c(view[:size]), trailer, listed_checksum(checks, index))
    return tensor_of(pages, spec)
