"""Stores: built from the tiny Gemma-2, read back by us and by plain zarr, damaged and mended, killed and resumed."""

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import google_crc32c
import ml_dtypes
import numpy as np
import pytest
import torch
import zarr
from filelock import FileLock
from places import GOLDEN
from safetensors.torch import load_file
from stores import HOOK, contents, spec
from transformers import AutoConfig

import hsae.cache.format.bfloat16  # noqa: F401  for zarr
from hsae.cache.building.build import build
from hsae.cache.building.contents import ComputedChunk, StoreContents, TokenisedText
from hsae.cache.building.estimate import _seconds as estimated_seconds
from hsae.cache.building.estimate import check_space, estimate
from hsae.cache.building.repair import repair
from hsae.cache.building.statistics import geometric_median
from hsae.cache.building.verification import verify
from hsae.cache.building.writer import write_header
from hsae.cache.config import CorpusConfig, ModelConfig
from hsae.cache.errors import CorpusError, ModelError, StoreError, UserError
from hsae.cache.files import crc32c, sealed
from hsae.cache.format import layout
from hsae.cache.language_model.lm import LanguageModel
from hsae.cache.launcher import Share, share
from hsae.cache.reading.mapped_chunks import MappedArray
from hsae.cache.reading.store import ActivationStore
from hsae.cache.storage.paths import sizes


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build([spec()], tmp_path_factory.mktemp("stores"))[0]


@pytest.fixture
def copied(built, tmp_path):
    return Path(shutil.copytree(built, tmp_path / built.name))


def test_golden_documents_pack_to_the_golden_rows(tmp_path):
    tensors, params = (
        load_file(GOLDEN / "core/documents.safetensors"),
        json.loads((GOLDEN / "core/params.json").read_text()),
    )
    ids, edges, data = tensors["ids"].tolist(), tensors["offsets"].tolist(), params["dataset"]
    order = [number for shard in data["shard_order_used"] for number in range(*data["shards"][shard]["docs"])]
    documents = [ids[edges[number] : edges[number + 1]] for number in order]
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 2**-6)):  # other processors round otherwise
        model = ModelConfig(id=str(GOLDEN / "model"), dtype=dtype)
        path = build(
            [spec(model=model, context=48, batch_rows=8, rows=144, clean_rows=48)],
            tmp_path,
            text=TokenisedText(documents),
        )[0]
        store = ActivationStore.open(path)
        assert torch.equal(store.tokens(0, 144), load_file(GOLDEN / "core/tokens.safetensors")["tokens"])
        expected = load_file(GOLDEN / f"core/resid_{dtype}.safetensors")["resid"].float()
        away = (store.acts(HOOK, 0, 144).float() - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert away.max() < tolerance


def test_what_is_stored_is_what_the_model_says(built):
    store, model = ActivationStore.open(built), LanguageModel.load(spec().model)
    tokens = store.tokens(0, 15)
    logits = torch.cat([model.logits(tokens[first : first + 5]) for first in (0, 5, 10)])
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten().long(), reduction="none"
    )
    loss = store.clean("loss", 0, 15)
    torch.testing.assert_close(loss[:, :-1].flatten(), expected, rtol=0.02, atol=0.02)
    assert torch.equal(loss, loss.bfloat16().float()) and not loss[:, -1].any()
    assert torch.equal(model.unembed(store.clean("final", 0, 5)), logits[:5])
    ablated = torch.full(
        (), 800.0
    ).log()  # zeroing the residual of a bias-free model makes every token as likely as any other
    torch.testing.assert_close(
        store.ablation(HOOK, "loss", 0, 15)[:, :-1], ablated.expand(15, 20), rtol=0.01, atol=0.01
    )
    entropy = -(logits.float().softmax(-1) * logits.float().log_softmax(-1)).sum(-1)
    torch.testing.assert_close(store.ablation(HOOK, "kl", 0, 15), ablated - entropy, rtol=0.05, atol=0.05)


