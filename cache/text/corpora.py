"""From text to token rows: where documents come from, and how they are packed.

Shapes: T context length. Packing is SAEBench's: a row starts with BOS, a document that starts inside a row has a BOS before it, a
document goes on in the next row after that row's own BOS; nothing is padded.
"""

import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from hsae.cache.errors import CorpusError
from hsae.cache.format.spec import CorpusConfig, Split
from hsae.cache.language_model.sources import files_digest
from hsae.cache.text.data_sets import (
    COMPRESSED,
    READERS,
    UNREADABLE,
    MissingColumn,
    decoded,
    file_kind,
    open_data_set,
    opened,
    placed_records,
    resolved_revision,
    streamed,
    values_of,
    whole,
)
from hsae.cache.text.python_text import CORPORA, MOST_CHARACTERS_MIXED, Document

TOKENISED_AT_ONCE = 64  # documents: the tokenizer takes them on all cores
KINDS = (".txt", *READERS)
OLDER_KINDS = (".txt", ".jsonl", ".parquet")
COMPARED_BYTES = 1 << 20
TEXT_TABLES: dict[Split, str] = {
    "train": "cache.train",
    "eval": "cache.eval",
    "forget": "unlearning.forget",
    "retain": "unlearning.retain",
    "autointerp": "autointerp.text",
}
"""Where a plan says which text a store is made of."""


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, and a digest of what they are."""

    name: str
    digest: str
    documents: Callable[[], Iterator[Document]]
    """Starts over at the first document that is used."""
    notes: tuple[str, ...] = ()
    """What people should know: files that are not read."""
    commit: str | None = None
    """The commit of a data set on the hub."""

    def open(self) -> Iterator[str]:
        """The texts of `documents`."""
        return (document.text for document in self.documents())


def open_corpus(config: CorpusConfig, split: Split = "train", *, anew: bool = False, older: bool = False) -> Corpus:
    """The documents `config` asks for. Raises CorpusError, naming keys of the table of `split`, if they can't be had.

    A row without text (null) is a document without tokens: document numbers are row numbers. With `anew` files are read for their digest
    in any case, not only if their sizes or times changed. With `older` a folder's files are those that hsae read before it told of the others.
    """
    name, path, table = config.corpus, _path(config), TEXT_TABLES[split]
    notes: list[str] = []
    commit = None
    if name in CORPORA:
        packaged = CORPORA[name]()
        digest = _digest(hashlib.sha256(document.text.encode()).hexdigest() for document in packaged)
        every: Callable[[], Iterator[Document]] = lambda: iter(packaged)  # noqa: E731
    elif path.exists():
        files, notes = _older_files(path) if older else _files(path, config.column)
        digest = files_digest(files, anew=anew)
        every = lambda: (document for file in files for document in _read(file, path, config.column, table))  # noqa: E731
    elif name.count("/") <= 1 and not name.startswith((".", "~")) and file_kind(path) not in KINDS:
        digest, every, commit = _hub(config, table)
    else:
        raise CorpusError(
            f"corpus {name!r}: there is no such file or folder; a data set on the hub is written owner/name, and the packaged "
            f"ones are {', '.join(CORPORA)}"
        )

    def documents() -> Iterator[Document]:
        index = -1
        for index, document in enumerate(every()):
            if config.last_document is not None and index >= config.last_document:
                return
            if index >= config.first_document:
                yield document
        if index < config.first_document:
            raise CorpusError(
                f"corpus {name!r} has {index + 1} document{'' if index == 0 else 's'} (a .txt file is one), and {table}.first_document = "
                f"{config.first_document} leaves none of them; lower {table}.first_document, or use more text"
            )

    return Corpus(name, digest, documents, tuple(notes), commit)


def check_corpus(corpus: Corpus) -> None:
    """Read a corpus's first documents, before a model is loaded for it. Raises CorpusError if they can't be had."""
    for _ in islice(corpus.documents(), TOKENISED_AT_ONCE):
        pass


def _digest(parts: Iterator[str]) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part.encode() + b"\n")
    return total.hexdigest()


# ---- files --------------------------------------------------------------------------------------------------------------


def _path(config: CorpusConfig) -> Path:
    try:
        return Path(config.corpus).expanduser()
    except RuntimeError:  # ~ of someone who isn't there
        return Path(config.corpus)


def _files(path: Path, column: str) -> tuple[list[Path], list[str]]:
    """The files of a corpus in the order in which they are read, and what to tell of those that are not.

    In a folder links are followed, each file is read once (under the first of its names), and what is hidden is left out.
    """
    listed = f"{', '.join(KINDS)} (all but .parquet also as {', '.join(COMPRESSED)})"
    if not path.is_dir():
        if not path.is_file() or file_kind(path) not in KINDS:
            raise CorpusError(f"corpus {str(path)!r} can't be read; what can be read are files of the kinds {listed}")
        return [path], []
    found: list[Path] = []
    seen: set[Path] = set()
    left = Counter[str]()
    for file in sorted(_walk(path)):
        kind = file_kind(file)
        if not file.is_file():
            left["broken link" if file.is_symlink() else "no plain file"] += kind in KINDS
        elif file.name.startswith("."):
            left["hidden"] += kind in KINDS
        elif kind not in KINDS or (kind == ".parquet" and file.suffix.lower() != kind):
            left[file.suffix or "without suffix"] += not file.name.startswith("_")
        elif kind in (".csv", ".tsv") and not _has(file, column):
            left[f"{kind} without a column {column!r}"] += 1
        elif file.name != whole(file.name):
            raise CorpusError(f"corpus {str(path)!r}: the name of the file {file.name!r} is not UTF-8; rename it")
        elif (real := file.resolve()) in seen:
            left["the same file again"] += 1
        else:
            seen.add(real)
            found.append(file)
    told = ", ".join(f"{count} {what}" for what, count in sorted(left.items()) if count)
    if not found:
        raise CorpusError(
            f"corpus {str(path)!r}: no {', '.join(KINDS)} file there; those are what can be read"
            + (f" (there is: {told})" if told else "")
        )
    return found, [f"corpus {str(path)!r}: files read: {len(found)}; not read: {told}"] if told else []


def _older_files(path: Path) -> tuple[list[Path], list[str]]:
    if not path.is_dir():
        return [path], []
    found = sorted(file for file in path.rglob("*") if file.suffix in OLDER_KINDS and file.is_file())
    return found, [
        f"corpus {str(path)!r}: files read: {len(found)}, those that the older hsae read which began the store"
    ]


def _walk(path: Path) -> Iterator[Path]:
    """Every entry below a folder that is no folder, but for those in hidden ones; no folder is entered twice."""

    def refuse(error: OSError) -> None:
        raise CorpusError(f"corpus {str(path)!r} can't be read: {error}") from None

    entered = set()
    for folder, folders, names in os.walk(path, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = (
            [] if real in entered else sorted(name for name in folders if not name.startswith((".", "_delta_log")))
        )
        if real not in entered:
            yield from (Path(folder) / name for name in names)
        entered.add(real)


def _has(file: Path, column: str) -> bool:
    """Whether a .csv file has a column."""
    try:
        next(placed_records(file, [column]), None)
    except MissingColumn:
        return False
    except CorpusError:
        pass  # which is said when it is read
    return True


def _read(file: Path, root: Path, column: str, table: str) -> Iterator[Document]:
    inside = [folder for folder in (*reversed(file.parents), file) if folder == root or root in folder.parents]
    named = next(folder for folder in inside if file_kind(folder) in KINDS)  # the parts of a folder x.parquet are of x
    topic = named.stem if named.suffix.lower() not in COMPRESSED else Path(named.stem).stem
    if file_kind(file) != ".txt":
        try:
            for where, (value,) in placed_records(file, [column]):
                yield Document(_text(value, where, column, table), topic)
        except MissingColumn as error:
            raise CorpusError(f"{error}; set {table}.column") from None
        return
    try:
        with opened(file) as data:
            text = decoded(data.read()).replace("\r\n", "\n").replace("\r", "\n")
    except UNREADABLE as error:
        raise CorpusError(f"{file} can't be read as txt: {error}; save it as UTF-8") from None
    if text.count("\0") > len(text) // 10:
        raise CorpusError(f"{file} is not text in UTF-8: much of it are null characters")
    yield Document(text, topic)


def _text(value: Any, where: str, column: str, table: str) -> str:
    if value is not None and not isinstance(value, str):
        raise CorpusError(f"{where}: column {column!r} holds {value!r}, not text; set {table}.column")
    return value or ""


def _hub(config: CorpusConfig, table: str) -> tuple[str, Callable[[], Iterator[Document]], str]:
    name, instead = config.corpus, f"give a local file or folder of its own with --set {table}.corpus=PATH"
    revision = resolved_revision(name, config.revision, instead)
    data = open_data_set(name, revision, config.subset, config.split, instead)
    if config.shuffle_seed is not None:
        data = data.shuffle(seed=config.shuffle_seed, buffer_size=1)  # the order of shards only

    def documents() -> Iterator[Document]:
        for number, record in enumerate(streamed(data, name, instead), 1):
            where = f"data set {name}, row {number}"
            try:
                (value,) = values_of(record, [config.column], where)
            except MissingColumn as error:
                raise CorpusError(f"{error}; set {table}.column") from None
            yield Document(_text(value, where, config.column, table))

    parts = [config.corpus, revision, str(config.subset), config.split, str(config.shuffle_seed)]
    return _digest(iter(parts)), documents, revision


# ---- text in common -----------------------------------------------------------------------------------------------------


def common_text(one: CorpusConfig, other: CorpusConfig) -> str | None:
    """The text that two windows of documents have in common, in words, or None. A file counts by what it holds, whatever its name.

    Windows are compared, not what stores take of them; of a data set on the hub only what the plan says, nothing is asked there.
    """
    names, local = {one.corpus, other.corpus}, [_path(each) for each in (one, other)]
    if names <= CORPORA.keys():
        if len(names) == 1:
            return _in_both(one, other, repr(one.corpus))
        if "python-docs" in names and "python-source" not in names:
            return f"{' and '.join(sorted(names))} are made of the same docstrings"
        texts = [{document.text[:MOST_CHARACTERS_MIXED] for document in _packaged(each)} for each in (one, other)]
        count = len(texts[0] & texts[1])
        return f"{' and '.join(sorted(names))} have {count} of these documents in common" if count else None
    if names & CORPORA.keys():
        return None
    if all(path.exists() for path in local):
        return _in_both_files(one, other, *(_files(path, one.column)[0] for path in local))
    if any(path.exists() for path in local) or one.corpus.lower() != other.corpus.lower():
        return None
    subset = (one.subset or "default") == (other.subset or "default")
    if not subset or one.column != other.column or not set(one.split.split("+")) & set(other.split.split("+")):
        return None
    if (one.split, one.shuffle_seed) == (other.split, other.shuffle_seed):
        return _in_both(one, other, repr(one.corpus))
    return f"both read {one.corpus!r}, but not in the same order, so that first_document and last_document do not part them"


def _packaged(config: CorpusConfig) -> Iterator[Document]:
    return islice(CORPORA[config.corpus](), config.first_document, config.last_document)


def _in_both(
    one: CorpusConfig, other: CorpusConfig, what: str, starts: tuple[int, int] = (0, 0), length: float = math.inf
) -> str | None:
    """Whether two windows meet in a text that begins at document `starts` of each and has `length` documents."""
    first = max(one.first_document - starts[0], other.first_document - starts[1], 0)
    last = min(
        length,
        *(
            math.inf if end is None else end - start
            for end, start in zip((one.last_document, other.last_document), starts, strict=True)
        ),
    )
    if first >= last:
        return None
    return f"both read {what}" + (
        f" from document {first} on" if last == math.inf else f", documents {first} to {last - 1:.0f} of it"
    )


def _in_both_files(one: CorpusConfig, other: CorpusConfig, mine: list[Path], others: list[Path]) -> str | None:
    readable = [file_kind(file) == ".txt" or one.column == other.column for file in mine]
    twins = [(place, place) for place in range(len(mine))]
    if not all(readable) or [file.resolve() for file in mine] != [file.resolve() for file in others]:
        by_size: dict[int, list[int]] = {}
        for place, file in enumerate(others):
            by_size.setdefault(file.stat().st_size, []).append(place)
        twins = [
            (place, twin)
            for place, file in enumerate(mine)
            if readable[place] and file.stat().st_size
            for twin in by_size.get(file.stat().st_size, ())
            if _alike(file, others[twin])
        ]
    if len(mine) == len(others) == len(twins) and all(place == twin for place, twin in twins):
        same = "" if one.corpus == other.corpus else f", which is {other.corpus!r}"
        return _in_both(one, other, f"{one.corpus!r}{same}")
    whole = all((window.first_document, window.last_document) == (0, None) for window in (one, other))
    for place, twin in twins:
        if whole:  # its documents need not be counted
            return f"both read {str(mine[place])!r}"
        starts = (_documents(mine[:place], one.column), _documents(others[:twin], one.column))
        if found := _in_both(one, other, repr(str(mine[place])), starts, _documents([mine[place]], one.column)):
            return found
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
    return sum(1 if file_kind(file) == ".txt" else sum(1 for _ in placed_records(file, [column])) for file in files)


@dataclass
class Packer:
    """Packs documents into rows of T tokens; its fields are the whole state, so that packing can go on later."""

    context: int
    bos_id: int | None
    """None packs without BOS."""
    documents: int = 0
    """Documents begun."""
    taken: int = 0
    """Tokens of the last document that are in finished rows or in `row`."""
    row: list[int] = field(default_factory=list)
    """The row being filled."""

    def state(self) -> dict[str, Any]:
        """JSON-ready state."""
        return {"documents": self.documents, "taken": self.taken, "row": self.row}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.documents, self.taken, self.row = int(state["documents"]), int(state["taken"]), list(state["row"])

    def pack(self, documents: Iterator[Sequence[int]]) -> Iterator[list[int]]:
        """Finished rows; whenever one is given out, the state is that after it.

        `documents` starts at the first document, or, with a restored state, at the last one it had begun.
        """
        for position, tokens in enumerate(documents):
            if (
                position > 0 or self.documents == 0
            ):  # else it is the document that was being packed when the state was taken
                self.documents, self.taken = self.documents + 1, 0
                if tokens and self.row and self.bos_id is not None:
                    self.row.append(self.bos_id)
                    if len(self.row) == self.context:
                        finished, self.row = self.row, []
                        yield finished
            while self.taken < len(tokens):
                if not self.row and self.bos_id is not None and tokens[self.taken] != self.bos_id:
                    self.row.append(self.bos_id)
                part = tokens[self.taken : self.taken + self.context - len(self.row)]
                self.row.extend(part)
                self.taken += len(part)
                if len(self.row) == self.context:
                    finished, self.row = self.row, []
                    yield finished


def tokenised(texts: Iterator[str], tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of each document alone, without BOS or EOS, not truncated."""
    group: list[str] = []
    for text in texts:
        group.append(text)
        if len(group) == TOKENISED_AT_ONCE:
            yield from tokenizer(group, add_special_tokens=False, verbose=False).input_ids
            group = []
    if group:
        yield from tokenizer(group, add_special_tokens=False, verbose=False).input_ids
