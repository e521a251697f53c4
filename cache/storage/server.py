"""Stores over HTTP, for reading only: whole files, ranges and listings of what lies in `*.zarr` folders, and of the
.json and .safetensors files in the folder `probe`, to who has the token.

Nothing else is shown: no other file of the folder, no name that begins with a dot (partial files and locks do),
nothing that a link leads to outside, and no method but GET and HEAD. The token is compared in constant time before a
request's path is looked at, and who has none keeps no reader out (see `connections`).
"""

import hmac
import socket
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from hsae.cache.errors import StoreError, UserError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

SUFFIX = ".zarr"
PROBE, PROBE_FILES = "probe", (".json", ".safetensors")
PIECE_BYTES = 1 << 20  # read and sent at once
SHORTEST_TOKEN = 16


def find_stores(path: Path) -> tuple[Path, str | None, list[str]]:
    """(folder, name of the one store served or None, names of all). Raises StoreError."""
    path = path.expanduser().resolve()
    if path.name.endswith(SUFFIX) and (path / "zarr.json").is_file():
        return path.parent, path.name, [path.name]
    names = sorted(store.name for store in path.glob(f"*{SUFFIX}") if (store / "zarr.json").is_file())
    if (path / PROBE).is_dir():
        names.append(PROBE)
    if not names:
        raise StoreError(f"{path} is no store and holds none; stores are made by `hsae cache build`")
    return path, None, names


def check_token(token: str | None) -> str:
    """The token, if it is one. Raises UserError, without showing it."""
    if not token:
        raise UserError("set HSAE_TOKEN to a secret that readers must know: export HSAE_TOKEN=$(openssl rand -hex 32)")
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(
            f"HSAE_TOKEN must be {SHORTEST_TOKEN} or more ASCII characters without spaces, for example the output of "
            "openssl rand -hex 32"
        )
    return token


def find(root: Path, only: str | None, name: str) -> Path | None:
    """The file or folder of a request's path, if it may be shown; `only` is the one store served."""
    parts = name.strip("/").split("/") if name.strip("/") else []
    if any(part in ("", "..") or part.startswith(".") for part in parts):
        return None
    try:
        target = root.joinpath(*parts).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):  # missing, too long, a null byte, a loop of links
        return None
    if not target.is_relative_to(root):
        return None
    real = target.relative_to(root).parts
    if any(part.startswith(".") for part in real):
        return None
    if real:
        is_probe = real[0] == PROBE and (target.is_dir() or target.name.endswith(PROBE_FILES))
        if not (is_probe or real[0].endswith(SUFFIX)) or only not in (None, real[0]) or not (root / real[0]).is_dir():
            return None
    return target if target.is_file() or target.is_dir() else None


def application(root: Path, only: str | None, token: str) -> "ASGIApp":
    """The ASGI application over the folder `root`."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.requests import Request
    from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, Response
    from starlette.routing import Route

    class WholeFile(FileResponse):
        chunk_size = PIECE_BYTES

    def answer(request: Request) -> Response:
        name = request.path_params["name"]
        target = find(root, only, name)
        try:
            if target is None:
                return PlainTextResponse("not found", status_code=404)
            if target.is_file():
                target.open("rb").close()
                return WholeFile(target, stat_result=target.stat(), media_type="application/octet-stream")
            inner = name.strip("/")
            entries = [(child, find(root, only, f"{inner}/{child.name}")) for child in sorted(target.iterdir())]
        except FileNotFoundError:
            return PlainTextResponse("not found", status_code=404)
        except PermissionError:
            return PlainTextResponse("the server may not read this", status_code=403)
        except OSError:  # it has no descriptor or memory left, or its disk fails
            return PlainTextResponse("the server can't read this now", status_code=503)
        names = [child.name + "/" * shown.is_dir() for child, shown in entries if shown is not None]
        links = (f'<a href="{quote(entry)}">{escape(entry)}</a><br>' for entry in names)
        return HTMLResponse(f"<!doctype html>{''.join(links)}")

    routes = [Route("/{name:path}", answer, methods=["GET"])]
    return Starlette(routes=routes, middleware=[Middleware(Bearer, token=token)])


class Bearer:
    """Lets through what shows the token; everything else gets 401, whatever it asks for."""

    def __init__(self, app: "ASGIApp", token: str) -> None:
        self.app, self._token = app, token.encode()

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Answer, or pass on."""
        from starlette.responses import PlainTextResponse

        authorization = next((value for name, value in scope.get("headers", ()) if name == b"authorization"), b"")
        scheme, _, token = authorization.partition(b" ")
        if hmac.compare_digest(token.strip(), self._token) and scheme.lower() == b"bearer":
            return await self.app(scope, receive, send)
        if scope["type"] == "http":
            headers = {"WWW-Authenticate": "Bearer", "Connection": "close"}
            refusal = PlainTextResponse("the token is missing or wrong", status_code=401, headers=headers)
            await refusal(scope, receive, send)


def serve(
    path: Path,
    token: str | None,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    certificate: Path | None = None,
    key: Path | None = None,
    started: Callable[[str, list[str]], None] = lambda url, names: None,
) -> None:
    """Serve stores until interrupted; `started` is called with the URL and their names. Raises UserError."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401

        from hsae.cache.storage.connections import Limits, most_connections, server
    except ImportError:
        raise UserError("serving stores needs uvicorn and starlette; run: pip install 'hsae[serve]'") from None
    root, only, names = find_stores(path)
    if (certificate is None) != (key is None):
        raise UserError("TLS needs both --certificate and --key, or neither")
    app = application(root, only, check_token(token))
    with _listener(host, port) as listener:
        limits = Limits(connections=most_connections(Limits.connections))
        try:
            running = server(app, listener, limits, certificate, key)
        except OSError as error:  # of which ssl's errors are
            raise UserError(f"{certificate} and {key} can't be used for TLS: {error}") from None
        at = f"[{host}]" if ":" in host else host
        started(f"http{'s' * (key is not None)}://{at}:{listener.getsockname()[1]}", names)
        running.run()


def _listener(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"can't listen at {host}, port {port} ({reason}); give another --host or --port") from None
