"""An S3 server on loopback (moto's, over real HTTP) that fails as it is told to, for the tests."""

import random
import socket
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

KINDS = ("500", "503", "reset", "short")
SKEWED = "The difference between the request time and the server's time is too large."
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}


class Faulty:
    """A WSGI application in front of another: some requests fail, in turn with 500, 503 SlowDown, a reset, or half a
    body.
    """

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self.app = app
        self.rate, self.gone_until = 0.0, 0.0
        self.skewed = False
        """Whether every request is refused as one whose clock is wrong."""
        self.harms: list[Callable[[bytes], bytes]] = []
        """What is done to the bodies of the next objects that are read, one after the other."""
        self.requests: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self._random, self._lock = random.Random(0), threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer one request."""
        with self._lock:
            self.requests[environ["REQUEST_METHOD"]] += 1
            kind = "skewed" if self.skewed else None
            if time.monotonic() < self.gone_until:
                kind = "gone"
            elif self._random.random() < self.rate:
                kind = KINDS[self.faults.total() % len(KINDS)]
            if kind:
                self.faults[kind] += 1
        if kind in ("reset", "gone"):
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            return []
        if kind in ("500", "503", "skewed"):
            status, code, message = {
                "500": ("500", "InternalError", "injected"),
                "503": ("503", "SlowDown", "injected"),
                "skewed": ("403", "RequestTimeTooSkewed", SKEWED),
            }[kind]
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
            headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
            if kind == "skewed":
                headers.append(("Date", formatdate(time.time() + 3600, usegmt=True)))
            start_response(f"{status} {code}", headers)
            return [body]
        if self.harms and environ["REQUEST_METHOD"] == "GET":
            return self._harmed(environ, start_response)
        body = b"".join(self.app(environ, start_response))
        return [body[: len(body) // 2] if kind == "short" else body]

    def _harmed(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        told: list[Any] = []
        body = b"".join(self.app(environ, lambda *answer: told.extend(answer)))
        body = self.harms.pop(0)(body)
        kept = [(name, value) for name, value in told[1] if name.lower() != "content-length"]
        start_response(told[0], [*kept, ("Content-Length", str(len(body)))])
        return [body]


class Prompt(WSGIRequestHandler):
    """Sends a body without waiting for the other side to acknowledge the headers, which takes 40 ms a reply."""

    disable_nagle_algorithm = True


@contextmanager
def served(bucket: str) -> Iterator[tuple[str, Faulty]]:
    """(endpoint, its faults) of a server with one empty bucket."""
    app = Faulty(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Prompt)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{bucket}", method="PUT")).close()
        yield endpoint, app
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
