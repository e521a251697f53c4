"""What is sent of a trained run: its model in hsae's and SAELens's formats, its log, its results, and a model card."""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from hsae.cache.config import ModelConfig
from hsae.cache.errors import UserError
from hsae.cache.files import CHECKSUM, parse_json, sealed
from hsae.cache.language_model.sources import on_hub
from hsae.eval import figures
from hsae.eval.report.run_section import Material, RunSection
from hsae.eval.sharing.model_card import CURVES, model_card
from hsae.train.run_record import FILE as RECORD
from hsae.train.run_record import damaged_files, model_files, read_run, train_command
from hsae.train.runs.metrics_log import FILE as LOG
from hsae.train.runs.run_directory import EVALUATED

Files = dict[str, Path | bytes]
CARD = "README.md"
LEFT_HERE = {"eval/unlearning.partial.json"}


def run_files(run_dir: Path, repository: str, model: str | None = None) -> Files:
    """Everything that is sent of a run, by its path in the repository `repository`.

    `model` is the language model's id on the hub, which takes the place of the plan's own name for it in every file.
    Raises UserError for a run that is not trained or is damaged, and where the model's id is not known.
    """
    record = read_run(run_dir)
    if record is None or not record.get("complete"):
        raise UserError(f"{run_dir} holds no trained run; finish it with `{train_command(run_dir)} --resume`")
    if harm := damaged_files(run_dir, record):
        name, problem = next(iter(harm.items()))
        raise UserError(f"{run_dir / name} {problem}; `{train_command(run_dir)}` makes the model's files again")
    own = str(record["model"])
    if model is None and not on_hub(ModelConfig(id=own)):
        raise UserError(
            f"{run_dir} was trained on {own!r}, which is no id of the hub; say which model that is with "
            "--model, such as --model google/gemma-3-270m"
        )
    results = {path for pattern in EVALUATED for path in run_dir.glob(pattern)}
    names = [*model_files(run_dir), *sorted(path.relative_to(run_dir).as_posix() for path in results)]
    files: Files = {name: run_dir / name for name in [*names, LOG] if name not in LEFT_HERE}
    section = RunSection(run_dir, record, Material(specs={}))
    if section.is_measured:
        files[CURVES] = _curves(section)
    if model is not None and model != own:
        files |= {name: _renamed(run_dir / name, own, model) for name in files if name.endswith(".json")}
        record = {**record, "model": model, "files": {**record["files"], **_digests(files, record["files"])}}
    files[RECORD] = json.dumps(sealed(record), indent=2).encode()
    files[CARD] = model_card(section, record, repository).encode()
    return files


def _renamed(path: Path, own: str, model: str) -> bytes:
    """A JSON file in which the language model has another name."""

    def rename(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: rename(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [rename(inner) for inner in value]
        return model if value == own else value

    data = path.read_bytes()
    if json.dumps(own).encode() not in data:
        return data
    content = rename(parse_json(data))
    return json.dumps(sealed(content) if CHECKSUM in content else content, indent=2).encode()


def _digests(files: Files, recorded: dict[str, str]) -> dict[str, str]:
    """SHA-256 of those of the recorded files whose bytes are others now."""
    changed = {name: data for name in recorded if isinstance(data := files.get(name), bytes)}
    return {name: hashlib.sha256(data).hexdigest() for name, data in changed.items()}


def _curves(section: RunSection) -> bytes:
    """The training curves as PNG."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, CURVES)
        figures.training_png(section.log, path)
        return path.read_bytes()
