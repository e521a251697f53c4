"""Workers that divide the latents of every level train as one would: selection, single steps, memory, real
processes.
"""

import os
import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from many_workers import (
    EVEN,
    SCRIPT_HEAD,
    TORCHRUN,
    assert_same_training,
    in_threads,
    launched,
    numbers,
    train_arguments,
)
from places import TESTS

from hsae.cache.errors import UserError
from hsae.train.config.plan import load_plan
from hsae.train.config.run_config import RunConfig
from hsae.train.model import sparse_products
from hsae.train.model.activations import batch_top_k, top_k
from hsae.train.parallel.latent_sharding import Latents
from hsae.train.parallel.workers import ALONE
from hsae.train.runs.metrics_log import read_metrics
from hsae.train.runs.planned_runs import check, train_runs
from hsae.train.training import training_run
from hsae.train.training.scaling import Scaling
from hsae.train.training.training_run import TrainingRun

D, BATCH, STEPS = 12, 43, 14


@settings(max_examples=40, deadline=None)
@given(
    world=st.integers(2, 4),
    own=st.integers(1, 5),
    k=st.integers(1, 6),
    seed=st.integers(0, 10**6),
    coarse=st.booleans(),
    low=st.booleans(),
)
def test_selection_among_divided_latents_is_that_among_all(world, own, k, seed, coarse, low):
    generator = torch.Generator().manual_seed(seed)
    pre = torch.randn(7, world * own, generator=generator) - 2.0 * low
    pre = (pre * 2).round() / 2 if coarse else pre  # many equal values
    k, l0 = min(k, world * own), 0.9 * min(k, own)
    whole = (top_k(pre, k), *batch_top_k(pre, l0))

    def selected(workers):
        mine, latents = pre.chunk(world, 1)[workers.rank], Latents(workers)
        return top_k(mine, k, latents), *batch_top_k(mine, l0, torch.tensor(0.1), latents=latents)

    parts = in_threads(world, selected)
    assert [smallest.item() for _, _, smallest in parts] == [whole[2].item()] * world
    for index in (0, 1):
        code = torch.cat([part[index] for part in parts], 1)
        assert coarse or torch.equal(code, whole[index])
        assert torch.equal(code.flatten().sort().values, whole[index].flatten().sort().values)
    assert torch.equal(torch.cat([part[0] for part in parts], 1).sort(1).values, whole[0].sort(1).values)


@pytest.fixture(autouse=True)
def _dead_latents_are_looked_for_at_every_step(request, monkeypatch):
    if request.node.get_closest_marker("slow") is None:  # whose workers are processes of their own
        monkeypatch.setattr(training_run, "DEAD_STEPS", 1)


def configured(**changes):
    return RunConfig(
        **{
            "number": 7, "name": "wide", "structure": "additive", "widths": (186, 30), "l0": (5, 3),
            "composition": {"mode": "normalised"},
            "learning_rate": 3e-3, "warmup_steps": 2, "dead_after_tokens": 44, "aux_latents": 4, "gradient_clip": 0.5,
            **changes,
        }
    )  # fmt: skip


def run_of(config, workers, steps=STEPS):
    scaling = Scaling(scale=1.0, median=torch.linspace(-0.3, 0.4, D), variance=12.0)
    return TrainingRun(config, scaling, steps=steps, seed=1, device="cpu", latents=Latents(workers))


FLAT = {"structure": "flat", "widths": (186,), "l0": (5,), "composition": {"mode": "none"}}
KINDS = {
    "batchtopk": {},
    "relu": {"activation": "relu"},
    "topk": {"activation": "topk"},
    "jumprelu": {"activation": "jumprelu"},
    "gated": {**FLAT, "activation": "gated"},
    "flat": FLAT,
    "joint": {"selection": "joint", "composition": {"mode": "none"}},
    "literal": {"composition": {"mode": "literal"}},
    "probe": {"composition": {"mode": "probe"}},
    "frozen": {"composition": {"mode": "frozen"}},
    "gate": {"child_gate": True},
    "three levels": {"widths": (186, 30, 18), "l0": (5, 3, 2), "curriculum": "coarse-first"},
    "sparse": {},
    "sparse literal": {"composition": {"mode": "literal"}},
}