def test_plain_zarr_reads_the_same_numbers_and_the_file_is_payload_then_crc32c(built):
    store, group = ActivationStore.open(built), zarr.open_group(built, mode="r")
    array = group[f"acts/{HOOK}"]
    assert array.dtype == ml_dtypes.bfloat16 and array.metadata.to_dict()["data_type"] == "bfloat16"
    assert np.array_equal(array[:].view(np.int16), store.acts(HOOK, 0, 43).view(torch.int16).numpy())
    assert np.array_equal(group["tokens"][:], store.tokens(0, 43).numpy())
    data = (built / f"acts/{HOOK}/c/1/0/0").read_bytes()
    assert len(data) == store.chunk_rows * 21 * 48 * 2 + 4
    assert int.from_bytes(data[-4:], "little") == google_crc32c.value(data[:-4])
    mapped = store.acts_chunk(HOOK, 1)
    assert data[:-4] == mapped.contiguous().view(torch.int16).numpy().tobytes()
    changed = mapped[0, 0, 0].clone()
    mapped[0, 0, 0] = 99  # a write stays in this process
    assert zarr.open_group(built, mode="r")[f"acts/{HOOK}"][store.chunk_rows, 0, 0] == changed.item()
    mapped[0, 0, 0] = changed


def test_rows_across_chunks_and_outside(built):
    store = ActivationStore.open(built)
    whole = torch.cat([store.acts_chunk(HOOK, index) for index in range(store.chunks)])
    assert whole.shape == (43, 21, 48) and store.chunks > 2 and 43 % store.chunk_rows
    for start, stop in ((0, 43), (3, 4), (store.chunk_rows - 1, store.chunk_rows + 1), (42, 43), (7, 7)):
        assert torch.equal(store.acts(HOOK, start, stop), whole[start:stop])
    with pytest.raises(IndexError):
        store.acts(HOOK, 0, 44)
    with pytest.raises(StoreError, match=re.escape(f"holds {HOOK}, not blocks.1.hook_resid_post")):
        store.acts("blocks.1.hook_resid_post", 0, 1)


def test_statistics_are_the_moments_of_the_non_special_tokens(built):
    store = ActivationStore.open(built)
    vectors = store.acts(HOOK, 0, 43)[~store.special_mask(store.tokens(0, 43))].double()
    statistics = store.statistics(HOOK)
    assert statistics.tokens == len(vectors) == store.header.kept_tokens == store.tokens_per_chunk.sum()
    torch.testing.assert_close(statistics.mean_D, vectors.mean(0))
    assert statistics.mean_square_norm == pytest.approx(vectors.square().sum(1).mean().item())
    distance = [
        (vectors - point).norm(dim=1).sum().item() for point in (statistics.geometric_median_D, vectors.mean(0))
    ]
    assert distance[0] < distance[1]
    line = torch.tensor([[0.0, 0], [1, 0], [10, 0]], dtype=torch.float64)
    torch.testing.assert_close(geometric_median(line), torch.tensor([1.0, 0], dtype=torch.float64), atol=1e-3, rtol=0)


def test_several_hooks_in_one_pass_give_what_one_alone_gives(built, tmp_path):
    hooks = ("blocks.0.hook_resid_post", HOOK, "blocks.4.hook_resid_pre")
    store, alone = ActivationStore.open(build([spec(hooks=hooks)], tmp_path)[0]), ActivationStore.open(built)
    assert torch.equal(store.acts(HOOK, 0, 43), alone.acts(HOOK, 0, 43))
    assert torch.equal(store.clean("loss", 0, 15), alone.clean("loss", 0, 15))
    assert not torch.equal(store.acts(hooks[0], 0, 43), store.acts(hooks[2], 0, 43))


