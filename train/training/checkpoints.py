"""Checkpoints: one safetensors file a run; its header has the loop's state as JSON and a checksum over all."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hsae.cache.errors import UserError
from hsae.cache.files import crc32c, parse_json, write_atomically

FILE = "checkpoint/state.safetensors"


State = tuple[dict[str, Tensor], dict[str, Any]]
"""What `TrainingRun.state` gives."""


def save_checkpoint(state: State, run_dir: Path, provenance: Mapping[str, Any]) -> None:
    """Replace a run's checkpoint by `state`; `provenance` names the configuration and data it belongs to."""
    tensors, rest = {name: tensor.cpu().contiguous() for name, tensor in state[0].items()}, state[1]
    path = run_dir / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**rest, **provenance})
    header = {"state": text, "crc32c": _crc32c(tensors, text)}
    write_atomically(path, lambda partial: save_file(tensors, partial, header))


def read_provenance(run_dir: Path) -> dict[str, Any] | None:
    """What a checkpoint says it belongs to; None if there is no checkpoint, or a damaged one."""
    try:
        return _load(run_dir / FILE)[1]
    except (OSError, UserError):
        return None


def load_checkpoint(run_dir: Path, identities: Collection[str]) -> State:
    """The state in a run's checkpoint. Raises UserError if the file is damaged or another configuration's."""
    path = run_dir / FILE
    tensors, rest = _load(path)
    if rest["identity"] not in identities:
        raise UserError(f"{path} belongs to another configuration or store; train with --restart to begin again")
    return tensors, rest


def _load(path: Path) -> State:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
        tensors, text = load_file(path), header["state"]
        if header.get("crc32c", checksum := _crc32c(tensors, text)) != checksum:  # older ones have none
            raise ValueError("it fails its checksum")
        rest: dict[str, Any] = parse_json(text)
        rest["identity"]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); train with --restart to begin again") from None
    return tensors, rest


def _crc32c(tensors: Mapping[str, Tensor], text: str) -> str:
    """Eight hex digits over the state and every tensor with its name, type and shape."""
    checksum = crc32c(text.encode())
    for name, tensor in sorted(tensors.items()):
        checksum = crc32c(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), checksum)
        if tensor.numel():
            checksum = crc32c(tensor.reshape(-1).view(torch.uint8).numpy().data, checksum)
    return f"{checksum:08x}"
