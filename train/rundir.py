"""A run directory, `runs/<N>/`: what is in it, whose it is, and how its log is kept.

run.json (what was trained on what), metrics.jsonl (one JSON object a line), checkpoint/ (while training), model/ (native),
saelens/<view>/ (for other tools), eval/ (results). Nothing in it is pickled.
"""

import hashlib
import json
import platform
import shutil
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from hsae.cache.errors import UserError
from hsae.cache.files import sweep, write_atomically
from hsae.cache.store import ActivationStore
from hsae.train.checkpoint import FILE as CHECKPOINT
from hsae.train.config import RunConfig
from hsae.train.plan import Plan

CONTENTS = ("run.json", "metrics.jsonl", "checkpoint", "model", "saelens", "eval")


def identity(plan: Plan, config: RunConfig, store_name: str) -> str:
    """Sixteen hex digits over all that determines a run's result: its configuration, the stream's and the store."""
    stream = plan.train.model_dump(mode="json", include={"tokens", "batch_tokens", "seed"})
    text = json.dumps([stream, config.model_dump(mode="json"), store_name, plan.hook.names[0]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_run(run_dir: Path) -> dict[str, Any] | None:
    """The content of run.json, or None if there is none. Raises UserError if it is damaged."""
    path = run_dir / "run.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); train the run again with --restart") from None
    return content


def lock(plan: Plan, config: RunConfig) -> AbstractContextManager[object]:
    """The lock on a run directory, taken. Raises UserError if another process trains the run."""
    folder = Path(plan.train.dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(folder / f".{config.number}.lock").acquire(timeout=0)
    except Timeout:
        raise UserError(f"another process is training {plan.run_dir(config)}; wait for it, or stop it") from None


def content_of(store: ActivationStore) -> dict[str, str]:
    """Digests of what the store was made from; its name says only what was asked for."""
    return {name: getattr(store.header, name) for name in ("model_digest", "tokenizer_digest", "corpus_digest")}


def check_content(run_dir: Path, store: ActivationStore) -> None:
    """Raise UserError if the run was trained on a store of the same name that was made from something else."""
    held = read_run(run_dir)
    if held is not None and held.get("train_store") == store.spec.name and held.get("content") != content_of(store):
        raise UserError(
            f"{run_dir} was trained on a store of the same name made from another model or text; --restart trains it again"
        )


def prepare(
    plan: Plan, config: RunConfig, store: ActivationStore, device: str, *, resume: bool, restart: bool, world: int = 1
) -> bool:
    """Make the run directory ready for `world` workers; returns whether there is a checkpoint to go on from.

    Raises UserError if the directory holds another configuration's run, or an unfinished one and neither `resume` nor
    `restart` was asked for.
    """
    run_dir = plan.run_dir(config)
    mine = identity(plan, config, store.spec.name)
    if restart:
        _clear(run_dir)
    sweep(run_dir)
    if (held := read_run(run_dir)) is not None:
        if held.get("identity") != mine:
            raise UserError(
                f"{run_dir} holds a run of another configuration or store (plan {held.get('plan')}); "
                "--restart replaces it, --set train.dir=FOLDER trains beside it"
            )
        if (run_dir / CHECKPOINT).is_file():
            if not resume:
                raise UserError(
                    f"{run_dir} was not finished; --resume goes on from its checkpoint, --restart begins again"
                )
            return True
    run_dir.mkdir(parents=True, exist_ok=True)
    _clear(run_dir)
    write_run(run_dir, _description(plan, config, store, mine, hardware(device, world)))
    return False


def _clear(run_dir: Path) -> None:
    for name in CONTENTS:
        path = run_dir / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def is_complete(plan: Plan, config: RunConfig, store_name: str) -> bool:
    """Whether this very run has been trained to its end."""
    held = read_run(plan.run_dir(config))
    return (
        held is not None and held.get("identity") == identity(plan, config, store_name) and held.get("complete") is True
    )


def write_run(run_dir: Path, content: dict[str, Any]) -> None:
    """Replace run.json."""
    write_atomically(run_dir / "run.json", lambda path: path.write_text(json.dumps(content, indent=2)))


def _description(plan: Plan, config: RunConfig, store: ActivationStore, mine: str, hardware: str) -> dict[str, Any]:
    try:
        own = version("hsae")
    except PackageNotFoundError:
        own = "not installed"
    return {
        "format": 1,
        "identity": mine,
        "number": config.number,
        "name": config.name,
        "plan": plan.name,
        "model": plan.model.id,
        "hook": plan.hook.names[0],
        "d_in": store.header.d_model,
        "train_store": store.spec.name,
        "content": content_of(store),
        "eval_store": plan.store("eval").name,
        "config": {**plan.train.model_dump(mode="json"), **config.model_dump(mode="json")},
        "versions": {"hsae": own, "torch": torch.__version__, "python": platform.python_version()},
        "hardware": hardware,
        "complete": False,
    }


def hardware(device: str, world: int = 1) -> str:
    """What a run is trained on, in words."""
    if device.startswith("cuda"):
        one = torch.cuda.get_device_name(device)
    else:
        one = f"{platform.machine()} processor, {torch.get_num_threads()} threads"
    return one if world == 1 else f"{world} workers, each: {one}"


class MetricsLog:
    """metrics.jsonl, appended to line by line; lines after a checkpoint are dropped when a run resumes from it."""

    def __init__(self, run_dir: Path, step: int) -> None:
        self.path = run_dir / "metrics.jsonl"
        kept = [
            line
            for line in read_metrics(run_dir)
            if line["step"] < step or (line["kind"] != "stage" and line["step"] == step)
        ]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(self.path, lambda path: path.write_text(text))

    def write(self, line: dict[str, Any]) -> None:
        """Append one object."""
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line cut off by a crash is left out."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
