"""`fit`: the same bits as a run of a plan, every kind of vectors, what is refused and when."""

import json
import re

import numpy as np
import pytest
import torch

from hsae.cache.errors import UserError
from hsae.cache.reading.store import ActivationStore
from hsae.train.config.plan import load_plan
from hsae.train.config.run_config import StreamConfig
from hsae.train.fitting import fit
from hsae.train.model.model_files import load_model
from hsae.train.runs.metrics_log import read_metrics
from hsae.train.runs.planned_runs import train_runs
from hsae.train.training.sources import ArraySource, IterableSource

SIZES = {"widths": [40, 12], "l0": [5, 2], "progress": False, "device": "cpu"}
SHORT = {**SIZES, "steps": 8, "batch_tokens": 64}


@pytest.fixture(scope="module")
def x():
    return torch.randn(500, 16, generator=torch.Generator().manual_seed(0)) + 3


def weights(model):
    tensors = [getattr(level, name) for level in model.levels for name in ("W_enc", "W_dec", "b_enc", "b_dec")]
    return [*tensors, *(part.weight for part in model.compositions)]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


@pytest.mark.parametrize("number", [0, 1, 3])
def test_on_a_store_it_is_the_run_of_a_plan_to_the_bit(overrides_in, tmp_path, number):
    plan = load_plan("tiny", overrides_in(tmp_path / "runs", "train.tokens=6000"))
    config = plan.runs[number]
    train_runs(plan, [config], device="cpu")
    store = ActivationStore.open(plan.store_path("train"))
    settings = config.model_dump()
    stream = {"tokens": plan.train.tokens, "batch_tokens": plan.train.batch_tokens, "seed": plan.train.seed}
    fit(store, **settings, **stream, log_steps=4, device="cpu", progress=False, folder=tmp_path / "fit")
    files = ["model/model.safetensors", *(f"saelens/{path.name}/cfg.json" for path in tmp_path.glob("fit/saelens/*"))]
    for name in files:
        assert (tmp_path / "fit" / name).read_bytes() == (plan.run_dir(config) / name).read_bytes(), name
    logs = [
        [{key: value for key, value in line.items() if key != "time"} for line in read_metrics(folder)]
        for folder in (tmp_path / "fit", plan.run_dir(config))
    ]
    assert logs[0] == logs[1]


def test_arrays_and_tensors_of_any_type_are_alike(x):
    model = fit(x, **SHORT, composition="normalised")
    assert model.level_widths == (40, 12) and len(model.compositions) == 1
    assert equal(model, fit(x.numpy(), **SHORT, composition={"mode": "normalised"}))
    read_only = x.numpy().copy()
    read_only.setflags(write=False)
    assert equal(model, fit(read_only, **SHORT, composition="normalised"))
    assert not equal(model, fit(x, **SHORT, composition="normalised", seed=1))
    assert equal(fit(x.bfloat16(), **SHORT), fit(x.bfloat16().double().numpy(), **SHORT))


def test_the_model_takes_vectors_in_their_own_units(x):
    model = fit(x * 100, **SIZES, steps=300, batch_tokens=250, learning_rate=5e-3)
    missed = model.reconstruct(model.codes(x * 100)) - x * 100
    assert missed.square().mean() < 0.6 * (x * 100).var()


def test_every_epoch_has_every_vector_once(x):
    source = ArraySource(torch.arange(1.0, 101).view(50, 2), StreamConfig(tokens=200, batch_tokens=20))
    batches = torch.cat(list(source.batches(0)))
    for epoch in batches.split(50):
        assert sorted(epoch[:, 0].tolist()) == list(range(1, 101, 2))
    assert not torch.equal(batches[:50], batches[50:100])
    assert torch.equal(torch.cat(list(source.batches(3))), batches[60:])


def test_iterables_are_regrouped_and_read_again_where_they_can_be(x):
    parts = list(x.split(33))
    model = fit(parts, **SHORT)
    assert equal(model, fit((part.numpy() for part in parts * 2), **SHORT))
    stream = StreamConfig(tokens=8 * 64, batch_tokens=64)
    assert torch.equal(torch.cat(list(IterableSource(parts, stream).batches(0))), torch.cat([x, x[:12]]))


