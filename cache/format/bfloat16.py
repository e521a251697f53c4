"""The zarr v3 data type `bfloat16`, backed by ml_dtypes.

Importing this module registers it. The entry-point group `zarr.data_type` of an installed hsae names it too, but
zarr-python up to 3.1.6 collects that group without ever loading it. The metadata is the plain name `bfloat16`, which
tensorstore reads without hsae.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeGuard

import ml_dtypes
import numpy as np
from zarr.core.dtype.common import DataTypeValidationError, HasEndianness, HasItemSize
from zarr.core.dtype.npy.common import float_from_json_v3, float_to_json_v3
from zarr.dtype import ZDType, data_type_registry

NUMPY_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class BFloat16(ZDType[Any, Any], HasEndianness, HasItemSize):
    """Sixteen bits: the upper half of a float32. zarr v3 only; little-endian."""

    _zarr_v3_name: ClassVar[str] = "bfloat16"
    dtype_cls = NUMPY_BFLOAT16.__class__

    @property
    def item_size(self) -> int:
        """Bytes of one number."""
        return 2

    @classmethod
    def from_native_dtype(cls, dtype: Any) -> Self:
        """This type for numpy's (ml_dtypes') bfloat16. Raises DataTypeValidationError for any other."""
        if dtype != NUMPY_BFLOAT16:
            raise DataTypeValidationError(f"Invalid data type: {dtype}. Expected {NUMPY_BFLOAT16}")
        return cls()

    def to_native_dtype(self) -> Any:
        """ml_dtypes' bfloat16."""
        return NUMPY_BFLOAT16

    @classmethod
    def _check_json_v2(cls, data: object) -> TypeGuard[Any]:
        return False

    @classmethod
    def _check_json_v3(cls, data: object) -> TypeGuard[Any]:
        return data == cls._zarr_v3_name

    @classmethod
    def _from_json_v2(cls, data: object) -> Self:
        raise DataTypeValidationError("bfloat16 exists in zarr v3 only")

    @classmethod
    def _from_json_v3(cls, data: object) -> Self:
        if cls._check_json_v3(data):
            return cls()
        raise DataTypeValidationError(
            f"Invalid JSON representation of {cls.__name__}: {data!r}; expected {cls._zarr_v3_name!r}"
        )

    def to_json(self, zarr_format: int) -> Any:
        """The name `bfloat16`. Raises ValueError for zarr v2."""
        if zarr_format != 3:
            raise ValueError("bfloat16 exists in zarr v3 only")
        return self._zarr_v3_name

    def _check_scalar(self, data: object) -> TypeGuard[Any]:
        return isinstance(data, int | float | np.number | ml_dtypes.bfloat16)

    def cast_scalar(self, data: object) -> Any:
        """A number as bfloat16. Raises TypeError for anything else."""
        if not self._check_scalar(data):
            raise TypeError(f"Cannot convert {data!r} to bfloat16")
        return NUMPY_BFLOAT16.type(data)

    def default_scalar(self) -> Any:
        """Zero."""
        return NUMPY_BFLOAT16.type(0)

    def from_json_scalar(self, data: Any, *, zarr_format: int) -> Any:
        """A fill value as it stands in metadata."""
        return NUMPY_BFLOAT16.type(float_from_json_v3(data))

    def to_json_scalar(self, data: object, *, zarr_format: int) -> Any:
        """A fill value as it stands in metadata."""
        return float_to_json_v3(float(self.cast_scalar(data)))


data_type_registry.register(BFloat16._zarr_v3_name, BFloat16)
