"""Codec `int8` for other readers of a store: numcodecs (id `hsae.int8`) and, inside a zarr v3 array, zarr-python.

Both find it through entry points of an installed hsae, which itself reads and writes chunks without them: importing
zarr takes a third of a second. What the bytes mean is in `quantised`.
"""

import math
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numcodecs.abc import Codec
from numcodecs.registry import register_codec
from zarr.abc.codec import ArrayBytesCodec
from zarr.core.buffer import Buffer, NDBuffer
from zarr.registry import register_codec as register_zarr_codec

from hsae.cache.format.quantised import dequantise, quantise

NAME = "hsae.int8"


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
