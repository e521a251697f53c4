"""What evaluation stores lie in a cache folder, whichever suite they are of."""

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from hsae.cache.probe import PART_TEXTS, ProbeHeader, part_file
from hsae.cache.ravel import RavelHeader
from hsae.cache.remote import Place

FOLDER, SETS = "probe", ("texts", "answers")


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One suite's store."""

    name: str
    """Relative to the cache folder."""
    model: str = ""
    hooks: tuple[str, ...] = ()
    texts: int = 0
    bytes: int = 0
    """Of its sets of residuals; suites share sets, so these don't add up."""
    problem: str | None = None


def probe_stores(home: Place) -> list[Listed]:
    """The stores in a local cache folder, by suite (they are never remote)."""
    if not isinstance(home, Path) or not (home / FOLDER).is_dir():
        return []
    suites = sorted(path for path in (home / FOLDER).iterdir() if path.is_dir() and path.name not in SETS)
    return [_listed(home, file) for suite in suites for file in sorted(suite.glob("*.json"))]


def _listed(home: Path, file: Path) -> Listed:
    name = str(file.relative_to(home))
    try:
        content = json.loads(file.read_text())
        header = RavelHeader(**content) if file.parent.name == "ravel" else ProbeHeader(**content)
    except (ValidationError, ValueError, TypeError, OSError) as error:
        return Listed(name=name, problem=f"damaged ({str(error).splitlines()[0]}); delete it and build it again")
    if isinstance(header, RavelHeader):
        sets = {header.texts: header.count}
    else:
        sets = {task.texts: task.count for task in header.tasks}
    parts = [
        part_file(home / FOLDER / "texts" / texts, number)
        for texts, count in sets.items()
        for number in range(-(-count // PART_TEXTS))
    ]
    missing = [part for part in parts if not part.is_file()]
    return Listed(
        name=name,
        model=header.spec.model.id,
        hooks=header.spec.hooks,
        texts=sum(sets.values()),
        bytes=sum(part.stat().st_size for part in parts if part not in missing),
        problem=f"{missing[0].relative_to(home)} is missing; go on with: hsae cache build --suite {file.parent.name}"
        if missing
        else None,
    )
