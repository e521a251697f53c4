"""Profiles: the trace is there and loads, a summary counts each moment once, and a failure leaves nothing half."""

import gzip
import json

import pytest
import torch

from hsae.cache import profiling
from hsae.cache.errors import UserError
from hsae.cache.profiling import STEPS, WARM_UP, label, labelled, profiled, step_done, summarise


def work(steps, phase="steps"):
    matrix = torch.randn(64, 64)
    for _ in labelled("data", range(steps)):
        (matrix @ matrix).topk(3)
        with label("update"):
            matrix += 1
        step_done(phase)


def test_trace_and_summary(tmp_path):
    with profiled(tmp_path / "traces", "train") as summaries:
        work(WARM_UP + STEPS + 5)
        work(WARM_UP + 4, "second phase")
        work(WARM_UP, "too short")
    first, second = summaries
    assert (first.phase, first.steps, second.steps) == ("steps", STEPS, 4) and not first.on_gpu
    names = {path.name for path in (tmp_path / "traces").iterdir()}
    assert names == {"train-steps.json.gz", "train-second-phase.json.gz"}
    events = json.loads(gzip.decompress(first.trace.read_bytes()))["traceEvents"]
    assert {"step", "data", "update", "aten::mm", "aten::topk"} <= {event["name"] for event in events}
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == "step" and e["ph"] == "X")
    assert len(spans) == STEPS
    assert first.step_ms == pytest.approx((spans[-1][1] - spans[0][0]) / 1000 / STEPS)
    assert all(first.ms[kind] > 0 for kind in ("products", "selection", "optimiser", "data", "Python"))
    assert set(first.ms) == set(profiling.ROWS)


def test_failure_leaves_no_file(tmp_path):
    with pytest.raises(ZeroDivisionError), profiled(tmp_path, "train") as summaries:
        work(WARM_UP + 2)
        1 / 0  # noqa: B018
    assert not summaries and not list(tmp_path.iterdir())
    work(WARM_UP + 2)  # nothing is profiled any more
    assert not list(tmp_path.iterdir())


def test_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--profile"), profiled(tmp_path / "file", "train"):
        pass


def event(name, cat, ts, dur, tid=1, **args):
    return {"ph": "X", "name": name, "cat": cat, "ts": ts, "dur": dur, "tid": tid, "args": args}


def test_each_moment_of_a_gpu_counts_once():
    """Kernels count as what launched them, or by their names; gaps are data or Python; overlaps count once."""
    trace = [
        event("step", "user_annotation", 0, 1000),
        event("data", "user_annotation", 0, 100),
        event("aten::mm", "cpu_op", 100, 50),
        event("cudaLaunchKernel", "cuda_runtime", 110, 5, correlation=1),
        event("update", "user_annotation", 200, 50),
        event("aten::mul", "cpu_op", 205, 20),
        event("cudaLaunchKernel", "cuda_runtime", 210, 5, correlation=2),
        event("cudaGraphLaunch", "cuda_runtime", 300, 5, correlation=3),
        event("some_kernel", "kernel", 150, 250, tid=7, correlation=1),
        event("vectorized_elementwise", "kernel", 400, 100, tid=7, correlation=2),
        event("Memcpy HtoD", "gpu_memcpy", 450, 100, tid=8, correlation=9),
        event("nvjet_tst_128x128", "kernel", 600, 100, tid=7, correlation=3),
        event("triton_poi_fused_add", "kernel", 700, 100, tid=7, correlation=3),
    ]
    summary = summarise({"traceEvents": trace}, "steps", 1)
    expected = {"products": 0.35, "optimiser": 0.1, "copies": 0.05, "other operations": 0.1, "data": 0.1}
    assert summary.on_gpu
    assert {kind: round(ms, 6) for kind, ms in summary.ms.items() if ms and kind != "Python"} == expected
    assert summary.step_ms == pytest.approx(1.0) and summary.ms["Python"] == pytest.approx(0.3)


def test_operations_inside_others_count_once():
    trace = [
        event("step", "user_annotation", 0, 500),
        event("step", "user_annotation", 500, 500),
        event("step", "user_annotation", 1000, 500),
        event("aten::linear", "cpu_op", 100, 300),
        event("aten::addmm", "cpu_op", 150, 200),
        event("aten::copy_", "cpu_op", 200, 50),
        event("aten::topk", "cpu_op", 600, 100, tid=2),
        event("aten::add", "cpu_op", 800, 100),
        event("aten::mm", "cpu_op", 1100, 100),
    ]
    summary = summarise({"traceEvents": trace}, "steps", 2)
    assert summary.steps == 2 and summary.ms["products"] == pytest.approx(0.15)
    assert summary.ms["other operations"] == pytest.approx(0.05) and summary.ms["selection"] == 0
    assert summary.ms["copies"] == 0 and summary.step_ms == pytest.approx(0.5)
