"""Sparse probing: SAEBench's own numbers in both of its random streams, and the ideal measures against naive ones.

FIX E: every size and setting of the reference data comes from its params.json.
"""

import json

import places
import pytest
import torch
from safetensors.torch import load_file

from hsae.eval.harness.estimates import differ_by_noise_only, mean_over_seeds
from hsae.eval.probing import sparse_probing
from hsae.eval.probing import text_probes as probes
from hsae.eval.probing.sparse_probing import baselines, faithful, ideal
from hsae.eval.probing.text_probes import Task, Training, balanced, sum_latents, sum_texts
from hsae.train.model.saelens_folder import load

GOLDEN = places.GOLDEN / "sparse_probing"
PARAMS = json.loads((GOLDEN / "params.json").read_text())
ONE_PREDICTION = PARAMS["tolerances"]["per_class_accuracy"]["atol"]
AGGREGATES = PARAMS["tolerances"]["aggregates"]["atol"]


def golden_tasks(dtype):
    """Tasks and, by task name, their ragged tokens."""
    stored = load_file(GOLDEN / "activations.safetensors")
    tasks, ragged = [], {}
    for data in PARAMS["datasets"]:
        parts, lists, first = [], {"train": {}, "test": {}}, 0
        for split, rows in lists.items():
            for name in data["classes"]:
                acts = stored[f"{data['index']}/{split}/{name}/acts"].to(dtype)
                mask = stored[f"{data['index']}/{split}/{name}/mask"].bool()
                parts.append((acts[mask], mask.sum(1).tolist()))
                rows[name] = torch.arange(first, first + len(acts))
                first += len(acts)
        lengths = torch.tensor([length for _, part in parts for length in part])
        tasks.append(Task(name=data["name"], sums_UD=sum_texts(parts), lengths_U=lengths, context=PARAMS["T"], **lists))
        ragged[data["name"]] = parts
    return tasks, ragged


CASES = [
    (name, dtype, mode)
    for name in PARAMS["saes"]
    for dtype in PARAMS["dtypes"]
    for mode in PARAMS["modes"]
    if mode == "cached" or (GOLDEN / "expected" / f"{name}_{dtype}_{mode}.json").exists()
]
TRAINING = Training(
    batch=PARAMS["torch_probe"]["batch_size"],
    epochs=PARAMS["torch_probe"]["epochs"],
    lr=PARAMS["torch_probe"]["lr"],
    patience=PARAMS["torch_probe"]["early_stopping_patience"],
)


@pytest.mark.parametrize(("name", "dtype", "mode"), CASES)
def test_the_numbers_are_saebenchs(name, dtype, mode, monkeypatch):
    monkeypatch.setattr(sparse_probing, "RANDOM_SEED", PARAMS["random_seed"])
    monkeypatch.setattr(sparse_probing, "TRAINING", TRAINING)
    expected = json.loads((GOLDEN / "expected" / f"{name}_{dtype}_{mode}.json").read_text())
    view = load(GOLDEN / "saes" / name).to(getattr(torch, dtype))
    tasks, ragged = golden_tasks(getattr(torch, dtype))
    llm = None
    if mode == "cached":
        llm = {
            key.removesuffix("_results"): {kind: values for kind, values in found.items() if kind.startswith("llm")}
            for key, found in expected["eval_result_unstructured"].items()
        }
    result = faithful(tasks, lambda task: sum_latents(view, ragged[task.name]), llm, PARAMS["k_values"])
    gaps = []
    for key, found in expected["eval_result_unstructured"].items():
        assert result.unstructured[key].keys() == found.keys()
        for kind, values in found.items():
            for chosen, value in values.items():
                gaps.append(abs(result.unstructured[key][kind][chosen] - value))
    kinds = 2 * (1 + len(PARAMS["k_values"]))
    assert len(gaps) == kinds * sum(len(data["classes"]) for data in PARAMS["datasets"]) and max(gaps) <= ONE_PREDICTION
    assert sum(gaps) / len(gaps) <= PARAMS["tolerances"]["mean_over_all_per_class_accuracies"]["atol"]
    for side, values in expected["eval_result_metrics"].items():
        assert list(result.metrics[side]) == list(values)
        for key, value in values.items():
            assert result.metrics[side][key] == (None if value is None else pytest.approx(value, abs=AGGREGATES)), key
    assert [list(entry) for entry in result.details] == [list(entry) for entry in expected["eval_result_details"]]


