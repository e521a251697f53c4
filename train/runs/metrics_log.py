"""metrics.jsonl, the log of a run: one JSON object a line, each with its `kind` and `step`."""

import io
import json
from pathlib import Path
from typing import Any

from hsae.cache.files import parse_json, write_atomically

FILE = "metrics.jsonl"
DAMAGED = "damaged"
"""Kind of the lines that stand in a log for damaged ones, with what is left of them."""


class MetricsLog:
    """metrics.jsonl, appended to line by line. When a run goes on at `step`, what lies behind that step is cut off.

    A damaged line before it is replaced by one that any reader of JSON lines understands and that holds what is left of
    it.
    """

    def __init__(self, run_dir: Path, step: int) -> None:
        self.path = run_dir / FILE
        lines = _lines(self.path)
        before = (number for number, (_, line) in enumerate(lines) if line is not None and _before(line, step))
        last = max(before, default=-1)
        texts, step_before = [], 0
        for number, (text, line) in enumerate(lines):
            if line is not None:
                if number > last:
                    break
                texts.append(text)
                step_before = line["step"]
            elif text.endswith(b"\n"):  # the last one may have been cut off
                left = text.decode("utf-8", "backslashreplace").rstrip("\n")
                rest = {"kind": DAMAGED, "step": step_before, "text": left}
                texts.append(json.dumps(rest).encode() + b"\n")
        content = b"".join(texts)
        if not self.path.is_file() or content != b"".join(text for text, _ in lines):
            write_atomically(self.path, lambda partial: partial.write_bytes(content))

    def write(self, line: dict[str, Any]) -> None:
        """Append one object."""
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # of a full disk, which names no file
            raise OSError(error.errno, error.strerror, str(self.path)) from error


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; damaged ones, and a last one cut off by a crash, are left out."""
    return [line for _, line in _lines(run_dir / FILE) if line is not None and line["kind"] != DAMAGED]


def damaged_metrics(run_dir: Path) -> list[int]:
    """Numbers (from 1) of the damaged lines of metrics.jsonl, the last one apart if it was cut off."""
    lines = enumerate(_lines(run_dir / FILE), 1)
    return [n for n, (text, line) in lines if (text.endswith(b"\n") if line is None else line["kind"] == DAMAGED)]


def _before(line: dict[str, Any], step: int) -> bool:
    """Whether a line was written before a checkpoint of `step`."""
    return bool(line["step"] < step or (line["kind"] != "stage" and line["step"] == step))


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any] | None]]:
    """The bytes of each line of a log, and what it says; None if that is damaged."""
    content = path.read_bytes() if path.is_file() else b""
    return [(text, _parsed(text)) for text in io.BytesIO(content)]


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        line = parse_json(text)
    except ValueError:
        return None
    known = isinstance(line, dict) and isinstance(line.get("step"), int) and isinstance(line.get("kind"), str)
    return line if known else None
