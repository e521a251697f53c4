"""A store too large to make: planning, listing, resuming, closing and opening one of 10 billion tokens x 3 hooks of
Gemma-2-2B on S3.

    python benchmarks/scale.py [--tokens 1e9 1e10] [--out docs/results/scale.json]

hsae's own code and s3fs talk over HTTP to a server that answers as S3 does for a store of that size
(`simulated_s3.py`). Each measure runs in a process of its own. Prints a line a measure (seconds, peak memory above what
the imports take, requests) and, last, one JSON document.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from hsae.cache.building import sealing, writer
from hsae.cache.building.builder import Builder, clear
from hsae.cache.building.chunk_log import Written
from hsae.cache.building.contents import StoreContents, TokenisedText
from hsae.cache.format.layout import (
    Header,
    HookSummary,
    arrays,
    every_array,
    kept_array,
    statistics_arrays,
)
from hsae.cache.format.spec import FORMAT_VERSION, StoreSpec
from hsae.cache.launcher import Share
from hsae.cache.reading.store import ActivationStore
from hsae.cache.reading.token_stream import TokenStream
from hsae.cache.storage.paths import place
from hsae.train.config.plan import load_plan

HOOKS = ["blocks.5.hook_resid_post", "blocks.12.hook_resid_post", "blocks.19.hook_resid_post"]
WIDTH, SPECIAL = 2304, (0, 1, 2)
WORKER = Share(5, 64)
SERVER = Path(__file__).with_name("simulated_s3.py")
STORE, KEY = "simulated.zarr", "simulated"
BATCH = 4096
LARGEST = {"list_empty": 1e9, "resume": 1e9, "tally_part": 1e9}  # the others say what grows
Measured = dict[str, Any]


def spec_of(tokens: float) -> StoreSpec:
    """The training store of the default plan, with three hooks and so many tokens."""
    rows = round(tokens) // 128
    overrides = [f"cache.train.rows={rows}", f"hook.names={HOOKS}", "cache.dir=s3://full", "cache.codec=mappable"]
    return load_plan("gemma-2-2b", overrides).store("train")


def header_of(spec: StoreSpec, **finished: Any) -> Header:
    return Header(
        format=FORMAT_VERSION, spec=spec, d_model=WIDTH, vocab_size=256000, bos_id=2, special_ids=SPECIAL,
        model_digest="m",
        tokenizer_digest="t", corpus_digest="c", versions={}, **finished,
    )  # fmt: skip


def set_up(spec: StoreSpec) -> Measured:
    """What the store has besides the chunks that the server makes up: metadata, statistics, and the parts of the
    tally.
    """
    target, specs = place(f"s3://full/{STORE}"), list(arrays(spec, WIDTH).values())
    tokens = specs[0]
    for array in statistics_arrays(spec, WIDTH).values():
        writer.write_chunk(target, array, 0, torch.ones(array.shape, dtype=torch.float64))
    for bucket in ("partly", "empty"):
        writer.write_metadata(place(f"s3://{bucket}/{STORE}"), header_of(spec))
    trailers = [writer.trailer(target, array, 0) for array in specs]
    for part in range(-(-tokens.count // sealing.TALLIED)):
        size = min(sealing.TALLIED, tokens.count - part * sealing.TALLIED)
        told = np.tile(np.array([tokens.chunks[0] * (spec.context - 1), *trailers], "<u4"), (size, 1))
        if (part + 1) * sealing.TALLIED >= tokens.count:
            told[-1, 0] = (spec.rows - (tokens.count - 1) * tokens.chunks[0]) * (spec.context - 1)
        (target / sealing.FOLDER / str(part)).write_bytes(told.tobytes() + sealing._checksum(told.tobytes(), part, KEY))
    return {}


def written_down(spec: StoreSpec) -> Written:
    """What would be known of a store all of whose chunks were written down."""
    target, specs = place(f"s3://full/{STORE}"), arrays(spec, WIDTH).values()
    known = Written(target, KEY, specs)
    for array in specs:
        known[array.path][:] = writer.trailer(target, array, 0)
    return known


def finish(spec: StoreSpec) -> Measured:
    """Worker 0's last steps: the parts of the tally, the lists, the header."""
    target, specs = place(f"s3://full/{STORE}"), list(arrays(spec, WIDTH).values())
    told = sealing.collect_parts(target, specs, KEY)
    assert told is not None
    kept, checks = told
    summary = {hook: HookSummary(mean_square_norm=1.0, tokens=1) for hook in spec.hooks}
    header = header_of(spec, statistics=summary, complete=True, kept_tokens=int(kept.sum(dtype=np.int64)))
    writer.write_list(target, kept_array(spec, WIDTH), kept)
    header = header.model_copy(update={"checks": writer.seal(target, every_array(header), checks)})
    clear(target)
    writer.write_metadata(target, header)
    return {"kept_tokens": header.kept_tokens}