def made_up(classes, separation=2.5, texts=(60, 41), width=11, seed=0):
    """A task whose class c is shifted along axis c, and that axis alone."""
    generator = torch.Generator().manual_seed(seed)
    parts, lists, first = [], {"train": {}, "test": {}}, 0
    for split, size in zip(lists, texts, strict=True):
        for number in range(classes):
            lengths = torch.randint(1, 6, (size,), generator=generator).tolist()
            tokens = torch.randn(sum(lengths), width, generator=generator)
            tokens[:, number] += separation
            parts.append((tokens, lengths))
            lists[split][str(number)] = torch.arange(first, first + size)
            first += size
    lengths = torch.tensor([length for _, part in parts for length in part])
    return Task(name="made up", sums_UD=sum_texts(parts), lengths_U=lengths, context=6, **lists)


def test_sums_of_ragged_texts_are_those_of_each_text():
    tokens = torch.arange(12.0).view(6, 2)
    parts = [(tokens[:4], [1, 3]), (tokens[4:], [2])]
    expected = torch.stack([tokens[0], tokens[1:4].sum(0), tokens[4:].sum(0)])
    assert torch.equal(sum_texts(parts), expected)


def test_a_balanced_sample_has_every_positive_once_and_negatives_of_every_other_class():
    lists = {"a": torch.arange(7), "b": torch.arange(7, 14), "c": torch.arange(14, 21), "d": torch.arange(21, 28)}
    rows, labels = balanced(lists, "b", torch.Generator().manual_seed(3))
    assert sorted(rows[labels == 1].tolist()) == list(range(7, 14))
    negatives = rows[labels == 0].tolist()
    assert len(set(negatives)) == 7 and not set(negatives) & set(range(7, 14))
    assert all(1 <= sum(low <= row < low + 7 for row in negatives) <= 3 for low in (0, 14, 21))
    paired, labels = balanced(lists, "b", torch.Generator().manual_seed(3), partner="d")
    assert sorted(paired[labels == 0].tolist()) == list(range(21, 28))


def test_ideal_measures_find_what_is_there_and_chance_where_nothing_is():
    seeds = range(4)
    told = ideal([made_up(3)], lambda task: task.sums_UD, seeds, k_values=[1, 4])["measures"]
    assert told["top_1_test_accuracy"]["value"] > 0.9 and told["test_accuracy"]["value"] > 0.9
    nothing = ideal([made_up(3, separation=0.0)], lambda task: task.sums_UD, seeds, k_values=[1])["measures"]
    entry = nothing["test_accuracy"]
    assert entry["low"] < 0.5 < entry["high"] and 0.35 < entry["value"] < 0.65
    assert len(entry["seeds"]) == 4


def test_an_ideal_sample_is_the_same_for_every_sae_and_differs_by_seed():
    task = made_up(3)
    one, again, other = (probes.sample(task, "1", seed) for seed in (5, 5, 6))
    assert torch.equal(one.train[0], again.train[0]) and torch.equal(one.test[0], again.test[0])
    assert not torch.equal(one.train[0], other.train[0])
    assert one.fitted == 96 and len(one.train[0]) == 120  # a fifth is kept for choosing
    assert not set(one.train[0].tolist()) & set(one.test[0].tolist())


def test_intervals_over_seeds_are_students():
    entry = mean_over_seeds([0.5, 0.7, 0.9]).to_dict()
    assert entry["value"] == pytest.approx(0.7)
    assert entry["high"] - entry["value"] == pytest.approx(4.302652729749464 * 0.2)  # t, 2 degrees of freedom
    assert mean_over_seeds([0.5]).low is None
    assert mean_over_seeds([0.5, None]).value is None


def test_differences_that_the_draws_make_are_noise():
    one = mean_over_seeds([0.50, 0.60, 0.70])
    assert differ_by_noise_only(one, mean_over_seeds([0.51, 0.59, 0.70])) is True
    assert differ_by_noise_only(one, mean_over_seeds([0.40, 0.50, 0.601])) is False  # the draws' own spread cancels
    assert differ_by_noise_only(one, mean_over_seeds([0.5])) is None


def test_the_residuals_own_probes_belong_to_no_sae():
    task = made_up(3, texts=(30, 20))
    assert baselines([task], [1]) == baselines([task], [1])
    found = baselines([task], [1])["made up"]
    assert list(found) == ["llm_test_accuracy", "llm_top_1_test_accuracy"] and found["llm_test_accuracy"].keys() == {
        "0",
        "1",
        "2",
    }
    assert min(found["llm_test_accuracy"].values()) > 0.75
