"""Where a store lies: a local path, or a URL that fsspec reaches. The one seam that tells them apart, and (with `web`) the only user of fsspec.

A `Place` is a `pathlib.Path` or a `RemotePath`, which has the few methods of it that stores need. An object is published by one PUT of
s3fs (multipart above 100 MB, which appears at its end as well), a file by rename: neither is ever seen in part. Requests are tried
again, with growing pauses, while the trouble may pass: 5xx, throttling, timeouts, resets, short reads. Endpoint, profile, region and
credentials of `s3://` come from the usual AWS places (AWS_ENDPOINT_URL, AWS_PROFILE, ~/.aws); FSSPEC_S3='{"anon": true}' and the
like configure any driver. Stores at `http://` and `https://` URLs can only be read.

No reply is read further than it can be right: a chunk's by its length, other files and listings by a fixed limit. Passwords and
signatures in URLs stand in no message.
"""

import contextlib
import errno
import logging
import os
import random
import re
import secrets
import shutil
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from filelock import FileLock, Timeout

from hsae.cache.errors import StoreError, UserError
from hsae.cache.files import PARTIAL, write_bytes_atomically

PATIENCE = 300.0  # seconds for which one request is tried again
LONGEST_PAUSE = 20.0
SILENCE, BETWEEN = 10.0, 60.0  # seconds of trying again before that is logged, and from one such line to the next
IN_FLIGHT = 16  # requests at once
MOST_BYTES = 1 << 28  # of a listing, or of a file whose length is not known before
MOST_LISTED, DEEPEST = 1 << 22, 16  # names in one listing, folders in folders
TRIES = 4  # times that what fails its checksum is fetched
LISTED_AT_ONCE = 10_000  # most numbers, nearly, in one part of a long listing
SECRET = re.compile("pass|secret|token|key|cred|sas|connection_string", re.IGNORECASE)  # names of drivers' options
LASTING = {errno.EINVAL, errno.ENOSYS, errno.EREMCHG}  # what s3fs makes of bad requests and redirects
LASTING_NAMES = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "ParamValidationError",
    "InvalidURL",
    "ClientConnectorCertificateError",
    "ClientConnectorSSLError",
}
MOST_SKEW = 300.0  # seconds that S3 and this machine's clock may differ before that is told as the reason of a refusal
LATER = {408, 425, 429}  # statuses below 500 of a web server that pass
DRIVERS = {"botocore", "aiobotocore", "aiohttp", "s3fs"}
WEB, S3 = {"http", "https"}, {"s3", "s3a"}
EXTRAS = {"s3": "hsae[s3]", "s3a": "hsae[s3]", "http": "hsae[http]", "https": "hsae[http]"}
LOG = logging.getLogger("hsae")
ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class RemoteError(OSError):
    """A remote store can't be reached, or refuses."""


class TooLongError(RemoteError):
    """A reply has more bytes than it can have."""

    @classmethod
    def than(cls, most: int) -> "TooLongError":
        """One of a reply of more than `most` bytes."""
        return cls(f"more than {most:,} bytes come, which it can't have")


def redacted(text: str) -> str:
    """A text without the passwords and the query strings of the URLs in it."""
    return re.sub(r"(://[^\s?]*\?)[^\s'\")]+", r"\1***", re.sub(r"(://[^\s:@]*):\S*@", r"\1:***@", text))


