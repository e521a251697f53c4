"""Where a store lies: a local path, or a URL that fsspec reaches. The one seam that tells them apart.

A `Place` is a `pathlib.Path` or a `RemotePath`, which has the few methods of it that stores need. A file is published
by rename, an object by one request: neither is ever seen in part.
"""

import contextlib
import errno
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from hsae.cache.errors import RemoteError, StoreError
from hsae.cache.files import PARTIAL, write_bytes_atomically
from hsae.cache.storage import retry
from hsae.cache.storage.remote import WEB, RemotePath

IN_FLIGHT = 16  # requests at once
LOCAL_AT_ONCE = 3  # files of this machine that are read or written at once; one may wait for a GPU
LISTED_AT_ONCE = 10_000  # most numbers, nearly, in one part of a long listing
ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

Place = Path | RemotePath


def place(url: str | Place) -> Place:
    """A folder or URL as a Place. Raises StoreError for a URL that can't be a store's."""
    if isinstance(url, RemotePath):
        return url
    protocol, separator, rest = str(url).partition("://")
    if not separator:
        try:
            return Path(url).expanduser()
        except RuntimeError:
            raise StoreError(f"{url}: there is no such user, so no such folder") from None
    if protocol in ("file", "local"):
        return Path(rest)
    if "::" in protocol or not rest.strip("/"):
        raise StoreError(
            f"{retry.redact(str(url))}: not a place for stores; use a folder, or a URL such as s3://bucket/prefix"
        )
    if protocol in WEB:
        _check_web_address(protocol, rest)
    return RemotePath(f"{protocol}://{rest.rstrip('/')}")


def _check_web_address(protocol: str, rest: str) -> None:
    """Refuse an address with more in it than host, port and path, without showing what may be secret."""
    try:
        parts = urlsplit(f"{protocol}://{rest}")
        plain = parts.hostname and parts.port != 0 and not (parts.username or parts.password or parts.query)
    except ValueError:
        plain = None
    if not plain or "@" in parts.netloc or set("?#") & set(rest):
        wanted = f"{protocol}://host:port/folder"
        raise StoreError(f"{protocol}://…: write a store's address as {wanted}, and put the token into HSAE_TOKEN")


def at_once(target: Place) -> int:
    """How many files or objects to read or write at once there."""
    return IN_FLIGHT if isinstance(target, RemotePath) else LOCAL_AT_ONCE


def read_again(
    source: Place, read: Callable[[], ResultT], damaged: type[Exception] | tuple[type[Exception], ...]
) -> ResultT:
    """`read()`; from a remote place a few times more while it raises `damaged`: a body may be cut on its way."""
    for number in range(1, retry.TRIES if isinstance(source, RemotePath) else 1):
        try:
            return read()
        except damaged as error:
            retry.log_waiting(f"{retry.redact(str(error))} Fetching it again.")
            time.sleep(retry.FIRST_PAUSE * number)
    return read()


def read_tail(source: Place, count: int) -> bytes:
    """The last `count` bytes of a file or object. Raises FileNotFoundError if there is none."""
    if isinstance(source, RemotePath):
        return bytes(source.request(lambda filesystem, path: filesystem.cat_file(path, start=-count)))
    with source.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - count))
        return file.read(count)


def publish(target: Place, data: bytes, *, replace: bool = True) -> None:
    """Make or replace a file or object with these bytes; it is never seen in part, and lasts once this returns.

    Without `replace` an object that another builder was faster to make stays; a file has one builder, see `locked`.
    """
    if isinstance(target, RemotePath):
        return target.write_bytes(data) if replace else target.create_bytes(data)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomically(target, data)


def sizes(target: Place) -> dict[str, int]:
    """Bytes of every file or object below, by its path from there; partial files left out."""
    if isinstance(target, RemotePath):
        return target.sizes()
    files = (path for path in target.rglob("*") if not path.name.endswith(PARTIAL) and path.is_file())
    return {path.relative_to(target).as_posix(): path.stat().st_size for path in files}


