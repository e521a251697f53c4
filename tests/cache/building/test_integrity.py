"""A single flipped, cut, missing, swapped or foreign chunk is found and named; no metadata makes a reader do anything
but refuse."""

import contextlib
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec
from zarr.storage import MemoryStore

from hsae.cache.building import sealing
from hsae.cache.building.builder import clear
from hsae.cache.building.chunk_log import Written
from hsae.cache.building.copying import copy
from hsae.cache.building.repair import repair
from hsae.cache.building.verification import verify
from hsae.cache.building.writer import seal, write_header, write_list
from hsae.cache.errors import DamagedFileError, StoreError
from hsae.cache.files import crc32c, sealed
from hsae.cache.format.arrays import ITEM_BYTES, ArraySpec
from hsae.cache.format.bfloat16 import NUMPY_BFLOAT16
from hsae.cache.format.chunk_codec import decode_chunk
from hsae.cache.format.int8 import Int8Codec
from hsae.cache.format.layout import arrays, documents_digest, every_array, is_sealed, kept_array, read_header
from hsae.cache.launcher import Share
from hsae.cache.reading.mapped_chunks import read_checks
from hsae.cache.reading.provenance import check_model
from hsae.cache.reading.store import ActivationStore
from hsae.cache.reading.token_stream import TokenStream

HOOK = "blocks.3.hook_resid_post"
MANY = settings(
    max_examples=int(os.environ.get("HSAE_EXAMPLES", "80")),
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module", params=["mappable", "compact"])
def stores(request, make_store, tmp_path_factory):
    """Two stores of one configuration and other numbers."""
    return [make_store(tmp_path_factory.mktemp("store"), codec=request.param, seed=seed)[0] for seed in (0, 1)]


def chunk_files(root):
    return sorted(path for path in root.rglob("*") if path.is_file() and "c" in path.relative_to(root).parts)


def read_everything(root):
    """Every number of every array, as training and evaluation read them."""
    store = ActivationStore.open(root)
    store.tokens(0, store.rows)
    store.acts(HOOK, 0, store.rows)
    store.statistics(HOOK)
    for name in ("loss", "final"):
        store.clean(name, 0, store.clean_rows)
    for name in ("loss", "kl"):
        store.ablation(HOOK, name, 0, store.clean_rows)


@given(data=st.data())
@MANY
def test_one_harmed_chunk_is_found_and_named_by_verify_and_by_reading(stores, scratch_home, record_property, data):
    record_property("injected", 1)
    root, other = stores
    files = chunk_files(root)
    chunk = data.draw(st.sampled_from(files))
    whole = chunk.read_bytes()
    harm, harmed, back = (
        data.draw(st.sampled_from(["flip", "cut", "longer", "remove", "swap", "foreign", "empty"])),
        {chunk},
        {chunk: whole},
    )
    if harm == "flip":
        place = data.draw(st.integers(0, len(whole) - 1))
        chunk.write_bytes(
            whole[:place] + bytes([whole[place] ^ 1 << data.draw(st.integers(0, 7))]) + whole[place + 1 :]
        )
    elif harm == "cut":
        chunk.write_bytes(whole[: -data.draw(st.integers(1, len(whole)))])
    elif harm == "longer":
        chunk.write_bytes(whole + data.draw(st.binary(min_size=1, max_size=9)))
    elif harm == "empty":
        chunk.write_bytes(b"")
    elif harm == "remove":
        chunk.unlink()
    elif harm == "foreign":  # whole, with a right checksum, from another store of the same shape
        chunk.write_bytes((other / chunk.relative_to(root)).read_bytes())
    else:
        second = data.draw(st.sampled_from([path for path in files if path != chunk]))
        back[second] = second.read_bytes()
        chunk.write_bytes(back[second])
        second.write_bytes(whole)
        harmed.add(second)
    try:
        assert {damage.path for damage in verify(root)} == harmed
        with pytest.raises(StoreError) as caught:
            read_everything(root)
        assert any(str(path) in str(caught.value) for path in harmed)
        assert f"hsae cache verify {root} --repair" in str(caught.value)
    finally:
        for path, content in back.items():
            path.write_bytes(content)
    assert verify(root) == []


def test_a_damaged_list_of_checksums_is_written_again_without_the_model(stores):
    root, _ = stores
    path = root / "checks/c/0"
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:3] + bytes([whole[3] ^ 4]) + whole[4:]):
        path.write_bytes(content)
        damages = verify(root)
        assert [damage.array for damage in damages] == ["checks"]
        assert repair(root, damages) == [] and path.read_bytes() == whole


