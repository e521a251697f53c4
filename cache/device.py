"""Where to compute."""

import os
import re
import shutil
from importlib.util import find_spec

import torch

from hsae.cache.errors import UserError


def can_compile(device: str) -> bool:
    """Whether torch.compile works on a device and pays there: a GPU, with Triton and a C compiler beside it."""
    compilers = (os.environ.get("CC", ""), "cc", "gcc", "clang")
    return device.startswith("cuda") and find_spec("triton") is not None and any(map(shutil.which, compilers))


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
