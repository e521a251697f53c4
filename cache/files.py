"""Atomic file writes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

PARTIAL = ".partial"  # suffix of a file that is being written


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a partial file beside `path`, then rename it into place; a failure leaves `path` as it was."""
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
