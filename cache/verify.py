"""Every chunk of a store checked against its checksum, and damaged ones computed again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hsae.cache.build import Builder, locked
from hsae.cache.layout import ArraySpec, Header, arrays, check_array, read_header, statistics_arrays
from hsae.cache.lm import LanguageModel
from hsae.cache.mapped import DamagedChunkError, decode_compact, map_chunk
from hsae.cache.store import local_path


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One chunk that is missing or is not what was written."""

    array: str
    index: int
    path: Path
    problem: str


def verify(url: str | Path, progress: Callable[[int, int], None] = lambda done, total: None) -> list[Damage]:
    """Every damaged chunk of a store. Raises StoreError if its metadata can't be trusted."""
    root = local_path(url)
    header = read_header(root)
    specs = list(arrays(header.spec, header.d_model).values())
    if header.complete:
        specs += statistics_arrays(header.spec, header.d_model).values()
    total, done = sum(spec.count for spec in specs), 0
    damages = []
    for spec in specs:
        check_array(root, spec)
        for index in range(spec.count):
            path = spec.chunk_file(root, index)
            try:
                check_chunk(root, path, spec)
            except DamagedChunkError as error:
                damages.append(Damage(array=spec.path, index=index, path=path, problem=error.problem))
            done += 1
            progress(done, total)
    return damages


def check_chunk(root: Path, path: Path, spec: ArraySpec) -> None:
    """Raise DamagedChunkError unless the file holds a whole chunk with the right checksum."""
    if spec.compact:
        if not path.is_file():
            raise DamagedChunkError(root, path, "is missing")
        decode_compact(root, path, spec)
    else:
        map_chunk(root, path, spec, check=True)


def repair(
    url: str | Path, damages: Sequence[Damage], *, device: str = "cpu", say: Callable[[str], None] = lambda text: None
) -> list[Damage]:
    """Compute damaged chunks again from the model and the corpus; returns what is still wrong.

    Raises StoreError if the model or the corpus are no longer what the store was made from.
    """
    root = local_path(url)
    header = read_header(root)
    say(f"loading {header.spec.model.id}")
    model = LanguageModel.load(header.spec.model, device=device, say=say)
    with locked(root):
        return _repaired(header, root, model, damages, say)


def _repaired(
    header: Header, root: Path, model: LanguageModel, damages: Sequence[Damage], say: Callable[[str], None]
) -> list[Damage]:
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
        builder.write_chunks(index, wanted)
        say(f"chunk {index} computed again ({number} of {len(by_index)})")
    if header.complete and any(damage.array.startswith("stats/") for damage in damages):
        builder.finish()
    return verify(root)
