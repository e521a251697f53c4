"""The last pass of a build: the checksum that ends each chunk, and each chunk's non-special tokens, written down part by part.

Part p is `tally/<p>`: uint32 [chunks, 1 + arrays], for chunks p*TALLIED and following their non-special tokens, then the checksum of that
chunk of each array with rows, 0 where an array has no such chunk. Workers share the parts, since a store of terabytes has millions of chunks
to ask; worker 0 does what is left and makes the store's lists of them. The folder is gone before the store is complete.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hsae.cache.errors import StoreError
from hsae.cache.layout import ArraySpec, read_header
from hsae.cache.mapped import kept_tokens
from hsae.cache.remote import Place, many, publish, remove, size_of
from hsae.cache.share import Share
from hsae.cache.writer import trailer

TALLIED = 1024  # chunks of each array in one part
FOLDER = "tally"


def write_parts(target: Place, specs: Sequence[ArraySpec], special_ids: Sequence[int], share: Share) -> None:
    """Write this worker's parts; worker 0 also those that the others have left. `specs` are the arrays with rows, the tokens first.

    Raises DamagedChunkError if a chunk is missing.
    """
    parts = -(-specs[0].count // TALLIED)
    for part in (*share.own(parts), *(() if share.rank else share.others(parts))):
        path = target / FOLDER / str(part)
        if size_of(path) != _bytes(specs, int(part)):
            publish(path, _tallied(target, specs, int(part), special_ids).tobytes())
            if share.rank and read_header(target).complete:  # worker 0 did not wait
                path.unlink(missing_ok=True)
                return


def collected(target: Place, specs: Sequence[ArraySpec]) -> tuple[NDArray[np.uint32], dict[str, NDArray[np.uint32]]]:
    """(non-special tokens of each chunk, the checksums of each array's chunks), from all parts."""

    def read(part: int) -> NDArray[np.uint32]:
        data = (target / FOLDER / str(part)).read_bytes()
        if len(data) != _bytes(specs, part):
            raise StoreError(f"{target / FOLDER / str(part)} was cut short; delete it and run the same command again")
        return np.frombuffer(data, "<u4").reshape(-1, 1 + len(specs))

    told = np.concatenate(list(many(read, range(-(-specs[0].count // TALLIED)))))
    return told[:, 0], {spec.path: told[: spec.count, column] for column, spec in enumerate(specs, 1)}


def clear(target: Place) -> None:
    """Delete the parts."""
    folder = target / FOLDER
    if not isinstance(folder, Path) or folder.exists():
        remove(folder)


def _bytes(specs: Sequence[ArraySpec], part: int) -> int:
    return 4 * (1 + len(specs)) * min(TALLIED, specs[0].count - part * TALLIED)


def _tallied(target: Place, specs: Sequence[ArraySpec], part: int, special_ids: Sequence[int]) -> NDArray[np.uint32]:
    tokens, *others = specs
    first, last = part * TALLIED, min((part + 1) * TALLIED, tokens.count)
    told = np.zeros((last - first, 1 + len(specs)), "<u4")
    count: Callable[[int], tuple[int, int]] = lambda index: kept_tokens(target, tokens, index, special_ids)  # noqa: E731
    for row, numbers in zip(told, many(count, range(first, last)), strict=True):
        row[:2] = numbers
    for column, spec in enumerate(others, 2):
        indices = range(first, min(last, spec.count))
        found = many(lambda index, spec=spec: trailer(target, spec, index), indices)  # type: ignore[misc]
        told[: len(indices), column] = np.fromiter(found, "<u4", len(indices))
    return told
