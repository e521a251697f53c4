"""Files that are never seen in part, and JSON that tells whether it is what was written.

A file is written under a partial name of its own, synced, renamed into place, and the rename is synced too. Its
writer holds a lock (flock) on it meanwhile, so that what a killed one has left is told from what is being written. A
sealed JSON object has a key `checksum`: a digest of everything else in it, so that one changed digit is noticed
whichever digit it is.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import google_crc32c
import numpy as np

PARTIAL = ".partial"  # suffix of a file that is being written
LEFT = re.compile(rf"\..*{re.escape(PARTIAL)}|\.tmp\w{{6}}")  # by killed writers; the second is safetensors' own
CHECKSUM = "checksum"
READ_BYTES = 1 << 24
JUST_MADE = 1.0  # seconds in which the writer of a partial file may not have locked it yet


def home() -> Path:
    """hsae's own cache folder: `$HSAE_HOME`, else `~/.cache/hsae`."""
    return Path(os.environ.get("HSAE_HOME") or Path.home() / ".cache" / "hsae")


def partial_name(path: Path) -> Path:
    """A name beside `path` that no other writer has, on this machine or on another that shares the folder."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}{PARTIAL}")


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a partial file beside `path`, then rename it into place; a failure leaves `path` as it was.

    The file has the mode that any new file gets, and lasts once this returns. What killed writers of `path` have left
    is deleted. An OSError names `path`.
    """
    partial = partial_name(path)
    try:
        with partial.open("xb") as file:
            lock(file)
            mode = os.fstat(file.fileno()).st_mode
            write(partial)
            # perhaps another file: safetensors makes its own, which only its owner may read
            with partial.open("r+b") as filled:
                lock(filled)
                os.fchmod(filled.fileno(), mode)
                os.fsync(filled.fileno())
                partial.replace(path)
        sync_folder(path.parent)
        sweep_files(_partial_files(path), JUST_MADE)
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(partial)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    except Exception as error:
        if (match := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        number = int(match[1])  # safetensors has an error of its own for a full disk
        raise OSError(number, os.strerror(number), str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def _partial_files(path: Path) -> list[Path]:
    start = f".{path.name}."
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        return [Path(entry.path) for entry in entries if entry.name.startswith(start) and entry.name.endswith(PARTIAL)]
    return []


def lock(file: IO[bytes]) -> bool:
    """Lock a partial file until it is closed; whether that could be done."""
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def write_bytes_atomically(path: Path, data: bytes) -> None:
    """Make or replace a file with these bytes; see `write_atomically`."""
    write_atomically(path, lambda partial: partial.write_bytes(data))


def sync_folder(folder: Path) -> None:
    """Make the renames in a folder last, where the system can: some network file systems refuse to open a folder."""
    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def sweep(folder: Path, *, below: bool = True, youngest: float = 0.0) -> int:
    """Delete files that killed writers left half-written in a folder (and `below` it); returns how many."""
    paths = folder.glob("**/.*" if below else ".*")
    return sweep_files((path for path in paths if LEFT.fullmatch(path.name) and path.is_file()), youngest)


def sweep_files(partial: Iterable[Path], youngest: float = 0.0) -> int:
    """Delete partial files without a writer that are at least so many seconds old."""
    swept = 0
    for path in partial:
        with contextlib.suppress(OSError), path.open("r+b") as file:
            if abs(time.time() - os.fstat(file.fileno()).st_mtime) >= youngest and lock(file):
                path.unlink()
                swept += 1
    return swept


# ---- JSON and TOML --------------------------------------------------------------------------------------------------


def parse_json(data: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError for whatever is wrong, depth and encoding too."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_toml(data: str | bytes) -> dict[str, Any]:
    """The tables of a TOML text in UTF-8. Raises ValueError for whatever is wrong with it."""
    try:
        return tomllib.loads(data.decode("utf-8-sig") if isinstance(data, bytes) else data)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def content_digest(content: Mapping[str, Any]) -> str:
    """Sixteen hex digits over a JSON object but for its checksum; the order of keys and the spacing don't matter."""
    rest = {key: value for key, value in content.items() if key != CHECKSUM}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The same JSON object with its checksum, of what a reader of the file will see."""
    return {**content, CHECKSUM: content_digest(parse_json(json.dumps(content)))}


def check_seal(content: Mapping[str, Any], *, required: bool = True) -> None:
    """Raise ValueError unless a JSON object is what was sealed; one of an older hsae may have no checksum."""
    if CHECKSUM not in content:
        if required:
            raise ValueError("it has no checksum")
    elif content[CHECKSUM] != content_digest(content):
        raise ValueError("it fails its checksum")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, read anew each time."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def crc32c(data: bytes | memoryview, before: int = 0) -> int:
    """The crc32c checksum of some bytes, or of them and those before, whose checksum is given."""
    return int(google_crc32c.extend(before, np.frombuffer(data, dtype=np.uint8)))


def files_digest(files: list[Path], *, anew: bool = False) -> str:
    """SHA-256 over names and contents, remembered in hsae's cache as long as paths, sizes and times stay.

    With `anew` the files are read in any case, as quickly as their crc32c is made, so that bits that changed under an
    unchanged time don't go unseen.
    """
    stamp = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    memory = home() / "digests" / f"{hashlib.sha256(json.dumps(stamp).encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        remembered = parse_json(memory.read_bytes())
        check_seal(remembered)
        if not anew or remembered["crc32c"] == [_file_crc32c(file) for file in files]:
            return str(remembered["sha256"])
    total, sums = hashlib.sha256(), []
    for file in files:
        content = hashlib.sha256()
        sums.append(_file_crc32c(file, content.update))
        total.update(file.name.encode())
        total.update(content.digest())
    digest = total.hexdigest()
    with contextlib.suppress(OSError):  # only a shortcut for next time
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_atomically(memory, json.dumps(sealed({"sha256": digest, "crc32c": sums})).encode())
    return digest


def _file_crc32c(path: Path, also: Callable[[bytes], None] = lambda part: None) -> int:
    """crc32c of a file, each part of which goes to `also` too."""
    total = 0
    with path.open("rb") as file:
        while part := file.read(READ_BYTES):
            total = crc32c(part, total)
            also(part)
    return total