def numbered_sizes(target: RemotePath, count: int) -> Iterator[tuple[str, int]]:
    """(path from there, bytes) of every object below whose path begins with a number less than `count`, perhaps of
    others too.

    On S3 a long listing is taken in parts, the numbers that begin with the same digits, several at once: a million
    objects would take a thousand requests one after the other.
    """
    digits = len(str(count - 1)) - len(str(LISTED_AT_ONCE)) + 1
    if digits < 1 or not target.lists_by_prefix:
        yield from target.sizes().items()
        return
    least = 10 ** (digits - 1)
    prefixes = [*(f"{number}/" for number in range(least)), *(str(number) for number in range(least, 10 * least))]
    for part in map_parallel(target.sizes, prefixes):
        yield from part.items()


def size_of(target: Place) -> int | None:
    """Bytes of a file or object; None if there is none."""
    try:
        return int(target.status()["size"]) if isinstance(target, RemotePath) else target.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


def children(target: Place) -> list[Place]:
    """What lies directly in a folder, sorted. Raises FileNotFoundError if there is no such folder."""
    inner: Iterable[Place] = target.iterdir()
    return sorted(inner, key=lambda child: child.name)


def exists(target: Place) -> bool:
    """Whether a store was begun there."""
    return (target / "zarr.json").is_file() if isinstance(target, RemotePath) else target.is_dir()


def locked(target: Place, suffix: str = "") -> AbstractContextManager[object]:
    """The lock on a local store, taken; none on a remote one, whose builders may do each other's work twice but no
    harm.

    Raises StoreError if another process builds or mends it, or if nothing can be written there.
    """
    if isinstance(target, RemotePath):
        _refuse_read_only(target)
        return contextlib.nullcontext()
    try:
        return FileLock(target.with_name(f".{target.name}{suffix}.lock")).acquire(timeout=0)
    except Timeout:
        raise StoreError(f"another process is building {target}; wait for it, or stop it") from None
    except OSError as error:
        raise StoreError(f"nothing can be written in {target.parent} ({error.strerror}); use another folder") from None


def check_writable(folder: Place, *, trial: bool = True) -> None:
    """Write something there, and delete it. Raises StoreError or OSError if that can't be done, so before anything is
    computed.

    Without a `trial` nothing is written: a folder is asked for its mode, an address for what kind it is of.
    """
    _refuse_read_only(folder)
    try:
        if trial:
            file = folder / f".{secrets.token_hex(4)}{PARTIAL}"
            publish(file, b"")
            file.unlink(missing_ok=True)
        elif isinstance(folder, Path):
            there = existing_folder(folder)
            if not there.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            if not os.access(there, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except RemoteError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise StoreError(f"nothing can be written in {folder} ({reason}); use another folder") from None


def existing_folder(path: Path) -> Path:
    """The path itself or the nearest folder above it that is there."""
    return next(each for each in (path, *path.absolute().parents) if each.exists())


def _refuse_read_only(target: Place) -> None:
    """Raise StoreError for an address where nothing can be written whatever the server says."""
    if isinstance(target, RemotePath) and target.read_only:
        raise StoreError(f"{target}: stores at {target.protocol}:// can only be read; write where they lie")


def remove(target: Place, *, ignore_errors: bool = False) -> None:
    """Delete everything below, of a remote place with one request for many objects where the driver can."""
    if isinstance(target, Path):
        return shutil.rmtree(target, ignore_errors=ignore_errors)
    with contextlib.suppress(FileNotFoundError):
        target.request(lambda filesystem, path: filesystem.rm(path, recursive=True))


def map_parallel(
    work: Callable[[ItemT], ResultT], items: Iterable[ItemT], at_once: int = IN_FLIGHT
) -> Iterator[ResultT]:
    """work(item) for each, in order, with up to `at_once` under way; no more than that many results wait."""
    with ThreadPoolExecutor(at_once, thread_name_prefix="hsae-request") as pool:
        under_way = []
        for item in items:
            under_way.append(pool.submit(work, item))
            if len(under_way) >= at_once:
                yield under_way.pop(0).result()
        for future in under_way:
            yield future.result()
