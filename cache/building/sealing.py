"""The last pass of a build: the checksum that ends each chunk, and each chunk's non-special tokens, written down part
by part.

Part p is `tally/<p>`: uint32 [chunks, 1 + arrays], for chunks p*TALLIED and following their non-special tokens, then
the checksum of that chunk of each array with rows, 0 where an array has no such chunk; behind them a crc32c of these
numbers, of what the store is made from and of p. Workers share the parts, since a store of terabytes has millions of
chunks to ask; worker 0 does what is left and makes the store's lists of them. A part is made only of chunks that are
what was written down (see `written`), and is not older than worker 0: chunks may have changed since. The folder goes
when the store is complete.
"""

import contextlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hsae.cache.building.chunk_log import Written
from hsae.cache.building.writer import trailer
from hsae.cache.errors import DamagedFileError
from hsae.cache.files import crc32c
from hsae.cache.format.arrays import CRC_BYTES, ArraySpec
from hsae.cache.launcher import Share
from hsae.cache.reading.mapped_chunks import kept_tokens
from hsae.cache.storage.paths import Place, map_parallel, publish

TALLIED = 1024  # chunks of each array in one part
FOLDER = "tally"
Chunk = tuple[ArraySpec, int]


def write_parts(
    target: Place, specs: Sequence[ArraySpec], special_ids: Sequence[int], share: Share, written: Written
) -> list[Chunk]:
    """Write this worker's parts; worker 0 also those that the others have left. `specs` are the arrays with rows, the
    tokens first.

    Returns the chunks that are missing, harmed or not what was written down; the parts that tell of them are not
    written.
    """
    parts, wrong = -(-specs[0].count // TALLIED), []
    for part in (*share.own(parts), *(() if share.rank else share.others(parts))):
        if _read(target, specs, int(part), written.key) is None:
            tally, harmed = _tally(target, specs, int(part), special_ids, written)
            wrong += harmed
            if not harmed:
                data = tally.tobytes()
                with contextlib.suppress(FileNotFoundError):  # worker 0, which did not wait, has deleted the folder
                    publish(target / FOLDER / str(part), data + _checksum(data, int(part), written.key))
    return wrong


def collect_parts(
    target: Place, specs: Sequence[ArraySpec], key: str
) -> tuple[NDArray[np.uint32], dict[str, NDArray[np.uint32]]] | None:
    """(non-special tokens of each chunk, checksums of each array's chunks); None if a part is missing or harmed."""
    parts: list[NDArray[np.uint32]] = []
    for part in map_parallel(lambda part: _read(target, specs, part, key), range(-(-specs[0].count // TALLIED))):
        if part is None:
            return None
        parts.append(part)
    whole = np.concatenate(parts)
    return whole[:, 0], {spec.path: whole[: spec.count, column] for column, spec in enumerate(specs, 1)}


def _read(target: Place, specs: Sequence[ArraySpec], part: int, key: str) -> NDArray[np.uint32] | None:
    """A part's numbers; None if it is not there or not what was written."""
    chunks = min(TALLIED, specs[0].count - part * TALLIED)
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        data = (target / FOLDER / str(part)).read_bytes()
        numbers, checksum = data[:-CRC_BYTES], data[-CRC_BYTES:]
        if len(numbers) == 4 * (1 + len(specs)) * chunks and checksum == _checksum(numbers, part, key):
            return np.frombuffer(numbers, "<u4").reshape(-1, 1 + len(specs))
    return None


def _checksum(numbers: bytes, part: int, key: str) -> bytes:
    return crc32c(f"{key}/{part}".encode(), crc32c(numbers)).to_bytes(CRC_BYTES, "little")


def _tally(
    target: Place, specs: Sequence[ArraySpec], part: int, special_ids: Sequence[int], written: Written
) -> tuple[NDArray[np.uint32], list[Chunk]]:
    """(a part's numbers, the chunks that are not what was written down)."""
    tokens = specs[0]
    first, last = part * TALLIED, min((part + 1) * TALLIED, tokens.count)
    tally, wrong = np.zeros((last - first, 1 + len(specs)), "<u4"), []

    def numbers(chunk: Chunk) -> tuple[int, int] | None:
        """(a chunk's non-special tokens if it is one of tokens, its checksum)."""
        spec, index = chunk
        with contextlib.suppress(DamagedFileError):
            count, checksum = (
                kept_tokens(target, spec, index, special_ids) if spec is tokens else (0, trailer(target, spec, index))
            )
            if checksum == written[spec.path][index]:
                return count, checksum
        return None

    for column, spec in enumerate(specs, 1):
        chunks = [(spec, index) for index in range(first, min(last, spec.count))]
        for chunk, result in zip(chunks, map_parallel(numbers, chunks), strict=True):
            row = tally[chunk[1] - first]
            if result is None:
                wrong.append(chunk)
            else:
                row[0], row[column] = row[0] + result[0], result[1]
    return tally, wrong
