"""A last line when mapped pages can't be read any more: a chunk's file was cut, or its disk failed.

The system then sends SIGBUS in the middle of an instruction, where no Python can run. So a small process waits behind
a pipe: Python's own handler, which is C, writes the signal's number there, and the process says which stores were
mapped and ends this one. It is started when a command of `hsae` maps its first chunk, never for users of the library,
and costs nothing after that.
"""

import contextlib
import os
import signal
import sys
import threading

END = b"\x7f"  # of a store's name; signals have smaller numbers, and a name is sent without such bytes
WATCHER = r"""
import os, signal, sys
for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
    signal.signal(ignored, signal.SIG_IGN)
received = b""
while data := os.read(0, 65536):
    received += bytes(byte for byte in data if byte >= 32)
    if signal.SIGBUS in data:
        try:
            import shlex
            names = [os.fsdecode(name) for name in received.split(b"\x7f")[:-1]]
            verify = "; ".join("hsae cache verify " + shlex.quote(name) for name in names if name.endswith(".zarr"))
            print("\nError: a file of", " or ".join(names), "was cut, or its disk failed, while it was being read "
                  "(SIGBUS). Checkpoints and results that were written are kept."
                  + (" Find the damage with: " + verify if verify else ""), file=sys.stderr, flush=True)
        finally:
            os.kill(int(sys.argv[1]), signal.SIGKILL)
        break
"""

_enabled = False
_pipe: int | None = None
_noted: set[str] = set()


def enable() -> None:
    """Let this process say what it had mapped when it dies of SIGBUS."""
    global _enabled
    _enabled = True


def note(store: str) -> None:
    """Remember that chunks of a store are about to be mapped."""
    if not _enabled or store in _noted or (_pipe is None and not _start()):
        return
    assert _pipe is not None
    _noted.add(store)
    with contextlib.suppress(OSError):
        os.write(_pipe, bytes(byte for byte in os.fsencode(store) if byte >= 32 and byte != END[0]) + END)


def _start() -> bool:
    """Start the process that waits; whether it could be."""
    global _pipe
    if threading.current_thread() is not threading.main_thread():
        return False
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    before = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    try:
        if before != -1:
            raise OSError("another part of the process handles signals")
        command = [sys.executable, "-I", "-S", "-c", WATCHER, str(os.getpid())]
        quiet = [(os.POSIX_SPAWN_DUP2, reads, 0), (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
        os.posix_spawn(sys.executable, command, os.environ, file_actions=quiet)
    except OSError:
        signal.set_wakeup_fd(before)
        os.close(writes)
        return False
    finally:
        os.close(reads)
    signal.signal(signal.SIGBUS, lambda number, frame: None)
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGBUS, signal.SIG_DFL))
    _pipe = writes
    return True
