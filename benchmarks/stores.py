"""Reading a store from S3 (moto on loopback) and from the disk against what the machine can do, and memory as a store
grows a hundredfold.

    python benchmarks/stores.py [--out docs/results/stores.json]

Ceilings first (memcpy, `cat` of the files, a bare gather, s3fs alone), then hsae's batches: each place cold (nothing in
the scratch folder, checksums tested) and warm. Then the peak memory of building and of training on a small store and on
one a hundred times as large; mapped pages, which the system takes back when it needs them, are told apart. Each measure
runs in a process of its own. Prints a line a measure and, last, one JSON document.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from hsae.cache.building import writer
from hsae.cache.building.build import build
from hsae.cache.building.contents import TokenisedText
from hsae.cache.building.copying import copy
from hsae.cache.config import CorpusConfig, ModelConfig
from hsae.cache.format.layout import Header, HookSummary, arrays, kept_array, statistics_arrays
from hsae.cache.format.spec import FORMAT_VERSION, StoreSpec
from hsae.cache.reading.store import ActivationStore
from hsae.cache.reading.token_stream import TokenStream
from hsae.cache.storage.paths import place
from hsae.train.config.plan import Plan, load_plan
from hsae.train.runs.planned_runs import train_runs

HOOK = "blocks.3.hook_resid_post"
ROWS, CONTEXT, WIDTH, BATCH = 512, 128, 2304, 4096
MODEL = Path(__file__).resolve().parent.parent / "tests/golden/model"
SMALL, LARGE = 192, 19_200  # rows
SERVER = """
import sys
sys.path.insert(0, sys.argv[1])
import logging, s3_server
logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
with s3_server.served("bucket") as (endpoint, _):
    print(endpoint, flush=True)
    sys.stdin.read()
"""
Measured = dict[str, float]


def made(folder: Path) -> Path:
    """A finished store of random vectors: 65,536 tokens of width 2304 in bfloat16, 302 MB in chunks of 9.4 MB."""
    spec = StoreSpec(
        split="train", model=ModelConfig(id="none"), hooks=(HOOK,), corpus=CorpusConfig(corpus="none"),
        context=CONTEXT, prepend_bos=True,
        batch_rows=16, chunk_mib=8, codec="mappable", rows=ROWS, clean_rows=0,
    )  # fmt: skip
    header = Header(
        format=FORMAT_VERSION, spec=spec, d_model=WIDTH, vocab_size=50, bos_id=0, special_ids=(0,), model_digest="m",
        tokenizer_digest="t", corpus_digest="c", versions={},
    )  # fmt: skip
    target, specs = folder / spec.name, [*arrays(spec, WIDTH).values(), *statistics_arrays(spec, WIDTH).values()]
    writer.write_metadata(target, header)
    generator = torch.Generator().manual_seed(0)
    for array in specs:
        for index in range(array.count):
            shape = array.chunks
            values = torch.ones(shape) if array.path == "tokens" else torch.randn(shape, generator=generator)
            writer.write_chunk(target, array, index, values)
    kept = kept_array(spec, WIDTH)
    counts = torch.full(kept.shape, spec.batch_rows * CONTEXT).numpy()
    writer.write_list(target, kept, counts)
    done = {
        "statistics": {HOOK: HookSummary(mean_square_norm=1.0, tokens=1)},
        "complete": True,
        "kept_tokens": int(counts.sum()),
    }
    checks = writer.seal(target, [*specs, kept])
    writer.write_metadata(target, header.model_copy(update={**done, "checks": checks}))
    return target


def timed(work: Callable[[], int]) -> Measured:
    """GB/s of wall time and of processor time of something that tells the bytes it has handed out."""
    began, worked = time.perf_counter(), time.process_time()
    size = work()
    seconds, cpu = time.perf_counter() - began, time.process_time() - worked
    return {"gb_per_s": size / seconds / 1e9, "gb_per_cpu_s": size / max(cpu, 1e-9) / 1e9}


def memcpy(_: str) -> int:
    """Copy as many bytes as the store has, from memory to memory."""
    source = torch.ones(64 << 20, dtype=torch.uint8)
    target, rounds = torch.empty_like(source), 5
    for _ in range(rounds):
        target.copy_(source)
    return rounds * len(source)


def cat(url: str) -> int:
    """Read the files of the activations one after the other, as `cat` does, from the page cache."""
    buffer, size = bytearray(16 << 20), 0
    for path in sorted((Path(url) / f"acts/{HOOK}/c").rglob("0")):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    size += count
    return size


def gather(url: str) -> int:
    """Shuffled rows of the mapped chunks, with neither stream nor threads: what a batch of random tokens costs at
    least.
    """
    store = ActivationStore.open(url)
    chunks = [store.acts_chunk(HOOK, index).view(-1, WIDTH) for index in range(store.chunks)]
    order, batch = torch.randperm(len(chunks[0])), torch.empty(BATCH, WIDTH, dtype=torch.bfloat16)
    for chunk in chunks:
        for part in order.split(BATCH):
            torch.index_select(chunk, 0, part, out=batch[: len(part)])
    return sum(chunk.numel() * chunk.element_size() for chunk in chunks)


def s3fs_alone(url: str) -> int:
    """Get the objects of the activations with s3fs, all at once."""
    filesystem, path = (place(url) / f"acts/{HOOK}/c")._opened  # type: ignore[union-attr]
    return sum(map(len, filesystem.cat(filesystem.find(path)).values()))


def batches(url: str) -> int:
    """One epoch of shuffled batches."""
    stream = TokenStream(ActivationStore.open(url), HOOK, batch_tokens=BATCH, seed=0)
    return sum(batch.numel() * batch.element_size() for batch in stream.batches(0, stream.tokens_per_epoch // BATCH))


def second_epoch(url: str) -> Measured:
    """The second epoch of one process: chunks are mapped and tested."""
    stream = TokenStream(ActivationStore.open(url), HOOK, batch_tokens=BATCH, seed=0)
    steps = stream.tokens_per_epoch // BATCH
    for step in range(steps):
        stream.batch(step)

    def work() -> int:
        return sum(batch.numel() * batch.element_size() for batch in stream.batches(steps, 2 * steps))

    return timed(work)


def plan_of(folder: Path, rows: int) -> Plan:
    """The tests' plan on the tests' tiny Gemma-2, with so many rows of 40 tokens in chunks of 0.4 MB."""
    places = [f"model.id={str(MODEL)!r}", f"cache.dir={str(folder)!r}", f"train.dir={str(folder / 'runs')!r}"]
    sizes = [f"cache.train.rows={rows}", "cache.batch_rows=48", "cache.chunk_mib=0.4", "train.tokens=25_000"]
    return load_plan("tiny", [*places, *sizes])


def documents(rows: int) -> Iterator[list[int]]:
    """Random token ids for so many rows."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(rows // 10 + 1):
        yield torch.randint(5, 800, (400,), generator=generator).tolist()


