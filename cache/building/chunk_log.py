"""What a build has written so far: the checksum of each chunk, beside the chunks, until the store is complete.

The crc32c that ends a chunk says that the chunk is whole, not that it is this store's or lies in its own place. So
whoever writes chunks of an unfinished store writes down their checksums too, after them, in files `written/<random
name>` of its own: sealed JSON, for each array [chunk, checksum] pairs. A chunk that is not written down, or not as it
is, is made again: the same bytes. The folder goes when the store is complete.
"""

import contextlib
import json
import secrets
import threading
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hsae.cache.files import check_seal, parse_json, sealed
from hsae.cache.format.arrays import ArraySpec
from hsae.cache.storage.paths import Place, map_parallel, publish, sizes

FOLDER = "written"
PER_FILE = 1024  # chunks in one file, which is written again as it grows
EVERY = 1.0  # seconds at least between two such times: what a kill can cost


class Written:
    """Checksums of an unfinished store's chunks, as far as anyone has written them down for the same `key`."""

    def __init__(self, target: Place, key: str, specs: Iterable[ArraySpec]) -> None:
        self.folder, self.key = target / FOLDER, key
        self._checksums = {spec.path: np.full(spec.count, -1, np.int64) for spec in specs}
        self._loaded: dict[str, int] = {}
        self._lock = threading.Lock()
        self._begin()
        self._is_dirty, self._flushed_at = False, time.monotonic()

    def _begin(self) -> None:
        self._name = secrets.token_hex(8)
        self._chunks: dict[str, list[list[int]]] = {}

    def __getitem__(self, path: str) -> NDArray[np.int64]:
        """The checksum of each chunk of an array, -1 where none is written down."""
        return self._checksums[path]

    def load(self) -> None:
        """Take in what workers have written down since the last time. A harmed file counts for nothing."""
        with self._lock:
            new: dict[str, int] = {}
            with contextlib.suppress(FileNotFoundError):  # the store was finished meanwhile
                new = {name: size for name, size in sizes(self.folder).items() if self._loaded.get(name) != size}
            for name, data in zip(new, map_parallel(self._read, new), strict=True):
                with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, OverflowError, IndexError):
                    self._load_file(parse_json(data))
                    self._loaded[name] = new[name]

    def _read(self, name: str) -> bytes:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return (self.folder / name).read_bytes()
        return b""

    def _load_file(self, content: dict[str, Any]) -> None:
        check_seal(content)
        if content["store"] != self.key:
            return
        for path, pairs in content["chunks"].items():
            if pairs and path in self._checksums:
                indices, checksums = np.array(pairs, np.int64).T
                self._checksums[path][indices] = checksums

    def add(self, path: str, index: int, checksum: int) -> None:
        """Write down the checksum of a chunk that is there, now or with the next ones."""
        with self._lock:
            self._checksums[path][index] = checksum
            self._chunks.setdefault(path, []).append([index, checksum])
            self._is_dirty = True
            if time.monotonic() - self._flushed_at >= EVERY:
                self._write()

    def flush(self) -> None:
        """Write down all that was added."""
        with self._lock:
            if self._is_dirty:
                self._write()

    def _write(self) -> None:
        content = json.dumps(sealed({"store": self.key, "chunks": self._chunks})).encode()
        with contextlib.suppress(FileNotFoundError):  # another worker has just finished the store
            publish(self.folder / self._name, content)
        self._loaded[self._name] = len(content)
        self._is_dirty, self._flushed_at = False, time.monotonic()
        if sum(map(len, self._chunks.values())) >= PER_FILE:
            self._begin()
