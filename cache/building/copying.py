"""Copying a complete store elsewhere, or into another codec: resumable, checked on the way and read back at the end.

Chunks first, metadata after them, the header last: a copy that was interrupted is no store yet, and the same call
goes on with the chunks that are missing. Metadata is written anew from the header, so nothing that a foreign store
names decides where a file is written.
"""

import contextlib
import json
from pathlib import Path

import numpy as np
import torch

from hsae.cache.building import writer
from hsae.cache.building.statistics import MOST_CHUNKS
from hsae.cache.building.verification import verify
from hsae.cache.config import Codec
from hsae.cache.errors import StoreError
from hsae.cache.files import sweep
from hsae.cache.format import layout
from hsae.cache.format.arrays import ArraySpec
from hsae.cache.format.chunk_codec import decode_chunk, encode_chunk, fetch_chunk, read_tensor, to_tensor
from hsae.cache.progress import Progress, Step, silent
from hsae.cache.reading.mapped_chunks import read_checks
from hsae.cache.storage.paths import Place, locked, map_parallel, place, publish


def copy(source: str | Place, folder: str | Place, *, codec: Codec | None = None, progress: Progress = silent) -> Place:
    """Copy the complete store at `source` into `folder`, in `codec` if one is given, and return its place.

    Raises StoreError if the source is not complete or is damaged, if another store lies there, or if what was written
    reads back wrong.
    """
    root = place(source)
    header = layout.read_header(root)
    if not header.complete:
        raise StoreError(f"{root} is not finished; go on with `hsae cache build`")
    wanted = header
    if header.spec.codec == "int8" and codec not in (None, "int8"):
        raise StoreError(f"{root} holds int8, which is not exact; recode the store that it was made from")
    if codec is not None and codec != header.spec.codec:
        wanted = header.model_copy(update={"spec": header.spec.model_copy(update={"codec": codec}), "checks": None})
    target = place(folder) / wanted.spec.name
    if str(target) == str(root):
        raise StoreError(f"{root} is already there; give another folder, or another codec")
    with contextlib.suppress(layout.LostHeaderError):
        existing = layout.read_header(target)
        if existing.model_copy(update={"checks": wanted.checks, "codec_error": wanted.codec_error}) != wanted:
            raise StoreError(f"{target} is another store of the same name; move it away, or copy to another folder")
    if isinstance(target, Path):
        target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target):
        if isinstance(target, Path):
            sweep(target)
        damaged = set()
        with contextlib.suppress(layout.LostHeaderError):  # a copy that was not finished has no header yet
            damaged = {(damage.array, damage.index) for damage in verify(target)}
        _copy_chunks(root, target, header, wanted, damaged, progress)
        if header.spec.rows_per_document is not None:
            publish(target / layout.DOCUMENTS, json.dumps(layout.read_documents(root, header)).encode())
        specs = layout.every_array(wanted)
        if wanted.checks is None:
            errors = _errors(root, header, wanted) if wanted.spec.codec == "int8" else {}
            wanted = wanted.model_copy(update={"checks": writer.seal(target, specs), "codec_error": errors})
        else:
            listed = layout.checks_array(specs)
            publish(listed.chunk_file(target, 0), fetch_chunk(root, listed, 0, [wanted.checks])[0])
        writer.write_metadata(target, wanted)
        if damages := verify(target):
            for damage in damages:
                damage.path.unlink(missing_ok=True)
            raise StoreError(
                f"{len(damages)} chunks read back damaged, the first {damages[0].path}; they were removed: run the "
                "same command again"
            )
    return target


def _mean(root: Place, header: layout.Header, path: str) -> torch.Tensor:
    """The mean [D] of the hook whose activations lie at `path`."""
    spec = layout.statistics_arrays(header.spec, header.d_model)[f"stats/{path.removeprefix('acts/')}/mean"]
    return read_tensor(root, spec, 0)


def _errors(root: Place, header: layout.Header, wanted: layout.Header) -> dict[str, float]:
    """What int8 loses at each hook: E||x - decoded||^2 / E||x - mean||^2 over evenly spaced chunks."""
    lossy = layout.arrays(wanted.spec, wanted.d_model)
    errors: dict[str, float] = {}
    for path, spec in layout.arrays(header.spec, header.d_model).items():
        if lossy[path].codec == "int8":
            mean, lost, spread = _mean(root, header, path), 0.0, 0.0
            for index in range(0, spec.count, -(-spec.count // MOST_CHUNKS)):
                values = read_tensor(root, spec, index)
                data = encode_chunk(lossy[path], values, mean)
                decoded = to_tensor(decode_chunk(root, spec.chunk_file(root, index), data, lossy[path]), spec, index)
                lost += float((values - decoded).double().square().sum())
                spread += float((values.double() - mean).square().sum())
            errors[path.removeprefix("acts/")] = lost / spread
    return errors


def _copy_chunks(
    root: Place,
    target: Place,
    header: layout.Header,
    wanted: layout.Header,
    damaged: set[tuple[str, int]],
    progress: Progress,
) -> None:
    """Copy the chunks that are missing or damaged, into another codec where `wanted` has one."""
    checks = read_checks(root, header)
    pairs = list(zip(layout.every_array(header), layout.every_array(wanted), strict=True))
    means, missing = {}, []
    for spec, other in pairs:
        layout.check_array(root, spec)
        if other.codec == "int8" and spec != other:
            means[spec.path] = _mean(root, header, spec.path)
    for spec, other in pairs:
        there = other.lengths(target)
        whole = there == spec.lengths(root) if spec == other else there >= 0
        whole &= [(other.path, index) not in damaged for index in range(other.count)]
        missing.append((spec, other, np.flatnonzero(~whole)))

    def transfer(chunk: tuple[ArraySpec, ArraySpec, int]) -> None:
        spec, other, index = chunk
        if spec == other:
            data, _ = fetch_chunk(root, spec, index, checks.get(spec.path))
        else:
            values = read_tensor(root, spec, index, checks.get(spec.path))
            data = encode_chunk(other, values, means.get(spec.path))
        publish(other.chunk_file(target, index), data)

    chunks = ((spec, other, int(index)) for spec, other, indices in missing for index in indices)
    total = sum(spec.count for spec, _ in pairs)
    done_before = total - sum(len(indices) for *_, indices in missing)
    for done, _ in enumerate(map_parallel(transfer, chunks), done_before + 1):
        progress(Step(task="copying", done=done, total=total, unit="chunks"))
