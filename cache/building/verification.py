"""Every file of a store, checked against what it must be."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hsae.cache.errors import DamagedFileError
from hsae.cache.format import layout
from hsae.cache.format.arrays import ArraySpec
from hsae.cache.format.chunk_codec import DamagedChunkError, read_chunk
from hsae.cache.progress import Progress, Step, silent
from hsae.cache.reading.mapped_chunks import map_chunk, read_checks
from hsae.cache.storage.paths import Place, at_once, map_parallel, place


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One file that is missing or is not what was written."""

    array: str
    """The array whose chunk it is; empty for metadata and `documents.json`."""
    index: int
    """Number of the chunk."""
    path: Place
    problem: str


def verify(url: str | Place, progress: Progress = silent) -> list[Damage]:
    """Every damaged file of a store, all of them read anew. Raises StoreError if its header can't be trusted."""
    root = place(url)
    header = layout.read_header(root)
    specs = layout.every_array(header)
    damages = []
    checks: dict[str, NDArray[np.uint32]] = {}

    def sound(array: str, check: Callable[[], object]) -> None:
        try:
            check()
        except DamagedFileError as error:
            damages.append(Damage(array=array, index=0, path=error.path, problem=error.problem))

    for name, document in metadata_files(header).items():
        sound("", lambda name=name, document=document: layout.check_metadata(root, name, document))  # type: ignore[misc]
    if header.spec.rows_per_document is not None and (header.complete or header.documents_digest):
        sound("", lambda: layout.read_documents(root, header))
    sound("checks", lambda: checks.update(read_checks(root, header)))
    total = sum(spec.count for spec in specs)
    jobs = ((spec, index) for spec in specs for index in range(spec.count))

    def problem(job: tuple[ArraySpec, int]) -> Damage | None:
        spec, index = job
        try:
            check_chunk(root, spec, index, int(checks[spec.path][index]) if checks else None)
        except DamagedChunkError as error:
            return Damage(array=spec.path, index=index, path=error.path, problem=error.problem)
        return None

    for done, damage in enumerate(map_parallel(problem, jobs, at_once(root)), 1):
        damages.extend([damage] if damage else [])
        progress(Step(task="checking", done=done, total=total, unit="chunks"))
    return damages


def metadata_files(header: layout.Header) -> dict[str, dict[str, object]]:
    """Every zarr.json that a store with this header has."""
    specs = layout.every_array(header)
    return layout.metadata(header, specs if header.checks is None else [*specs, layout.checks_array(specs)])


def check_chunk(root: Place, spec: ArraySpec, index: int, listed: int | None) -> None:
    """Raise DamagedChunkError unless the file holds a whole chunk with the right checksum."""
    path = spec.chunk_file(root, index)
    if spec.codec == "mappable" and isinstance(path, Path):
        map_chunk(root, path, spec, check=True, listed=listed)
    else:
        read_chunk(root, spec, index, listed)
