"""Objects at URLs that fsspec reaches. With the backends beside it, the only user of fsspec.

A backend is a `Backend`: fsspec's driver of a protocol as it is, or a subclass in a file of its own that BACKENDS
names, for a protocol that needs more. No reply is read further than it can be right: a chunk's by its length, other
files and listings by a fixed limit. FSSPEC_S3='{"anon": true}' and the like configure any driver.
"""

import contextlib
import errno
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any, ClassVar, TypeVar
from urllib.parse import unquote, urlsplit

from hsae.cache.errors import RemoteError, StoreError, TooLongError
from hsae.cache.storage.retry import redact, retry_request

BACKENDS = {
    "s3": "hsae.cache.storage.s3:S3Backend",
    "s3a": "hsae.cache.storage.s3:S3Backend",
    "http": "hsae.cache.storage.http:WebBackend",
    "https": "hsae.cache.storage.http:WebBackend",
}
EXTRAS = {"s3": "hsae[s3]", "s3a": "hsae[s3]", "http": "hsae[http]", "https": "hsae[http]"}
WEB = {"http", "https"}  # where nothing can be written
MOST_BYTES = 1 << 28  # of a listing, or of a file whose length is not known before
MOST_LISTED = 1 << 22  # names in one listing
SECRET = re.compile("pass|secret|token|key|cred|sas|connection_string", re.IGNORECASE)  # names of drivers' options
ResultT = TypeVar("ResultT")


class Backend:
    """How the objects of a protocol are reached: by fsspec's driver for it, as it is."""

    lists_by_prefix: ClassVar[bool] = False
    """Whether a part of a listing can be had, the names that begin with the same digits."""

    def open(self, url: str) -> tuple[Any, str]:
        """The file system of a URL and the object's path on it. Raises ImportError and ValueError."""
        import fsspec

        return fsspec.core.url_to_fs(url, use_listings_cache=False)  # type: ignore[no-any-return]

    def read(self, filesystem: Any, path: str, most: int) -> bytes:
        """An object's bytes. Raises TooLongError if there are more than `most`."""
        data = bytes(filesystem.cat_file(path, end=most + 1))
        if len(data) > most:
            raise TooLongError.than(most)
        return data

    def describe(self, error: Exception) -> str:
        """An error of a request in one line, with what to do about it where that is known."""
        return f"{type(error).__name__}: {error}".splitlines()[0]

    def lacks_bucket(self, error: FileNotFoundError) -> bool:
        """Whether not the object is missing, but all that it could lie in."""
        return False

    def sizes(self, target: "RemotePath", prefix: str) -> dict[str, int]:
        """Bytes of every object below, by its path from there; if `lists_by_prefix`, of those that begin with it."""

        def find(filesystem: Any, path: str) -> dict[str, int]:
            start = len(path.rstrip("/")) + 1
            return {name[start:]: int(info["size"]) for name, info in filesystem.find(path, detail=True).items()}

        try:
            return target.request(find)
        except FileNotFoundError:
            return {}


def backend(protocol: str) -> Backend:
    """The backend of a protocol. Raises ImportError if a package of it is missing."""
    module, _, name = BACKENDS.get(protocol, f"{__name__}:Backend").partition(":")
    return getattr(import_module(module), name)()  # type: ignore[no-any-return]