def test_a_store_from_before_the_list_is_read_and_can_be_given_one(make_store, tmp_path):
    root, values = make_store(tmp_path)
    header = read_header(root)
    write_header(root, header.model_copy(update={"checks": None}))
    for name in ("c/0", "zarr.json"):
        (root / "checks" / name).unlink()
    assert torch.equal(ActivationStore.open(root).acts(HOOK, 0, 23), values[f"acts/{HOOK}"])
    assert verify(root) == [] and repair(root, []) == []
    assert read_header(root) == header


def test_kept_tokens_are_written_down_checked_and_counted_again(make_store, tmp_path):
    root, values = make_store(tmp_path)
    old = ActivationStore.open(root)
    wanted = [int((values["tokens"][first : first + 4] != 0).sum()) for first in range(0, 23, 4)]
    assert (
        old.header.kept_tokens is None and old.tokens_per_chunk.tolist() == wanted
    )  # made before they were written down
    header = old.header.model_copy(update={"kept_tokens": sum(wanted)})
    write_list(root, kept_array(header.spec, header.d_model), np.array(wanted))
    write_header(root, header.model_copy(update={"checks": seal(root, every_array(header))}))
    assert verify(root) == [] and ActivationStore.open(root).tokens_per_chunk.tolist() == wanted
    for index in range(6):
        (root / f"tokens/c/{index}/0").rename(root / f"tokens/{index}")
    assert ActivationStore.open(root).tokens_per_chunk.tolist() == wanted  # no token is read
    (root / "stats/kept/c/0").write_bytes((root / "stats/kept/c/0").read_bytes()[:-1])
    with pytest.raises(StoreError, match="stats/kept/c/0 is 27 bytes long, not 28"):
        _ = ActivationStore.open(root).tokens_per_chunk
    write_list(root, kept_array(header.spec, header.d_model), np.array([*wanted[1:], 1]))
    known = {path: listed for path, listed in read_checks(root, read_header(root)).items() if path != "stats/kept"}
    write_header(root, header.model_copy(update={"checks": seal(root, every_array(header), known)}))
    with pytest.raises(StoreError, match=f"the header tells of {sum(wanted)} kept tokens, the chunks of"):
        _ = ActivationStore.open(root).tokens_per_chunk


def test_workers_take_down_counts_and_checksums_in_parts(make_store, tmp_path, monkeypatch):
    monkeypatch.setattr(sealing, "TALLIED", 2)
    root, values = make_store(tmp_path)
    header = read_header(root)
    specs, wanted = list(arrays(header.spec, header.d_model).values()), read_checks(root, header)
    write_header(root, header.model_copy(update={"complete": False}))
    written = Written(root, "key", specs)
    for spec in specs:
        for index, checksum in enumerate(wanted[spec.path]):
            written.add(spec.path, index, int(checksum))
    assert sealing.write_parts(root, specs, (0,), Share(1, 3), written) == []
    assert [path.name for path in (root / "tally").iterdir()] == ["1"]
    assert sealing.collect_parts(root, specs, "key") is None
    assert sealing.write_parts(root, specs, (0,), Share(0, 3), written) == []  # what worker 2 left as well
    kept, checks = sealing.collect_parts(root, specs, "key")
    assert kept.tolist() == [int((values["tokens"][first : first + 4] != 0).sum()) for first in range(0, 23, 4)]
    assert all(checks[spec.path].tolist() == wanted[spec.path].tolist() for spec in specs)
    assert sealing.collect_parts(root, specs, "another key") is None
    clear(root)
    specs[1].chunk_file(root, 3).unlink()
    written.add("tokens", 0, 7)
    assert sealing.write_parts(root, specs, (0,), Share(), written) == [(specs[0], 0), (specs[1], 3)]
    assert [path.name for path in (root / "tally").iterdir()] == ["2"]


