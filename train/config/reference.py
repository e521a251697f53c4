"""What may stand in a plan: every key, what it holds, its default and what it means, read off the models that check
it.
"""

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hsae.cache.config import CacheConfig, Config, HookConfig, ModelConfig
from hsae.registry import TABLES, resolve
from hsae.train.config.checked import PlanError
from hsae.train.config.run_config import RunConfig, StreamConfig

OWN_KEYS = ("number",)
"""Fields of a run that its table's name gives."""
PLURALS = {"integer": "whole numbers", "number": "numbers", "string": "texts"}
NAMES = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "object": "a table",
}
BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key of a plan."""

    name: str
    """As `--set` takes it, for example `cache.train.rows`; runs are `runs.N`, and `[]` stands for one of a list."""
    holds: str
    """What it may be, in words."""
    default: str | None
    """As TOML has it, `not set` for a key that may be left out; None where there must be a value."""
    meaning: str
    """What it is for, in one paragraph."""


def plan_keys(prefix: str = "") -> list[Key]:
    """Every key of a plan, or those of the table or key `prefix`. Raises PlanError if there is none."""
    keys = list(_every())
    chosen = [key for key in keys if key.name == prefix or key.name.startswith((f"{prefix}.", f"{prefix}[]"))]
    if prefix and not chosen:
        near = difflib.get_close_matches(prefix, [key.name for key in keys], n=3)
        advice = f"did you mean {' or '.join(near)}?" if near else "`hsae plan keys` lists all"
        raise PlanError(f"a plan has no key or table {prefix!r}; {advice}")
    return chosen if prefix else keys


def _every() -> Iterator[Key]:
    own: dict[str, type[Config]] = {
        "model": ModelConfig,
        "hook": HookConfig,
        "cache": CacheConfig,
        "train": StreamConfig,
    }
    for table, kind in own.items():
        yield from _keys(table, kind.model_json_schema())
    for key in _keys("runs.N", RunConfig.model_json_schema()):
        if key.name.removeprefix("runs.N.") not in OWN_KEYS:
            yield key
    for table, entry in TABLES.items():
        yield from _keys(table, resolve(entry.kind).model_json_schema())


def _keys(
    table: str, schema: dict[str, Any], defs: dict[str, Any] | None = None, given: dict[str, Any] | None = None
) -> Iterator[Key]:
    """The keys of a JSON schema's object, each followed by those of the tables that it holds.

    `given` are the defaults of this table where another one holds it.
    """
    defs = schema.get("$defs", {}) if defs is None else defs
    for name, field in schema["properties"].items():
        key = f"{table}.{name}"
        default = given[name] if given and name in given else field.get("default")
        inner = list(_tables(field, defs))
        if "$ref" not in field or not inner:  # a table that is always there is its keys
            is_required = name in schema.get("required", ()) and not given
            yield Key(
                name=key,
                holds=_holds(field, defs),
                default=None if is_required else _shown(default),
                meaning=" ".join(field.get("description", "").split()),
            )
        for suffix, nested in inner:
            yield from _keys(key + suffix, nested, defs, default if isinstance(default, dict) else None)


def _tables(field: dict[str, Any], defs: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The schemas of the tables that a field may hold, each with `[]` if it holds a list of them."""
    if "$ref" in field:
        schema = defs[_name(field)]
        yield from [("", schema)] if "properties" in schema else []
    if "items" in field:
        yield from ((f"[]{suffix}", schema) for suffix, schema in _tables(field["items"], defs))
    for option in field.get("anyOf", ()):
        yield from _tables(option, defs)


def _name(reference: dict[str, Any]) -> str:
    return str(reference["$ref"]).rpartition("/")[2]


def _holds(field: dict[str, Any], defs: dict[str, Any]) -> str:
    """What a field may be, in words."""
    if "anyOf" in field:
        options = [_holds(option, defs) for option in field["anyOf"] if option.get("type") != "null"]
        return (", " if all(option.startswith('"') for option in options) else " or ").join(options)
    if "$ref" in field:
        return "a table" if "properties" in defs[_name(field)] else _holds(defs[_name(field)], defs)
    if "enum" in field or "const" in field:
        return ", ".join(_shown(value) for value in field.get("enum", [field.get("const")]))
    kind = field["type"]
    if kind == "array":
        items = field["items"]
        return f"a list of {PLURALS.get(items.get('type', ''), 'tables')}"
    bounds = [f"{words} {field[bound]:,}" for bound, words in BOUNDS.items() if bound in field]
    return f"{NAMES[kind]} {', '.join(bounds)}".strip()


def _shown(value: Any) -> str:
    """A default as TOML has it."""
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)
