"""What lies in a folder or at a URL of stores: activation stores, and the stores of evaluation suites."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hsae.cache.errors import StoreError
from hsae.cache.format.layout import read_header as read_store_header
from hsae.cache.format.layout import total_bytes
from hsae.cache.storage.paths import Place, children, place, sizes
from hsae.cache.suites.probe_store import ProbeHeader
from hsae.cache.suites.ravel_store import RavelHeader
from hsae.cache.suites.residual_sets import part_name, sets_folder
from hsae.cache.suites.specs import SUITES, suites_folder
from hsae.cache.suites.suite_files import SuiteHeader, read_header

HEADERS: dict[str, type[SuiteHeader]] = {**dict.fromkeys(SUITES, ProbeHeader), "ravel": RavelHeader}


@dataclass(frozen=True, kw_only=True)
class StoreSummary:
    """One store."""

    name: str
    """Relative to the folder or URL."""
    model: str = ""
    hooks: tuple[str, ...] = ()
    count: int = 0
    """Rows; of a suite's store texts."""
    bytes: int = 0
    """Of a suite's store those of its sets of residuals; suites share sets, so these don't add up."""
    is_complete: bool = True
    problem: str | None = None


def list_stores(folder: str | Place) -> Iterator[StoreSummary]:
    """The stores in a folder or at a URL, activations first. Raises StoreError if there is no such folder.

    >>> for store in list_stores("activations"):  # doctest: +SKIP
    ...     print(store.name, store.model, store.count, store.is_complete)
    """
    home = place(folder)
    if not home.is_dir():
        raise StoreError(f"there is no folder {home}; stores are made by `hsae cache build`")
    for path in children(home):
        if path.name.endswith(".zarr"):
            yield _summarise_activations(path)
    lengths = functools.cache(lambda texts: sizes(sets_folder(home) / texts))  # suites share sets
    for suite in sorted(HEADERS):
        try:
            files = children(suites_folder(home) / suite)
        except (FileNotFoundError, NotADirectoryError):
            continue
        for file in files:
            if file.name.endswith(".json") and not file.name.startswith("."):
                yield _summarise_suite(home, suite, file, lengths)


def _summarise_activations(path: Place) -> StoreSummary:
    try:
        header = read_store_header(path)
    except StoreError as error:
        return StoreSummary(name=path.name, problem=str(error))
    return StoreSummary(
        name=path.name,
        model=header.spec.model.id,
        hooks=header.spec.hooks,
        count=header.spec.rows,
        bytes=total_bytes(header.spec, header.d_model),
        is_complete=header.complete,
    )


def _summarise_suite(home: Place, suite: str, file: Place, lengths: Callable[[str], dict[str, int]]) -> StoreSummary:
    """A suite's store; `lengths` gives those of a set's parts."""
    name = f"{suites_folder(home).name}/{suite}/{file.name}"
    try:
        header = read_header(file, HEADERS[suite], suite)
    except (StoreError, OSError) as error:
        return StoreSummary(name=name, problem=str(error).removeprefix(f"{file} "))
    total, problem = 0, None
    for texts, parts in header.parts.items():
        for number, part in enumerate(parts):
            size = lengths(texts).get(part_name(number))
            total += size or 0
            if size != part.bytes and problem is None:
                wrong = "is missing" if size is None else f"is {size} bytes long, not {part.bytes}"
                inner = f"probe/texts/{texts}/{part_name(number)}"
                problem = f"{inner} {wrong}; go on with: hsae cache build --suite {suite}"
    return StoreSummary(
        name=name,
        model=header.spec.model.id,
        hooks=header.spec.hooks,
        count=sum(header.sets.values()),
        bytes=total,
        problem=problem,
    )
