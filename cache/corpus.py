"""From text to token rows: where documents come from, and how they are packed.

Shapes: T context length. Packing is SAEBench's: a row starts with BOS, a document that starts inside a row has a BOS before it, a
document goes on in the next row after that row's own BOS; nothing is padded.
"""

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hsae.cache.config import CorpusConfig
from hsae.cache.errors import CorpusError
from hsae.cache.packaged import CORPORA, Document
from hsae.cache.weights import files_digest

TOKENISED_AT_ONCE = 64  # documents: the tokenizer takes them on all cores
SUFFIXES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, and a digest of what they are."""

    name: str
    digest: str
    documents: Callable[[], Iterator[Document]]
    """Starts over at the first document that is used."""

    def open(self) -> Iterator[str]:
        """The texts of `documents`."""
        return (document.text for document in self.documents())


def open_corpus(config: CorpusConfig) -> Corpus:
    """The documents `config` asks for. Raises CorpusError if they can't be had."""
    name, path = config.corpus, Path(config.corpus).expanduser()
    if name in CORPORA:
        packaged = CORPORA[name]()
        digest = _digest(hashlib.sha256(document.text.encode()).hexdigest() for document in packaged)
        every: Callable[[], Iterator[Document]] = lambda: iter(packaged)  # noqa: E731
    elif path.exists():
        files = _files(path)
        digest = files_digest(files)
        every = lambda: (Document(text, file.stem) for file in files for text in _read(file, config.column))  # noqa: E731
    elif name.count("/") <= 1 and not name.startswith((".", "~")) and path.suffix not in SUFFIXES:
        digest, every = _hub(config)
    else:
        raise CorpusError(
            f"corpus {name!r}: there is no such file or folder; a data set on the hub is written owner/name, and the packaged "
            f"ones are {', '.join(CORPORA)}"
        )

    def documents() -> Iterator[Document]:
        for index, document in enumerate(every()):
            if config.last_document is not None and index >= config.last_document:
                return
            if index >= config.first_document:
                yield document

    return Corpus(name, digest, documents)


def _digest(parts: Iterator[str]) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part.encode() + b"\n")
    return total.hexdigest()


def _files(path: Path) -> list[Path]:
    files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES) if path.is_dir() else [path]
    if not files or any(file.suffix not in SUFFIXES for file in files):
        raise CorpusError(f"corpus {str(path)!r}: no {', '.join(SUFFIXES)} file there; those are what can be read")
    return files


def _read(file: Path, column: str) -> Iterator[str]:
    try:
        if file.suffix == ".txt":
            yield file.read_text(encoding="utf-8")
        elif file.suffix == ".jsonl":
            with file.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _field(json.loads(line), column, f"{file}, line {number}")
        else:
            yield from _parquet(file, column)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CorpusError(f"{file} can't be read as {file.suffix[1:]}: {error}") from None


def _field(record: Any, column: str, where: str) -> str:
    value = record.get(column) if isinstance(record, dict) else None
    if not isinstance(value, str):
        keys = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise CorpusError(
            f"{where}: no text in column {column!r} (there is: {keys}); set cache.train.column and cache.eval.column"
        )
    return value


def _parquet(file: Path, column: str) -> Iterator[str]:
    _need("pyarrow", f"reading {file.name}")
    import pyarrow
    from pyarrow import parquet

    try:
        opened = parquet.ParquetFile(file)
        if column not in opened.schema_arrow.names:
            _field(dict.fromkeys(opened.schema_arrow.names), column, str(file))
        for batch in opened.iter_batches(columns=[column], batch_size=256):
            for value in batch.column(0).to_pylist():
                yield _field({column: value}, column, str(file))
    except pyarrow.ArrowInvalid as error:
        raise CorpusError(f"{file} is not a parquet file: {error}") from None


def _need(module: str, why: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise CorpusError(f"{why} needs the package {module}; run: pip install 'hsae[hub]'")


def _hub(config: CorpusConfig) -> tuple[str, Callable[[], Iterator[Document]]]:
    _need("datasets", f"corpus {config.corpus!r} (a data set on the hub)")
    from datasets import load_dataset
    from datasets.utils.logging import set_verbosity_error

    set_verbosity_error()
    try:
        from huggingface_hub import HfApi

        revision = HfApi().dataset_info(config.corpus, revision=config.revision, timeout=10.0).sha
        data = load_dataset(config.corpus, config.subset, split=config.split, revision=revision, streaming=True)
    except Exception as error:  # the client has no common base for network, access and naming errors
        raise CorpusError(
            f"data set {config.corpus!r} can't be opened ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); "
            "check the id and the network, or give a local file or folder with --set cache.train.corpus=PATH --set cache.eval.corpus=PATH"
        ) from None
    if config.shuffle_seed is not None:
        data = data.shuffle(seed=config.shuffle_seed, buffer_size=1)  # the order of shards only

    def documents() -> Iterator[Document]:
        for record in data:
            yield Document(_field(record, config.column, f"data set {config.corpus}"))

    return _digest(
        iter([config.corpus, str(revision), str(config.subset), config.split, str(config.shuffle_seed)])
    ), documents


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