def test_progress_is_a_bar_a_function_or_nothing(x, capsys):
    lines = []
    fit(x, **{**SHORT, "progress": lines.append}, log_steps=2)
    assert [line["step"] for line in lines] == [2, 4, 6, 8] and lines[-1]["loss"] > 0
    assert not capsys.readouterr().out
    fit(x, **{**SHORT, "progress": True})
    assert "8/8" in capsys.readouterr().out


def test_a_folder_holds_the_model(x, tmp_path):
    model = fit(x, **SHORT, folder=tmp_path / "new")
    assert equal(model, load_model(tmp_path / "new/model"))
    assert (tmp_path / "new/saelens/sae/cfg.json").is_file() and read_metrics(tmp_path / "new")[-1]["step"] == 8
    assert json.loads((tmp_path / "new/model/model.json").read_text())["run"] is None
    with pytest.raises(UserError, match="is not empty; name a new one"):
        fit(x, **SHORT, folder=tmp_path / "new")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"l0": [5]}, "fit: l0 has 1 value(s) for 2 width(s)"),
        ({"widths": [12, 40]}, "fit: widths [12, 40] must fall strictly"),
        ({"widths": [40, 0]}, "fit: widths.1: Input should be greater than or equal to 1 (given: 0)"),
        ({"composition": "magic"}, "fit: composition.mode: Input should be 'none', 'normalised'"),
        ({"curriculum": "slow"}, "fit: curriculum"),
        ({"learning_rates": 1.0}, "fit: unknown key learning_rates; allowed: activation, aux_latents"),
        ({"steps": None, "tokens": 0}, "fit: tokens: Input should be greater than or equal to 1 (given: 0)"),
        ({"tokens": 900}, "fit: tokens=900 and steps=8 exclude each other; give one"),
        ({"batch_tokens": 501}, "x has 500 vectors, fewer than batch_tokens = 501"),
        ({"curriculum": "coarse-first", "steps": 3}, "fit: its curriculum has 5 stages, but tokens makes only 3 steps"),
        ({"hook": "blocks.0.hook_resid_post"}, "is for an activation store, not for a Tensor"),
        ({"device": "tpu"}, "use auto, cpu, cuda or cuda:N"),
        ({"x": torch.ones(500, 16)}, "the vectors of x do not vary"),
        ({"x": torch.zeros(500, 16)}, "the vectors of x are all zero"),
        ({"x": torch.randn(5, 100, 16)}, "x has shape (5, 100, 16); give vectors [N, D], for example x.reshape"),
        ({"x": torch.randn(500)}, "x has shape (500,); give vectors [N, D]"),
        ({"x": np.ones((500, 16), dtype=np.int64)}, "x has type int64; give floating-point vectors"),
        ({"x": np.full((500, 16), "a")}, "x has type <U1; give floating-point vectors"),
        ({"x": torch.randn(500, 16).index_fill(0, torch.tensor([7]), torch.nan)}, "vector 7 has NaN or infinite"),
        ({"x": 3}, "x is a int; give vectors [N, D], an activation store, or an iterable of batches"),
        ({"x": iter([torch.randn(300, 16)])}, "x ended after 4 of 8 steps of 64 vectors; give an iterator that lasts"),
        ({"x": []}, "x ended after 0 of 8 steps"),
        ({"x": [torch.randn(90, 16), torch.randn(90, 17)]}, "batch 2 of x has width 17, those before 16"),
        ({"x": [torch.full((90, 16), torch.inf)]}, "batch 1 of x has NaN or infinite values"),
        ({"x": [[1.0, 2.0]]}, "batch 1 of x is a list; give a tensor or an array"),
        ({"x": [torch.randn(90, 16)], "steps": None}, "fit: give steps, or tokens, for an iterable of batches"),
    ],
)
def test_what_cannot_work_is_refused_before_a_step(x, change, message, monkeypatch):
    monkeypatch.setattr("hsae.train.fitting.TrainingRun", None)
    with pytest.raises(UserError, match=re.escape(message)):
        fit(**{"x": x, **SHORT, **change})


def test_a_training_that_diverges_ends_with_an_error(x):
    good, bad = x.split(250)[0], torch.full((250, 16), 3e38)
    with pytest.raises(UserError, match=r"fit: the loss became \w+ at step \d+; a lower learning_rate"):
        fit(iter([good] * 200 + [bad] * 9), **SIZES, steps=200, batch_tokens=256)
