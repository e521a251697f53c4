"""Numbers on their way from the model's device into memory, while the device goes on computing."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


@functools.cache
def _copying(device: str) -> torch.cuda.Stream | None:
    """The stream on which a GPU copies beside its work; None for a processor, where there is nothing to copy."""
    is_gpu = torch.device(device).type == "cuda"
    return torch.cuda.Stream(device) if is_gpu else None  # type: ignore[no-untyped-call]


class Transfer:
    """Copies from a device into memory: from a GPU they are under way until `wait` returns."""

    def __init__(self, device: str) -> None:
        self._stream = _copying(device)
        self._last: torch.cuda.Event | None = None

    def memory(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Zeros in memory, pinned where a GPU will copy to them."""
        return torch.zeros(*shape, dtype=dtype, pin_memory=self._stream is not None)

    def copy(self, values: Tensor, target: Tensor) -> None:
        """Copy a tensor of the device into memory of the same shape, once it is computed."""
        if self._stream is None:
            target.copy_(values)
            return
        self._stream.wait_stream(torch.cuda.current_stream(values.device))
        with torch.cuda.stream(self._stream):
            target.copy_(values, non_blocking=True)
            self._last = self._stream.record_event()
        values.record_stream(self._stream)  # its memory is not used again before the copy is made

    def wait(self) -> None:
        """Return when all copies are made; may be called in any thread."""
        if self._last is not None:
            self._last.synchronize()
