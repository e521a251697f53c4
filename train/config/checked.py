"""Checking what a plan or a call says against a pydantic model, with one clear line about what is wrong."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from hsae.cache.config import Config
from hsae.cache.errors import UserError

SHOWN = 100
"""Characters of a wrong value that an error shows."""
LARGEST = 2**62
ConfigT = TypeVar("ConfigT", bound=Config)


class PlanError(UserError):
    """A plan that can't be read, or settings that are impossible."""


def shorten(value: Any) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}… ({len(text):,} characters)"


def check_table(source: str, table: str, values: Any) -> None:
    """Raise PlanError, naming `source`, unless the values are a table of things that a configuration can hold."""
    if not isinstance(values, dict):
        given = shorten(values)
        raise PlanError(f"{source}: {table} is a table, not a value (given: {given}); set its keys one by one")
    for key, value in values.items():
        name = f"{table}.{key}" if table else str(key)
        if isinstance(value, dict):
            check_table(source, name, value)
        elif isinstance(value, str) and "\0" in value:
            raise PlanError(f"{source}: {name}: text can't hold a NUL character (given: {shorten(value)})")
        elif isinstance(value, int) and abs(value) > LARGEST:
            raise PlanError(f"{source}: {name}: whole numbers go to {LARGEST} (given: {shorten(value)})")


def checked(source: str, table: str, kind: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """The configuration that a table's values make.

    Raises PlanError naming `source`, the key, its value and what is allowed. Keys are named `<table>.<key>`, or by
    themselves where `table` is empty.
    """
    check_table(source, table, values)
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join([*([table] if table else []), *(str(part) for part in first["loc"])])
        if first["type"] == "extra_forbidden":
            raise PlanError(f"{source}: unknown key {key}; allowed: {', '.join(sorted(kind.model_fields))}") from None
        given = "" if first["type"] in ("missing", "value_error") else f" (given: {shorten(first['input'])})"
        where = f"{source}: {key}" if key else source
        raise PlanError(f"{where}: {first['msg'].removeprefix('Value error, ')}{given}") from None