def test_compact_stores_hold_the_same_and_are_smaller(built, tmp_path, monkeypatch):
    monkeypatch.setenv("HSAE_HOME", str(tmp_path / "home"))
    path = build([spec(codec="compact")], tmp_path)[0]
    store, plain = ActivationStore.open(path), ActivationStore.open(built)
    assert torch.equal(store.acts(HOOK, 0, 43), plain.acts(HOOK, 0, 43))
    assert np.array_equal(
        zarr.open_group(path, mode="r")[f"acts/{HOOK}"][:].view(np.int16),
        plain.acts(HOOK, 0, 43).view(torch.int16).numpy(),
    )
    sizes = [
        sum(file.stat().st_size for file in (root / "acts").rglob("*") if "c" in file.parts) for root in (path, built)
    ]
    assert sizes[0] < sizes[1]
    assert verify(path) == []
    chunk = path / f"acts/{HOOK}/c/0/0/0"
    data = bytearray(chunk.read_bytes())
    data[40] ^= 1
    chunk.write_bytes(data)
    assert [damage.problem for damage in verify(path)] == ["fails its checksum"]
    with pytest.raises(StoreError, match="fails its checksum"):
        ActivationStore.open(path).acts_chunk(HOOK, 0)


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "swap"])
@pytest.mark.parametrize(
    "array", [f"acts/{HOOK}", "tokens", "clean/final", "clean/loss", f"ablation/{HOOK}/kl", f"stats/{HOOK}/mean"]
)
def test_any_damaged_chunk_is_found_named_and_repaired_to_the_same_bytes(built, copied, array, harm):
    chunk = next(path for path in sorted((copied / array / "c").rglob("*")) if path.is_file())
    data = bytearray(chunk.read_bytes())
    if harm == "flip":
        data[len(data) // 3] ^= 16
        chunk.write_bytes(data)
    elif harm == "truncate":
        chunk.write_bytes(data[:-9])
    elif harm == "swap":
        chunk.write_bytes(b"x" * len(data))
    else:
        chunk.unlink()
    damages = verify(copied)
    assert [damage.path for damage in damages] == [chunk]
    spec_of = {**layout.arrays(spec(), 48), **layout.statistics_arrays(spec(), 48)}[array]
    with pytest.raises(StoreError, match=re.escape(f"{chunk} ") + r".*hsae cache verify .* --repair"):
        MappedArray(copied, spec_of).chunk(damages[0].index)
    assert repair(copied, damages) == []
    assert contents(copied) == contents(built)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header.update(format=99), "has format 99; this hsae reads format 1"),
        (lambda header: header["spec"].update(rows=-5), "impossible sizes"),
        (lambda header: header["spec"].update(rows=1 << 60), "impossible sizes"),
        (lambda header: header["spec"].update(hooks=["../../etc"]), "names hooks hsae doesn't know"),
        (lambda header: header.update(d_model=1 << 40), "is not the header of an hsae store"),
        (lambda header: header.update(d_model="48"), "is not the header of an hsae store"),
        (lambda header: header.update(extra=1), "is not the header of an hsae store"),
        (lambda header: header.update(d_model=49), "the store's header leads to"),
        (lambda header: header.update(complete=False), "is not finished; go on with `hsae cache build`"),
    ],
)
def test_metadata_that_cannot_be_trusted_is_refused(copied, change, message):
    content = json.loads((copied / "zarr.json").read_text())
    change(content["attributes"]["hsae"])
    content["attributes"]["hsae"] = sealed(content["attributes"]["hsae"])
    (copied / "zarr.json").write_text(json.dumps(content))
    with pytest.raises(StoreError, match=re.escape(message)):
        ActivationStore.open(copied)


def test_an_array_of_another_type_is_refused(copied):
    path = copied / f"acts/{HOOK}/zarr.json"
    path.write_text(path.read_text().replace('"bfloat16"', '"float16"'))
    with pytest.raises(StoreError, match='says data_type is "float16", the store\'s header leads to "bfloat16"'):
        ActivationStore.open(copied)


def test_missing_stores_and_urls_are_refused_clearly(tmp_path):
    with pytest.raises(StoreError, match=r"no activation store at .*; make it with `hsae cache build`"):
        ActivationStore.open(tmp_path / "nothing")
    with pytest.raises(
        StoreError, match=r"nowhere://x/zarr.json: Protocol not known: nowhere; use a folder, or a URL such as"
    ):
        ActivationStore.open("nowhere://x")
    with pytest.raises(StoreError, match="s3://: not a place for stores; use a folder, or a URL such as"):
        ActivationStore.open("s3://")


def test_a_finished_store_is_used_again_without_the_model(built, tmp_path, monkeypatch):
    monkeypatch.setattr("hsae.cache.building.build.LanguageModel.load", None)
    assert build([spec()], built.parent) == [built]


def test_a_store_begun_from_something_else_is_not_touched(built, copied):
    header = layout.read_header(copied)
    write_header(copied, header.model_copy(update={"complete": False, "corpus_digest": "other"}))
    before = contents(copied)
    with pytest.raises(StoreError, match="was begun with another corpus of the same name; nothing was written"):
        build([spec()], copied.parent)
    assert contents(copied) == before
    versions = {**header.versions, "torch": "1.0"}
    write_header(copied, header.model_copy(update={"complete": False, "versions": versions}))
    with pytest.raises(StoreError, match=r"was begun with torch 1.0 \(now 2"):
        build([spec()], copied.parent)
    other = copied.rename(copied.with_name(spec(rows=44).name))
    with pytest.raises(StoreError, match="was made for another configuration: its rows is 43, not 44"):
        build([spec(rows=44)], other.parent)