@dataclass(frozen=True, repr=False)
class RemotePath:
    """An object, or all objects below it, on a remote store."""

    url: str

    @cached_property
    def _driver(self) -> tuple[Any, str]:
        """The file system and this object's path on it."""
        import fsspec

        protocol, options = self.protocol, {"use_listings_cache": False}
        try:
            if self.read_only:
                from hsae.cache.storage.http import file_system

                return file_system(), self.url
            if self.is_s3:
                from hsae.cache.storage import s3

                options |= s3.options(2 * IN_FLIGHT)
            filesystem, path = fsspec.core.url_to_fs(self.url, **options)
        except ImportError:
            extra = f"pip install '{EXTRAS[protocol]}'" if protocol in EXTRAS else "pip install its fsspec driver"
            raise StoreError(f"{self}: nothing installed reads {protocol}:// URLs; {extra}") from None
        except ValueError as error:
            raise StoreError(
                f"{self}: {self.hidden(str(error))}; use a folder, or a URL such as s3://bucket/prefix"
            ) from None
        if self.is_s3 and filesystem.session is None:
            filesystem.session = s3.session(filesystem.kwargs)
        return filesystem, path

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self.url}/{name}")

    def __str__(self) -> str:
        return redacted(self.url)

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def hidden(self, text: str) -> str:
        """A driver's text without passwords, those that it was given in other ways than by the URL among them."""
        with contextlib.suppress(ValueError):
            if password := urlsplit(self.url).password:
                text = text.replace(password, "***").replace(unquote(password), "***")
        options = self.__dict__["_driver"][0].storage_options if "_driver" in self.__dict__ else {}
        for name, value in options.items():
            if isinstance(value, str) and value and SECRET.search(name):
                text = text.replace(value, "***")
        return redacted(text)

    @property
    def protocol(self) -> str:
        """What stands before ://."""
        return self.url.partition("://")[0]

    @property
    def read_only(self) -> bool:
        """Whether nothing can be written there."""
        return self.protocol in WEB

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rsplit("/", 1)[-1]

    def read_bytes(self, most: int = MOST_BYTES) -> bytes:
        """The whole object. Raises FileNotFoundError if there is none, TooLongError if more bytes than `most` come."""

        def read(filesystem: Any, path: str) -> bytes:
            if self.read_only:
                return filesystem.cat_file(path, most=most)  # type: ignore[no-any-return]
            if self.is_s3:
                from hsae.cache.storage import s3

                return s3.cat(filesystem, path, most)
            data = filesystem.cat_file(path, end=most + 1)
            if len(data) > most:
                raise TooLongError.than(most)
            return bytes(data)

        return self._patiently(read)

    def read_text(self) -> str:
        """The whole object as UTF-8."""
        return self.read_bytes().decode()

    def read_tail(self, count: int) -> bytes:
        """The last `count` bytes of the object. Raises FileNotFoundError if there is none."""
        return bytes(self._patiently(lambda filesystem, path: filesystem.cat_file(path, start=-count)))

    def write_bytes(self, data: bytes) -> None:
        """Make or replace the object; readers see the old one or all of the new one."""
        self._patiently(lambda filesystem, path: filesystem.pipe_file(path, data))

    def create_bytes(self, data: bytes) -> bool:
        """Make the object unless there is one; whether it was made. Where a store can't promise that, a later one wins."""

        def request(filesystem: Any, path: str) -> bool:
            try:
                filesystem.pipe_file(path, data, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno != errno.ENOSYS:
                    raise
                filesystem.pipe_file(path, data)
            return True

        return self._patiently(request)

    def status(self) -> dict[str, Any]:
        """What the driver says of the object: `size`, and often `ETag` or `mtime`. Raises FileNotFoundError if there is none."""
        return dict(self._patiently(lambda filesystem, path: filesystem.info(path)))

    def is_file(self) -> bool:
        """Whether there is such an object."""
        try:
            return self.status().get("type") == "file"
        except FileNotFoundError:
            return False

    def is_dir(self) -> bool:
        """Whether there is an object below."""
        try:
            return bool(self._patiently(lambda filesystem, path: filesystem.ls(path, detail=False)))
        except (FileNotFoundError, NotADirectoryError):
            return False

    def children(self) -> list["RemotePath"]:
        """What lies directly below, sorted."""
        names = self._patiently(lambda filesystem, path: filesystem.ls(path, detail=False))
        return [self / name for name in sorted({str(name).rstrip("/").rsplit("/", 1)[-1] for name in names})]

    @property
    def is_s3(self) -> bool:
        """Whether it lies on S3, of which parts of a listing can be had."""
        return self.protocol in S3

    def sizes(self, begin: str = "") -> dict[str, int]:
        """Bytes of every object below, by its path from here; on S3 of those whose path begins so.

        s3fs's own `find` takes a time that grows with the square of the number of chunks, each of which has a folder of its own.
        """
        if self.is_s3:
            bucket, key, _ = self._driver[0].split_path(self._driver[1])
            found: dict[str, int] = {}
            asked = {"Bucket": bucket, "Prefix": f"{key}/{begin}", **self._driver[0].req_kw}
            while True:
                page = self._patiently(lambda filesystem, _: filesystem.call_s3("list_objects_v2", **asked))
                found.update({item["Key"][len(key) + 1 :]: int(item["Size"]) for item in page.get("Contents", ())})
                if len(found) > MOST_LISTED or page.get("NextContinuationToken") == asked.get("ContinuationToken", ""):
                    raise RemoteError(f"{self} is refused (the server lists objects without end)")
                if not page.get("IsTruncated"):
                    return found
                asked["ContinuationToken"] = page["NextContinuationToken"]

        if self.protocol in WEB:
            return self._walked()

        def below(filesystem: Any, path: str) -> dict[str, int]:
            start = len(path.rstrip("/")) + 1
            return {name[start:]: int(told["size"]) for name, told in filesystem.find(path, detail=True).items()}

        try:
            return dict(self._patiently(below))
        except FileNotFoundError:
            return {}

    def _walked(self) -> dict[str, int]:
        """The same where only folders are listed, and without sizes."""

        def listed(folder: str) -> list[str]:
            try:
                found = (self / folder)._patiently(lambda filesystem, path: filesystem.ls(path, detail=False))
            except FileNotFoundError:
                return []
            return [folder + str(name)[len(f"{self.url}/{folder}") :] for name in found]

        files: list[str] = []
        folders, seen = [""], 0
        while folders:
            names = [name for inner in many(listed, folders) for name in inner]
            seen += len(names)
            if seen > MOST_LISTED or folders[0].count("/") > DEEPEST:
                raise RemoteError(f"{self} is refused (the server lists folders without end)")
            folders = [name for name in names if name.endswith("/")]
            files += [name for name in names if not name.endswith("/")]
        lengths = many(lambda name: int((self / name).status()["size"]), files)
        return dict(zip(files, lengths, strict=True))

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object."""
        try:
            self._patiently(lambda filesystem, path: filesystem.rm_file(path))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def remove(self) -> None:
        """Delete every object below, many with one request where the driver can."""
        with contextlib.suppress(FileNotFoundError):
            self._patiently(lambda filesystem, path: filesystem.rm(path, recursive=True))

    def _patiently(self, request: Callable[[Any, str], ResultT]) -> ResultT:
        """Do it, and again while what goes wrong may pass. Raises RemoteError when patience ends or there is no point."""
        began, pause = time.monotonic(), 0.1
        while True:
            try:
                return request(*self._driver)
            except FileNotFoundError as error:
                if code_of(error) == "NoSuchBucket":
                    raise StoreError(f"{self}: there is no such bucket; make it, or correct the URL") from None
                raise
            except (NotADirectoryError, UserError):
                raise
            except TooLongError as error:
                raise TooLongError(f"{self} is refused ({error})") from None
            except Exception as error:
                detail = self.hidden(in_a_line(error))
                if not passes(error):
                    raise RemoteError(f"{self} is refused ({detail})") from None
                waited = time.monotonic() - began
                if waited + pause > PATIENCE:
                    raise RemoteError(f"{self} can't be reached, tried for {PATIENCE:.0f} s ({detail})") from None
                if waited > SILENCE:
                    _log_waiting(f"{self} can't be reached ({detail}); trying again for up to {PATIENCE:.0f} s")
            time.sleep(pause * random.uniform(0.5, 1))  # many readers must not come back in step
            pause = min(pause * 2, LONGEST_PAUSE)


def again(
    source: "Place", read: Callable[[], ResultT], harmed: type[Exception] | tuple[type[Exception], ...]
) -> ResultT:
    """`read()`; from a remote place a few times more while it raises `harmed`, for a body may be cut, flipped or another's on its way."""
    for number in range(1, TRIES if isinstance(source, RemotePath) else 1):
        try:
            return read()
        except harmed as error:
            _log_waiting(f"{redacted(str(error))} Fetching it again.")
            time.sleep(0.1 * number)
    return read()


async def whole(read: Callable[[int], Awaitable[bytes]], most: int) -> bytes:
    """All that `read` gives, piece by piece. Raises TooLongError if that is more than `most` bytes."""
    pieces, length = [], 0
    while piece := await read(1 << 20):
        pieces.append(piece)
        length += len(piece)
        if length > most:
            raise TooLongError.than(most)
    return b"".join(pieces)


_logged_at = -BETWEEN


def _log_waiting(line: str) -> None:
    """Log it, unless such a line was logged a moment ago: many requests wait together."""
    global _logged_at
    if (now := time.monotonic()) - _logged_at >= BETWEEN:
        _logged_at = now
        LOG.warning(line)


def code_of(error: Exception) -> str:
    """What S3 calls an error; empty if it is not S3's."""
    answered = getattr(error.__cause__, "response", None) or {}  # botocore's
    return str(answered.get("Error", {}).get("Code", ""))


def in_a_line(error: Exception) -> str:
    """An error in one line, with what to do about it where that is known."""
    if type(error).__name__ == "ClientResponseError":
        from hsae.cache.storage.http import refusal

        return refusal(error)  # type: ignore[arg-type]
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    answered = getattr(error.__cause__, "response", None) or {}  # botocore's
    date = answered.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    with contextlib.suppress(TypeError, ValueError):
        behind = parsedate_to_datetime(date).timestamp() - time.time()
        if abs(behind) > MOST_SKEW:  # also where a HEAD, which has no words, was refused
            return f"{line}: this machine's clock is {abs(behind) / 60:.0f} minutes {'behind' if behind > 0 else 'ahead of'} the server's; set it"
    return line


def passes(error: Exception) -> bool:
    """Whether trying again later may help."""
    if isinstance(error, PermissionError) or type(error).__name__ in LASTING_NAMES:
        return False
    if isinstance(status := getattr(error, "status", None), int):
        return status >= 500 or status in LATER
    if isinstance(error, OSError | TimeoutError | EOFError):
        return error.errno not in LASTING if isinstance(error, OSError) else True
    return type(error).__module__.split(".")[0] in DRIVERS


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
            f"{redacted(str(url))}: not a place for stores; use a folder, or a URL such as s3://bucket/prefix"
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
        raise StoreError(
            f"{protocol}://…: write a store's address as {protocol}://host:port/folder, and put the token into HSAE_TOKEN"
        )


def publish(target: Place, data: bytes) -> None:
    """Make or replace a file or object with these bytes; it is never seen in part, and lasts once this returns."""
    if isinstance(target, RemotePath):
        return target.write_bytes(data)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomically(target, data)


def sizes(target: Place) -> dict[str, int]:
    """Bytes of every file or object below, by its path from there; partial files left out."""
    if isinstance(target, RemotePath):
        return target.sizes()
    files = (path for path in target.rglob("*") if not path.name.endswith(PARTIAL) and path.is_file())
    return {path.relative_to(target).as_posix(): path.stat().st_size for path in files}


def numbered(target: RemotePath, count: int) -> Iterator[tuple[str, int]]:
    """(path from there, bytes) of every object below whose path begins with a number less than `count`, perhaps of others too.

    On S3 a long listing is taken in parts, the numbers that begin with the same digits, several at once: a million objects would
    take a thousand requests one after the other.
    """
    digits = len(str(count - 1)) - len(str(LISTED_AT_ONCE)) + 1
    if digits < 1 or not target.is_s3:
        yield from target.sizes().items()
        return
    least = 10 ** (digits - 1)
    begins = [*(f"{number}/" for number in range(least)), *(str(number) for number in range(least, 10 * least))]
    for part in many(target.sizes, begins):
        yield from part.items()


def size_of(target: Place) -> int | None:
    """Bytes of a file or object; None if there is none."""
    try:
        return int(target.status()["size"]) if isinstance(target, RemotePath) else target.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


def children(target: Place) -> list[Place]:
    """What lies directly in a folder, sorted. Raises FileNotFoundError if there is no such folder."""
    if isinstance(target, RemotePath):
        return list(target.children())
    return list[Place](sorted(target.iterdir()))


def exists(target: Place) -> bool:
    """Whether a store was begun there."""
    return (target / "zarr.json").is_file() if isinstance(target, RemotePath) else target.is_dir()


def locked(target: Place, suffix: str = "") -> AbstractContextManager[object]:
    """The lock on a local store, taken; none on a remote one, whose builders may do each other's work twice but no harm.

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
    """Write something there, and delete it. Raises StoreError or OSError if that can't be done, so before anything is computed.

    Without a `trial` nothing is written: a folder is asked for its mode, an address for what kind it is of.
    """
    _refuse_read_only(folder)
    try:
        if trial:
            file = folder / f".{secrets.token_hex(4)}{PARTIAL}"
            publish(file, b"")
            file.unlink(missing_ok=True)
        elif isinstance(folder, Path):
            there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
            if not there.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            if not os.access(there, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except RemoteError:
        raise
    except OSError as error:
        raise StoreError(
            f"nothing can be written in {folder} ({error.strerror or error}); use another folder"
        ) from None


def _refuse_read_only(target: Place) -> None:
    """Raise StoreError for an address where nothing can be written whatever the server says."""
    if isinstance(target, RemotePath) and target.read_only:
        raise StoreError(f"{target}: stores at {target.protocol}:// can only be read; write where they lie")


def remove(target: Place) -> None:
    """Delete everything below."""
    if isinstance(target, RemotePath):
        target.remove()
    else:
        shutil.rmtree(target)


def many(work: Callable[[ItemT], ResultT], items: Iterable[ItemT], at_once: int = IN_FLIGHT) -> Iterator[ResultT]:
    """work(item) for each, in order, with up to `at_once` under way; no more than that many results wait."""
    with ThreadPoolExecutor(at_once, thread_name_prefix="hsae-request") as pool:
        under_way = []
        for item in items:
            under_way.append(pool.submit(work, item))
            if len(under_way) >= at_once:
                yield under_way.pop(0).result()
        for future in under_way:
            yield future.result()
