"""run.json: what a run is, under a checksum, with the SHA-256 of its model's files, which their readers compare.

Runs that were made before there were digests have none, and are taken as they are.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsae.cache.errors import UserError
from hsae.cache.files import check_seal, file_sha256, parse_json, sealed, write_bytes_atomically

if TYPE_CHECKING:
    from hsae.cache.reading.store import ActivationStore

FILE = "run.json"
MODEL_FILES = ("model/model.json", "model/model.safetensors")
VIEW = re.compile(r"sae|level\d+(-effective)?")
"""Names of the folders in saelens/."""
SAELENS_FILES = ("saelens/*/cfg.json", "saelens/*/sae_weights.safetensors")


def read_run(run_dir: Path) -> dict[str, Any] | None:
    """The content of run.json, or None if there is none. Raises UserError if it is damaged."""
    path = run_dir / FILE
    if not path.is_file():
        return None
    try:
        content = parse_json(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        check_seal(content, required=False)
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}); `{train_command(run_dir)}` writes it again if the model or the checkpoint "
            "beside it is whole, and with --restart trains again"
        ) from None
    return content


def write_run(run_dir: Path, content: dict[str, Any]) -> None:
    """Replace run.json."""
    write_bytes_atomically(run_dir / FILE, json.dumps(sealed(content), indent=2).encode())


def train_command(run_dir: Path) -> str:
    """The command that trains the run of a directory."""
    return f"hsae train {run_options(run_dir)}"


def run_options(run_dir: Path) -> str:
    """What names the run of a directory to a command: `--run 3`, `--run 3 --seeds 2`."""
    seed = run_dir.parent.name.removeprefix("seed")
    more = f" --seeds {int(seed) + 1}" if run_dir.parent.name.startswith("seed") and seed.isdecimal() else ""
    return f"--run {run_dir.name}{more}"


def model_files(run_dir: Path) -> list[str]:
    """The files of a run's model that are there, those for other tools among them, by their paths in the directory."""
    saelens = sorted(path for pattern in SAELENS_FILES for path in run_dir.glob(pattern))
    names = [path.relative_to(run_dir).as_posix() for path in saelens if VIEW.fullmatch(path.parent.name)]
    return [name for name in MODEL_FILES if (run_dir / name).exists()] + names


def digests(run_dir: Path) -> dict[str, str]:
    """SHA-256 of each of a run's `model_files`."""
    return {name: file_sha256(run_dir / name) for name in model_files(run_dir)}


def damaged_files(run_dir: Path, content: dict[str, Any]) -> dict[str, str]:
    """What is wrong with files whose digests run.json holds, by their paths in the directory."""
    problems = {}
    for name, digest in (content.get("files") or {}).items():
        if not (run_dir / name).is_file():
            problems[name] = "is missing"
        elif file_sha256(run_dir / name) != digest:
            problems[name] = "fails its checksum"
    return problems


def check_files(folder: Path, names: Iterable[str]) -> None:
    """Compare files of a run's model/ or saelens/<view>/ with the digests in its run.json. Raises UserError."""
    folder = folder.resolve()
    run_dir = folder.parent.parent if folder.parent.name == "saelens" else folder.parent
    recorded = (read_run(run_dir) or {}).get("files")
    if not isinstance(recorded, dict):
        return
    for name in names:
        path = folder / name
        digest = recorded.get(path.relative_to(run_dir).as_posix())
        if digest is not None and path.is_file() and file_sha256(path) != digest:
            raise damage_error(path, run_dir, "fails its checksum")


def run_of(folder: Path) -> Path | None:
    """The run directory that a folder saelens/<view> lies in, if it does."""
    folder = folder.resolve()
    run_dir = folder.parent.parent
    return run_dir if folder.parent.name == "saelens" and (run_dir / FILE).is_file() else None


def damage_error(path: Path, run_dir: Path, problem: str) -> UserError:
    """The error about a file of a trained model."""
    again = f", or delete it and run `{train_command(run_dir)}`, which makes it again and keeps the evaluations"
    return UserError(
        f"{path} is damaged: it {problem}; put back a whole copy{again if run_dir.name.isdecimal() else ''}"
    )


def check_same_model(run_dir: Path | None, store: "ActivationStore") -> None:
    """Raise UserError if a run was trained on activations of other weights or another tokenizer than a store's.

    None, and runs that don't say, pass.
    """
    if run_dir is None:
        return
    content: dict[str, Any] = (read_run(run_dir) or {}).get("content") or {}
    for name, what in (("model_digest", "weights"), ("tokenizer_digest", "tokenizer")):
        if content.get(name) not in (None, getattr(store.header, name)):
            raise UserError(
                f"{run_dir} was trained on activations of a model with other {what} than those of {store.url}; build "
                f"both stores of one model (hsae cache build) and train it again ({train_command(run_dir)} --restart)"
            )
