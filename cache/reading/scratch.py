"""Chunks (and parts of the suites' stores) that can't be mapped where they lie (remote or compact), fetched and
decoded once into `$HSAE_HOME/scratch`.

A scratch file is named by a digest of what it holds (store, array, chunk, checksum), so that a stale one is never
asked for, and ends with a crc32c over its numbers and its name, so that a damaged or foreign one is made again. Many
processes may share the folder: a file lock lets one of them fetch a chunk while the others wait for it; files appear
by rename and may vanish at any time (whoever has one mapped keeps its pages). `HSAE_SCRATCH_GIB` (default 64) bounds
the folder; the least recently used files go first.
"""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

import google_crc32c
from filelock import FileLock

from hsae.cache.errors import UserError
from hsae.cache.files import JUST_MADE, PARTIAL, crc32c, home, lock, sweep_files
from hsae.cache.format.arrays import CRC_BYTES
from hsae.cache.storage.paths import IN_FLIGHT

DEFAULT_GIB = 64.0
SPARE_BYTES = 1 << 30  # of the disk, left to others
EVICTED_TO = 0.9  # share of the budget that an eviction leaves, so that it is rare
AHEAD = 600.0  # seconds that a file's time may lie ahead of the clock
OURS = re.compile(rf"[0-9a-f]{{32}}({re.escape(PARTIAL)})?")


class Scratch:
    """One folder of decoded chunks with a byte budget."""

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder, self.budget = folder, budget
        self._used: int | None = None  # bytes seen at the last look, and written by this process since
        self._lock = threading.Lock()

    def fetch(self, key: str, size: int, make: Callable[[], bytes]) -> Path:
        """The file of the chunk known as `key`, made if it isn't there. Raises UserError if it can't be written."""
        path = self.folder / hashlib.sha256(key.encode()).hexdigest()[:32]
        try:
            if self._touch(path, size):
                return path
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / f"{path.name[:2]}.lock"):
                if not self._touch(path, size):  # no other process or thread made it meanwhile
                    self._write(path, make())
        except OSError as error:
            name = error.filename  # utime gives none
            ours = name is None or Path(os.fsdecode(name)).is_relative_to(self.folder.parent)
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and ours:
                raise UserError(
                    f"nothing can be written in the scratch folder {self.folder} ({error.strerror}); "
                    "set HSAE_HOME to a folder of your own"
                ) from None
            raise
        return path

    def _write(self, path: Path, numbers: bytes) -> None:
        self._make_room(len(numbers) + CRC_BYTES)
        partial = path.with_name(path.name + PARTIAL)
        try:
            with partial.open("wb") as file:  # not synced, unlike what must last
                lock(file)
                file.write(numbers)
                file.write(named_checksum(crc32c(numbers), path).to_bytes(CRC_BYTES, "little"))
                file.flush()
                partial.replace(path)
        except OSError as error:
            raise OSError(error.errno, error.strerror, error.filename or str(path)) from None
        finally:
            partial.unlink(missing_ok=True)

    @staticmethod
    def _touch(path: Path, size: int) -> bool:
        """Whether the file is there and whole; it counts as used now."""
        try:
            if path.stat().st_size != size + CRC_BYTES:
                return False
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def _make_room(self, size: int) -> None:
        with self._lock:
            if self._used is None or self._used + size > self._limit(self._used):
                self._evict(size)
            self._used = (self._used or 0) + size

    def _limit(self, used: int) -> int:
        return min(self.budget, used + shutil.disk_usage(self.folder).free - SPARE_BYTES)

    def _evict(self, size: int) -> None:
        """Look at what is there, whoever wrote it, and delete the least recently used files if it is too much."""
        with FileLock(self.folder / "evict.lock"):
            files, now = [], time.time()
            self._used = 0
            sweep_files(self.folder.glob(f"*{PARTIAL}"), JUST_MADE)
            for entry in os.scandir(self.folder):
                if OURS.fullmatch(entry.name):
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        self._used += status.st_size
                        if not entry.name.endswith(PARTIAL):
                            ahead = status.st_mtime > now + AHEAD  # set by a wrong clock: as if never used
                            files.append((0 if ahead else status.st_mtime_ns, status.st_size, entry.path))
            limit = self._limit(self._used)
            if self._used + size <= limit:
                return
            for _, length, name in sorted(files):
                if self._used + size <= EVICTED_TO * limit:
                    break
                Path(name).unlink(missing_ok=True)
                self._used -= length


def named_checksum(checksum: int, path: Path) -> int:
    """The crc32c of a scratch file's numbers followed by its name."""
    return int(google_crc32c.extend(checksum, path.name.encode()))


def scratch() -> Scratch:
    """The scratch folder of this user, bounded by `HSAE_SCRATCH_GIB`. Raises UserError for no number."""
    text = os.environ.get("HSAE_SCRATCH_GIB") or str(DEFAULT_GIB)
    try:
        gib = float(text)
    except ValueError:
        gib = -1.0
    if not 0 < gib < 1 << 30:
        raise UserError(f"HSAE_SCRATCH_GIB is {text!r}; give the GiB that decoded chunks may take, for example 64")
    return Scratch(home() / "scratch", int(gib * 2**30))


class Prefetcher:
    """Does jobs in order, several at once, until the next order replaces them; their errors are left out."""

    def __init__(self, at_once: int = IN_FLIGHT) -> None:
        self.at_once = at_once
        self._jobs: deque[Callable[[], object]] = deque()
        self._lock = threading.Lock()
        self._threads = 0

    def order(self, jobs: Iterable[Callable[[], object]]) -> None:
        """Do these next."""
        with self._lock:
            self._jobs = deque(jobs)
            wanted = min(self.at_once, len(self._jobs)) - self._threads
            self._threads += max(0, wanted)
        for _ in range(wanted):
            threading.Thread(target=self._work, name="hsae-prefetch", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._threads -= 1
                    return
                job = self._jobs.popleft()
            try:
                job()
            except Exception:
                continue
