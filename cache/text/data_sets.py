"""Rows of several columns from local files and from data sets on the hub.

Files are .jsonl, .csv, .tsv and .parquet, the first three also compressed (.gz, .bz2, .xz, .zst). Text is UTF-8, with
or without a byte order mark; bytes are taken for UTF-8, and half of a surrogate pair, which no tokenizer takes,
becomes U+FFFD.
"""

import bz2
import codecs
import contextlib
import csv
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import ValidationError

from hsae.cache.config import Config
from hsae.cache.errors import CorpusError, UnreachableError, need
from hsae.cache.files import parse_json, parse_toml

TableT = TypeVar("TableT", bound=Config)


class MissingColumn(CorpusError):
    """A file or row has no such column."""


COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
HALF = re.compile("[\ud800-\udfff]")
LONGEST_FIELD = 1 << 30  # characters of one cell of a .csv file
UNREADABLE = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, csv.Error)


def read_tables(path: Path, name: str, kind: type[TableT]) -> list[TableT]:
    """The [[name]] tables of a TOML file that describes local files. Raises CorpusError naming what is wrong."""
    try:
        return [kind(**table) for table in parse_toml(path.read_bytes())[name]]
    except KeyError:
        raise CorpusError(f"{path} has no [[{name}]] table") from None
    except (ValidationError, TypeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        raise CorpusError(f"{path}: [[{name}]] {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (OSError, ValueError) as error:
        raise CorpusError(f"{path} is not valid TOML: {error}") from None


def records(file: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """The values of some columns of a file, row by row. Raises CorpusError naming what is wrong where."""
    if not file.is_file():
        raise CorpusError(f"there is no file {file}")
    if file_kind(file) not in READERS:
        raise CorpusError(f"{file}: rows are read from {', '.join(READERS)} files")
    return (values for _, values in records_with_places(file, columns))


def records_with_places(file: Path, columns: Sequence[str]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The rows of `records`, each with the words that say where it is."""
    kind = file_kind(file)
    try:
        for place, row in READERS[kind](file, columns):
            where = f"{file}, {place}"
            yield where, read_values(row, columns, where)
    except CorpusError:
        raise
    except UNREADABLE as error:
        raise CorpusError(f"{file} can't be read as {kind[1:]}: {error}") from None


def file_kind(file: Path) -> str:
    """The suffix that tells how a file is read: in lower case, without that of its compression."""
    name = file.name.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return Path(name).suffix


def open_decompressed(file: Path) -> BinaryIO:
    """A file's bytes, decompressed if its name says so."""
    suffix = file.suffix.lower()
    if suffix == ".zst":
        need(f"reading {file.name}", "pyarrow", "hub", kind=CorpusError)
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))
    how: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return how.get(suffix, open)(file, "rb")  # type: ignore[no-any-return]


def decode_text(data: bytes) -> str:
    """UTF-8 as text. Raises UnicodeDecodeError."""
    return replace_surrogates(data.decode("utf-8", "surrogatepass"))


def replace_surrogates(text: str) -> str:
    """A text with U+FFFD in place of halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return HALF.sub("\ufffd", text)
    return text


def read_values(row: dict[str, Any], columns: Sequence[str], where: str) -> tuple[Any, ...]:
    """Values of some columns of a row, never bytes. Raises CorpusError naming column and place."""
    _check(row, columns, where)
    return tuple(_value(row[column], column, where) for column in columns)


def _value(value: Any, column: str, where: str) -> Any:
    if isinstance(value, bytes):
        try:
            return decode_text(value)
        except UnicodeDecodeError as error:
            raise CorpusError(f"{where}: column {column!r} holds bytes that are not UTF-8 ({error.reason})") from None
    if isinstance(value, list | dict):
        raise CorpusError(f"{where}: column {column!r} holds a {type(value).__name__}, not one value")
    return replace_surrogates(value) if isinstance(value, str) else value


def _check(row: Any, columns: Sequence[str], where: str) -> None:
    for column in columns:
        if not isinstance(row, dict) or column not in row:
            there = ", ".join(map(str, row)) if isinstance(row, dict) else f"a {type(row).__name__}"
            raise MissingColumn(f"{where}: no column {column!r} (there is: {there})")


def _lines(file: Path) -> Iterator[str]:
    """Lines of text with their ends, whichever they have."""
    with open_decompressed(file) as blocks:
        for number, block in enumerate(blocks):
            block = block if number else block.removeprefix(codecs.BOM_UTF8)
            yield from (line.decode("utf-8", "surrogatepass") for line in block.splitlines(keepends=True))


Rows = Iterator[tuple[str, dict[str, Any]]]
"""Rows of a file, each with its line or number."""


def _jsonl(file: Path, columns: Sequence[str]) -> Rows:
    for number, line in enumerate(_lines(file), 1):
        if line.strip():
            try:
                yield f"line {number}", parse_json(line.rstrip("\r\n"))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None


def _csv(file: Path, columns: Sequence[str]) -> Rows:
    csv.field_size_limit(LONGEST_FIELD)
    rows = csv.DictReader(_lines(file), strict=True, delimiter="\t" if file_kind(file) == ".tsv" else ",")
    _check(dict.fromkeys(rows.fieldnames or ()), columns, str(file))
    for number, row in enumerate(rows, 1):
        if None in row:
            raise CorpusError(
                f"{file}, row {number} has more cells than the header; put text that holds commas in quotes"
            )
        yield f"row {number}", row


def _parquet(file: Path, columns: Sequence[str]) -> Rows:
    need(f"reading {file.name}", "pyarrow", "hub", kind=CorpusError)
    import pyarrow
    from pyarrow import parquet

    def cells(array: Any) -> list[Any]:
        try:
            return array.to_pylist()  # type: ignore[no-any-return]
        except UnicodeDecodeError:
            return array.cast(pyarrow.large_binary()).to_pylist()  # type: ignore[no-any-return]

    try:
        with parquet.ParquetFile(file) as table:
            _check(dict.fromkeys(table.schema_arrow.names), columns, str(file))
            batches = table.iter_batches(columns=list(dict.fromkeys(columns)), batch_size=256)
            rows = (row for batch in batches for row in zip(*(cells(batch[name]) for name in columns), strict=True))
            for number, row in enumerate(rows, 1):
                yield f"row {number}", dict(zip(columns, row, strict=True))
    except pyarrow.ArrowException as error:
        raise CorpusError(f"{file} is not a parquet file: {error}") from None


READERS = {".jsonl": _jsonl, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}


INSTEAD = (
    "use texts that ship with Python with --set suite.tasks=python, or local files with --set suite.tasks=FILE.toml"
)
"""What can be done without a hub data set."""


def open_data_set(name: str, revision: str | None, subset: str | None, split: str, instead: str = INSTEAD) -> Any:
    """A hub data set's split, streamed. Raises CorpusError, with what to do instead."""
    need(f"data set {name!r} on the hub", "datasets", "hub", kind=CorpusError)
    from datasets import load_dataset
    from datasets.utils.logging import set_verbosity_error

    set_verbosity_error()
    with reaching(name, instead):
        return load_dataset(name, subset, split=split, revision=revision, streaming=True, trust_remote_code=False)


def stream_rows(data: Any, name: str, instead: str = INSTEAD) -> Iterator[Any]:
    """The rows of an opened data set. Raises CorpusError if the hub fails meanwhile."""
    with reaching(name, instead):
        yield from data


def resolve_revision(name: str, revision: str | None, instead: str = INSTEAD) -> str:
    """The commit of a hub data set's revision now. Raises CorpusError, with what to do instead."""
    need(f"data set {name!r} on the hub", "datasets", "hub", kind=CorpusError)
    from huggingface_hub import HfApi

    with reaching(name, instead):
        return str(HfApi().dataset_info(name, revision=revision, timeout=10.0).sha)


@contextlib.contextmanager
def reaching(name: str, instead: str) -> Iterator[None]:
    """Turns what the hub's client raises into UnreachableError, with what to do instead."""
    try:
        yield
    except Exception as error:  # the client has no common base for network, access and naming errors
        first = str(error).splitlines()[0] if str(error) else ""
        raise UnreachableError(
            f"data set {name!r} can't be found on the hub ({type(error).__name__}: {first}); check the network, or "
            f"{instead}"
        ) from None
