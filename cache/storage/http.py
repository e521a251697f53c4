"""fsspec's HTTP file system with what stores need of it: the token of `hsae cache serve`, no error taken for a
missing file, no reply without bound.

The token in HSAE_TOKEN is sent to this machine and to the addresses in HSAE_TOKEN_HOST, and nowhere else: which
address a plan names is not always its reader's choice. An address without http:// is one of https, so plain http is
used where that was written.
"""

import contextlib
import errno
import os
import re
from html import unescape
from ipaddress import ip_address
from typing import Any

import aiohttp
from fsspec.implementations.http import HTTPFileSystem
from yarl import URL

from hsae.cache.errors import TooLongError, UserError
from hsae.cache.storage.paths import map_parallel
from hsae.cache.storage.remote import MOST_BYTES, MOST_LISTED, Backend, RemotePath, read_all

DEEPEST = 16  # folders in folders
TOKEN, TOKEN_HOST = "HSAE_TOKEN", "HSAE_TOKEN_HOST"
LINK = re.compile(rb"""<a\s[^>]{0,999}?href\s*=\s*["']([^"'<>]{1,9999})["']""", re.IGNORECASE)


class WebFileSystem(HTTPFileSystem):  # type: ignore[misc]
    """Reads what a web server shows: files, and folders as pages that link to what is in them."""

    async def _info(self, url: str, **kwargs: Any) -> dict[str, Any]:
        """One HEAD. Raises FileNotFoundError for 404 only; fsspec's own raises it for whatever goes wrong."""
        session, address = await self.set_session(), self.encode_url(url)
        async with session.head(address, headers=_headers(address), allow_redirects=True) as answer:
            self._raise_not_found_for_status(answer, url)
            if answer.content_length is None:
                raise OSError(errno.EINVAL, "the server does not tell the lengths of files")
            tags = {name: answer.headers[name] for name in ("ETag", "Last-Modified") if name in answer.headers}
            return {"name": url, "type": "file", "size": answer.content_length, **tags}

    async def _cat_file(
        self, url: str, start: int | None = None, end: int | None = None, most: int = MOST_BYTES, **kwargs: Any
    ) -> bytes:
        """A file or a range of it. Raises TooLongError if more than `most` bytes come."""
        wanted = {} if start is end is None else {"Range": await self._process_limits(url, start, end)}
        answer, data = await self._fetch(url, most, wanted)
        return data if not wanted or answer.status == 206 else data[start:end]

    async def _ls_real(self, url: str, detail: bool = False, **kwargs: Any) -> list[str]:
        """What a folder's page links to that lies directly in it, by name; hsae wants no more `detail`."""
        folder = url.rstrip("/") + "/"
        answer, page = await self._fetch(url, MOST_BYTES, {})
        links = LINK.findall(page) if answer.content_type == "text/html" else []
        names = set()
        for link in (unescape(link.decode(errors="replace")) for link in links):
            path = link.removeprefix(folder) if "://" in link else link.removeprefix("./")
            path = path.removeprefix(URL(folder).raw_path) if path.startswith("/") else path
            if re.fullmatch(r"[^/?#:]+/?", path) and path.rstrip("/") not in (".", ".."):
                names.add(folder + path)
        return sorted(names)

    async def _fetch(self, url: str, most: int, wanted: dict[str, str]) -> tuple[aiohttp.ClientResponse, bytes]:
        session, address = await self.set_session(), self.encode_url(url)
        async with session.get(address, headers={**_headers(address), **wanted}) as answer:
            self._raise_not_found_for_status(answer, url)
            if answer.headers.get("Content-Encoding", "identity") != "identity":
                raise OSError(errno.EINVAL, "the server compresses its answers, unasked")
            if (answer.content_length or 0) > most:
                raise TooLongError.than(most)
            return answer, await read_all(answer.content.read, most)


class WebBackend(Backend):
    """Stores at http:// and https:// URLs, which can only be read."""

    def open(self, url: str) -> tuple[WebFileSystem, str]:
        """A file system of our own, and the URL."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)
        client = {"auto_decompress": False, "timeout": timeout, "read_bufsize": 1 << 20}
        return WebFileSystem(client_kwargs=client), url

    def read(self, filesystem: Any, path: str, most: int) -> bytes:
        """A file's bytes, by one GET that ends where they can't be right any more."""
        return filesystem.cat_file(path, most=most)  # type: ignore[no-any-return]

    def describe(self, error: Exception) -> str:
        """An error in one line; a server's refusal by what it means."""
        return refusal(error) if isinstance(error, aiohttp.ClientResponseError) else super().describe(error)

    def sizes(self, target: RemotePath, prefix: str) -> dict[str, int]:
        """By a walk through the folders, whose listings have no sizes, and a HEAD of every file."""

        def listed(folder: str) -> list[str]:
            with contextlib.suppress(FileNotFoundError):
                names = (target / folder).request(lambda filesystem, path: filesystem.ls(path, detail=False))
                return [folder + str(name)[len(f"{target.url}/{folder}") :] for name in names]
            return []

        files: list[str] = []
        folders, seen = [""], 0
        while folders:
            names = [name for inner in map_parallel(listed, folders) for name in inner]
            seen += len(names)
            if seen > MOST_LISTED or folders[0].count("/") > DEEPEST:
                raise target.refuse_endless("folders")
            folders = [name for name in names if name.endswith("/")]
            files += [name for name in names if not name.endswith("/")]
        lengths = map_parallel(lambda name: int((target / name).status()["size"]), files)
        return dict(zip(files, lengths, strict=True))


def _headers(address: URL) -> dict[str, str]:
    """Those of a request; aiohttp takes the token out when another server is redirected to."""
    headers = {"Accept-Encoding": "identity"}
    if (token := os.environ.get(TOKEN)) and takes_token(address):
        headers["Authorization"] = f"Bearer {token}"
    return headers


def is_here(host: str) -> bool:
    """Whether a host is this machine, by the loopback addresses and their name."""
    try:
        return host == "localhost" or ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def takes_token(address: URL) -> bool:
    """Whether the token may be sent there: to this machine, or to what HSAE_TOKEN_HOST names. Raises UserError."""
    if is_here(address.host or ""):
        return True
    words = os.environ.get(TOKEN_HOST, "").replace(",", " ").split()
    try:
        urls = [URL(word if "://" in word else f"https://{word}") for word in words]
        return (address.scheme, address.host, address.port) in {(url.scheme, url.host, url.port) for url in urls}
    except ValueError:
        raise UserError(f"{TOKEN_HOST} must be an address such as server:8420 or http://server:8420") from None


def refusal(error: aiohttp.ClientResponseError) -> str:
    """What a server's refusal means, in words."""
    if error.status != 401:
        return f"{error.status} {error.message}"
    last_url = error.request_info.real_url
    first_url, at = error.history[0].url if error.history else last_url, last_url.origin()
    if first_url.origin() != at:
        return (
            f"the server redirects to {at}, which wants a token and gets none; if that is right, give its own address"
        )
    there = "" if takes_token(at) else f" and {TOKEN_HOST}={at}"
    if not os.environ.get(TOKEN):
        return f"the server wants a token; set {TOKEN} to the one that it was started with{there}"
    if there:
        return f"the server wants a token; if the one in {TOKEN} is for it: export {TOKEN_HOST}={at}"
    return f"the server does not take the token in {TOKEN}; set it to the one that the server was started with"