def share(spec: StoreSpec) -> Measured:
    """One worker's chunks in order: its own, then all others."""
    count = arrays(spec, WIDTH)["tokens"].count
    return {"own": len(WORKER.own(count)), "others": len(WORKER.others(count))}


def list_one(spec: StoreSpec, bucket: str, expected: Callable[[int], int]) -> Measured:
    """What is there of one array."""
    array = arrays(spec, WIDTH)[f"acts/{HOOKS[0]}"]
    found = int(array.written(place(f"s3://{bucket}/{STORE}")).sum())
    assert found == expected(array.count), (found, array.count)
    return {"chunks_found": found}


class Model:
    """What a Builder asks of a language model that computes nothing."""

    d_model, special_ids = WIDTH, SPECIAL

    def check_hooks(self, hooks: object) -> None:
        """All are right."""


def resume(spec: StoreSpec) -> Measured:
    """A worker that starts again: everything missing of its own share is found, and its tokens fetched; nothing is
    computed.
    """
    target, computed = place(f"s3://partly/{STORE}"), []
    contents = StoreContents(spec, Model(), TokenisedText([]))  # type: ignore[arg-type]
    contents.compute = lambda index, missing, *rest: computed.append((index, len(missing))) or iter(())  # type: ignore
    builder = Builder(contents, target, share=WORKER)
    builder.written = written_down(spec)
    mine = WORKER.own(builder.specs["tokens"].count)
    assert list(builder._computed(mine)) == []
    assert computed == [(index, len(HOOKS)) for index in mine if index % 97 == 5]
    return {"chunks_missing": len(computed)}


def tally_part(spec: StoreSpec) -> Measured:
    """One part of the last pass: checksums of 1024 chunks of every array, and their tokens counted."""
    specs = list(arrays(spec, WIDTH).values())
    told, wrong = sealing._tally(place(f"s3://full/{STORE}"), specs, 0, SPECIAL, written_down(spec))
    assert len(wrong) < len(told)  # the last rows of the store are others
    return {"chunks": told.size - len(told)}


