"""What evaluation stores lie in a folder or at a URL of stores, whichever suite they are of."""

from dataclasses import dataclass

from hsae.cache.errors import StoreError
from hsae.cache.storage.paths import Place, children, sizes
from hsae.cache.suites.probe_store import ProbeHeader
from hsae.cache.suites.ravel_store import RavelHeader
from hsae.cache.suites.residual_sets import part_name
from hsae.cache.suites.specs import SUITES
from hsae.cache.suites.suite_files import read_header

FOLDER, SETS = "probe", "texts"
HEADERS: dict[str, type[ProbeHeader] | type[RavelHeader]] = {**dict.fromkeys(SUITES, ProbeHeader), "ravel": RavelHeader}


@dataclass(frozen=True, kw_only=True)
class SuiteStoreSummary:
    """One suite's store."""

    name: str
    """Relative to the folder or URL."""
    model: str = ""
    hooks: tuple[str, ...] = ()
    texts: int = 0
    bytes: int = 0
    """Of its sets of residuals; suites share sets, so these don't add up."""
    problem: str | None = None


def list_suite_stores(home: Place) -> list[SuiteStoreSummary]:
    """The stores in a folder or at a URL, by suite."""
    summaries: list[SuiteStoreSummary] = []
    lengths: dict[str, dict[str, int]] = {}
    for suite in sorted(HEADERS):
        try:
            files = children(home / FOLDER / suite)
        except (FileNotFoundError, NotADirectoryError):
            continue
        shown = (file for file in files if file.name.endswith(".json") and not file.name.startswith("."))
        summaries += [_summarise(home, suite, file, lengths) for file in shown]
    return summaries


def _summarise(home: Place, suite: str, file: Place, lengths: dict[str, dict[str, int]]) -> SuiteStoreSummary:
    """One store; `lengths` are those of the parts of the sets that were looked at."""
    name = f"{FOLDER}/{suite}/{file.name}"
    try:
        header: ProbeHeader | RavelHeader = read_header(file, HEADERS[suite], suite)
    except (StoreError, OSError) as error:
        return SuiteStoreSummary(name=name, problem=str(error).removeprefix(f"{file} "))
    held, problem = 0, None
    for texts, parts in header.parts.items():
        if texts not in lengths:
            lengths[texts] = sizes(home / FOLDER / SETS / texts)
        for number, part in enumerate(parts):
            size = lengths[texts].get(part_name(number))
            held += size or 0
            if size != part.bytes and problem is None:
                wrong = "is missing" if size is None else f"is {size} bytes long, not {part.bytes}"
                problem = (
                    f"{FOLDER}/{SETS}/{texts}/{part_name(number)} {wrong}; go on with: hsae cache build --suite {suite}"
                )
    return SuiteStoreSummary(
        name=name,
        model=header.spec.model.id,
        hooks=header.spec.hooks,
        texts=sum(header.sets.values()),
        bytes=held,
        problem=problem,
    )
