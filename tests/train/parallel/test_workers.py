"""Several workers train as one would: selection across shares, real processes under torchrun, kills, two hosts."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from many_workers import (
    HARD,
    HSAE,
    SCRIPT_HEAD,
    TORCHRUN,
    assert_same_training,
    in_threads,
    launched,
    numbers,
    train_arguments,
)
from places import GOLDEN_MODEL, TESTS

import hsae.train.parallel.workers as workers_module
from hsae.cache.errors import UserError
from hsae.cache.launcher import Share
from hsae.cache.reading.store import ActivationStore
from hsae.cache.reading.token_stream import TokenStream
from hsae.train import run_record
from hsae.train.config.plan import load_plan
from hsae.train.config.run_config import RunConfig
from hsae.train.model.activations import batch_top_k
from hsae.train.parallel.workers import ALONE, worker_group
from hsae.train.runs.metrics_log import read_metrics
from hsae.train.runs.planned_runs import check, train_runs
from hsae.train.training.scaling import Scaling
from hsae.train.training.training_run import TrainingRun


@settings(max_examples=40, deadline=None)
@given(
    world=st.integers(2, 4),
    share=st.integers(1, 5),
    seed=st.integers(0, 10**6),
    coarse=st.booleans(),
    low=st.booleans(),
)
def test_batch_top_k_of_shares_is_that_of_the_batch(world, share, seed, coarse, low):
    generator = torch.Generator().manual_seed(seed)
    pre = torch.randn(world * share, 7, generator=generator) - 2.0 * low
    pre = (pre * 2).round() / 2 if coarse else pre  # many equal values
    l0 = 0.5 + 3 * torch.rand((), generator=generator).item()
    whole, smallest = batch_top_k(pre, l0)
    for bound in (None, torch.tensor(0.1), torch.tensor(1.5)):
        parts = in_threads(
            world, lambda workers, bound=bound: batch_top_k(pre.chunk(world)[workers.rank], l0, bound, workers)
        )
        code = torch.cat([part for part, _ in parts])
        assert [low.item() for _, low in parts] == [smallest.item()] * world
        assert (code > 0).sum() == (whole > 0).sum()
        assert torch.equal(code.flatten().sort().values, whole.flatten().sort().values)
        assert coarse or torch.equal(code, whole)


def test_nan_in_one_share_is_kept_by_it():
    pre = torch.rand(4, 7, generator=torch.Generator().manual_seed(0))
    pre[3, 2] = torch.nan
    codes = [code for code, _ in in_threads(2, lambda w: batch_top_k(pre.chunk(2)[w.rank], 1.5, None, w))]
    assert torch.isnan(codes[1]).any() and not torch.isnan(codes[0]).any()


KINDS = ("relu", "topk", "jumprelu", "gated", "stacked", "joint", "literal", "gate")


@pytest.mark.parametrize(
    ("activation", "resample_steps"),
    [*((kind, 0) for kind in KINDS), *((kind, 3) for kind in ("jumprelu", "stacked", "joint", "gate"))],
)
def test_steps_of_two_workers_are_those_of_one(activation, resample_steps):
    changes = {
        "stacked": {"structure": "stacked", "stop_gradient": False},
        "joint": {"selection": "joint", "composition": {"mode": "none"}},
        "literal": {"composition": {"mode": "literal"}},
        "gate": {"child_gate": True},
    }.get(activation, {"activation": activation})
    flat = (
        {"structure": "flat", "widths": (187,), "l0": (5,), "composition": {"mode": "none"}}
        if activation == "gated"
        else {}
    )
    config = RunConfig(
        **{
            "number": 7, "name": "two", "structure": "additive", "widths": (187, 31), "l0": (5, 3),
            "composition": {"mode": "normalised"},
            "learning_rate": 3e-3, "warmup_steps": 2, "dead_after_tokens": 45, "aux_latents": 4,
            "resample_steps": resample_steps,
            "aux_weight": 0 if resample_steps else 1 / 32,  # of latents drawn from one vector AuxK takes any
            **changes, **flat,
        }
    )  # fmt: skip
    x = torch.randn(14, 44, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    x[..., 0] *= 1 + torch.arange(44) / 10  # halves that differ
    scaling = Scaling(scale=1.0, median=torch.zeros(12), variance=12.0)

    def trained(workers):
        run = TrainingRun(config, scaling, steps=14, seed=1, device="cpu", workers=workers)
        run.model.double(), run.compositions.double()  # so that a difference is not one of rounding
        lines = []
        for batch in x:
            share = batch.chunk(workers.world)[workers.rank]
            lines.append(run.metrics(share, run.step(share)) | {"resampled": list(run.resampled.values())})
        return run, lines

    alone, lines = trained(ALONE)
    for run, told in in_threads(2, trained):
        for mine, theirs in zip(lines, told, strict=True):
            assert numbers(theirs) == pytest.approx(numbers(mine), rel=1e-6, abs=1e-6), mine["step"]
        for name, tensor in alone.state()[0].items():
            if tensor.is_floating_point() and "exp_avg" not in name:
                torch.testing.assert_close(run.state()[0][name], tensor, rtol=0, atol=1e-7, equal_nan=True)
    assert sum(sum(line["resampled"]) for line in lines) > 0 or not resample_steps
    assert max(max(line["dead"]) for line in lines) > 0 or activation in ("relu", "gated")


@pytest.mark.parametrize("world", [2, 5])
def test_shares_of_the_stream_are_the_batch(activations, world):
    plan = load_plan("tiny", [f"model.id={str(GOLDEN_MODEL)!r}"])
    store = ActivationStore.open(activations / plan.store("train").name)
    options = {"batch_tokens": 250, "seed": 3}
    whole = TokenStream(store, plan.hook.names[0], **options)
    parts = [TokenStream(store, plan.hook.names[0], share=Share(rank, world), **options) for rank in range(world)]
    for step in (0, 7, 40):
        assert torch.equal(torch.cat([part.batch(step) for part in parts]), whole.batch(step))


def test_what_workers_cannot_do_is_refused_before_any_compute(overrides_in, tmp_path, activations, monkeypatch):
    plan = load_plan("tiny", overrides_in(tmp_path))
    ActivationStore.open(plan.store_path("train"))
    with pytest.raises(
        UserError,
        match=r"train.batch_tokens is 250, which 4 workers can't share equally; use a multiple of 4, such as 248 or "
        r"252",
    ):
        check(plan, plan.select("3"), world=4)
    check(plan, plan.select("3"), world=5)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("MASTER_PORT", "29500")
    with (
        pytest.raises(UserError, match="2 workers, but MASTER_ADDR not set: give the host of worker 0"),
        worker_group(Share(1, 2), "cpu"),
    ):
        raise AssertionError
    with pytest.raises(UserError, match="device 'cuda:1' for 2 workers: use --device cuda, and each takes a GPU"):
        workers_module._backend(Share(1, 2), "cuda:1")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"4 workers on this host, which has 3 GPU\(s\): start one a GPU"):
        workers_module._backend(Share(1, 4), "cuda")


SCRIPT = (
    SCRIPT_HEAD.replace("SETTINGS", "HARD")
    + """
