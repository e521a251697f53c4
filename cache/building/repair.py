"""Damaged files of a store, made again.

What follows from the header and from other files (metadata, lists) is written again as it was; chunks are computed
again from the model and the corpus. Nothing is deleted, and nothing is replaced but by what the store's list of
checksums names.
"""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hsae.cache.building.statistics import summarise
from hsae.cache.building.verification import Damage, find_damage, verify
from hsae.cache.building.writer import read_trailers, write_documents, write_header, write_list
from hsae.cache.config import at_commit
from hsae.cache.errors import DamagedFileError, StoreError
from hsae.cache.files import crc32c, sweep
from hsae.cache.format import layout
from hsae.cache.format.arrays import CRC_BYTES, ArraySpec
from hsae.cache.format.chunk_codec import encode_chunk, listed_checksum, read_tensor
from hsae.cache.reading.mapped_chunks import count_kept, read_checks
from hsae.cache.storage.paths import Place, exists, locked, place, publish

LISTS = ("checks", "stats/kept")  # arrays that follow from others


def repair(
    url: str | Place, damages: Sequence[Damage], *, device: str = "cpu", say: Callable[[str], None] = lambda text: None
) -> list[Damage]:
    """Make damaged files again, from the header and other files or from the model and the corpus; returns what is
    still wrong.

    A store made before there were checksums of the header and of all chunks gets them. Raises StoreError, before
    anything is written, if the model or the corpus are no longer what the store was made from, or if numbers were
    lost that only another store still has.
    """
    root = place(url)
    header = layout.read_header(root)
    _refuse_lossy(root, header, damages)
    with locked(root):
        if isinstance(root, Path):
            sweep(root)
        paths, arrays = {str(one.path) for one in damages}, {one.array for one in damages}
        documents = layout.metadata(header).items()
        write_documents(root, {name: document for name, document in documents if str(root / name) in paths})
        if any(one.array not in LISTS and one.path.name != layout.METADATA for one in damages):
            _compute_again(root, header, damages, device, say)
        if "stats/kept" in arrays:
            _write_kept(root, header)
        if header.complete and ("checks" in arrays or header.checks is None or not layout.is_sealed(root)):
            _seal_again(root, header)
    return verify(root)


def mend_documents(root: Place, *, device: str, say: Callable[[str], None]) -> None:
    """Make `documents.json` of a finished store again if it is missing or damaged."""
    if (damage := find_damage(partial(layout.read_documents, root, layout.read_header(root)))) is not None:
        say(f"{damage.path} {damage.problem}; making it again")
        repair(root, [damage], device=device, say=say)


def _refuse_lossy(root: Place, header: layout.Header, damages: Sequence[Damage]) -> None:
    """Refuse what can't be had from the model: int8, and statistics of what it was made from."""
    lost = [one for one in damages if one.array.startswith(("acts/", "stats/blocks"))]
    if header.spec.codec != "int8" or not lost:
        return
    folder = root.parent
    names = [header.spec.model_copy(update={"codec": codec}).name for codec in ("mappable", "compact")]
    known = next((str(folder / name) for name in names if exists(folder / name)), None)
    where = "" if known else f", where STORE is the one that it was made from ({' or '.join(names)})"
    raise StoreError(
        f"{lost[0].path} {lost[0].problem}, and int8 can't be computed again; nothing was written. Mend it with: "
        f"hsae cache recode {known or 'STORE'} {folder} --codec int8{where}"
    )


def _compute_again(
    root: Place, header: layout.Header, damages: Sequence[Damage], device: str, say: Callable[[str], None]
) -> None:
    """Documents and tokens first, since others follow from them; then other chunks, and statistics."""
    # which load transformers: to write metadata again takes none
    from hsae.cache.building.contents import StoreContents, text_of
    from hsae.cache.language_model.lm import LanguageModel

    say(f"loading {header.spec.model.id}")
    model = LanguageModel.load(at_commit(header.spec.model, header.model_commit), device=device, say=say)
    contents = StoreContents(header.spec, model, text_of(header.spec, header, anew=True), older=header.older)
    contents.check_same(root, header)
    specs = {spec.path: spec for spec in layout.every_array(header)}
    checks: dict[str, NDArray[np.uint32]] = {}
    with contextlib.suppress(DamagedFileError):  # the list is written again at the end, and compared with the header
        checks = read_checks(root, header)

    def replace(path: Place, data: bytes, right: bool) -> None:
        """Publish a file, if it is the one that the store was finished with."""
        if not right:
            raise StoreError(
                f"{path} comes out with other numbers than those that the store was finished with, and was left as it "
                f"is; move {root} away and build it again with `hsae cache build`"
            )
        publish(path, data)

    def replace_chunk(spec: ArraySpec, index: int, values: Tensor) -> None:
        data = encode_chunk(spec, values)
        listed = listed_checksum(checks.get(spec.path), index)
        replace(spec.chunk_file(root, index), data, listed in (None, int.from_bytes(data[-CRC_BYTES:], "little")))

    if any(one.path.name == layout.DOCUMENTS for one in damages):
        data = contents.documents_json
        replace(root / layout.DOCUMENTS, data, header.documents_digest in (None, layout.documents_digest(data)))
    if token_chunks := {one.index for one in damages if one.array == "tokens"}:
        for index, chunk in contents.token_chunks():
            if index in token_chunks:
                replace_chunk(specs["tokens"], index, chunk)
    by_index: dict[int, list[ArraySpec]] = {}
    for one in damages:
        if one.array in contents.specs and one.array != "tokens":
            by_index.setdefault(one.index, []).append(specs[one.array])
    for number, (index, wanted) in enumerate(sorted(by_index.items()), 1):
        computed = contents.compute(index, wanted, read_tensor(root, specs["tokens"], index))
        for spec, _, values in computed.arrays():
            replace_chunk(spec, index, values)
        say(f"chunk {index} computed again ({number} of {len(by_index)})")
    lost = {one.array for one in damages if one.array.startswith("stats/blocks")}
    for hook in {path.split("/")[1] for path in lost}:
        _, moments = summarise(root, specs, hook, header.special_ids, checks)
        for path in lost & {f"stats/{hook}/{name}" for name in moments}:
            replace_chunk(specs[path], 0, moments[path.rpartition("/")[2]])


def _write_kept(root: Place, header: layout.Header) -> None:
    """Count the tokens again. Raises StoreError if they are not as many as the header tells."""
    counts = count_kept(root, layout.every_array(header)[0], header.special_ids)
    if counts.sum() != header.kept_tokens:
        raise _not_the_same(root)
    write_list(root, layout.kept_array(header.spec, header.d_model), counts.astype(np.uint32))


def _seal_again(root: Place, header: layout.Header) -> None:
    """Write the checksums' list and the header. Raises StoreError if the list is not the header's."""
    specs = layout.every_array(header)
    checks = read_trailers(root, specs).astype("<u4")
    if header.checks not in (None, crc32c(checks.tobytes())):
        raise _not_the_same(root)
    header = header.model_copy(update={"checks": write_list(root, layout.checks_array(specs), checks)})
    write_header(root, header)


def _not_the_same(root: Place) -> StoreError:
    return StoreError(
        f"{root}: the chunks are whole, but not those that the store was finished with; move it away and build it "
        f"again with `hsae cache build`"
    )
