"""Rows of several columns from local files and from data sets on the hub."""

import csv
import importlib.util
import json
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from hsae.cache.config import Config
from hsae.cache.errors import CorpusError

TableT = TypeVar("TableT", bound=Config)


def described(path: Path, name: str, kind: type[TableT]) -> list[TableT]:
    """The [[name]] tables of a TOML file that describes local files. Raises CorpusError naming what is wrong."""
    try:
        return [kind(**table) for table in tomllib.loads(path.read_text(encoding="utf-8"))[name]]
    except KeyError:
        raise CorpusError(f"{path} has no [[{name}]] table") from None
    except tomllib.TOMLDecodeError as error:
        raise CorpusError(f"{path} is not valid TOML: {error}") from None
    except (ValidationError, TypeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        raise CorpusError(f"{path}: [[{name}]] {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def records(file: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """The values of some columns of a .csv, .jsonl or .parquet file, row by row. Raises CorpusError naming what is wrong where."""
    if not file.is_file():
        raise CorpusError(f"there is no file {file}")
    if file.suffix == ".jsonl":
        yield from _jsonl(file, columns)
    elif file.suffix == ".csv":
        yield from _csv(file, columns)
    elif file.suffix == ".parquet":
        yield from _parquet(file, columns)
    else:
        raise CorpusError(f"{file}: rows are read from .csv, .jsonl and .parquet files")


def _jsonl(file: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    row = json.loads(line)
                    _check(row if isinstance(row, dict) else {}, columns, f"{file}, line {number}")
                    yield tuple(row[column] for column in columns)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CorpusError(f"{file} can't be read as jsonl: {error}") from None


def _csv(file: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            for number, row in enumerate(csv.DictReader(lines, strict=True), 1):
                _check({key: row[key] for key in row if key is not None}, columns, f"{file}, row {number}")
                yield tuple(row[column] for column in columns)
    except (UnicodeDecodeError, csv.Error) as error:
        raise CorpusError(f"{file} can't be read as csv: {error}") from None


def _parquet(file: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    need("pyarrow", f"reading {file.name}")
    import pyarrow
    from pyarrow import parquet

    try:
        opened = parquet.ParquetFile(file)
        _check(dict.fromkeys(opened.schema_arrow.names), columns, str(file))
        for batch in opened.iter_batches(columns=list(dict.fromkeys(columns)), batch_size=256):
            held = {name: batch.column(name).to_pylist() for name in columns}
            yield from zip(*(held[name] for name in columns), strict=True)
    except pyarrow.ArrowInvalid as error:
        raise CorpusError(f"{file} is not a parquet file: {error}") from None


def _check(row: dict[str, Any], columns: Sequence[str], where: str) -> None:
    for column in columns:
        if column not in row:
            raise CorpusError(f"{where}: no column {column!r} (there is: {', '.join(map(str, row))})")


def need(module: str, why: str) -> None:
    """Raise CorpusError unless a package of the extra `hub` is there."""
    if importlib.util.find_spec(module) is None:
        raise CorpusError(f"{why} needs the package {module}; run: pip install 'hsae[hub]'")


INSTEAD = (
    "use texts that ship with Python with --set suite.tasks=python, or local files with --set suite.tasks=FILE.toml"
)
"""What can be done without a hub data set."""


def open_data_set(name: str, revision: str | None, subset: str | None, split: str) -> Any:
    """A hub data set's split, streamed in its own order. Raises CorpusError if it can't be opened."""
    need("datasets", f"data set {name!r} on the hub")
    from datasets import load_dataset
    from datasets.utils.logging import set_verbosity_error

    set_verbosity_error()
    try:
        return load_dataset(name, subset, split=split, revision=revision, streaming=True)
    except Exception as error:  # the client has no common base for network, access and naming errors
        first = str(error).splitlines()[0] if str(error) else ""
        raise CorpusError(
            f"data set {name!r} can't be opened ({type(error).__name__}: {first}); check the network, or {INSTEAD}"
        ) from None


def resolved_revision(name: str, revision: str | None, instead: str = INSTEAD) -> str:
    """The commit a hub data set's revision stands for now. Raises CorpusError, with what to do instead, if the hub can't be asked."""
    need("datasets", f"data set {name!r} on the hub")
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name, revision=revision, timeout=10.0).sha)
    except Exception as error:  # as above
        first = str(error).splitlines()[0] if str(error) else ""
        raise CorpusError(
            f"data set {name!r} can't be found on the hub ({type(error).__name__}: {first}); check the network, or {instead}"
        ) from None
