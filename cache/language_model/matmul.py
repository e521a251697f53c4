"""bfloat16 matrix products at the speed of float32 on processors without instructions for them.

Such processors multiply bfloat16 matrices some forty times slower than float32 ones. Here the factors are widened to
float32, which is exact, multiplied, and the result rounded to bfloat16 once: what hardware with bfloat16 products
does too.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

PRODUCTS = frozenset(
    {
        *(torch.nn.functional.linear, torch.matmul, torch.mm, torch.bmm),
        *(Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__, Tensor.__rmatmul__),
    }
)


@functools.cache
def bfloat16_is_slow(device: str) -> bool:
    """Whether bfloat16 matrix products on this device are emulated number by number."""
    if torch.device(device).type != "cpu":
        return False
    known = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return not (known and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class WidenedProducts(TorchFunctionMode):
    """While it is entered, bfloat16 matrix products on a processor go through float32; everything else is as it was."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch in place of `func`."""
        keywords = kwargs or {}
        if func in PRODUCTS and all(_is_slow(arg) for arg in args[:2]):
            return func(*(_widened(arg) for arg in args), **{k: _widened(v) for k, v in keywords.items()}).bfloat16()
        return func(*args, **keywords)


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, through float32 where bfloat16 is slow."""
    if _is_slow(left) and _is_slow(right) and bfloat16_is_slow("cpu"):
        return (left.float() @ right.float()).bfloat16()
    return left @ right


def _is_slow(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.dtype == torch.bfloat16 and argument.device.type == "cpu"


def _widened(argument: Any) -> Any:
    return argument.float() if _is_slow(argument) else argument
