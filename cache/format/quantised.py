"""The numbers of codec `int8`: a token's vector, less a mean vector, as one float32 scale and D signed bytes. Half the
bytes of bfloat16; lossy.

    bytes   uint32 D; float32 mean [D]; float32 scale [N]; int8 [N, D]          all little-endian, N vectors

x is read back as mean + scale * q. The scale is the largest |x - mean| of the token over 127, so no entry is off by
more than scale / 2 before it is rounded to the array's type. A chunk carries the mean it was made with and can be
read without anything else.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def quantise(values: NDArray[Any], mean: NDArray[Any]) -> bytes:
    """Vectors [.., D] as bytes, with a mean [D]."""
    centred = values.reshape(-1, mean.shape[0]).astype(np.float32) - mean.astype(np.float32)
    scale = np.abs(centred).max(1, initial=0) / np.float32(127)
    quotient = np.divide(centred, scale[:, None], out=np.zeros_like(centred), where=scale[:, None] > 0)
    width = np.array([mean.shape[0]], "<u4")
    parts = (width, mean.astype("<f4"), scale.astype("<f4"), np.rint(quotient).astype(np.int8))
    return b"".join(part.tobytes() for part in parts)


def dequantise(data: bytes | memoryview, width: int | None = None) -> NDArray[np.float32]:
    """The vectors [N, D], float32. Raises ValueError for what `quantise` does not make, or another width."""
    view = memoryview(data).cast("B")
    stored = int.from_bytes(view[:4], "little")
    vectors, rest = divmod(len(view) - 4 - 4 * stored, 4 + stored)
    if len(view) < 4 or stored == 0 or vectors < 0 or rest or (width is not None and stored != width):
        of_width = f" of width {width}" if width else ""
        raise ValueError(f"{len(view)} bytes that name width {stored} are no int8 chunk{of_width}")
    mean = np.frombuffer(view, "<f4", stored, 4)
    scale = np.frombuffer(view, "<f4", vectors, 4 + 4 * stored)
    numbers = np.frombuffer(view, np.int8, vectors * stored, 4 + 4 * stored + 4 * vectors).reshape(vectors, stored)
    return (mean + scale[:, None] * numbers).astype(np.float32, copy=False)