def test_two_builders_do_not_share_a_store(tmp_path):
    with FileLock(tmp_path / f".{spec().name}.lock"), pytest.raises(StoreError, match="another process is building"):
        build([spec()], tmp_path)


def test_too_little_text_is_said_before_activations_are_computed(tmp_path):
    with pytest.raises(
        CorpusError, match=r"documents 0 to 1, gives \d+ rows of 21 tokens; 90000 were asked for. Lower cache.eval"
    ):
        build([spec(rows=90_000, corpus=CorpusConfig(corpus="python-docs", last_document=2))], tmp_path)
    assert not list(tmp_path.glob("*.zarr"))


@pytest.mark.parametrize("is_enough", [True, False])
def test_the_model_computes_while_text_is_still_packed(tmp_path, monkeypatch, is_enough):
    computed, arrays = threading.Event(), ComputedChunk.arrays
    monkeypatch.setattr(ComputedChunk, "arrays", lambda self: computed.set() or arrays(self))
    ids = [[number % 700 + 5] * (97 if number < 6 else 500) for number in range(12 if is_enough else 7)]

    def documents(waits):
        for number, document in enumerate(ids):
            if waits and number == 6:
                assert computed.wait(60)
            yield document

    if not is_enough:
        monkeypatch.setattr("hsae.cache.building.builder.PACKED_AT_ONCE", 1)
        with pytest.raises(CorpusError, match="rows of 21 tokens; 143 were asked for"):
            build([spec(rows=143)], tmp_path, text=TokenisedText(documents(True)))
        assert computed.is_set() and not list(tmp_path.glob("*.zarr"))
        return
    (before,) = build([spec(rows=143)], tmp_path / "before", text=TokenisedText(documents(False)))
    computed.clear()
    monkeypatch.setattr("hsae.cache.building.builder.PACKED_AT_ONCE", 1)
    (ahead,) = build([spec(rows=143)], tmp_path / "ahead", text=TokenisedText(documents(True)))
    assert contents(ahead) == contents(before)


def test_sizes_that_differ_between_layers_are_estimated():
    """FIX A6: transformers refuses to tell one head_dim of a Gemma 4."""
    config = AutoConfig.for_model("gemma4_text", num_hidden_layers=4, vocab_size=800)
    with pytest.raises(RuntimeError, match="per-layer"):
        _ = config.head_dim
    assert estimated_seconds(spec(), config, "cpu") > 0


def test_estimates_and_what_they_refuse(built, tmp_path, monkeypatch):
    item = estimate(spec(), built.parent, "cpu")
    files = sum(
        path.stat().st_size for path in built.rglob("*") if "c" in path.relative_to(built).parts and path.is_file()
    )
    assert (item.state, item.bytes) == ("complete", files)
    new = estimate(spec(rows=1000), tmp_path, "cpu")
    assert (
        new.state == "new"
        and new.seconds > 0
        and new.model_bytes == (GOLDEN / "model/model.safetensors").stat().st_size
    )
    check_space([new])
    with pytest.raises(StoreError, match="not enough disk"):
        check_space([estimate(spec(rows=10**9), tmp_path, "cpu")])
    with pytest.raises(ModelError, match="has layers 0 to 4"):
        estimate(spec(hooks=("blocks.5.hook_resid_post",)), tmp_path, "cpu")
    with pytest.raises(ModelError, match="it would overflow"):
        estimate(spec(model=ModelConfig(id=str(GOLDEN / "model"), dtype="float16")), tmp_path, "cpu")


