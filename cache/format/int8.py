"""Codec `int8`: a token's vector, less a mean vector, as one float32 scale and D signed bytes. Half the bytes of
bfloat16; lossy.

    bytes   uint32 D; float32 mean [D]; float32 scale [N]; int8 [N, D]          all little-endian, N vectors

x is read back as mean + scale * q. The scale is the largest |x - mean| of the token over 127, so no entry is off by
more than scale / 2 before it is rounded to the array's type. A chunk carries the mean it was made with and can be
read without anything else, with numcodecs (id `hsae.int8`) and, inside a zarr v3 array, with zarr-python, which both
find the codec through entry points of an installed hsae.
"""

import math
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numcodecs.abc import Codec
from numcodecs.registry import register_codec
from numpy.typing import NDArray
from zarr.abc.codec import ArrayBytesCodec
from zarr.core.buffer import Buffer, NDBuffer
from zarr.registry import register_codec as register_zarr_codec

NAME = "hsae.int8"


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


class Int8(Codec):  # type: ignore[misc]
    """The codec for numcodecs: encodes arrays [.., D] about their own mean, decodes to float32 [N, D]."""

    codec_id = NAME

    def encode(self, buf: Any) -> bytes:
        """An array's bytes."""
        values = np.asarray(buf)
        return quantise(values, values.reshape(-1, values.shape[-1]).astype(np.float64).mean(0))

    def decode(self, buf: Any, out: Any = None) -> Any:
        """The array, or `out` filled with it."""
        values = dequantise(memoryview(buf))
        if out is None:
            return values
        out[...] = values.reshape(out.shape)
        return out


@dataclass(frozen=True)
class Int8Codec(ArrayBytesCodec):
    """The codec for zarr v3."""

    is_fixed_size = True

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """From metadata, which has no configuration. Raises ValueError for another codec's."""
        if data.get("name") != NAME or data.get("configuration"):
            raise ValueError(f"expected codec {NAME} without configuration, not {data}")
        return cls()

    def to_dict(self) -> dict[str, Any]:
        """Metadata."""
        return {"name": NAME}

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: Any) -> NDBuffer:
        values = dequantise(chunk_bytes.to_bytes(), chunk_spec.shape[-1])
        dtype = chunk_spec.dtype.to_native_dtype()
        return chunk_spec.prototype.nd_buffer.from_ndarray_like(values.astype(dtype).reshape(chunk_spec.shape))  # type: ignore[no-any-return]

    async def _encode_single(self, chunk_array: NDBuffer, chunk_spec: Any) -> Buffer | None:
        return chunk_spec.prototype.buffer.from_bytes(Int8().encode(chunk_array.as_numpy_array()))  # type: ignore[no-any-return]

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: Any) -> int:
        """Bytes of a chunk."""
        vectors, width = int(math.prod(chunk_spec.shape[:-1])), int(chunk_spec.shape[-1])
        return 4 + 4 * width + vectors * (4 + width)


register_codec(Int8)
register_zarr_codec(NAME, Int8Codec)
