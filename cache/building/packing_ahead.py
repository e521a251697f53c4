"""Tokens packed in a thread, ahead of the model that computes on them."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence


class Stopped(Exception):
    """The build has ended, so nothing more is to be packed."""


class Packed:
    """How far the packing of one store is, told by the thread that packs to those that wait for tokens."""

    def __init__(self) -> None:
        self._chunks = 0
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def reach(self, chunks: int) -> None:
        """Say that so many chunks are there. Raises Stopped, or what another store's packing has failed with."""
        with self._changed:
            if self._error is not None:
                raise self._error
            self._chunks = max(self._chunks, chunks)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Say that there will be no more."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def wait(self, chunks: int) -> None:
        """Return when so many chunks are there. Raises what a packing has failed with, as soon as it has."""
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or self._chunks >= chunks)
            if self._error is not None:
                raise self._error


@contextlib.contextmanager
def packing_ahead(stores: Sequence[tuple[Packed, Callable[[], None]]]) -> Iterator[None]:
    """Pack the tokens of stores, one after the other, in a thread that ends with the block."""

    def fail(error: BaseException) -> None:
        for packed, _ in stores:
            packed.fail(error)

    def pack_all() -> None:
        try:
            for _, pack in stores:
                pack()
        except BaseException as error:
            fail(error)

    thread = threading.Thread(target=pack_all, name="hsae-packing", daemon=True)
    thread.start()
    try:
        yield
    finally:
        fail(Stopped())
        thread.join()
