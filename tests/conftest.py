"""What several test files need: small stores made without a language model, an S3 server that fails on demand, and a
web server.
"""

import gc
import importlib.util
import logging
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch

from hsae.cli.main import COLLECT_AFTER

gc.set_threshold(*COLLECT_AFTER)  # as commands do: a sixth of the time that a process spends on imports
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a run in the background ignores it, as commands it starts would
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: kernels run on the processor
os.environ.pop("COLUMNS", None)  # which pytest-xdist sets; tests expect the default width
ROOT = Path(__file__).resolve().parent.parent
HOOK = "blocks.3.hook_resid_post"
GOLDEN_MODEL = ROOT / "tests/golden/model"


def pytest_collection_modifyitems(items):
    """The longest first, so that no process is left alone with them at the end."""

    def minutes(item):
        slow = item.get_closest_marker("slow")
        return slow.kwargs.get("minutes", 1) if slow else 0

    items.sort(key=minutes, reverse=True)


def made(folder, *, rows=23, context=7, width=10, codec="mappable", clean=9, seed=0):
    """A complete store of random numbers at a folder or URL: chunks of 4 rows, token 0 special.

    Returns (its place, the numbers).
    """
    from hsae.cache.building import writer
    from hsae.cache.config import CorpusConfig, ModelConfig
    from hsae.cache.format.layout import Header, HookSummary, arrays, statistics_arrays
    from hsae.cache.format.spec import FORMAT_VERSION, StoreSpec
    from hsae.cache.storage.paths import place

    spec = StoreSpec(
        split="eval", model=ModelConfig(id="none", dtype="bfloat16"), hooks=(HOOK,),
        corpus=CorpusConfig(corpus="none"), context=context,
        prepend_bos=True, batch_rows=2, chunk_mib=4 * context * width * 2 / 2**20, codec=codec, rows=rows,
        clean_rows=clean,
    )  # fmt: skip
    header = Header(
        format=FORMAT_VERSION, spec=spec, d_model=width, vocab_size=50, bos_id=0, special_ids=(0,), model_digest="m",
        tokenizer_digest="t",
        corpus_digest="c", versions={},
    )  # fmt: skip
    target = place(folder) / spec.name
    specs = [*arrays(spec, width).values(), *statistics_arrays(spec, width).values()]
    done = {"statistics": {HOOK: HookSummary(mean_square_norm=float(width), tokens=99)}, "complete": True}
    header = header.model_copy(update=done)
    writer.write_metadata(target, header)
    generator, values = torch.Generator().manual_seed(seed), {}
    for array in specs:
        numbers = torch.randn(array.shape, generator=generator, dtype=torch.float64)
        values[array.path] = (
            (numbers.abs() * 9).int() if array.path == "tokens" else numbers.to(getattr(torch, array.dtype))
        )
        for index in range(array.count):
            step = array.chunks[0]
            writer.write_chunk(target, array, index, values[array.path][index * step : (index + 1) * step])
    writer.write_header(target, header.model_copy(update={"checks": writer.seal(target, specs)}))
    return target, values


@pytest.fixture(scope="session")
def make_store():
    return made


@pytest.fixture(scope="module")
def activations(tmp_path_factory):
    """The training store of the tiny plan, of the golden model."""
    from hsae.cache.building.build import build
    from hsae.train.config.plan import load_plan

    folder = tmp_path_factory.mktemp("activations")
    build([load_plan("tiny", [f"model.id={str(GOLDEN_MODEL)!r}"]).store("train")], folder)
    return folder


@pytest.fixture
def overrides_in(activations):
    def make(folder, *overrides):
        places = [f"model.id={str(GOLDEN_MODEL)!r}", f"cache.dir={str(activations)!r}", f"train.dir={str(folder)!r}"]
        return [*places, *overrides]

    return make


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    """What failed is tried again at once."""
    from hsae.cache.storage import retry

    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.002)


@pytest.fixture
def wide(monkeypatch):
    """A terminal so wide that no path breaks a message in two."""
    monkeypatch.setenv("COLUMNS", "400")


def save_nothing(figure, file, *, format, **options):
    file.write("<svg ></svg>") if format == "svg" else Path(file).touch()


@pytest.fixture(scope="module")
def undrawn_for_all():
    """Pictures are composed, but not drawn, which takes most of the time of a report."""
    with mock.patch("matplotlib.figure.Figure.savefig", save_nothing):
        yield


@pytest.fixture
def undrawn():
    """The same for one test."""
    with mock.patch("matplotlib.figure.Figure.savefig", save_nothing):
        yield


@pytest.fixture
def scratch_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HSAE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "scratch"


@pytest.fixture(scope="session")
def s3_server():
    where = importlib.util.spec_from_file_location("s3_server", ROOT / "benchmarks/s3_server.py")
    module = importlib.util.module_from_spec(where)
    where.loader.exec_module(module)
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    with module.served("bucket") as (endpoint, faults):
        yield {**module.CREDENTIALS, "AWS_ENDPOINT_URL": endpoint}, faults


@pytest.fixture
def s3(s3_server, monkeypatch):
    """The server's faults, with the environment pointing at it."""
    import fsspec

    environment, faults = s3_server
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield faults
    faults.rate, faults.gone_until, faults.skewed = 0.0, 0.0, False
    faults.harms.clear()


TOKEN = "a-token-that-readers-know"


@contextmanager
def serving(path, *options, token=TOKEN):
    """`hsae cache serve` in a process of its own: (its URL, the process, what it printed so far)."""
    settings = {**os.environ, "HSAE_TOKEN": token, "COLUMNS": "300"}
    command = [
        sys.executable,
        "-c",
        "from hsae.cli.main import main; main()",
        "cache",
        "serve",
        str(path),
        "--port",
        "0",
    ]
    process = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=settings
    )
    printed = [process.stdout.readline()]
    try:
        yield re.search(r"serving at (\S+),", printed[0])[1], process, printed
    finally:
        process.send_signal(signal.SIGINT)
        printed.append(process.communicate(timeout=30)[0])


@pytest.fixture(scope="session")
def serve():
    return serving


@pytest.fixture
def token(monkeypatch):
    monkeypatch.setenv("HSAE_TOKEN", TOKEN)
    return TOKEN