def open_store(spec: StoreSpec) -> Measured:
    """Open a finished store for training; then the order of the first batch, of one in the middle, and of the last
    window of the epoch.
    """
    began = time.perf_counter()
    store = ActivationStore.open(f"s3://full/{STORE}")
    opened = time.perf_counter()
    prefetch = store.prefetch
    store.prefetch = lambda wanted: prefetch([(path, i) for path, i in wanted if path == "tokens"])  # type: ignore[method-assign]
    stream = TokenStream(store, HOOKS[0], batch_tokens=BATCH, seed=0)
    known = time.perf_counter()
    told = {"open_s": opened - began, "stream_s": known - opened, "tokens_per_epoch": stream.tokens_per_epoch}
    steps = stream.tokens_per_epoch // BATCH
    for name, step in (("first", 0), ("middle", steps // 2), ("last", steps - 1)):
        began = time.perf_counter()
        size = sum(len(part) for part in stream._addresses(step * BATCH, (step + 1) * BATCH))
        assert size == BATCH
        told[f"{name}_order_s"] = time.perf_counter() - began
    began = time.perf_counter()
    assert sum(len(part) for part in stream._addresses(0, 1)) == 1
    told["again_from_scratch_s"] = time.perf_counter() - began
    return told


MEASURES: dict[str, Callable[[StoreSpec], Measured]] = {
    "set_up": set_up,
    "finish": finish,
    "share": share,
    "list_empty": lambda spec: list_one(spec, "empty", lambda count: 0),
    "tally_part": tally_part,
    "open": open_store,
    "list_full": lambda spec: list_one(spec, "full", lambda count: count),
    "resume": resume,
}


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, tokens: float) -> Measured:
    """Run one measure in this process."""
    spec, before = spec_of(tokens), peak_mb()
    asked, began, worked = requests(), time.perf_counter(), time.process_time()
    told = MEASURES[name](spec)
    seconds, cpu = time.perf_counter() - began, time.process_time() - worked
    asked = {kind: count - asked.get(kind, 0) for kind, count in requests().items() if count > asked.get(kind, 0)}
    peak = {"peak_mb": peak_mb() - before, "imports_mb": before}
    return {"seconds": seconds, "cpu_seconds": cpu, **peak, "requests": asked, **told}


def apart(work: Callable[..., Measured], *arguments: object) -> Measured:
    """work(*arguments) in a process of its own, so that its peak memory is its own."""
    context = multiprocessing.get_context("fork")  # this process has imported everything, and started nothing
    answers = context.SimpleQueue()
    process = context.Process(target=lambda: answers.put(work(*arguments)))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{arguments} failed")
    return dict(answers.get())


def requests() -> dict[str, int]:
    """Requests that the server has had."""
    with urllib.request.urlopen(f"{os.environ['AWS_ENDPOINT_URL']}/_requests") as reply:
        return dict(json.load(reply))


@contextmanager
def served(spec: StoreSpec) -> Iterator[None]:
    """The server for a store, in a process of its own, with the environment pointing at it."""
    told = {path: [array.count, len(array.shape), array.chunk_bytes] for path, array in arrays(spec, WIDTH).items()}
    command = [sys.executable, str(SERVER), json.dumps({"arrays": told, "context": spec.context})]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, TemporaryDirectory() as home:
        assert server.stdout is not None
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{int(server.stdout.readline())}", "AWS_ACCESS_KEY_ID": "none",
            "AWS_SECRET_ACCESS_KEY": "none", "AWS_DEFAULT_REGION": "us-east-1", "HSAE_HOME": home,
        }  # fmt: skip
        try:
            yield
        finally:
            server.kill()


def sizes_of(tokens: float) -> Measured:
    """Objects and bytes, counted from the layout."""
    spec = spec_of(tokens)
    every = list(arrays(spec, WIDTH).values())
    return {
        "tokens": spec.rows * spec.context,
        "chunks_of_an_array": every[0].count,
        "objects": sum(array.count for array in every),
        "bytes": sum(array.count * (array.chunk_bytes + 4) for array in every),
        "bytes_of_a_chunk": every[1].chunk_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, nargs="+", default=[1e9, 1e10])
    parser.add_argument("--measure", nargs="+", choices=list(MEASURES), default=list(MEASURES))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    versions = {name: version(name) for name in ("s3fs", "fsspec", "aiobotocore", "numpy", "zarr", "torch")}
    document: Measured = {"machine": machine, "versions": versions, "results": []}
    for tokens in arguments.tokens:
        found: Measured = {"store": sizes_of(tokens)}
        document["results"].append(found)
        with served(spec_of(tokens)):
            for name in arguments.measure:
                if tokens > LARGEST.get(name, tokens):
                    continue
                found[name] = told = apart(measure, name, tokens)
                asked = " ".join(f"{count} {kind}" for kind, count in told["requests"].items())
                figures = (
                    f"{told['seconds']:8.2f} s, {told['cpu_seconds']:7.2f} s of a processor, {told['peak_mb']:7.1f} MB"
                )
                print(f"{tokens:8.0e} {name:12} {figures}  {asked}", flush=True)
                if arguments.out:
                    arguments.out.write_text(json.dumps(document) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
