"""One array of a store: its shape, type, chunks and codec, what zarr's metadata says of it, and where its chunks
lie."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hsae.cache.config import Codec
from hsae.cache.storage.paths import Place, numbered_sizes, size_of

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8, "int32": 4, "uint32": 4}
CRC_BYTES = 4


@dataclass(frozen=True)
class ArraySpec:
    """Shape, type and chunking that an array of a store must have."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...]
    codec: Codec = "mappable"

    @property
    def count(self) -> int:
        """Number of chunks (all lie along the first axis)."""
        return -(-self.shape[0] // self.chunks[0])

    def rows(self, index: int) -> int:
        """Rows of chunk `index`, without padding."""
        return min(self.chunks[0], self.shape[0] - index * self.chunks[0])

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk's numbers."""
        return ITEM_BYTES[self.dtype] * math.prod(self.chunks)

    @property
    def metadata(self) -> dict[str, Any]:
        """The array's zarr.json, as zarr-python writes it."""
        numbers = {"name": "bytes", "configuration": {"endian": "little"}}
        blosc = {"cname": "lz4", "clevel": 5, "shuffle": "bitshuffle", "blocksize": 0}
        compressor = {"name": "blosc", "configuration": {"typesize": ITEM_BYTES[self.dtype], **blosc}}
        codecs: dict[Codec, list[dict[str, Any]]] = {
            "mappable": [numbers],
            "compact": [numbers, compressor],
            "int8": [{"name": "hsae.int8"}],
        }
        return {
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunks)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0 if "int" in self.dtype else 0.0,
            "codecs": [*codecs[self.codec], {"name": "crc32c"}],
            "attributes": {},
            "zarr_format": 3,
            "node_type": "array",
            "storage_transformers": [],
        }

    def lengths(self, root: Place) -> NDArray[np.int64]:
        """Bytes of each chunk's file or object, -1 where there is none: one listing, 8 bytes a chunk."""
        folder = root / self.path / "c"
        if isinstance(folder, Path):
            sizes = (size_of(Path(f"{folder}/{self.key(index)}")) for index in range(self.count))
            return np.fromiter((-1 if size is None else size for size in sizes), np.int64, self.count)
        lengths = np.full(self.count, -1, np.int64)
        for name, size in numbered_sizes(folder, self.count):
            index = name.partition("/")[0]
            if index.isdecimal() and int(index) < self.count and name == self.key(int(index)):
                lengths[int(index)] = size
        return lengths

    def written(self, root: Place) -> NDArray[np.bool_]:
        """For each chunk, whether it is there and, where its length is known, whole: one listing."""
        lengths = self.lengths(root)
        return lengths == self.chunk_bytes + CRC_BYTES if self.codec == "mappable" else lengths >= 0

    def is_written(self, root: Place, index: int) -> bool:
        """As `written`, for chunk `index`."""
        size = size_of(self.chunk_file(root, index))
        return size is not None and (self.codec != "mappable" or size == self.chunk_bytes + CRC_BYTES)

    def key(self, index: int) -> str:
        """Path of chunk `index` below the array's `c`."""
        return "/".join([str(index), *["0"] * (len(self.shape) - 1)])

    def chunk_file(self, root: Place, index: int) -> Place:
        """File or object of chunk `index`."""
        return root / self.path / "c" / self.key(index)
