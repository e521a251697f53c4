"""A store that has lost its header: its chunks are kept if they are whole and are those of this model and this text."""

import contextlib
from collections.abc import Mapping
from functools import partial

import numpy as np

from hsae.cache.building.chunk_log import Written
from hsae.cache.building.contents import StoreContents
from hsae.cache.building.verification import Damage, check_chunk, find_damage
from hsae.cache.building.writer import trailer
from hsae.cache.errors import DamagedFileError, StoreError
from hsae.cache.files import crc32c
from hsae.cache.format.arrays import CRC_BYTES, ArraySpec
from hsae.cache.format.chunk_codec import encode_chunk
from hsae.cache.format.layout import every_array
from hsae.cache.reading.mapped_chunks import split_checks
from hsae.cache.storage.paths import Place, at_once, map_parallel


def keep_what_is_right(contents: StoreContents, root: Place, written: Written) -> None:
    """Check every chunk that is there, and delete those that are damaged; a build then makes what is missing.

    A chunk is compared with its checksum and, where the store had been finished, with its list of checksums; all
    tokens with the text packed anew; the first chunk of activations and losses with what the model computes. Of a
    store that had not been finished only chunks that were written down count as there. Raises StoreError if anything
    differs.
    """
    specs = contents.specs
    present = [(spec, int(index)) for spec in specs.values() for index in np.flatnonzero(spec.written(root))]
    if not present:
        return
    checks = _listed(contents, root)

    def find(chunk: tuple[ArraySpec, int]) -> Damage | None:
        return find_damage(partial(check_chunk, root, *chunk, checks.get(chunk[0].path)))

    damaged = {str(one.path): one.path for one in map_parallel(find, present, at_once(root)) if one is not None}
    first, known = None, 0
    for index, chunk in contents.token_chunks():
        first = chunk if index == 0 else first
        known += _compare(root, specs["tokens"], index, encode_chunk(specs["tokens"], chunk), damaged)
    there = [spec for path, spec in specs.items() if path != "tokens" and spec.is_written(root, 0)]
    if there and first is not None:
        for spec, index, values in contents.compute(0, there, first).arrays():
            _compare(root, spec, index, encode_chunk(spec, values), damaged)
    if damaged and not known:
        raise StoreError(
            f"{root} has lost its header, and none of its tokens are whole, so that nobody knows whose it is. Move "
            "it away, or build elsewhere with --set cache.dir=FOLDER"
        )
    for path in damaged.values():
        path.unlink(missing_ok=True)
    if checks:  # what a finished store's list tells of is as good as written down
        for spec, index in present:
            written.add(spec.path, index, int(checks[spec.path][index]))
        written.flush()


def _listed(contents: StoreContents, root: Place) -> dict[str, np.ndarray]:
    """The checksums of each array's chunks that a finished store would list, if they are there and whole."""
    for count in (0, None):  # older stores have no list of kept tokens
        specs = every_array(contents.header().model_copy(update={"complete": True, "kept_tokens": count}))
        with contextlib.suppress(DamagedFileError):
            return split_checks(root, specs, None)
    return {}


def _compare(root: Place, spec: ArraySpec, index: int, data: bytes, damaged: Mapping[str, Place]) -> bool:
    """Whether a chunk is there, whole and right. Raises StoreError if it is whole and another."""
    path = spec.chunk_file(root, index)
    if str(path) in damaged or not spec.is_written(root, index):
        return False
    if trailer(root, spec, index) != crc32c(data[:-CRC_BYTES]):
        raise StoreError(
            f"{root} has lost its header, and its chunks are not those of this model and text: {path} would be "
            "another. Move the store away, or build elsewhere with --set cache.dir=FOLDER"
        )
    return True