with worker_group(share(), "cpu") as workers:
    options = {"device": "cpu", "workers": workers}
    whole = plan("two")
    assert {result.status for result in train_runs(whole, whole.select("1,3,12,15"), **options)} == {"trained"}
    drawn = plan("drawn two", "train.resample_steps=5")
    train_runs(drawn, drawn.select("3"), **options)
    begun, calls = plan("begun by two"), iter(range(99))
    wished = lambda: next(calls) == 10 and workers.rank == 1
    assert train_runs(begun, begun.select("3"), should_stop=wished, **options)[0].status == "stopped"
    ended = plan("ended by two")
    assert train_runs(ended, ended.select("3"), resume=True, **options)[0].status == "trained"
    assert train_runs(ended, ended.select("3"), **options)[0].status == "already trained"
"""
)


@pytest.mark.slow
def test_two_workers_train_what_one_does_and_take_each_others_places(overrides_in, tmp_path):
    def plan(folder, *more):
        return load_plan("tiny", overrides_in(tmp_path / folder, *HARD, *more))

    one, drawn, begun, ended = (
        plan("one"),
        plan("drawn one", "train.resample_steps=5"),
        plan("begun by two"),
        plan("ended by two"),
    )
    train_runs(one, one.select("1,3,12,15"), device="cpu")
    train_runs(drawn, drawn.select("3"), device="cpu")
    calls = iter(range(99))
    train_runs(ended, ended.select("3"), device="cpu", should_stop=lambda: next(calls) == 13)
    arguments = [str(TESTS), str(tmp_path), *overrides_in(tmp_path)[:2]]
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [*TORCHRUN, "--nproc-per-node", "2", str(tmp_path / "script.py"), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert train_runs(begun, begun.select("3"), device="cpu", resume=True)[0].status == "trained"
    for number in (1, 3, 12, 15):
        assert_same_training(tmp_path / "one" / str(number), tmp_path / "two" / str(number))
    assert_same_training(tmp_path / "drawn one/3", tmp_path / "drawn two/3")
    for folder in ("begun by two", "ended by two"):
        assert_same_training(tmp_path / "one/3", tmp_path / folder / "3")
    last = [line for line in read_metrics(tmp_path / "one/3") if line["kind"] == "metrics"][-1]
    assert last["parts"]["auxiliary1"] > 0 and last["composition_loss"] > 0
    assert run_record.read_run(tmp_path / "two/3")["hardware"].startswith("2 workers, each: ")


@pytest.mark.slow
def test_four_workers_train_what_one_does(overrides_in, tmp_path):
    hard = [*HARD, "train.batch_tokens=252"]
    one = load_plan("tiny", overrides_in(tmp_path / "one", *hard))
    train_runs(one, one.select("1-3"), device="cpu")
    process = launched(4, train_arguments(overrides_in(tmp_path / "four", *hard), "1-3"))
    out, err = process.communicate()
    assert process.returncode == 0, err[-3000:]
    assert out.count("trained") == 3 and "4 workers, cpu" in out  # the first alone prints
    for number in (1, 2, 3):
        assert_same_training(tmp_path / "one" / str(number), tmp_path / "four" / str(number))


@pytest.mark.slow
def test_a_mistake_is_told_once(overrides_in, tmp_path):
    process = launched(2, train_arguments(overrides_in(tmp_path, "train.batch_tokens=251")))
    _, err = process.communicate()
    assert process.returncode != 0 and err.count("which 2 workers can't share equally") == 1
    assert not (tmp_path / "3").exists()


@pytest.mark.slow
@pytest.mark.parametrize("whom", [0, 1, "launcher"])
def test_whoever_ends_all_end_and_all_go_on(overrides_in, tmp_path, whom):
    long = ["train.tokens=100_000", "train.checkpoint_steps=20"]
    one = load_plan("tiny", overrides_in(tmp_path / "one", *long))
    train_runs(one, one.select("3"), device="cpu")
    arguments = [*train_arguments(overrides_in(tmp_path / "two", *long)), "--resume"]
    process = launched(2, arguments)
    checkpoint = tmp_path / "two/3/checkpoint/state.safetensors"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    if whom == "launcher":
        process.send_signal(signal.SIGTERM)
    else:
        os.kill(worker_of(process.pid, whom), signal.SIGKILL)
    began = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - began < 30
    assert (
        "run 3 full: stopped at step" in out if whom == "launcher" else err.count("start all again with --resume") <= 1
    )
    assert checkpoint.exists()
    two = load_plan("tiny", overrides_in(tmp_path / "two", *long))
    assert train_runs(two, two.select("3"), device="cpu", resume=True)[0].status == "trained"
    assert_same_training(tmp_path / "one/3", tmp_path / "two/3", tolerance=1e-4)  # over 400 steps


def worker_of(launcher, rank):
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            settings = (entry / "environ").read_bytes().split(b"\0") if parent == launcher else []
        except (OSError, IndexError, ValueError):
            continue
        if f"RANK={rank}".encode() in settings:
            return int(entry.name)
    raise AssertionError(f"no worker {rank} of process {launcher}")


@pytest.mark.slow
def test_two_workers_build_the_store_of_one(tmp_path):
    def built(world, folder):
        arguments = ["cache", "build", "--plan", "tiny", "--split", "train", "--device", "cpu"]
        places = ["--set", f"model.id={str(GOLDEN_MODEL)!r}", "--set", f"cache.dir={str(tmp_path / folder)!r}"]
        process = launched(world, [*arguments, *places])
        _, err = process.communicate()
        assert process.returncode == 0, err[-3000:]
        root = next((tmp_path / folder).glob("*.zarr"))
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    assert built(1, "one") == built(2, "two")


@pytest.fixture
def two_hosts():
    """Two network namespaces that see each other alone, as (name, address, interface)."""
    names = [f"hsae{os.getpid()}{side}" for side in "ab"]
    hosts = [(name, f"10.77.0.{number}", f"veth{number}") for number, name in enumerate(names, 1)]

    if shutil.which("ip") is None:
        pytest.skip("there is no ip command")

    def ip(*arguments):
        return subprocess.run(["ip", *arguments], capture_output=True, text=True)

    made = [ip("netns", "add", name).returncode for name in names]
    pair = ["veth1", "netns", names[0], "type", "veth", "peer", "name", "veth2", "netns", names[1]]
    try:
        if any(made) or ip("link", "add", *pair).returncode:
            pytest.skip("network namespaces can't be made here")
        for name, address, interface in hosts:
            ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
            for device in (interface, "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield hosts
    finally:
        for name in names:
            ip("netns", "delete", name)


@pytest.mark.slow
def test_two_hosts_train_what_one_does(two_hosts, overrides_in, tmp_path):
    one = load_plan("tiny", overrides_in(tmp_path / "one", *HARD))
    train_runs(one, one.select("1,3"), device="cpu")
    processes = []
    for rank, (name, _, interface) in enumerate(two_hosts):
        folder = tmp_path / "two" if rank == 0 else tmp_path / "elsewhere"  # run directories are worker 0's alone
        told = {
            "MASTER_ADDR": two_hosts[0][1],
            "MASTER_PORT": "29611",
            "GLOO_SOCKET_IFNAME": interface,
            "OMP_NUM_THREADS": "1",
        }
        told |= {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}
        command = ["ip", "netns", "exec", name, *HSAE, *train_arguments(overrides_in(folder, *HARD), "1,3")]
        processes.append(
            subprocess.Popen(
                command, env={**os.environ, **told}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]
    assert not (tmp_path / "elsewhere").exists()
    for number in (1, 3):
        assert_same_training(tmp_path / "one" / str(number), tmp_path / "two" / str(number))
