"""Every file of a store, checked against what it must be."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hsae.cache.errors import DamagedFileError
from hsae.cache.format import layout
from hsae.cache.format.arrays import ArraySpec
from hsae.cache.format.chunk_codec import Checks, fetch_chunk
from hsae.cache.progress import Progress, Step, silent
from hsae.cache.reading.mapped_chunks import map_chunk, read_checks
from hsae.cache.storage.paths import Place, at_once, map_parallel, place


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One file that is missing or is not what was written."""

    array: str  # the array whose chunk it is; empty for metadata and `documents.json`
    index: int  # number of the chunk
    path: Place
    problem: str


def verify(url: str | Place, progress: Progress = silent) -> list[Damage]:
    """Every damaged file of a store, all of them read anew. Raises StoreError if its header can't be trusted."""
    root = place(url)
    header = layout.read_header(root)
    checks: dict[str, NDArray[np.uint32]] = {}
    files = [find_damage(partial(layout.check_metadata, root, *item)) for item in layout.metadata(header).items()]
    if header.spec.rows_per_document is not None and (header.complete or header.documents_digest):
        files.append(find_damage(partial(layout.read_documents, root, header)))
    files.append(find_damage(lambda: checks.update(read_checks(root, header)), "checks"))
    damages = [damage for damage in files if damage is not None]
    specs = layout.every_array(header)
    chunks = ((spec, index) for spec in specs for index in range(spec.count))  # of which there may be millions
    total = sum(spec.count for spec in specs)

    def find(chunk: tuple[ArraySpec, int]) -> Damage | None:
        spec, index = chunk
        return find_damage(partial(check_chunk, root, spec, index, checks.get(spec.path)), spec.path, index)

    for done, damage in enumerate(map_parallel(find, chunks, at_once(root)), 1):
        damages.extend([damage] if damage else [])
        progress(Step(task="checking", done=done, total=total, unit="chunks"))
    return damages


def find_damage(check: Callable[[], object], array: str = "", index: int = 0) -> Damage | None:
    """The damage that `check` raises a DamagedFileError for."""
    try:
        check()
    except DamagedFileError as error:
        return Damage(array=array, index=index, path=error.path, problem=error.problem)
    return None


def check_chunk(root: Place, spec: ArraySpec, index: int, checks: Checks | None) -> None:
    """Raise DamagedFileError unless the file holds a whole chunk with the right checksum."""
    if spec.codec == "mappable" and isinstance(root, Path):
        map_chunk(root, spec, index, checks)
    else:
        fetch_chunk(root, spec, index, checks)
