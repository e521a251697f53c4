"""The files of `hsae eval composition` in a run directory.

`eval/composition.json` holds the measures, the named failures, and all that they depend on;
`eval/composition.safetensors` the contributions [F_l, F_{l-1}] of every map: `learned2`, `fitted2`, `fitted3`, ... The
JSON holds the digest of the other.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hsae.cache.errors import UserError
from hsae.cache.files import file_sha256
from hsae.eval.harness.result_files import publish, read_result
from hsae.eval.hierarchy.composition_result import CompositionResult
from hsae.eval.hierarchy.failures import Failure

FORMAT = 1
FILE, MAPS_FILE = Path("eval") / "composition.json", Path("eval") / "composition.safetensors"
AGAIN = "hsae eval composition"


class CompositionFile(BaseModel):
    """What `eval/composition.json` holds."""

    format: Literal[1]
    inputs: dict[str, Any]
    compared: str | None = None
    """The run that coarse-hurts-fine was judged against."""
    failures: list[Failure] | None = None
    """None while they have not been judged."""
    unchecked: dict[str, str] = {}
    """Failures that could not be looked for, and why."""
    result: CompositionResult


def read_composition(run_dir: Path) -> CompositionFile | None:
    """The measures of a run; None if there are none or they can't be understood."""
    try:
        return CompositionFile.model_validate(read_result(run_dir / FILE, AGAIN))
    except ValueError:
        return None


def read_maps(run_dir: Path) -> dict[str, Tensor] | None:
    """Contributions of every map by reading and level; None if there are none or the file is damaged."""
    try:
        digest = read_result(run_dir / FILE, AGAIN).get("maps")
        if digest not in (None, maps_digest(run_dir)):
            return None
        return load_file(run_dir / MAPS_FILE)
    except (OSError, UserError, SafetensorError):
        return None


def write_maps(run_dir: Path, maps: dict[str, Tensor]) -> None:
    """Write the contributions of every map. The JSON goes, until it is written anew."""
    (run_dir / FILE).unlink(missing_ok=True)  # never beside maps of another model
    tensors = {name: part.contiguous() for name, part in maps.items()}
    publish(run_dir / MAPS_FILE, lambda path: save_file(tensors, path))


def maps_digest(run_dir: Path) -> str:
    """SHA-256 of the file of maps, which stands in the JSON."""
    return file_sha256(run_dir / MAPS_FILE)