@pytest.mark.parametrize(
    ("kind", "resample_steps", "world"),
    [
        *((kind, 0, 2 + index % 2) for index, kind in enumerate(KINDS)),
        *(("jumprelu", 3, 2), ("joint", 3, 3), ("gate", 3, 2)),
    ],
)
def test_steps_with_divided_latents_are_those_with_whole_levels(kind, resample_steps, world, monkeypatch):
    monkeypatch.setitem(sparse_products.SMALLEST, "cpu", 1 if kind.startswith("sparse") else 10**9)
    aux = 0 if resample_steps else 1 / 32  # latents drawn from one vector are equal, and AuxK chooses among equals
    config = configured(**KINDS[kind], resample_steps=resample_steps, aux_weight=aux)
    x = torch.randn(STEPS, BATCH, D, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

    def trained(workers):
        run = run_of(config, workers)
        first, lines = run.state()[0], []
        first = {name: tensor.clone() for name, tensor in first.items()}
        run.model.double(), run.compositions.double()  # so that a difference is not one of rounding
        for batch in x:
            lines.append(run.metrics(batch, run.step(batch)) | {"resampled": list(run.resampled.values())})
        return first, lines, run.state()[0]

    first, lines, last = trained(ALONE)
    parts = in_threads(world, trained)
    for name, tensor in first.items():
        assert torch.equal(parts[0][0][name], tensor) or tensor.isnan(), name
    for _, told, _ in parts:
        for mine, theirs in zip(lines, told, strict=True):
            assert mine["dead"] == theirs["dead"]
            assert numbers(theirs) == pytest.approx(numbers(mine), rel=1e-6, abs=1e-6), mine["step"]
    assert parts[0][2].keys() == last.keys() and not any(state for _, _, state in parts[1:])
    for name, tensor in last.items():
        torch.testing.assert_close(parts[0][2][name], tensor, rtol=1e-6, atol=1e-7, equal_nan=True, msg=name)
    assert {"adam/model.levels.0.W_enc/exp_avg", "adam/model.biases.0/exp_avg_sq"} <= last.keys()
    assert kind in ("frozen", "joint", "gated", "flat") or "adam/composition.0.W/exp_avg" in last
    assert sum(sum(line["resampled"]) for line in lines) > 0 or not resample_steps
    assert max(max(line["dead"]) for line in lines) > 0 or kind in ("relu", "gated")
    assert any(line["parts"].get("auxiliary1") for line in lines) or not aux or kind in ("relu", "gated")


def bytes_of(run):
    """(of what is divided, of what every worker has whole)"""
    tensors = {f"model.{name}": tensor for name, tensor in run.model.state_dict().items()}
    tensors |= {f"composition.{name}": tensor for name, tensor in run.compositions.state_dict().items()}
    tensors |= {f"fired.{index}": counter for index, counter in enumerate(run.tokens_since_fired)}
    for parameter, state in run.optimiser.state.items():
        tensors |= {f"adam/{run._names()[parameter]}/{key}": value for key, value in state.items()}
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    whole = sum(
        size for name, size in sizes.items() if any(part in name for part in (".biases.", ".threshold", "/step"))
    )
    return sum(sizes.values()) - whole, whole


def test_each_worker_holds_its_part_of_weights_and_adam():
    config, x = configured(widths=(184, 32), child_gate=True), torch.randn(BATCH, D)

    def held(workers):
        run = run_of(config, workers)
        run.step(x)
        storages = {tensor.untyped_storage().nbytes() for tensor in run.model.parameters()}
        assert storages == {tensor.numel() * tensor.element_size() for tensor in run.model.parameters()}
        return bytes_of(run)

    divided, whole = held(ALONE)
    for world in (2, 4):
        assert in_threads(world, held) == [(divided // world, whole)] * world
    assert divided % 4 == 0 and whole < divided / 100


def test_a_part_that_is_not_finite_and_biases_that_differ_are_seen_by_all():
    config, x = configured(), torch.randn(BATCH, D)

    def judged(workers):
        run = run_of(config, workers)
        run.step(x)
        run.check_same()
        sound = run.check_weights()
        with torch.no_grad():
            run.model.bias(1)[3] += 0.25 * workers.rank
            run.model.level(2).W_enc[3, 1] = torch.nan if workers.rank == 1 else 0.0
        try:
            run.check_same()
        except UserError as error:
            return sound, run.check_weights(), str(error)

    told = "the workers' copies of biases.0 have come to differ; use machines of one kind, and go on with --resume"
    assert in_threads(3, judged) == [(True, False, told)] * 3


def test_what_cannot_be_divided_is_refused_before_any_compute():
    plan = load_plan("tiny")
    with pytest.raises(UserError, match=r"run 1 is stacked: its levels read whole codes, so .* use --divide batch"):
        check(plan, plan.select("1"), 2, "latents")
    fine, coarse = plan.runs[3].widths
    assert fine % 3 == 0 and coarse % 3 == 1
    with pytest.raises(
        UserError,
        match=rf"run 3: level 2 has {coarse} latents, which 3 workers can't divide equally; "
        f"use a multiple of 3, such as {coarse - 1} or {coarse + 2}, another number of workers, or --divide batch",
    ):
        check(plan, plan.select("3"), 3, "latents")


SCRIPT = (
    SCRIPT_HEAD.replace("SETTINGS", "EVEN")
    + """
with worker_group(share(), "cpu") as workers:
    options = {"device": "cpu", "workers": workers, "divide": "latents"}
    whole = plan("two")
    assert {result.status for result in train_runs(whole, whole.select("3,12,15"), **options)} == {"trained"}
    begun, calls = plan("begun by two"), iter(range(99))
    wished = lambda: next(calls) == 10 and workers.rank == 1
    assert train_runs(begun, begun.select("3"), should_stop=wished, **options)[0].status == "stopped"
    ended = plan("ended by two")
    assert train_runs(ended, ended.select("3"), resume=True, **options)[0].status == "trained"
    twice, calls = plan("begun and ended by two"), iter(range(99))
    wished = lambda: next(calls) == 9
    for status in ("stopped", "trained"):
        assert train_runs(twice, twice.select("3"), resume=True, should_stop=wished, **options)[0].status == status
    shares, calls = plan("begun with shares"), iter(range(99))
    wished = lambda: next(calls) == 7
    train_runs(shares, shares.select("3"), should_stop=wished, device="cpu", workers=workers)
    assert train_runs(shares, shares.select("3"), resume=True, **options)[0].status == "trained"
"""
)


@pytest.mark.slow
def test_two_workers_with_half_the_latents_train_what_one_does(overrides_in, tmp_path):
    def plan(folder, *more):
        return load_plan("tiny", overrides_in(tmp_path / folder, *EVEN, *more))

    one, begun, ended = plan("one"), plan("begun by two"), plan("ended by two")
    train_runs(one, one.select("3,12,15"), device="cpu")
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
    for number in (3, 12, 15):
        assert_same_training(tmp_path / "one" / str(number), tmp_path / "two" / str(number))
    for folder in ("begun by two", "ended by two", "begun with shares"):
        assert_same_training(tmp_path / "one/3", tmp_path / folder / "3")
    bits = [
        (tmp_path / folder / "3/model/model.safetensors").read_bytes() for folder in ("two", "begun and ended by two")
    ]
    assert bits[0] == bits[1]
    last = [line for line in read_metrics(tmp_path / "one/3") if line["kind"] == "metrics"][-1]
    assert last["parts"]["auxiliary1"] > 0 and last["composition_loss"] > 0


@pytest.mark.slow
def test_four_workers_with_a_quarter_of_the_latents_train_what_one_does(overrides_in, tmp_path):
    one = load_plan("tiny", overrides_in(tmp_path / "one", *EVEN))
    train_runs(one, one.select("3"), device="cpu")
    process = launched(4, [*train_arguments(overrides_in(tmp_path / "four", *EVEN)), "--divide", "latents"])
    out, err = process.communicate()
    assert process.returncode == 0, err[-3000:]
    assert out.count("trained") == 1 and "4 workers, cpu" in out
    assert_same_training(tmp_path / "one/3", tmp_path / "four/3")
