"""fsspec's HTTP file system with what stores need of it: the token of `hsae cache serve`, and no error taken for a missing file."""

import os
from typing import Any

import aiohttp
from fsspec.implementations.http import HTTPFileSystem

TOKEN = "HSAE_TOKEN"


class WebFileSystem(HTTPFileSystem):  # type: ignore[misc]
    """Reads what a web server shows: files, and folders as pages that link to what is in them."""

    async def _info(self, url: str, **kwargs: Any) -> dict[str, Any]:
        """One HEAD. Raises FileNotFoundError for 404 only; fsspec's own raises it for whatever goes wrong."""
        session = await self.set_session()
        options = {**self.kwargs, **kwargs}
        options["headers"] = {**options.get("headers", {}), "Accept-Encoding": "identity"}  # else the length is another
        async with session.head(self.encode_url(url), **{"allow_redirects": True, **options}) as answer:
            self._raise_not_found_for_status(answer, url)
            told = {name: answer.headers[name] for name in ("ETag", "Last-Modified") if name in answer.headers}
            return {"name": url, "type": "file", "size": answer.content_length, **told}


def file_system() -> WebFileSystem:
    """The file system of http:// and https://, showing the token in HSAE_TOKEN if there is one."""
    token = os.environ.get(TOKEN)
    settings = {
        "headers": {"Authorization": f"Bearer {token}"} if token else {},
        "timeout": aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60),
        "read_bufsize": 1 << 20,
    }
    return WebFileSystem(simple_links=False, client_kwargs=settings)


def refusal(error: aiohttp.ClientResponseError) -> str:
    """What a server's refusal means, in words."""
    if error.status == 401 and os.environ.get(TOKEN):
        return f"the server does not take the token in {TOKEN}; set it to the one that the server was started with"
    if error.status == 401:
        return f"the server wants a token; set {TOKEN} to the one that it was started with"
    return f"{error.status} {error.message}"
