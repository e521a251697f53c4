"""SAEBench 0.6.0's result files: twelve keys in its order, with parts of each evaluation's own, and the block `hsae`.

An evaluation states the types of its parts in a subclass of `SaebenchFile`, so that what it writes and what it reads
back is what SAEBench would read. Null stands for a number that was not asked for or does not exist.
"""

import json
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, field_validator

from hsae.cache.errors import UserError
from hsae.cache.files import CHECKSUM, content_digest, parse_json
from hsae.eval.harness.result_files import damaged, hsae_version, publish, read_json, run_option

Number = int | float
WRITER = "sae_bench_commit_hash"  # says in SAEBench's schema who wrote a file


class Part(BaseModel):
    """A part of a file: exactly these keys, of exactly these types."""

    model_config = ConfigDict(extra="forbid", strict=True)


def keys(*names: str) -> AfterValidator:
    """Of a dict: it must have exactly these keys."""

    def check(value: dict[str, Any]) -> dict[str, Any]:
        if other := sorted(value.keys() ^ set(names)):
            raise ValueError(f"{other[0]} is {'missing' if other[0] in names else 'no key of it'}")
        return value

    return AfterValidator(check)


class SaebenchFile(Part):
    """A result file; subclasses name their type, and narrow the config, the metrics and the details."""

    TYPE: ClassVar[str]
    """SAEBench's `eval_type_id`."""

    eval_type_id: str
    eval_config: Any
    eval_id: str
    datetime_epoch_millis: int
    eval_result_metrics: Any
    eval_result_details: Any
    sae_bench_commit_hash: str
    sae_lens_id: str | None
    sae_lens_release_id: str | None
    sae_lens_version: str | None
    sae_cfg_dict: dict[str, Any] | None
    eval_result_unstructured: dict[str, Any] | None
    hsae: dict[str, Any] | None = None

    @field_validator("eval_type_id")
    @classmethod
    def _is_of_this_type(cls, value: str) -> str:
        if value != cls.TYPE:
            raise ValueError(f"is {value!r}, not {cls.TYPE!r}")
        return value

    @classmethod
    def content(cls, **parts: Any) -> dict[str, Any]:
        """A new result as JSON, its keys in SAEBench's order; `parts` are those of `envelope`."""
        return cls.model_validate(envelope(cls.TYPE, **parts)).model_dump()


def envelope(
    eval_type_id: str,
    *,
    eval_config: Any,
    metrics: Any,
    details: Any,
    sae_config: dict[str, Any] | None,
    unstructured: Any,
    hsae: dict[str, Any] | None,
    release: str,
    sae_id: str,
    eval_id: str | None = None,
) -> dict[str, Any]:
    """Any evaluation's result as the JSON object that SAEBench writes, in its key order, and `hsae` behind it."""
    return {
        "eval_type_id": eval_type_id,
        "eval_config": eval_config,
        "eval_id": eval_id or str(uuid.uuid4()),
        "datetime_epoch_millis": int(time.time() * 1000),
        "eval_result_metrics": metrics,
        "eval_result_details": details,
        WRITER: hsae_version(),
        "sae_lens_id": sae_id,
        "sae_lens_release_id": release,
        "sae_lens_version": None,
        "sae_cfg_dict": sae_config,
        "eval_result_unstructured": unstructured,
        "hsae": hsae,
    }


def file_name(release: str, sae_id: str, *variant: str) -> str:
    """SAEBench's name for a result file; `variant` is what tells it from the standard result, such as `all-tokens`."""
    return f"{'_'.join((release, sae_id, *variant))}_eval_results.json".replace("/", "_")


def envelope_text(content: Mapping[str, Any]) -> str:
    """The JSON text of a file. SAEBench's keys are fixed, so the checksum of all else stands in hsae's own block."""
    hsae = content.get("hsae")
    if isinstance(hsae, dict):
        plain = parse_json(json.dumps(content))
        content = {**content, "hsae": {**hsae, CHECKSUM: content_digest(plain)}}
    return json.dumps(content, indent=2)


def write_envelope(path: Path, content: Mapping[str, Any]) -> Path:
    """Write a result atomically, with its checksum; returns the file."""
    text = envelope_text(content)
    publish(path, lambda partial: partial.write_text(text))
    return path


def read_envelope(path: Path, command: str) -> Any:
    """The content of a file, hsae's or not, without its checksum.

    Raises UserError with the `command` that makes it if it is missing or damaged.
    """
    content = read_json(path, command, "JSON")
    hsae = content.get("hsae") if isinstance(content, dict) else None
    if isinstance(hsae, dict) and CHECKSUM in hsae:
        plain = {**content, "hsae": {key: value for key, value in hsae.items() if key != CHECKSUM}}
        if hsae[CHECKSUM] != content_digest(plain):
            raise damaged(path, command, "it fails its checksum")
        return plain
    if isinstance(content, dict) and "hsae" not in content and str(content.get(WRITER)).startswith("hsae "):
        raise damaged(path, command, "its block hsae is missing")
    return content


def read_file(path: Path, kind: type[SaebenchFile], evaluation: str) -> dict[str, Any]:
    """The content of a file of `hsae eval EVALUATION` or SAEBench. Raises UserError saying what is wrong with it."""
    content: dict[str, Any] = read_envelope(path, f"hsae eval {evaluation}{run_option(path)}")
    try:
        kind.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path} is not a SAEBench {kind.TYPE} result: {first_problem(error)}") from None
    return content


def read_measured(path: Path, kind: type[SaebenchFile], evaluation: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A result and what it was made of, nothing if hsae did not make it. Raises UserError as `read_file` does."""
    content = read_file(path, kind, evaluation)
    hsae = content.get("hsae") or {}
    inputs, store = hsae.get("inputs"), hsae.get("store")
    if not isinstance(hsae.get("measures"), dict) or not isinstance(inputs, dict):
        return content, {}
    if "state" not in inputs and isinstance(store, dict) and isinstance(store.get("path"), str):  # of an older hsae
        inputs = {**inputs, "store": Path(store["path"]).stem.rpartition("-")[2], "state": inputs.get("store")}
    return content, inputs


def first_problem(error: ValidationError) -> str:
    """`eval_config.random_seed: Field required`."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the top level'}: {first['msg']}"
