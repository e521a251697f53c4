"""Functions of tensors that are compiled into few kernels on a GPU, and run as they are on a processor."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LOG = logging.getLogger("hsae")


class Fused:
    """A function of tensors, the first of which says where it runs: on a GPU it is compiled at the first call.

    Where that fails (no C compiler, no Triton), it says so once and runs the function as it is. Each shape is compiled
    anew, so a function is for shapes that stay. Use it as a decorator.
    """

    where = frozenset({"cuda"})
    """Types of devices on which functions are compiled."""
    failed = False
    """Whether compiling has failed in this process."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, first: Tensor, *others: Any) -> Any:
        """The function's value."""
        if Fused.failed or first.device.type not in Fused.where:
            return self.function(first, *others)
        if self._compiled is not None:
            return self._compiled(first, *others)
        try:
            compiled = torch.compile(self.function, dynamic=False)
            value = compiled(first, *others)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            Fused.failed = True
            LOG.warning("training is slower than it could be: torch.compile fails here (%s)", _first_line(error))
            return self.function(first, *others)
        self._compiled = compiled
        return value


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
