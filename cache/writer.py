"""Writing a store: its metadata, whole chunks, and the header, through zarr; every file appears by rename.

zarr's local store writes a chunk under a partial name and renames it. The chunks of a store are never overwritten in part.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec

from hsae.cache.dtype import NUMPY_BFLOAT16
from hsae.cache.layout import ArraySpec, Header
from hsae.cache.mapped import TORCH_DTYPES

__all__ = ["TORCH_DTYPES", "create", "write_chunk", "write_header", "write_json"]


def create(target: Path, header: Header, specs: Iterable[ArraySpec]) -> None:
    """Make an empty store with all its arrays; the folder appears whole or not at all."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed; the builder holds the store's lock
    try:
        group = zarr.create_group(partial, zarr_format=3, attributes={"hsae": header.model_dump(mode="json")})
        for spec in specs:
            _create_array(group, spec)
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _create_array(group: zarr.Group, spec: ArraySpec) -> None:
    blosc = (
        (BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle", typesize=2 if spec.dtype != "float32" else 4),)
        if spec.compact
        else ()
    )
    group.create_array(
        spec.path,
        shape=spec.shape,
        chunks=spec.chunks,
        dtype=NUMPY_BFLOAT16 if spec.dtype == "bfloat16" else np.dtype(spec.dtype),
        filters=(),
        serializer=BytesCodec(endian="little"),
        compressors=(*blosc, Crc32cCodec()),
        fill_value=0,
    )


def write_chunk(target: Path, spec: ArraySpec, index: int, values: Tensor) -> None:
    """Publish chunk `index`, [rows, ...]; missing rows of the last chunk are padded with zeros."""
    padded = torch.zeros(spec.chunks, dtype=TORCH_DTYPES[spec.dtype])
    padded[: len(values)] = values
    numbers = padded.view(torch.int16).numpy().view(NUMPY_BFLOAT16) if spec.dtype == "bfloat16" else padded.numpy()
    rows = min(spec.chunks[0], spec.shape[0] - index * spec.chunks[0])
    start = index * spec.chunks[0]
    with zarr.config.set({"array.write_empty_chunks": True}):
        array = zarr.open_array(target / spec.path, mode="r+")
        array[start : start + rows] = numbers[:rows]


def write_header(target: Path, header: Header) -> None:
    """Replace the store's header."""
    zarr.open_group(target, mode="r+").attrs["hsae"] = header.model_dump(mode="json")


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file by rename."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content))
    partial.replace(path)
