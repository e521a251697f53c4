"""Functions of tensors that are compiled into few kernels on a GPU, and run as they are on a processor."""

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor

LOG = logging.getLogger("hsae")
RECOMPILE_LIMIT = 256
"""Forms (shapes, stages of a curriculum, numbers of dead latents) that one function is compiled for."""


class Compiled:
    """A function through torch.compile, as one graph for each form of its arguments.

    Where it can't be compiled (no C compiler, no Triton, an operation that is not known), that is said once, and from
    then on nothing is compiled in this process: functions run as they are.
    """

    failed = False
    """Whether compiling has failed in this process."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        """The function's value."""
        if Compiled.failed:
            return self.function(*arguments)
        import torch._dynamo  # takes as long as importing torch, and is needed here only

        try:
            if self._compiled is None:
                torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
                limit = torch._dynamo.config.accumulated_recompile_limit
                torch._dynamo.config.accumulated_recompile_limit = max(16 * RECOMPILE_LIMIT, limit)
                self._compiled = torch.compile(self.function, dynamic=False, fullgraph=True)
            return self._compiled(*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:  # raised before anything is computed
            Compiled.failed = True
            LOG.warning("training is slower than it could be: torch.compile fails here (%s)", _first_line(error))
            return self.function(*arguments)


class Fused:
    """A decorator: a function of tensors is compiled where the first of them lies on a GPU."""

    where = frozenset({"cuda"})
    """Types of devices on which functions are compiled."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.compiled = function, Compiled(function)

    def __call__(self, first: Tensor, *others: Any) -> Any:
        """The function's value."""
        called = self.compiled if first.device.type in Fused.where else self.function
        return called(first, *others)


def _first_line(error: Exception) -> str:
    error = getattr(error, "inner_exception", error)
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