@pytest.mark.slow
def test_kill_minus_nine_ten_times_then_build_again_gives_the_same_bytes(built, tmp_path, record_property):
    """Build in a process that is killed with SIGKILL at random moments, finish, compare."""
    record_property("injected", 10)
    code = (
        "import sys, json, time\nfrom hsae.cache.building import writer\nfrom hsae.cache.building.build import "
        "build\nfrom hsae.cache.format.spec import StoreSpec\n"
        "slow = writer.write_chunk\n"
        "def write(*a):\n    print(flush=True); time.sleep(0.02); return slow(*a)\n"
        "writer.write_chunk = write\n"
        f"build([StoreSpec(**json.loads({spec().model_dump_json()!r}))], {str(tmp_path)!r})"
    )
    generator, killed = torch.Generator().manual_seed(1), 0
    while killed < 10:
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        for _ in range(int(torch.randint(1, 6, (), generator=generator))):
            process.stdout.readline()  # it begins to write a chunk, or has ended
        time.sleep(0.03 * torch.rand((), generator=generator).item())
        if process.poll() is not None:
            assert process.returncode == 0, process.communicate()[1].decode()
            process.communicate()
            assert contents(tmp_path / built.name) == contents(built)
            shutil.rmtree(tmp_path / built.name)
            continue
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        killed += 1
    if not layout.read_header(tmp_path / built.name).complete:
        (
            tmp_path / built.name / f"acts/{HOOK}/.x.partial"
        ).touch()  # what a kill in the middle of a write leaves behind
    build([spec()], tmp_path)
    assert contents(tmp_path / built.name) == contents(built)


def test_a_full_disk_leaves_a_store_that_can_be_finished(built, tmp_path, monkeypatch):
    from hsae.cache.building import builder as module

    real, count = module.writer.write_chunk, iter(range(100))

    def full(*arguments):
        if next(count) == 9:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(module.writer, "write_chunk", full)
    with pytest.raises(OSError, match="No space left"):
        build([spec()], tmp_path)
    with pytest.raises(StoreError, match="is not finished"):
        ActivationStore.open(tmp_path / built.name)
    monkeypatch.undo()
    build([spec()], tmp_path)
    assert contents(tmp_path / built.name) == contents(built)


@pytest.mark.parametrize(
    "content", [b"", b"[1]", b"{}", b'{"chunks": Infinity, "documents": 1, "taken": 0, "row": []}', b"[" * 100_000]
)
def test_a_damaged_state_of_packing_costs_packing_again_and_no_bytes(built, tmp_path, monkeypatch, content):
    from hsae.cache.building import builder as module

    real, count = module.writer.write_chunk, iter(range(100))

    def full(target, array, *values):
        if array.path == "tokens" and next(count) == 2:
            raise OSError(28, "No space left on device")
        return real(target, array, *values)

    monkeypatch.setattr(module.writer, "write_chunk", full)
    monkeypatch.setattr(module, "PACKED_AT_ONCE", 1)
    with pytest.raises(OSError, match="No space left"):
        build([spec()], tmp_path)
    monkeypatch.undo()
    state = tmp_path / built.name / "packing.json"
    assert state.is_file()
    state.write_bytes(content)
    build([spec()], tmp_path)
    assert contents(tmp_path / built.name) == contents(built)


def test_passes_of_other_rows_and_compiled_layers_are_told_apart_and_made_again_to_the_same_bytes(
    tmp_path, built, monkeypatch
):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # all but the compiler
    model = ModelConfig(id=str(GOLDEN / "model"), dtype="float32")
    plain = spec(model=model)
    wanted = spec(model=model, forward_rows=10, compiled=True)
    one, other = build([plain, wanted], tmp_path)
    assert one.name != other.name
    assert {"forward_rows", "compiled"} & set(read_header_spec(one)) == set()
    assert read_header_spec(other)["forward_rows"] == 10 and read_header_spec(other)["compiled"] is True
    stores = [ActivationStore.open(path) for path in (one, other)]
    assert [store.chunk_rows for store in stores] == [5, 10] and 43 % 10  # the last pass is filled up
    assert torch.equal(stores[0].tokens(0, 43), stores[1].tokens(0, 43))
    for read in (
        lambda s: s.acts(HOOK, 0, 43),
        lambda s: s.clean("loss", 0, 15),
        lambda s: s.ablation(HOOK, "kl", 0, 15),
    ):
        torch.testing.assert_close(read(stores[1]), read(stores[0]), rtol=1e-4, atol=1e-4)
    language = LanguageModel.load(model)
    assert torch.equal(stores[1].clean("final", 0, 10), language.suffix(HOOK, stores[1].acts(HOOK, 0, 10)))
    before = contents(other)
    for index in (1, 4):  # whole, and of rows that do not fill a pass
        (other / f"acts/{HOOK}/c/{index}/0/0").unlink()
    repair(other, verify(other))
    assert contents(other) == before