@dataclass(frozen=True, repr=False)
class RemotePath:
    """An object, or all objects below it, on a remote store: the few methods of `pathlib.Path` that stores need."""

    url: str

    @cached_property
    def _backend(self) -> Backend:
        try:
            return backend(self.protocol)
        except ImportError:
            raise self._nothing_reads_it() from None

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        """The file system and this object's path on it."""
        try:
            return self._backend.open(self.url)
        except ImportError:
            raise self._nothing_reads_it() from None
        except ValueError as error:
            problem = self.hidden(str(error))
            raise StoreError(f"{self}: {problem}; use a folder, or a URL such as s3://bucket/prefix") from None

    def _nothing_reads_it(self) -> StoreError:
        extra = f"pip install '{EXTRAS[self.protocol]}'" if self.protocol in EXTRAS else "pip install its fsspec driver"
        return StoreError(f"{self}: nothing installed reads {self.protocol}:// URLs; {extra}")

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self.url}/{name}")

    def __str__(self) -> str:
        return redact(self.url)

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def hidden(self, text: str) -> str:
        """A driver's text without passwords, those that it was given in other ways than by the URL among them."""
        with contextlib.suppress(ValueError):
            if password := urlsplit(self.url).password:
                text = text.replace(password, "***").replace(unquote(password), "***")
        options = self.__dict__["_opened"][0].storage_options if "_opened" in self.__dict__ else {}
        for name, value in options.items():
            if isinstance(value, str) and value and SECRET.search(name):
                text = text.replace(value, "***")
        return redact(text)

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

    @property
    def parent(self) -> "RemotePath":
        """What it lies in."""
        return RemotePath(self.url.rpartition("/")[0])

    def with_name(self, name: str) -> "RemotePath":
        """Another object beside it."""
        return self.parent / name

    def read_bytes(self, most: int = MOST_BYTES) -> bytes:
        """The whole object. Raises FileNotFoundError if there is none, TooLongError if more bytes than `most` come."""
        return self.request(lambda filesystem, path: self._backend.read(filesystem, path, most))

    def write_bytes(self, data: bytes) -> None:
        """Make or replace the object; readers see the old one or all of the new one."""
        self.request(lambda filesystem, path: filesystem.pipe_file(path, data))

    def create_bytes(self, data: bytes) -> None:
        """Make the object unless there is one. Where a store can't promise that, a later one wins."""

        def create(filesystem: Any, path: str) -> None:
            try:
                filesystem.pipe_file(path, data, mode="create")
            except FileExistsError:
                pass
            except OSError as error:
                if error.errno != errno.ENOSYS:
                    raise
                filesystem.pipe_file(path, data)

        self.request(create)

    def status(self) -> dict[str, Any]:
        """What the driver says of the object: `size`, often `ETag` or `mtime`. Raises FileNotFoundError without one."""
        return dict(self.request(lambda filesystem, path: filesystem.info(path)))

    def is_file(self) -> bool:
        """Whether there is such an object."""
        try:
            return self.status().get("type") == "file"
        except FileNotFoundError:
            return False

    def is_dir(self) -> bool:
        """Whether there is an object below."""
        try:
            return bool(self.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return False

    def iterdir(self) -> list["RemotePath"]:
        """What lies directly below."""
        names = self.request(lambda filesystem, path: filesystem.ls(path, detail=False))
        return [self / name for name in {str(name).rstrip("/").rsplit("/", 1)[-1] for name in names}]

    @property
    def lists_by_prefix(self) -> bool:
        """Whether a part of a long listing can be had."""
        return self._backend.lists_by_prefix

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Bytes of every object below, by its path from here; if `lists_by_prefix`, of those that begin with it."""
        return self._backend.sizes(self, prefix)

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object."""
        try:
            self.request(lambda filesystem, path: filesystem.rm_file(path))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def request(self, do: Callable[[Any, str], ResultT]) -> ResultT:
        """`do(file system, path)`, see `retry_request`. Raises StoreError if there is no such bucket."""
        try:
            return retry_request(
                str(self), lambda: do(*self._opened), lambda error: self.hidden(self._backend.describe(error))
            )
        except FileNotFoundError as error:
            if self._backend.lacks_bucket(error):
                raise StoreError(f"{self}: there is no such bucket; make it, or correct the URL") from None
            raise

    def refuse_endless(self, what: str) -> RemoteError:
        """The error of a listing that has no end."""
        return RemoteError(f"{self} is refused (the server lists {what} without end)")


async def read_all(read: Callable[[int], Awaitable[bytes]], most: int) -> bytes:
    """All that `read` gives, piece by piece. Raises TooLongError if that is more than `most` bytes."""
    pieces, length = [], 0
    while piece := await read(1 << 20):
        pieces.append(piece)
        length += len(piece)
        if length > most:
            raise TooLongError.than(most)
    return b"".join(pieces)
