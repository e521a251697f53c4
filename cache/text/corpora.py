"""Where documents come from: files, folders, data sets on the hub, and what ships with Python."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsae.cache.config import CorpusConfig, Split
from hsae.cache.errors import CorpusError
from hsae.cache.files import files_digest
from hsae.cache.text import data_sets
from hsae.cache.text.python_text import CORPORA, Document

KINDS = (".txt", *data_sets.READERS)
OLDER_KINDS = (".txt", ".jsonl", ".parquet")
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
    documents: Callable[[], Iterator[Document]]  # starts over at the first document that is used
    notes: tuple[str, ...] = ()  # what people should know: files that are not read
    commit: str | None = None  # the commit of a data set on the hub

    def open(self) -> Iterator[str]:
        """The texts of `documents`."""
        return (document.text for document in self.documents())


def open_corpus(config: CorpusConfig, split: Split = "train", *, anew: bool = False, older: bool = False) -> Corpus:
    """The documents `config` asks for. Raises CorpusError, naming keys of the table of `split`, if they can't be had.

    A row without text (null) is a document without tokens: document numbers are row numbers. With `anew` files are
    read for their digest in any case, not only if their sizes or times changed. With `older` a folder's files are
    those that hsae read before it told of the others.
    """
    name, path, table = config.corpus, corpus_path(config), TEXT_TABLES[split]
    notes: list[str] = []
    commit = None
    if name in CORPORA:
        read: Callable[[], Iterable[Document]] = CORPORA[name]
        digest = _digest(hashlib.sha256(document.text.encode()).hexdigest() for document in read())
    elif path.exists():
        files, notes = _older_files(path) if older else corpus_files(path, config.column)
        digest = files_digest(files, anew=anew)
        read = lambda: (document for file in files for document in _read(file, path, config.column, table))  # noqa: E731
    elif name.count("/") <= 1 and not name.startswith((".", "~")) and data_sets.file_kind(path) not in KINDS:
        digest, read, commit = _hub(config, table)
    else:
        raise CorpusError(
            f"corpus {name!r}: there is no such file or folder; a data set on the hub is written owner/name, and the "
            f"packaged ones are {', '.join(CORPORA)}"
        )

    def documents() -> Iterator[Document]:
        index = -1
        for index, document in enumerate(read()):
            if config.last_document is not None and index >= config.last_document:
                return
            if index >= config.first_document:
                yield document
        if index < config.first_document:
            raise CorpusError(
                f"corpus {name!r} has {index + 1} document{'' if index == 0 else 's'} (a .txt file is one), and "
                f"{table}.first_document = {config.first_document} leaves none of them; "
                f"lower {table}.first_document, or use more text"
            )

    return Corpus(name, digest, documents, tuple(notes), commit)


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("".join(f"{part}\n" for part in parts).encode()).hexdigest()


# ---- files ---------------------------------------------------------------------


def corpus_path(config: CorpusConfig) -> Path:
    """Where a corpus lies if it is of files."""
    try:
        return Path(config.corpus).expanduser()
    except RuntimeError:  # ~ of someone who isn't there
        return Path(config.corpus)


def corpus_files(path: Path, column: str) -> tuple[list[Path], list[str]]:
    """(files of a corpus in order, what to tell of others); links are followed, each file is read once."""
    if not path.is_dir():
        if not path.is_file() or data_sets.file_kind(path) not in KINDS:
            kinds = f"{', '.join(KINDS)} (all but .parquet also as {', '.join(data_sets.COMPRESSED)})"
            raise CorpusError(f"corpus {str(path)!r} can't be read; what can be read are files of the kinds {kinds}")
        return [path], []
    files: list[Path] = []
    seen: set[Path] = set()
    ignored = Counter[str]()
    for file in sorted(_walk(path)):
        kind = data_sets.file_kind(file)
        if not file.is_file():
            ignored["broken link" if file.is_symlink() else "no plain file"] += kind in KINDS
        elif file.name.startswith("."):
            ignored["hidden"] += kind in KINDS
        elif kind not in KINDS or (kind == ".parquet" and file.suffix.lower() != kind):
            ignored[file.suffix or "without suffix"] += not file.name.startswith("_")
        elif kind in (".csv", ".tsv") and not _has(file, column):
            ignored[f"{kind} without a column {column!r}"] += 1
        elif file.name != data_sets.replace_surrogates(file.name):
            raise CorpusError(f"corpus {str(path)!r}: the name of the file {file.name!r} is not UTF-8; rename it")
        elif (real := file.resolve()) in seen:
            ignored["the same file again"] += 1
        else:
            seen.add(real)
            files.append(file)
    others = ", ".join(f"{count} {what}" for what, count in sorted(ignored.items()) if count)
    if not files:
        raise CorpusError(
            f"corpus {str(path)!r}: no {', '.join(KINDS)} file there; those are what can be read"
            + (f" (there is: {others})" if others else "")
        )
    return files, [f"corpus {str(path)!r}: files read: {len(files)}; not read: {others}"] if others else []


def _older_files(path: Path) -> tuple[list[Path], list[str]]:
    if not path.is_dir():
        return [path], []
    files = sorted(file for file in path.rglob("*") if file.suffix in OLDER_KINDS and file.is_file())
    return files, [
        f"corpus {str(path)!r}: files read: {len(files)}, those that the older hsae read which began the store"
    ]


def _walk(path: Path) -> Iterator[Path]:
    """Every entry below a folder that is no folder, but for those in hidden ones; no folder is visited twice."""

    def refuse(error: OSError) -> None:
        raise CorpusError(f"corpus {str(path)!r} can't be read: {error}") from None

    visited = set()
    for folder, folders, names in os.walk(path, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "_delta_log")))
        yield from (Path(folder) / name for name in names)


def _has(file: Path, column: str) -> bool:
    """Whether a .csv file has a column."""
    try:
        next(data_sets.records_with_places(file, [column]), None)
    except CorpusError as error:  # any other is raised when the file is read
        return not isinstance(error, data_sets.MissingColumn)
    return True


def _read(file: Path, root: Path, column: str, table: str) -> Iterator[Document]:
    paths = (path for path in (*reversed(file.parents), file) if path == root or root in path.parents)
    # the parts of a folder x.parquet are of x
    source = next(path for path in paths if data_sets.file_kind(path) in KINDS)
    topic = source.stem if source.suffix.lower() not in data_sets.COMPRESSED else Path(source.stem).stem
    if data_sets.file_kind(file) != ".txt":
        rows = data_sets.records_with_places(file, [column])
        yield from (Document(text, topic) for text in _texts(rows, column, table))
        return
    try:
        with data_sets.open_decompressed(file) as data:
            text = data_sets.decode_text(data.read()).replace("\r\n", "\n").replace("\r", "\n")
    except data_sets.UNREADABLE as error:
        raise CorpusError(f"{file} can't be read as txt: {error}; save it as UTF-8") from None
    if text.count("\0") > len(text) // 10:
        raise CorpusError(f"{file} is not text in UTF-8: much of it are null characters")
    yield Document(text, topic)


def _texts(rows: Iterator[tuple[str, tuple[Any, ...]]], column: str, table: str) -> Iterator[str]:
    """The text of each row; "" for null."""
    try:
        for where, (value,) in rows:
            if value is not None and not isinstance(value, str):
                raise CorpusError(f"{where}: column {column!r} holds {value!r}, not text; set {table}.column")
            yield value or ""
    except data_sets.MissingColumn as error:
        raise CorpusError(f"{error}; set {table}.column") from None


def _hub(config: CorpusConfig, table: str) -> tuple[str, Callable[[], Iterator[Document]], str]:
    name, instead = config.corpus, f"give a local file or folder of its own with --set {table}.corpus=PATH"
    revision = data_sets.resolve_revision(name, config.revision, instead)
    data = data_sets.open_data_set(name, revision, config.subset, config.split, instead)
    if config.shuffle_seed is not None:
        data = data.shuffle(seed=config.shuffle_seed, buffer_size=1)  # the order of shards only

    def rows() -> Iterator[tuple[str, tuple[Any, ...]]]:
        for number, record in enumerate(data_sets.stream_rows(data, name, instead), 1):
            where = f"data set {name}, row {number}"
            yield where, data_sets.read_values(record, [config.column], where)

    parts = [config.corpus, revision, str(config.subset), config.split, str(config.shuffle_seed)]
    return _digest(parts), lambda: map(Document, _texts(rows(), config.column, table)), revision