def test_the_list_holds_the_crc32c_of_every_chunk(stores):
    root, _ = stores
    listed = [
        int.from_bytes((root / "checks/c/0").read_bytes()[4 * n : 4 * n + 4], "little")
        for n in range(len(chunk_files(root)) - 1)
    ]
    header = read_header(root)
    wanted = [
        crc32c(spec.chunk_file(root, index).read_bytes()[:-4])
        for spec in every_array(header)
        for index in range(spec.count)
    ]
    assert listed == wanted


def places_in(tree, path=()):
    """Every path into a JSON document."""
    yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from places_in(value, (*path, key))


HOSTILE = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3),
    st.sampled_from([-(1 << 63), 1 << 40, 1 << 63, 10**30, 10**400, -1, 0]),
    st.floats(allow_nan=False),
    st.sampled_from(["", "../../etc/passwd", "/etc", "c/0", "\0", "float64", "s3://x/y", "blocks.3.hook_resid_pre"]),
    st.lists(st.integers(-1, 1 << 40), max_size=4),
    st.dictionaries(st.sampled_from(["name", "a"]), st.integers(), max_size=2),
)  # fmt: skip


@given(data=st.data())
@MANY
def test_hostile_metadata_is_refused_or_means_what_it_says(stores, scratch_home, record_property, data):
    record_property("injected", 1)
    root = stores[0]
    path = root / data.draw(
        st.sampled_from(["zarr.json", "zarr.json", f"acts/{HOOK}/zarr.json", "tokens/zarr.json", "checks/zarr.json"])
    )
    whole = path.read_text()
    tree = {"": json.loads(whole)}
    *outer, last = data.draw(st.sampled_from([place for place in places_in(tree) if place]))
    node = tree
    for key in outer:
        node = node[key]
    if data.draw(st.booleans()):
        node[last] = data.draw(HOSTILE)
    else:
        del node[last]
    if data.draw(st.booleans()):  # someone else's, not rot
        with contextlib.suppress(KeyError, TypeError):
            tree[""]["attributes"]["hsae"] = sealed(tree[""]["attributes"]["hsae"])
    try:
        path.write_text(json.dumps(tree.get("")))
        try:
            read_everything(root)
            verify(root)
        except StoreError as error:
            assert str(error)
    finally:
        path.write_text(whole)


@given(content=st.one_of(st.binary(max_size=40), st.just(b"[" * 100_000), st.just(b'{"attributes": {"hsae": []}}')))
@settings(MANY, max_examples=25)
def test_a_header_of_any_bytes_is_refused(stores, record_property, content):
    record_property("injected", 1)
    path = stores[0] / "zarr.json"
    whole = path.read_bytes()
    path.write_bytes(content)
    try:
        with pytest.raises(StoreError, match="is not the header of an hsae store"):
            ActivationStore.open(stores[0])
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_rows": 0}, "impossible sizes"),
        ({"rows": 0, "clean_rows": 0}, "impossible sizes"),
        ({"rows": 1 << 40, "chunk_mib": 1e-9}, "impossible sizes"),
        ({"chunk_mib": 1e6}, "impossible sizes|the store's header leads to"),
        ({"hooks": []}, "names hooks hsae doesn't know"),
        ({"hooks": [HOOK, HOOK]}, "names hooks hsae doesn't know"),
        ({"hooks": ["blocks.3.hook_resid_post/../../x"]}, "names hooks hsae doesn't know"),
        ({"hooks": [HOOK, "blocks.4.hook_resid_post"]}, "says the store is complete, but has no statistics of"),
    ],
)
def test_impossible_sizes_and_hooks_are_refused(stores, change, message):
    path = stores[0] / "zarr.json"
    whole = path.read_text()
    path.write_text(with_header(path, spec=json.loads(whole)["attributes"]["hsae"]["spec"] | change))
    try:
        with pytest.raises(StoreError, match=message):
            ActivationStore.open(stores[0])
    finally:
        path.write_text(whole)