@contextmanager
def memory() -> Iterator[Measured]:
    """Peaks of this process's own memory and of mapped files, in MB, looked at every 10 ms."""
    peaks: Measured = {"anonymous_mb": 0.0, "mapped_mb": 0.0}
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.01):
            told = dict(
                line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line
            )
            for name, key in (("anonymous_mb", "RssAnon"), ("mapped_mb", "RssFile")):
                peaks[name] = max(peaks[name], int(told[key].split()[0]) / 1024)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()
        peaks["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def building(folder: Path, rows: int) -> Measured:
    with memory() as peaks:
        build([plan_of(folder, rows).store("train")], folder, text=TokenisedText(documents(rows)))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {**peaks, "store_mb": size / 1e6}


def training(folder: Path, rows: int) -> Measured:
    plan = plan_of(folder, rows)
    with memory() as peaks:
        train_runs(plan, plan.select("3"), restart=True)
    return dict(peaks)


def apart(work: Callable[..., Any], *arguments: object) -> Any:
    """work(*arguments) in a process of its own."""
    context = multiprocessing.get_context("fork")  # this process has imported everything, and started nothing
    answers = context.SimpleQueue()
    process = context.Process(target=lambda: answers.put(work(*arguments)))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{work} failed")
    return answers.get()


@contextmanager
def s3() -> Iterator[None]:
    """An S3 server in a process of its own, and the environment pointing at it."""
    command = [sys.executable, "-c", SERVER, str(Path(__file__).parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        os.environ |= {
            "AWS_ENDPOINT_URL": server.stdout.readline().strip(), "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1",
        }  # fmt: skip
        try:
            yield
        finally:
            server.kill()


def throughput(folder: Path) -> dict[str, Measured]:
    """GB/s of every way to read the store, each told as it comes."""
    near = str(apart(made, folder))
    compact = str(apart(lambda: str(copy(near, folder / "other", codec="compact"))))
    found: dict[str, Measured] = {}

    def tell(name: str, work: Callable[[str], Any], url: str, home: str | None = None) -> None:
        os.environ["HSAE_HOME"] = str(folder / (home or "none"))
        found[name] = apart(work, url) if work is second_epoch else apart(timed, lambda: work(url))
        print(
            f"{name:32} {found[name]['gb_per_s']:8.3f} GB/s {found[name]['gb_per_cpu_s']:8.3f} GB a processor second",
            flush=True,
        )

    with s3():
        far, far_compact = (str(apart(lambda url=url: str(copy(url, "s3://bucket/stores")))) for url in (near, compact))
        tell("ceiling: memcpy", memcpy, near)
        tell("ceiling: cat of the files", cat, near)
        tell("ceiling: gather of mapped rows", gather, near)
        tell("ceiling: s3fs alone", s3fs_alone, far)
        tell("disk, mapped, first epoch", batches, near)
        tell("disk, mapped, second epoch", second_epoch, near)
        for name, url in (("disk, compact", compact), ("S3, mappable", far), ("S3, compact", far_compact)):
            home = name.replace(", ", "-")
            tell(f"{name}, cold scratch", batches, url, home)
            tell(f"{name}, warm scratch", batches, url, home)
            tell(f"{name}, second epoch", second_epoch, url, home)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=("throughput", "memory"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # so that processor seconds can be compared
    results: dict[str, Any] = {}
    with TemporaryDirectory() as temporary:
        if arguments.only != "memory":
            results["throughput"] = throughput(Path(temporary) / "speed")
        if arguments.only != "throughput":
            for rows in (SMALL, LARGE):
                for work in (building, training):
                    told = apart(work, Path(temporary) / str(rows), rows)
                    results[f"{work.__name__}_{rows}_rows"] = told
                    print(
                        f"{work.__name__} {rows:6} rows",
                        " ".join(f"{name} {value:,.0f}" for name, value in told.items()),
                        flush=True,
                    )
    versions = {name: version(name) for name in ("torch", "zarr", "s3fs", "aiobotocore", "moto")}
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    document = json.dumps({"machine": machine, "versions": versions, **results})
    if arguments.out:
        arguments.out.write_text(document + "\n")
    print(document)


if __name__ == "__main__":
    main()