def read_header_spec(path):
    return json.loads((path / "zarr.json").read_text())["attributes"]["hsae"]["spec"]


def test_layers_that_can_t_be_compiled_are_refused_before_compute(tmp_path, monkeypatch):
    def broken(forward, **options):
        def call(*arguments, **keywords):
            raise RuntimeError("Failed to find C compiler")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    model = ModelConfig(id=str(GOLDEN / "model"), dtype="float32")
    with pytest.raises(
        ModelError, match=r"can't be compiled here \(RuntimeError: Failed to find C compiler\); build with"
    ):
        build([spec(model=model, compiled=True)], tmp_path)
    monkeypatch.setattr(torch, "compile", lambda forward, **options: lambda x, *args, **keywords: 2 * x)
    with pytest.raises(ModelError, match=rf"compiled layers give another residual at {HOOK} \(relative error "):
        build([spec(model=model, compiled=True)], tmp_path)
    assert not list(tmp_path.glob("*.zarr"))


def test_activations_that_are_not_finite_are_refused_by_row(tmp_path, monkeypatch):
    prefix = LanguageModel.prefix

    def poisoned(self, tokens, hooks, **options):
        found = prefix(self, tokens, hooks, **options)
        found[HOOK][2:3, 3, 4] = torch.inf  # not of the two rows with which the cut is checked
        return found

    monkeypatch.setattr(LanguageModel, "prefix", poisoned)
    with pytest.raises(StoreError, match=f"activations of row 2 at {HOOK} are not finite in bfloat16"):
        build([spec()], tmp_path)


def test_a_build_on_a_remote_store_is_the_local_one_and_goes_on_where_it_was(built, monkeypatch):
    from hsae.cache.building import builder as module

    folder, real, count = f"memory://{built.name}", module.writer.write_chunk, iter(range(100))

    def full(*arguments):
        if next(count) == 11:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(module.writer, "write_chunk", full)
    with pytest.raises(OSError, match="No space left"):
        build([spec()], folder)
    monkeypatch.undo()
    target = build([spec()], folder)[0]
    found = {name: hashlib.sha256((target / name).read_bytes()).hexdigest() for name in sizes(target)}
    assert found == contents(built) and verify(target) == []


WORKER = """
import json, sys
from hsae.cache.building import build, contents, liveness
from hsae.cache.format.spec import StoreSpec
from hsae.cache.launcher import share
real, computed = contents.StoreContents.compute, []
def compute(self, index, *rest):
    computed.append(index)
    return real(self, index, *rest)
contents.StoreContents.compute, liveness.POLL = compute, 0.05
build.build([StoreSpec.model_validate_json(sys.argv[1])], sys.argv[2], share=share())
print(json.dumps(computed))
"""


@pytest.mark.slow
def test_workers_share_one_store_and_make_the_same_bytes(built, tmp_path):
    command = [sys.executable, "-c", WORKER, spec().model_dump_json(), str(tmp_path)]
    workers = []
    for rank in range(3):
        told = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        workers.append(subprocess.Popen(command, env=told, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    ended = [worker.communicate() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0], [error[-2000:] for _, error in ended]
    computed = [json.loads(output.splitlines()[-1]) for output, _ in ended]
    assert contents(tmp_path / built.name) == contents(built)
    assert {index for part in computed for index in part} == set(range(ActivationStore.open(built).chunks))


def test_worker_0_alone_does_what_a_lost_worker_left_and_the_others_wait_for_its_tokens(built, tmp_path, monkeypatch):
    from hsae.cache.building import liveness as module

    monkeypatch.setattr(module, "WAIT", 0.05)
    monkeypatch.setattr(module, "POLL", 0.01)
    with pytest.raises(StoreError, match=r"worker 0 has given no sign of life at .* for 0 s; is it running\?"):
        build([spec()], tmp_path, share=Share(1, 2))
    build([spec()], tmp_path, share=Share(0, 2))
    assert contents(tmp_path / built.name) == contents(built)


def test_workers_wait_as_long_as_worker_0_lives_whatever_it_does(built, tmp_path, monkeypatch):
    from hsae.cache.building import builder
    from hsae.cache.building import liveness as module

    target, signs = tmp_path / built.name, set()
    monkeypatch.setattr(module, "BEAT", 0.01)
    monkeypatch.setattr(module, "POLL", 0.01)

    def salvage(*given):  # as long as the workers would wait without a sign, and longer
        while len(signs) < 3:
            with contextlib.suppress(FileNotFoundError):
                signs.add(module.sign_of_life(target).read_bytes())

    monkeypatch.setattr(builder, "keep_what_is_right", salvage)
    build([spec()], tmp_path, share=Share(0, 2))
    assert contents(target) == contents(built) and not module.sign_of_life(target).exists()

    clock = itertools.count(0, module.WAIT / 2)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda seconds: None))
    calls = iter(range(20))

    def there():
        module.sign_of_life(target).write_text(str(number := next(calls)))
        return number == 9

    module.wait_for(target, there)
    with pytest.raises(StoreError, match="no sign of life"):
        module.wait_for(target, lambda: False)


