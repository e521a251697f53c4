"""Signs of life: how workers on one store know that worker 0, on which they wait, is still at work."""

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from hsae.cache.errors import StoreError, UserError
from hsae.cache.storage.paths import Place, publish

WAIT, POLL, BEAT = 3600.0, 1.0, 60.0  # seconds


@contextlib.contextmanager
def signs_of_life(targets: Sequence[Place]) -> Iterator[None]:
    """Show every BEAT seconds, beside each store, that worker 0 is at work, whatever takes it long."""
    ended = threading.Event()

    def beat() -> None:
        while True:
            for target in targets:
                if ended.is_set():
                    return
                with contextlib.suppress(OSError, UserError):
                    publish(sign_of_life(target), secrets.token_hex(8).encode())
            if ended.wait(BEAT):
                return

    thread = threading.Thread(target=beat, name="hsae-signs-of-life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
    thread.join()  # not after a failure: it may be trying again for minutes, and the next build deletes its sign
    for target in targets:
        with contextlib.suppress(OSError, UserError):
            sign_of_life(target).unlink(missing_ok=True)


def sign_of_life(target: Place) -> Place:
    """The file beside a store whose content changes as long as worker 0 lives."""
    return target.with_name(f".{target.name}.alive")


def wait_for(target: Place, is_there: Callable[[], bool]) -> None:
    """Wait for something that worker 0 makes. Raises StoreError after WAIT seconds without a sign of life."""
    sign, since = b"", time.monotonic()
    while not is_there():
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if (now := sign_of_life(target).read_bytes()) != sign:
                sign, since = now, time.monotonic()
        if time.monotonic() - since > WAIT:
            raise StoreError(f"worker 0 has given no sign of life at {target} for {WAIT:.0f} s; is it running?")
        time.sleep(POLL)