def with_header(path, **change):
    """The text of a zarr.json whose header, sealed again, says something else: what someone writes, not what rots."""
    document = json.loads(path.read_text())
    document["attributes"]["hsae"] = sealed(document["attributes"]["hsae"] | change)
    return json.dumps(document)


def refused_or_read(root, name, content):
    """What fuzzing found: read everything, as training does too, with other content in one file."""
    path = root / name
    whole = path.read_bytes() if path.exists() else None
    path.write_bytes(content)
    try:
        read_everything(root)
        store = ActivationStore.open(root)
        TokenStream(store, HOOK, batch_tokens=5, seed=0).batch(0)
        store.documents()
    finally:
        path.unlink() if whole is None else path.write_bytes(whole)


@pytest.mark.parametrize("name", ["tokens/zarr.json", "checks/zarr.json", f"acts/{HOOK}/zarr.json", "documents.json"])
@pytest.mark.parametrize("content", [b"[" * 100_000, b"", b"[[Infinity, null]]", b"[[1, 2, 3]]", b"\xff", b"1" * 5000])
def test_metadata_that_python_s_json_chokes_on_is_refused(stores, scratch_home, name, content):
    with pytest.raises(StoreError):
        refused_or_read(stores[0], name, content)


@pytest.mark.parametrize("change", [{"special_ids": [10**30]}, {"special_ids": [-5]}, {"bos_id": 2**40}])
def test_token_ids_that_no_token_can_have_are_refused(stores, change):
    with pytest.raises(StoreError, match="is not the header of an hsae store"):
        refused_or_read(stores[0], "zarr.json", with_header(stores[0] / "zarr.json", **change).encode())


def test_a_store_of_special_tokens_only_is_refused_in_a_sentence(stores, scratch_home):
    content = with_header(stores[0] / "zarr.json", special_ids=list(range(100)))
    with pytest.raises(StoreError, match="holds special tokens only; use another corpus"):
        refused_or_read(stores[0], "zarr.json", content.encode())


@pytest.mark.parametrize("claimed", [0, 15, 34_013_184, 2**32 - 1])
def test_a_compact_chunk_that_claims_another_length_is_damaged(make_store, tmp_path, claimed):
    """blosc reads as many bytes as its header says, beyond the end too."""
    root, _ = make_store(tmp_path, codec="compact")
    spec = next(spec for spec in every_array(read_header(root)) if spec.codec == "compact")
    body = bytearray(spec.chunk_file(root, 0).read_bytes()[:-4])
    assert (
        len(decode_chunk(root, root / "chunk", bytes(body) + crc32c(body).to_bytes(4, "little"), spec))
        == spec.chunk_bytes
    )
    body[12:16] = claimed.to_bytes(4, "little")
    with pytest.raises(DamagedFileError, match="does not decode to a chunk of this array"):
        decode_chunk(root, root / "chunk", bytes(body) + crc32c(body).to_bytes(4, "little"), spec)
    short = bytes(body[:12]) + bytes([13])  # no whole header, and the length that it claims
    with pytest.raises(DamagedFileError, match="does not decode to a chunk of this array"):
        decode_chunk(root, root / "chunk", short + crc32c(short).to_bytes(4, "little"), spec)


def test_a_store_without_statistics_says_so(make_store, tmp_path):
    root, _ = make_store(tmp_path)
    write_header(root, read_header(root).model_copy(update={"statistics": {}, "complete": False, "checks": None}))
    with pytest.raises(StoreError, match=r"has no statistics of .*; finish it with `hsae cache build`"):
        ActivationStore.open(root, require_complete=False).statistics(HOOK)