def test_shares_cover_every_chunk_and_impossible_ones_are_refused(monkeypatch):
    for world in (1, 2, 5, 9):
        shares = [Share(rank, world) for rank in range(world)]
        assert all(sorted([*share.own(7), *share.others(7)]) == list(range(7)) for share in shares)
        assert sorted(index for share in shares for index in share.own(7)) == list(range(7))
    lost = [[index for index in Share(rank, 5).others(100) if index % 5 == 2][:4] for rank in (0, 1, 3, 4)]
    assert len({index for part in lost for index in part}) == 16  # helpers of worker 2 do not do the same work
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    assert share() == Share(0, 1)
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert share() == Share(3, 8)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        UserError,
        match="RANK=2, WORLD_SIZE=2, LOCAL_RANK=0: RANK must be a number from 0 to WORLD_SIZE - 1; unset them",
    ):
        share()


# ---- FIX C8: what a message names mends it ---------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["lost", "empty", "digit"])
def test_a_lost_or_damaged_header_is_built_again_from_the_chunks(built, copied, harm, monkeypatch):
    path = copied / "zarr.json"
    text = path.read_text()
    path.unlink() if harm == "lost" else path.write_text(
        "" if harm == "empty" else text.replace('"d_model": 48', '"d_model": 58')
    )
    with pytest.raises(StoreError, match="`hsae cache build`"):
        ActivationStore.open(copied)
    damaged = copied / f"acts/{HOOK}/c/3/0/0"
    damaged.write_bytes(b"x" * damaged.stat().st_size)
    computed = []
    compute = StoreContents.compute
    monkeypatch.setattr(
        StoreContents, "compute", lambda self, index, *rest: computed.append(index) or compute(self, index, *rest)
    )
    assert build([spec()], copied.parent) == [copied]
    assert computed == [0, 3]  # the first to compare, the damaged one to mend
    assert contents(copied) == contents(built)


@pytest.mark.parametrize("array", ["tokens", f"acts/{HOOK}"])
def test_chunks_of_another_text_or_model_get_no_header(built, copied, array):
    (copied / "zarr.json").unlink()
    for path in (copied / "checks/c/0", copied / "checks/zarr.json"):
        path.unlink()  # as in a store that had not been finished
    chunk = next(path for path in sorted((copied / array / "c").rglob("*")) if path.is_file())
    data = bytes([*chunk.read_bytes()[:-5], 7])
    chunk.write_bytes(data + crc32c(data).to_bytes(4, "little"))
    before = contents(copied)
    with pytest.raises(StoreError, match=r"its chunks are not those of this model and text.*Move the store away"):
        build([spec()], copied.parent)
    assert contents(copied) == before


def test_a_store_under_another_s_name_is_not_opened(built, copied):
    other = copied.rename(copied.with_name(spec(rows=44).name))
    assert ActivationStore.of(spec(), built.parent).rows == 43
    with pytest.raises(StoreError, match=r"made for another configuration: its rows is 43, not 44\. Move it away"):
        ActivationStore.of(spec(rows=44), other.parent)


def test_repair_keeps_what_it_can_not_make_again(built, copied, monkeypatch):
    chunk = copied / f"acts/{HOOK}/c/1/0/0"
    chunk.write_bytes(b"x" * chunk.stat().st_size)
    before = contents(copied)
    arrays = ComputedChunk.arrays
    monkeypatch.setattr(ComputedChunk, "arrays", lambda self: ((*at, values + 1) for *at, values in arrays(self)))
    with pytest.raises(
        StoreError, match=r"comes out with other numbers than .* was left as it is; move .* build it again"
    ):
        repair(copied, verify(copied))
    assert contents(copied) == before
