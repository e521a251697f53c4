"""Text that two corpora have in common: whether documents that are evaluated on were trained on."""

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from hsae.cache.config import CorpusConfig
from hsae.cache.text.corpora import corpus_files, corpus_path
from hsae.cache.text.data_sets import file_kind, records_with_places
from hsae.cache.text.python_text import CORPORA, MOST_CHARACTERS_MIXED

COMPARED_BYTES = 1 << 20


def common_text(one: CorpusConfig, other: CorpusConfig) -> str | None:
    """The text that two windows of documents have in common, in words, or None.

    Files are compared by content, windows as they are, whatever stores take of them; of data sets on the hub only what
    the plan says is compared.
    """
    names, local = {one.corpus, other.corpus}, [corpus_path(each) for each in (one, other)]
    if names <= CORPORA.keys():
        if len(names) == 1:
            return _in_both(one, other, repr(one.corpus))
        if "python-docs" in names and "python-source" not in names:
            return f"{' and '.join(sorted(names))} are made of the same docstrings"
        windows = (islice(CORPORA[each.corpus](), each.first_document, each.last_document) for each in (one, other))
        mine, others = ({document.text[:MOST_CHARACTERS_MIXED] for document in window} for window in windows)
        count = len(mine & others)
        return f"{' and '.join(sorted(names))} have {count} of these documents in common" if count else None
    if names & CORPORA.keys():
        return None
    if all(path.exists() for path in local):
        return _in_both_files(one, other, *(corpus_files(corpus_path(each), each.column)[0] for each in (one, other)))
    if any(path.exists() for path in local) or one.corpus.lower() != other.corpus.lower():
        return None
    subset = (one.subset or "default") == (other.subset or "default")
    if not subset or one.column != other.column or not set(one.split.split("+")) & set(other.split.split("+")):
        return None
    if (one.split, one.shuffle_seed) == (other.split, other.shuffle_seed):
        return _in_both(one, other, repr(one.corpus))
    how = "but not in the same order, so that first_document and last_document do not part them"
    return f"both read {one.corpus!r}, {how}"


def _in_both(
    one: CorpusConfig, other: CorpusConfig, what: str, starts: tuple[int, int] = (0, 0), length: float = math.inf
) -> str | None:
    """Whether two windows meet in a text that begins at document `starts` of each and has `length` documents."""
    windows = list(zip((one, other), starts, strict=True))
    first = max(0, *(window.first_document - start for window, start in windows))
    ends = [window.last_document - start for window, start in windows if window.last_document is not None]
    last = min([length, *ends])
    if first >= last:
        return None
    where = f" from document {first} on" if last == math.inf else f", documents {first} to {last - 1:.0f} of it"
    return f"both read {what}{where}"


def _in_both_files(one: CorpusConfig, other: CorpusConfig, mine: list[Path], others: list[Path]) -> str | None:
    readable = [file_kind(file) == ".txt" or one.column == other.column for file in mine]
    twins = [(place, place) for place in range(len(mine))]
    if not all(readable) or [file.resolve() for file in mine] != [file.resolve() for file in others]:
        by_size = defaultdict[int, list[int]](list)
        for place, file in enumerate(others):
            by_size[file.stat().st_size].append(place)
        twins = [
            (place, twin)
            for place, file in enumerate(mine)
            if readable[place] and (size := file.stat().st_size)
            for twin in by_size[size]
            if _alike(file, others[twin])
        ]
    if len(mine) == len(others) == len(twins) and all(place == twin for place, twin in twins):
        same = "" if one.corpus == other.corpus else f", which is {other.corpus!r}"
        return _in_both(one, other, f"{one.corpus!r}{same}")
    whole = all((window.first_document, window.last_document) == (0, None) for window in (one, other))
    for place, twin in twins:
        if whole:  # its documents need not be counted
            return f"both read {str(mine[place])!r}"
        starts = (_documents(mine[:place], one.column), _documents(others[:twin], other.column))
        if shared := _in_both(one, other, repr(str(mine[place])), starts, _documents([mine[place]], one.column)):
            return shared
    return None


def _alike(file: Path, other: Path) -> bool:
    """Whether two files of one size are the same or copies, by their first and last bytes: text may be large."""
    if file.samefile(other):
        return True
    end = max(0, file.stat().st_size - COMPARED_BYTES)
    with file.open("rb") as mine, other.open("rb") as others:
        return all(
            mine.seek(place) == others.seek(place) and mine.read(COMPARED_BYTES) == others.read(COMPARED_BYTES)
            for place in (0, end)
        )


def _documents(files: Sequence[Path], column: str) -> int:
    return sum(
        1 if file_kind(file) == ".txt" else sum(1 for _ in records_with_places(file, [column])) for file in files
    )
