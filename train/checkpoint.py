"""Checkpoints: one safetensors file a run, whose header carries the loop's state as JSON. Written atomically."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hsae.cache.errors import UserError
from hsae.cache.files import write_atomically

FILE = "checkpoint/state.safetensors"


State = tuple[dict[str, Tensor], dict[str, Any]]
"""What `TrainingRun.state` gives."""


def save_checkpoint(state: State, run_dir: Path, identity: str) -> None:
    """Replace a run's checkpoint by `state`; `identity` names the configuration and data it belongs to."""
    tensors, rest = {name: tensor.cpu().contiguous() for name, tensor in state[0].items()}, state[1]
    path = run_dir / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"state": json.dumps({**rest, "identity": identity})}
    write_atomically(path, lambda partial: save_file(tensors, partial, header))


def load_checkpoint(run_dir: Path, identity: str) -> State:
    """The state in a run's checkpoint. Raises UserError if the file is damaged or another configuration's."""
    path = run_dir / FILE
    try:
        with safe_open(path, framework="pt") as file:
            rest: dict[str, Any] = json.loads(file.metadata()["state"])
        tensors = load_file(path)
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} can't be read ({error}); train with --restart to begin again") from None
    if rest["identity"] != identity:
        raise UserError(f"{path} belongs to another configuration or store; train with --restart to begin again")
    return tensors, rest
