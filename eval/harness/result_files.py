"""Result files: JSON under a checksum, so that a digit that changed is not shown as a result.

Evaluations share folders without knowing of each other: whoever writes into one holds its lock, and clears away what
killed ones left.
"""

import fcntl
import json
import os
import re
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hsae.cache.errors import UserError
from hsae.cache.files import CHECKSUM, check_seal, parse_json, sealed, sweep, write_atomically
from hsae.train.run_record import run_options

DIGEST = re.compile("[0-9a-f]{16,}")
NAMED = {"sae": "SAE", "hsae": "version", "seeds": "draws", "state": "state of the store", "corpus": "text"}
NAMED |= {"config": "settings", "model": "weights of the language model"}


def hsae_version() -> str:
    """What hsae calls itself in result files, for example `hsae 0.1.0`."""
    try:
        return f"hsae {version('hsae')}"
    except PackageNotFoundError:
        return "hsae (not installed)"


def publish(path: Path, write: Callable[[Path], Any]) -> None:
    """Make or replace a file of an evaluation atomically, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        if _lock(folder):
            sweep(path.parent, below=False)
        write_atomically(path, write)
    finally:
        os.close(folder)


def _lock(folder: int) -> bool:
    """Wait for the lock on an open folder; False on a file system that has no such locks."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def write_result(path: Path, content: Mapping[str, Any], *, indent: int = 1, allow_nan: bool = False) -> Path:
    """Write a JSON object with its checksum, unless just that is there already; returns the file."""
    text = json.dumps(sealed(content), indent=indent, allow_nan=allow_nan)
    if not path.is_file() or path.read_bytes() != text.encode():
        publish(path, lambda partial: partial.write_text(text))
    return path


def read_result(path: Path, command: str) -> dict[str, Any]:
    """The content of a result file without its checksum. Raises UserError with the `command` that makes it."""
    content = read_json(path, command)
    try:
        check_seal(content, required=False)
    except ValueError as error:
        raise damaged(path, command, error) from None
    return {key: value for key, value in content.items() if key != CHECKSUM}


def changes(inputs: Mapping[str, Any], earlier: Mapping[str, Any]) -> str:
    """In what inputs differ from those of the result whose place is taken: `draws 3 (was 5), other text`."""
    parts = []
    for key in dict.fromkeys((*inputs, *earlier)):
        now, before = inputs.get(key), earlier.get(key)
        if now == before:
            continue
        name = NAMED.get(key, key.replace("_", " "))
        if isinstance(now, dict) and isinstance(before, dict):
            parts.append(changes(now, before))
        elif any(isinstance(value, str) and DIGEST.fullmatch(value) for value in (now, before)):
            parts.append(f"other {name}")
        else:
            parts.append(f"{name} {now} (was {before})")
    return ", ".join(parts)


def run_option(path: Path) -> str:
    """` --run N`, with its seed, for a result in a run directory; nothing elsewhere."""
    run = next((folder.parent for folder in path.parents if folder.name == "eval"), None)
    return f" {run_options(run)}" if run is not None and run.name.isdecimal() else ""


def read_json(path: Path, command: str, kind: str = "a result file") -> Any:
    """The content of a JSON file; an object, unless `kind` is "JSON". Raises UserError as `read_result` does."""
    try:
        content = parse_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not {kind}: {error}; make it again with: {command}") from None
    if kind != "JSON" and not isinstance(content, dict):
        raise damaged(path, command, "not a JSON object")
    return content


def damaged(path: Path, command: str, problem: object) -> UserError:
    """What to raise of a damaged file."""
    return UserError(f"{path} is damaged ({problem}); make it again with: {command}")
