"""bfloat16 in zarr: our metadata, read by plain zarr after one import of ours and by tensorstore, which knows nothing
of us."""

import json
import subprocess
import sys
from importlib.metadata import entry_points

import ml_dtypes
import numpy as np
import pytest
import tensorstore
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec

from hsae.cache.format.bfloat16 import NUMPY_BFLOAT16, BFloat16


def sample(shape, seed=0):
    """Every exponent, both signs, zeros and the largest number, as bfloat16."""
    values = np.random.default_rng(seed).integers(0, 1 << 16, size=shape, dtype=np.uint16)
    values[(values & 0x7F80) == 0x7F80] &= 0xBFFF  # no infinities or NaN: their bits compare, their values do not
    values.flat[:4] = (0x0000, 0x8000, 0x7F7F, 0x0001)
    return values.view(ml_dtypes.bfloat16)


def written_by_zarr(path, values, chunks):
    array = zarr.create_array(
        path, shape=values.shape, chunks=chunks, dtype=NUMPY_BFLOAT16, serializer=BytesCodec(endian="little"),
        filters=(), compressors=(Crc32cCodec(),), fill_value=0,
    )  # fmt: skip
    array[:] = values


def opened_by_tensorstore(path, **changes):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}, **changes}
    return tensorstore.open(spec).result()


def test_plain_zarr_reads_what_we_write_after_one_import(tmp_path):
    values = sample((7, 5, 3))
    written_by_zarr(tmp_path / "array", values, (3, 5, 3))
    code = (
        "import sys, zarr, hsae.cache.format.bfloat16\n"
        f"array = zarr.open_array({str(tmp_path / 'array')!r}, mode='r')\n"
        "numbers = array[:]\n"
        "assert str(numbers.dtype) == 'bfloat16', numbers.dtype\n"
        "sys.stdout.buffer.write(numbers.tobytes())"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=tmp_path)
    assert told.stdout == values.tobytes()


def test_the_entry_point_leads_to_the_type():
    """zarr-python 3.1.6 collects the group `zarr.data_type` and never loads it; versions that do need no import."""
    (found,) = entry_points(group="zarr.data_type", name="bfloat16")
    assert found.load() is BFloat16


def test_tensorstore_reads_what_we_write_and_we_read_what_it_writes(tmp_path):
    values = sample((7, 5, 3))
    written_by_zarr(tmp_path / "ours", values, (3, 5, 3))
    array = opened_by_tensorstore(tmp_path / "ours")
    assert array.dtype.name == "bfloat16"
    assert array.read().result().tobytes() == values.tobytes()
    metadata = json.loads((tmp_path / "ours" / "zarr.json").read_text())
    assert metadata["data_type"] == "bfloat16"
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    grid = {"name": "regular", "configuration": {"chunk_shape": [3, 5, 3]}}
    theirs = opened_by_tensorstore(
        tmp_path / "theirs", create=True,
        metadata={"shape": [7, 5, 3], "data_type": "bfloat16", "chunk_grid": grid, "codecs": codecs, "fill_value": 0},
    )  # fmt: skip
    theirs.write(values).result()
    assert zarr.open_array(tmp_path / "theirs", mode="r")[:].tobytes() == values.tobytes()
    for index in range(3):
        chunk = f"c/{index}/0/0"
        assert (tmp_path / "ours" / chunk).read_bytes() == (tmp_path / "theirs" / chunk).read_bytes()


def test_tensorstore_refuses_a_flipped_byte_of_ours(tmp_path):
    written_by_zarr(tmp_path / "array", sample((3, 5, 2)), (3, 5, 2))
    chunk = tmp_path / "array/c/0/0/0"
    data = bytearray(chunk.read_bytes())
    data[11] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(ValueError, match="Digest mismatch"):
        opened_by_tensorstore(tmp_path / "array").read().result()


@pytest.mark.parametrize("value", [0.0, -1.5, float("inf"), float("-inf"), 3.0e38])
def test_fill_values_survive_their_metadata(tmp_path, value):
    array = zarr.create_array(tmp_path / "array", shape=(4,), dtype=NUMPY_BFLOAT16, fill_value=value)
    stored = zarr.open_array(tmp_path / "array", mode="r")
    assert stored.fill_value == ml_dtypes.bfloat16(value) == array[0]
    assert opened_by_tensorstore(tmp_path / "array").read().result().tobytes() == stored[:].tobytes()


def test_zarr_v2_and_other_types_are_refused():
    with pytest.raises(ValueError, match="exists in zarr v3 only"):
        BFloat16().to_json(2)
    with pytest.raises(TypeError, match="Cannot convert 'x' to bfloat16"):
        BFloat16().cast_scalar("x")
    assert zarr.dtype.parse_dtype("float16", zarr_format=3) != BFloat16()
    assert zarr.dtype.parse_dtype(NUMPY_BFLOAT16, zarr_format=3) == BFloat16()
