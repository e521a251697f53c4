"""Where to compute."""

import re

import torch

from hsae.cache.errors import UserError


def pick_device(device: str) -> str:
    """`auto` is cuda where there is a GPU, else cpu. Raises UserError for a device that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"device {device!r}: use auto, cpu, cuda or cuda:N")
    if device != "cpu" and int(device.partition(":")[2] or 0) >= (seen := torch.cuda.device_count()):
        gpus = f"{seen or 'no'} GPU{'s' if seen > 1 else ''}"
        raise UserError(f"device {device!r}: this torch ({torch.__version__}) sees {gpus}; use --device cpu")
    return device
