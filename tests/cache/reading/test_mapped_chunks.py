"""Mapped chunks: no descriptor stays with one (FIX C2), and one that is cut while it is mapped is said before the end
(FIX C10)."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from stores import HOOK, spec

from hsae.cache.building.build import build
from hsae.cache.reading.mapped_chunks import mapped_pages
from hsae.cache.reading.store import ActivationStore

CUT = """
import mmap, os, sys
from hsae.cache.reading import page_faults
page_faults.enable()
page_faults.note("/some folder/é.zarr")
page_faults.note("probe/texts/x")
with open(sys.argv[1], "r+b") as file:
    pages = mmap.mmap(file.fileno(), 0)
os.truncate(sys.argv[1], 10)
pages[50_000]
"""
INTERRUPTED = """
import os, signal, time
from hsae.cache.reading import page_faults
page_faults.enable()
page_faults.note("a.zarr")
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let background jobs ignore it
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
except KeyboardInterrupt:
    raise SystemExit(130)
"""


def descriptors():
    return len(list(Path("/dev/fd").iterdir()))


@pytest.fixture
def few_descriptors():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors() + 24, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_more_chunks_are_mapped_than_there_may_be_descriptors(tmp_path, few_descriptors):
    path = tmp_path / "chunk"
    path.write_bytes(bytes(range(200)))
    path.chmod(0o444)
    pages = [mapped_pages(path, 200) for _ in range(100)]
    pages[0][7] = 99  # a write stays in this process, and in this map
    assert pages[1][7] == 7 and path.read_bytes()[7] == 7
    assert Path("/proc/self/maps").read_text().count(str(path)) == 100
    pages.clear()
    assert str(path) not in Path("/proc/self/maps").read_text()
    with pytest.raises(ValueError, match="is 200 bytes long, not 201"):
        mapped_pages(path, 201)
    with pytest.raises(FileNotFoundError, match="nothing"):
        mapped_pages(tmp_path / "nothing", 1)


def test_a_name_that_is_no_text_is_mapped(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff\xfe")
    path.write_bytes(b"abc")
    assert bytes(mapped_pages(path, 3).numpy().data) == b"abc"


def test_a_whole_store_is_read_under_a_low_limit(tmp_path):
    path = build([spec(rows=150, batch_rows=1, chunk_mib=0.001, clean_rows=0, split="train")], tmp_path)[0]
    store, before = ActivationStore.open(path), descriptors()
    chunks = [store.acts_chunk(HOOK, index) for index in range(store.chunks)]
    assert len(chunks) == 150 and descriptors() <= before


def test_a_file_cut_while_it_is_mapped_is_said_with_the_names_of_the_stores(tmp_path):
    path = tmp_path / "chunk"
    path.write_bytes(bytes(100_000))
    ended = subprocess.run([sys.executable, "-c", CUT, str(path)], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL and ended.stderr.count("Error:") == 1
    assert (
        "Error: a file of /some folder/é.zarr or probe/texts/x was cut, or its disk failed, while it was being read "
        "(SIGBUS). Checkpoints "
        "and results that were written are kept. Find the damage with: hsae cache verify '/some folder/é.zarr'\n"
    ) in ended.stderr


def test_an_interrupt_is_still_one():
    ended = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (130, "")
