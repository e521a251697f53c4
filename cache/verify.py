"""Every chunk of a store checked against its checksum, and damaged ones computed again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hsae.cache.codec import DamagedChunkError, read_chunk
from hsae.cache.errors import StoreError
from hsae.cache.layout import ArraySpec, Header, check_array, every_array, kept_array, read_header
from hsae.cache.mapped import count_kept, map_chunk, read_checks
from hsae.cache.remote import IN_FLIGHT, Place, RemotePath, locked, many, place
from hsae.cache.writer import seal, write_chunk, write_header, write_list

LOCAL_READERS = 2


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One chunk that is missing or is not what was written."""

    array: str
    index: int
    path: Place
    problem: str


def verify(url: str | Place, progress: Callable[[int, int], None] = lambda done, total: None) -> list[Damage]:
    """Every damaged chunk of a store. Raises StoreError if its metadata can't be trusted."""
    root = place(url)
    header = read_header(root)
    specs = every_array(header)
    damages = []
    checks: dict[str, NDArray[np.uint32]] = {}
    try:
        checks = read_checks(root, header)
    except DamagedChunkError as error:
        damages.append(Damage(array="checks", index=0, path=error.path, problem=error.problem))
    for spec in specs:
        check_array(root, spec)
    total = sum(spec.count for spec in specs)
    jobs = ((spec, index) for spec in specs for index in range(spec.count))

    def problem(job: tuple[ArraySpec, int]) -> Damage | None:
        spec, index = job
        listed = int(checks[spec.path][index]) if checks else None
        try:
            check_chunk(root, spec, index, listed)
        except DamagedChunkError as error:
            return Damage(array=spec.path, index=index, path=error.path, problem=error.problem)
        return None

    at_once = IN_FLIGHT if isinstance(root, RemotePath) else LOCAL_READERS
    for done, damage in enumerate(many(problem, jobs, at_once), 1):
        damages.extend([damage] if damage else [])
        progress(done, total)
    return damages


def check_chunk(root: Place, spec: ArraySpec, index: int, listed: int | None) -> None:
    """Raise DamagedChunkError unless the file holds a whole chunk with the right checksum."""
    path = spec.chunk_file(root, index)
    if spec.codec == "mappable" and isinstance(path, Path):
        map_chunk(root, path, spec, check=True, listed=listed)
    else:
        read_chunk(root, spec, index, listed)


def repair(
    url: str | Place, damages: Sequence[Damage], *, device: str = "cpu", say: Callable[[str], None] = lambda text: None
) -> list[Damage]:
    """Compute damaged chunks again from the model and the corpus; returns what is still wrong.

    A store made before there was a list of checksums gets one. Raises StoreError if the model or the corpus are no longer what the
    store was made from.
    """
    root = place(url)
    header = read_header(root)
    with locked(root):
        if any(damage.array != "checks" for damage in damages):
            _compute_again(header, root, damages, device, say)
        if header.complete:
            seal_again(root, header)
    return verify(root)


def _compute_again(
    header: Header, root: Place, damages: Sequence[Damage], device: str, say: Callable[[str], None]
) -> None:
    from hsae.cache.build import Builder  # which loads transformers; checking needs none
    from hsae.cache.lm import LanguageModel

    say(f"loading {header.spec.model.id}")
    model = LanguageModel.load(header.spec.model, device=device, say=say)
    builder = Builder(header.spec, root, model, lambda spec, stage, done, total, row_bytes: None)
    builder.check_same(header, builder.header())
    for damage in damages:
        damage.path.unlink(missing_ok=True)
    builder.write_tokens()
    by_index: dict[int, list[ArraySpec]] = {}
    for damage in damages:
        if damage.array in builder.specs and damage.array != "tokens":
            by_index.setdefault(damage.index, []).append(builder.specs[damage.array])
    for number, (index, wanted) in enumerate(sorted(by_index.items()), 1):
        for chunk in builder.compute(index, wanted, builder.tokens(index)):
            write_chunk(root, *chunk)
        say(f"chunk {index} computed again ({number} of {len(by_index)})")
    if header.complete and any(damage.array.startswith("stats/") for damage in damages):
        builder.write_statistics()
        if header.kept_tokens is not None:
            kept = count_kept(root, builder.specs["tokens"], header.special_ids)
            write_list(root, kept_array(header.spec, header.d_model), kept.astype(np.uint32))


def seal_again(root: Place, header: Header) -> None:
    """Write the list of checksums of a complete store, and in its header the list's own, if it is not there or not right."""
    checks = seal(root, every_array(header))
    if checks != header.checks:
        if header.checks is not None:
            raise StoreError(
                f"{root}: the chunks are whole, but not those the store was finished with; build it again elsewhere and compare"
            )
        write_header(root, header.model_copy(update={"checks": checks}))
