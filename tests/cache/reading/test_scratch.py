"""The folder of decoded chunks: filled once, bounded, shared, and never trusted."""

import os
import threading

import pytest
import torch

from hsae.cache.errors import UserError
from hsae.cache.reading import scratch as module
from hsae.cache.reading.scratch import Prefetcher, Scratch, scratch
from hsae.cache.reading.store import ActivationStore

HOOK = "blocks.3.hook_resid_post"


def files(folder):
    return sorted(
        (path for path in folder.iterdir() if module.OURS.fullmatch(path.name)),
        key=lambda path: path.stat().st_mtime_ns,
    )


def test_the_least_recently_used_go_first_and_foreign_files_stay(tmp_path):
    (tmp_path / "notes.txt").write_bytes(b"x" * 5000)
    held, made = Scratch(tmp_path, 1000), []
    for number in range(9):
        held.fetch(f"key {number}", 96, lambda number=number: made.append(number) or bytes([number]) * 96)
        os.utime(held.fetch(f"key {number}", 96, bytes), ns=(number, number))
    os.utime(held.fetch("key 1", 96, bytes), ns=(50, 50))  # used again: number 0 and then 2 are the oldest
    held.fetch("key 9", 96, lambda: bytes(96))
    held.fetch("key 10", 96, lambda: bytes(96))
    assert made == list(range(9)) and sum(path.stat().st_size for path in files(tmp_path)) <= 1000
    for number in (0, 2):
        held.fetch(f"key {number}", 96, lambda number=number: made.append(number) or bytes(96))
    held.fetch("key 1", 96, lambda: pytest.fail("was thrown away"))
    assert made[9:] == [0, 2] and (tmp_path / "notes.txt").stat().st_size == 5000


def test_another_process_s_files_count_and_a_dead_one_s_partial_file_goes(tmp_path):
    Scratch(tmp_path, 1000).fetch("theirs", 800, lambda: bytes(800))
    dead = tmp_path / f"{'a' * 32}{module.PARTIAL}"
    dead.write_bytes(bytes(100))
    os.utime(dead, (1, 1))
    Scratch(tmp_path, 1000).fetch("ours", 300, lambda: bytes(300))
    assert [path.stat().st_size for path in files(tmp_path)] == [304]


def test_a_partial_file_goes_when_its_writer_is_dead_and_not_before(tmp_path):
    """FIX C11"""
    left, live = (tmp_path / f"{letter * 32}{module.PARTIAL}" for letter in "ab")
    with live.open("wb") as file:
        module.lock(file)
        for path in (left, live):
            path.write_bytes(bytes(10))
            os.utime(path, (1, 1))
        Scratch(tmp_path, 1000).fetch("ours", 300, lambda: bytes(300))
        assert live.exists() and not left.exists()


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    """FIX C14"""

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "lock", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/[0-9a-f]+'"):
        Scratch(tmp_path, 1000).fetch("key", 10, lambda: bytes(10))
    assert files(tmp_path) == []


def test_many_readers_of_one_chunk_make_it_once(tmp_path):
    made, barrier = [], threading.Barrier(8)

    def read():
        barrier.wait()
        Scratch(tmp_path, 1 << 20).fetch("key", 10, lambda: made.append(1) or bytes(10))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]


@pytest.mark.parametrize("harm", ["flip", "cut", "swap", "remove"])
def test_a_harmed_scratch_file_is_made_again(make_store, scratch_home, tmp_path, harm):
    root, values = make_store(tmp_path, codec="compact")
    assert torch.equal(ActivationStore.open(root).acts(HOOK, 0, 23), values[f"acts/{HOOK}"])
    first, second = files(scratch_home)[:2]
    data = first.read_bytes()
    if harm == "flip":
        first.write_bytes(data[:7] + bytes([data[7] ^ 1]) + data[8:])
    elif harm == "cut":
        first.write_bytes(data[:-1])
    elif harm == "remove":
        first.unlink()
    else:
        first.write_bytes(second.read_bytes())
        second.write_bytes(data)
    assert torch.equal(ActivationStore.open(root).acts(HOOK, 0, 23), values[f"acts/{HOOK}"])
    assert first.read_bytes() == data


def test_reading_goes_on_when_the_folder_is_far_too_small_or_emptied(make_store, scratch_home, tmp_path, monkeypatch):
    monkeypatch.setenv("HSAE_SCRATCH_GIB", str(1500 / 2**30))  # two chunks of 564 bytes
    root, values = make_store(tmp_path, codec="compact")
    store = ActivationStore.open(root)
    for start in (0, 9, 17, 3, 20, 11):
        assert torch.equal(store.acts(HOOK, start, start + 3), values[f"acts/{HOOK}"][start : start + 3])
    assert sum(path.stat().st_size for path in files(scratch_home)) <= 1500
    for path in files(scratch_home):
        path.unlink()
    assert torch.equal(store.acts(HOOK, 0, 23), values[f"acts/{HOOK}"])
    assert torch.equal(ActivationStore.open(root).acts(HOOK, 0, 23), values[f"acts/{HOOK}"])


def test_a_budget_that_is_no_number_is_refused(monkeypatch):
    for text in ("much", "-1", "0", "nan", "inf"):
        monkeypatch.setenv("HSAE_SCRATCH_GIB", text)
        with pytest.raises(
            UserError, match=f"HSAE_SCRATCH_GIB is '{text}'; give the GiB that decoded chunks may take, for example 64"
        ):
            scratch()


def test_prefetching_keeps_the_order_drops_what_is_no_longer_wanted_and_survives_errors():
    prefetcher, done, gate = Prefetcher(at_once=1), [], threading.Event()

    def job(number):
        def work():
            if number == 0:
                gate.wait(10)
            done.append(number)
            if number == 7:
                raise OSError("gone")

        return work

    ended = threading.Event()
    prefetcher.order([job(0), job(1), job(2)])
    while prefetcher._jobs and len(prefetcher._jobs) == 3:  # the first is under way
        ended.wait(0.001)
    prefetcher.order([job(7), job(8), ended.set])
    gate.set()
    assert ended.wait(10) and done == [0, 7, 8]