# ---- FIX C4: no digit of the header, of metadata or of documents.json changes without a word -----------------------


@pytest.fixture(scope="module")
def labelled(make_store, tmp_path_factory):
    """A store whose rows are of one document each."""
    root, _ = make_store(tmp_path_factory.mktemp("labelled"))
    header = read_header(root)
    data = json.dumps([[number // 2, None if number % 3 else "7th"] for number in range(23)]).encode()
    (root / "documents.json").write_bytes(data)
    spec = header.spec.model_copy(update={"rows_per_document": 2})
    write_header(root, header.model_copy(update={"spec": spec, "documents_digest": documents_digest(data)}))
    assert verify(root) == []
    return root


@pytest.mark.parametrize("name", ["zarr.json", "documents.json", "every array's and group's"])
def test_no_changed_digit_passes(labelled, name, record_property, monkeypatch):
    monkeypatch.setattr("hsae.cache.building.verification.check_chunk", lambda *given: None)  # chunks are as they were
    files = [labelled / name] if name.endswith("json") else sorted(labelled.glob("*/**/zarr.json"))
    passed = tried = 0
    for path in files:
        whole = path.read_text()
        for place in (place for place, sign in enumerate(whole) if sign.isdecimal()):
            changed = f"{whole[:place]}{(int(whole[place]) + 3) % 10}{whole[place + 1 :]}"
            path.write_text(changed)
            tried += 1
            try:
                damages = verify(labelled)
            except StoreError as error:
                assert "`hsae cache build`" in str(error)
            else:
                passed += not damages and json.loads(changed) != json.loads(whole)
                assert {damage.path for damage in damages} <= {path}
        path.write_text(whole)
    record_property("injected", tried)
    assert tried > 30 and passed == 0


def test_metadata_and_lists_are_written_again_as_they_were_without_the_model(labelled, monkeypatch):
    monkeypatch.setattr("hsae.cache.building.repair._compute_again", None)
    files = [path for path in labelled.rglob("*") if path.name == "zarr.json" and path != labelled / "zarr.json"]
    whole = {path: path.read_bytes() for path in (*files, labelled / "checks/c/0")}
    for number, path in enumerate(whole):
        path.unlink() if number % 2 else path.write_bytes(b"")
    with pytest.raises(StoreError, match=f"hsae cache verify {labelled} --repair"):
        ActivationStore.open(labelled)
    damages = verify(labelled)
    assert {damage.path for damage in damages} == set(whole) and repair(labelled, damages) == []
    assert {path: path.read_bytes() for path in whole} == whole
    content = json.loads((labelled / "zarr.json").read_text())
    (labelled / "zarr.json").write_text(json.dumps({**content, "zarr_format": 2}))
    damages = verify(labelled)
    assert [damage.problem for damage in damages] == ["says zarr_format is 2, the store's header leads to 3"]
    assert repair(labelled, damages) == [] and json.loads((labelled / "zarr.json").read_text()) == content


def test_a_store_from_before_the_header_s_checksum_is_read_and_can_be_given_one(labelled):
    path = labelled / "zarr.json"
    whole = path.read_text()
    content = json.loads(whole)
    held = content["attributes"]["hsae"]
    for name in ("checksum", "documents_digest"):
        del held[name]
    path.write_text(json.dumps(content))
    (labelled / "acts/zarr.json").write_text(
        '{"attributes": {}, "consolidated_metadata": null, "zarr_format": 3, "node_type": "group"}'
    )
    assert verify(labelled) == [] and len(ActivationStore.open(labelled).documents()) == 23
    assert not is_sealed(labelled) and repair(labelled, []) == [] and is_sealed(labelled)
    held["d_model"] = 11
    path.write_text(json.dumps(content))
    with pytest.raises(StoreError, match="the store's header leads to"):
        ActivationStore.open(labelled)
    path.write_text(whole)


@pytest.mark.parametrize("content", [None, b"", b"[" * 100_000, b"1" * 5000, b"\xff"])
def test_what_a_lost_or_damaged_documents_json_needs_is_named(labelled, content):
    path = labelled / "documents.json"
    whole = path.read_bytes()
    path.unlink() if content is None else path.write_bytes(content)
    assert [damage.path for damage in verify(labelled)] == [path]
    with pytest.raises(StoreError, match=f"documents.json is .*hsae cache verify {labelled} --repair"):
        ActivationStore.open(labelled).documents()
    path.write_bytes(whole)


@pytest.mark.parametrize("codec", ["mappable", "compact", "int8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "int32", "uint32"])
def test_metadata_is_what_zarr_writes(codec, dtype):
    spec = ArraySpec("a/b", (23, 7), dtype, (4, 7), codec)
    held: dict = {}
    array = zarr.create_group(MemoryStore(held), zarr_format=3).create_array(
        "a/b", shape=spec.shape, chunks=spec.chunks, dtype=NUMPY_BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype),
        filters=(),
        serializer=Int8Codec() if codec == "int8" else BytesCodec(endian="little"), fill_value=0,
        compressors=(*([BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle",
        typesize=ITEM_BYTES[dtype])] * (codec == "compact")), Crc32cCodec()),
    )  # fmt: skip
    assert array.shape == spec.shape and json.loads(held["a/b/zarr.json"].to_bytes()) == spec.metadata
    assert json.loads(held["a/zarr.json"].to_bytes()) == {"attributes": {}, "zarr_format": 3, "node_type": "group"}


# ---- FIX C7: int8 is recoded, never computed again -----------------------------------------------------------------


@pytest.mark.parametrize("array", [f"acts/{HOOK}", f"stats/{HOOK}/mean"])
def test_lost_int8_chunks_are_refused_and_recoding_mends_them(make_store, tmp_path, array):
    source, _ = make_store(tmp_path)
    root = copy(source, tmp_path, codec="int8")
    whole = {path: path.read_bytes() for path in chunk_files(root)}
    first, second = [path for path in chunk_files(root) if path.is_relative_to(root / array)][-1], root / "checks/c/0"
    first.write_bytes(b"x" * len(whole[first]))
    second.unlink()
    before = {path: path.read_bytes() for path in chunk_files(root)}
    with pytest.raises(
        StoreError, match=f"nothing was written. Mend it with: hsae cache recode {source} {tmp_path} --codec int8"
    ):
        repair(root, verify(root))
    assert {path: path.read_bytes() for path in chunk_files(root)} == before
    copy(source, tmp_path, codec="int8")
    assert {path: path.read_bytes() for path in chunk_files(root)} == whole and verify(root) == []
    (root / "zarr.json").write_text("{}")
    copy(source, tmp_path, codec="int8")
    assert {path: path.read_bytes() for path in chunk_files(root)} == whole and verify(root) == []


@pytest.mark.parametrize(
    ("name", "command"), [("x-forget-me-train-0", "build"), ("x-retain-0", "build --suite unlearning")]
)
def test_the_command_that_makes_a_lost_store_is_its_own(tmp_path, name, command):
    with pytest.raises(StoreError, match=f"make it with `hsae cache {command}`"):
        ActivationStore.open(tmp_path / f"{name}.zarr")


# ---- FIX A4: a store and the model that is loaded for it -----------------------------------------------------------


@pytest.mark.parametrize(("name", "what"), [("model_digest", "weights"), ("tokenizer_digest", "tokenizer files")])
def test_a_model_or_tokenizer_of_another_digest_is_refused(stores, name, what):
    header = read_header(stores[0])
    digests = {key: getattr(header, key) for key in ("model_digest", "tokenizer_digest")}

    def model(**changes):
        given = digests | changes
        return SimpleNamespace(folder=None, digest_like=lambda part, other: given[f"{part}_digest"])

    check_model(stores[0], header, model())
    with pytest.raises(
        StoreError, match=f"was made with other {what} than the model has now; move it away and make it again with"
    ):
        check_model(stores[0], header, model(**{name: "other"}))
