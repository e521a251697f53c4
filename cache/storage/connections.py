"""The connections of `hsae cache serve`: uvicorn's, each of which is over in time, and never more than there are
descriptors for.

uvicorn waits for ever for a request that was begun or for an answer to be taken, and asyncio accepts without a limit,
with a line of log (Python 3.11: thousands a second) where the system has no descriptor left. So connections are
accepted here. When there are as many as there may be, a new one takes the place of the oldest that asks for nothing,
those that never showed the token first; if all are being answered, it waits.
"""

import asyncio
import logging
import resource
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

SPARE_FILES = 64  # descriptors kept for what is neither a connection nor the file that it is sent
BACKLOG = 2048  # connections that the system holds until they are accepted


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How many connections there may be, and what one may take, in seconds."""

    connections: int = 1024
    request: float = 10.0  # from the beginning of a connection or request to the end of its head; a TLS handshake too
    stalled: float = 60.0  # without taking anything of an answer that is ready
    idle: int = 75  # from one request to the next
    pause: float = 1.0  # after the system had no descriptor or memory for a connection
    log: float = 60.0  # from one line of log to the next


def most_connections(wanted: int) -> int:
    """So many, or as many as there may be descriptors for, with a file each; raises the soft limit."""
    with suppress(OSError, ValueError):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != resource.RLIM_INFINITY:
            files = 2 * wanted + SPARE_FILES
            allowed = files if hard == resource.RLIM_INFINITY else min(files, hard)
            if allowed > soft:
                resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
            return max(1, min(wanted, (max(allowed, soft) - SPARE_FILES) // 2))
    return wanted


class Connection(H11Protocol):
    """One connection, which is aborted when it takes longer than it may, whatever is still to be sent."""

    def __init__(self, server: "Server") -> None:
        super().__init__(server.config, server.server_state, server.lifespan.state)
        self._limits = server.limits
        self._timer: asyncio.TimerHandle | None = None
        self.waiting = False  # whether a request was answered, so its sender has the token, and no byte of another came
        self.known = False  # whether it was ever so
        self.begun = False  # whether a TLS handshake, if there is one, is over
        self.over: asyncio.Future[None] = self.loop.create_future()

    @property
    def busy(self) -> bool:
        """Whether an answer is being made or sent."""
        if not self.begun:
            return False
        answering = self.cycle is not None and not self.cycle.response_complete
        return (answering and not self.transport.is_closing()) or self.transport.get_write_buffer_size() > 0

    def _allow(self, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a request."""
        super().connection_made(transport)
        self.begun = True
        self._allow(self._limits.request)

    def data_received(self, data: bytes) -> None:
        """Parts of a request; the first byte of a further one begins its time."""
        waited, self.waiting = self.waiting, False
        super().data_received(data)
        if not self.busy:
            if waited:
                self._allow(self._limits.request)
        elif not self.flow.write_paused:
            self._allow(None)

    def on_response_complete(self) -> None:
        """The answer was handed over, if not yet sent; perhaps a further request has come already."""
        super().on_response_complete()
        closing, answering = self.transport.is_closing(), not self.cycle.response_complete
        self.waiting = not closing and not answering
        self.known = self.known or not closing
        if not answering:
            self._allow(self._limits.stalled + (0 if closing else self._limits.idle))
        elif not self.flow.write_paused:
            self._allow(None)

    def pause_writing(self) -> None:
        """The other side has much to take."""
        super().pause_writing()
        self._allow(self._limits.stalled)

    def resume_writing(self) -> None:
        """It took most of it."""
        super().resume_writing()
        if self.cycle is not None and not self.cycle.response_complete:
            self._allow(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        super().connection_lost(exc)
        self._allow(None)
        if not self.over.done():
            self.over.set_result(None)


class Server(uvicorn.Server):
    """uvicorn's server over one listening socket, which it closes when it ends."""

    def __init__(self, config: uvicorn.Config, listener: socket.socket, limits: Limits) -> None:
        super().__init__(config)
        listener.listen(BACKLOG)
        listener.setblocking(False)
        self.limits, self._listener = limits, listener
        self.open: dict[Connection, asyncio.Task[None]] = {}  # the oldest first

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept connections."""
        await super().startup(sockets=[])
        self._accepting = asyncio.create_task(self._accept())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more, and let those that are being answered end."""
        self._accepting.cancel()
        await super().shutdown(sockets=[self._listener])

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(0)  # where connections come without end, those that are there go on as well
            try:
                accepted, _ = await loop.sock_accept(self._listener)
            except ConnectionError:  # it is gone again
                continue
            except OSError:
                await asyncio.sleep(self.limits.pause)
                continue
            while len(self.open) >= self.limits.connections and not self._make_room():
                await asyncio.sleep(0.05)
            connection = Connection(self)
            self.open[connection] = loop.create_task(self._keep(connection, accepted))

    def _make_room(self) -> bool:
        """End one connection that asks for nothing; whether there is one."""
        strangers = (connection for connection in self.open if not connection.known and not connection.busy)
        waiting = (connection for connection in self.open if connection.waiting)
        chosen = next(strangers, None) or next(waiting, None)
        if chosen is not None:
            self.open.pop(chosen).cancel()
        return chosen is not None

    async def _keep(self, connection: Connection, accepted: socket.socket) -> None:
        timeout = self.limits.request if self.config.ssl else None
        try:
            await connection.loop.connect_accepted_socket(
                lambda: connection, accepted, ssl=self.config.ssl, ssl_handshake_timeout=timeout
            )
            await connection.over
        except OSError:
            pass  # no TLS, or gone
        finally:
            self.open.pop(connection, None)
            if connection.begun:
                connection.transport.abort()


class Seldom(logging.Filter):
    """Lets one line through, and the next one some seconds later: what strangers cause must not fill a disk."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds, self._next = seconds, 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it is time for a line."""
        if (now := time.monotonic()) < self._next:
            return False
        self._next = now + self._seconds
        return True


def server(app: Any, listener: socket.socket, limits: Limits, certificate: Path | None, key: Path | None) -> Server:
    """A server of an ASGI application. Raises OSError if certificate and key can't be used."""
    config = uvicorn.Config(
        app, loop="asyncio", lifespan="off", ws="none", log_level="error", access_log=False, proxy_headers=False,
        server_header=False,
        timeout_keep_alive=limits.idle, timeout_graceful_shutdown=5, ssl_certfile=certificate, ssl_keyfile=key,
    )  # fmt: skip
    config.load()
    seldom = Seldom(limits.log)
    for name in ("uvicorn.error", "asyncio"):
        logging.getLogger(name).addFilter(seldom)
    return Server(config, listener, limits)
