from types import SimpleNamespace

import numcodecs
import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hsae.cache.building.copying import copy
from hsae.cache.building.verification import verify
from hsae.cache.errors import StoreError
from hsae.cache.format.int8 import Int8Codec
from hsae.cache.format.layout import read_header
from hsae.cache.format.quantised import dequantise, quantise
from hsae.cache.reading.store import ActivationStore
from hsae.cache.storage.paths import sizes

HOOK = "blocks.3.hook_resid_post"
NUMBERS = st.floats(-1e5, 1e5, width=32)


def encoded_bytes(vectors, width):
    return Int8Codec().compute_encoded_size(0, SimpleNamespace(shape=(vectors, width)))


@given(
    values=arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 7)), elements=NUMBERS),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None, database=None)
def test_no_entry_is_off_by_more_than_half_a_step_of_its_token(values, seed):
    mean = np.random.default_rng(seed).normal(size=values.shape[1]).astype(np.float32)
    data = quantise(values, mean)
    assert len(data) == encoded_bytes(*values.shape)
    step = np.abs(values - mean).max(1) / 127
    rounding = 1e-6 * (np.abs(values).max(1) + np.abs(mean).max()) + 1e-30
    assert (np.abs(dequantise(data) - values).max(1) <= step / 2 + rounding).all()


@pytest.mark.parametrize(
    "data", [b"", b"\x03\0\0", b"\0\0\0\0", b"\x02\0\0\0" + bytes(9), b"\xff\xff\xff\xff" + bytes(40)]
)
def test_bytes_that_are_no_int8_chunk_are_refused(data):
    with pytest.raises(ValueError, match="are no int8 chunk"):
        dequantise(data)


def test_numcodecs_finds_it():
    values = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    codec = numcodecs.get_codec({"id": "hsae.int8"})
    decoded = codec.decode(codec.encode(values)).reshape(values.shape)
    assert 0 < np.abs(decoded - values).max() < np.abs(values).max() / 100
    out = np.empty_like(values)
    assert codec.decode(codec.encode(values), out=out) is out and np.array_equal(out, decoded)


def test_a_store_recoded_to_int8_is_half_as_large_and_says_what_it_lost(make_store, scratch_home, tmp_path):
    near, values = make_store(tmp_path, width=96)
    small = copy(near, tmp_path / "small", codec="int8")
    numbers, mean = values[f"acts/{HOOK}"], values[f"stats/{HOOK}/mean"].float().numpy()
    wanted = torch.from_numpy(dequantise(quantise(numbers.float().numpy(), mean))).view(numbers.shape).bfloat16()
    store = ActivationStore.open(small)
    assert torch.equal(store.acts(HOOK, 0, 23), wanted)
    assert torch.equal(store.clean("final", 0, 9), values["clean/final"])  # lossless
    plain = zarr.open_group(small, mode="r")[f"acts/{HOOK}"][:]
    assert np.array_equal(plain.astype(np.float32), wanted.float().numpy())
    bytes_of = [
        sum(size for name, size in sizes(root).items() if name.startswith("acts") and "/c/" in name)
        for root in (small, near)
    ]
    assert (
        bytes_of == [6 * (encoded_bytes(4 * 7, 96) + 4), 6 * (4 * 7 * 96 * 2 + 4)] and bytes_of[0] < 0.6 * bytes_of[1]
    )
    lost = (numbers - wanted).double().square().sum() / (numbers.double() - values[f"stats/{HOOK}/mean"]).square().sum()
    assert read_header(small).codec_error == {HOOK: pytest.approx(lost.item())} and 1e-6 < lost < 1e-3
    assert verify(small) == []
    chunk = small / f"acts/{HOOK}/c/2/0/0"
    data = bytearray(chunk.read_bytes())
    data[90] ^= 2
    chunk.write_bytes(data)
    assert [damage.path for damage in verify(small)] == [chunk]
    with pytest.raises(StoreError, match="holds int8, which is not exact; recode the store that it was made from"):
        copy(small, tmp_path / "back", codec="mappable")


def test_an_int8_store_is_copied_as_it_is_and_cannot_be_built(make_store, scratch_home, tmp_path):
    from hsae.cache.building.build import build

    near, _ = make_store(tmp_path)
    small = copy(near, tmp_path, codec="int8")
    assert small.parent == near.parent and small.name != near.name
    far = copy(small, tmp_path / "far", codec="int8")
    assert {name: (far / name).read_bytes() for name in sizes(far)} == {
        name: (small / name).read_bytes() for name in sizes(small)
    }
    with pytest.raises(
        StoreError, match=r"int8 stores are made from finished ones: build with --set cache.codec=mappable, then"
    ):
        build([read_header(small).spec], tmp_path / "new")
