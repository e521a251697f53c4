"""SCR and TPP: SAEBench's own accuracies and scores, and the ideal measures.

FIX E: every size and setting of the reference data comes from its params.json.
"""

import json

import pytest
import torch
from places import GOLDEN
from safetensors.torch import load_file

from hsae.eval.probing import scr_tpp
from hsae.eval.probing.scr_tpp import Effects, Trained
from hsae.eval.probing.text_probes import Probe, Task, Training, sum_latents, sum_texts
from hsae.train.model.sae import SAE
from hsae.train.model.saelens_folder import load

PARAMS = {kind: json.loads((GOLDEN / kind / "params.json").read_text()) for kind in ("scr", "tpp")}
CASES = [
    (kind, sae, dtype, mode)
    for kind, params in PARAMS.items()
    for sae in params["saes"]
    for dtype in params["dtypes"]
    for mode in params["modes"]
    if mode == "cached" or (GOLDEN / kind / "expected" / f"{sae}_{dtype}_{mode}.json").exists()
]


def golden_training(kind):
    told = PARAMS[kind]["probe"]
    return Training(
        batch=told["batch_size"],
        epochs=told["epochs"],
        lr=told["lr"],
        patience=told["early_stopping_patience"],
        l1=told["l1_penalty"],
    )


def golden_tasks(kind, dtype):
    """Tasks and, by task name, their ragged tokens."""
    stored = load_file(GOLDEN / kind / "activations.safetensors")
    tasks, ragged = [], {}
    for data in PARAMS[kind]["datasets"]:
        parts, lists, first = [], {"train": {}, "test": {}}, 0
        for split, rows in lists.items():
            groups = [""] if kind == "scr" else [f"{name}/" for name in data["classes"]]
            for group in groups:
                key = f"{data['index']}/{split}/{group}"
                acts, mask = stored[f"{key}acts"].to(dtype), stored[f"{key}mask"].bool()
                parts.append((acts[mask], mask.sum(1).tolist()))
                if kind == "tpp":
                    rows[group[:-1]] = torch.arange(first, first + len(acts))
                else:
                    for number, name in enumerate(data["lists"]):
                        rows[name] = first + stored[f"{key}list{number}"].long()
                first += len(acts)
        lengths = torch.tensor([length for _, part in parts for length in part])
        task = Task(
            name=data["result_name"].removesuffix("_tpp"),
            sums_UD=sum_texts(parts),
            lengths_U=lengths,
            context=PARAMS[kind]["T"],
            **lists,
        )
        tasks.append(task)
        ragged[task.name] = parts
    return tasks, ragged


def golden_probes(kind, sae, dtype, accuracies):
    stored = load_file(GOLDEN / kind / "probes.safetensors")
    found = {}
    for data in PARAMS[kind]["datasets"]:
        probes = {}
        for index, name in enumerate(data["probe_classes"]):
            key = f"{sae}/{dtype}/{data['index']}/{index}"
            probes[name] = Probe(stored[f"{key}/weight"], stored[f"{key}/bias"])
        name = data["result_name"]
        found[name.removesuffix("_tpp")] = Trained(probes, accuracies[name]["clean_accuracies"])
    return found


@pytest.mark.parametrize(("kind", "sae", "dtype", "mode"), CASES)
def test_the_accuracies_and_scores_are_saebenchs(kind, sae, dtype, mode, monkeypatch):
    params, stem = PARAMS[kind], GOLDEN / kind / "expected" / f"{sae}_{dtype}_{mode}"
    monkeypatch.setattr(scr_tpp, "RANDOM_SEED", params["random_seed"])
    monkeypatch.setattr(scr_tpp, "TRAINING", golden_training(kind))
    expected = json.loads(stem.with_suffix(".json").read_text())
    accuracies = json.loads(stem.with_name(f"{stem.name}_accuracies.json").read_text())
    view = load(GOLDEN / kind / "saes" / sae).to(getattr(torch, dtype))
    tasks, ragged = golden_tasks(kind, getattr(torch, dtype))
    trained = golden_probes(kind, sae, dtype, accuracies) if mode == "cached" else None
    result, effects = scr_tpp.faithful(
        kind, tasks, view, lambda task: sum_latents(view, ragged[task.name]), trained, params["n_values"][dtype]
    )
    tolerance = params["tolerances"]["accuracy"]["float32" if dtype == "float32" else "bfloat16_linear_shortcut"]
    assert accuracies.keys() == {data["result_name"] for data in params["datasets"]}
    for name, found in ((name.removesuffix("_tpp"), found) for name, found in accuracies.items()):
        assert effects[name].clean.keys() == found["clean_accuracies"].keys()
        for key, value in found["clean_accuracies"].items():
            assert effects[name].clean[key] == pytest.approx(value, abs=params["tolerances"]["accuracy"]["float32"])
        for ablated, by_number in found["ablated_accuracies"].items():
            assert list(map(int, by_number)) == params["n_values"][dtype]
            for n, values in by_number.items():
                for key, value in values.items():
                    assert effects[name].ablated[ablated][int(n)][key] == pytest.approx(value, abs=tolerance)
    assert (result.unstructured or {}).keys() == (expected["eval_result_unstructured"] or {}).keys()
    assert list(result.metrics) == list(expected["eval_result_metrics"])
    assert [list(entry) for entry in result.details] == [list(entry) for entry in expected["eval_result_details"]]
    for category, values in expected["eval_result_metrics"].items():
        assert list(result.metrics[category]) == list(values)
        if dtype == "float32":
            assert result.metrics[category] == pytest.approx(values, abs=1e-9)
        elif kind == "tpp":
            assert result.metrics[category] == pytest.approx(
                values, abs=params["tolerances"]["scores"]["bfloat16_linear_shortcut"]
            )


@pytest.mark.parametrize("kind", PARAMS)
def test_scores_of_given_accuracies(kind):
    for case in json.loads((GOLDEN / kind / "score_cases.json").read_text()):
        ablated = {
            chosen: {int(n): values for n, values in found.items()}
            for chosen, found in case["ablated_accuracies"].items()
        }
        effects = Effects(clean=case["clean_accuracies"], ablated=ablated)
        assert scr_tpp.scores(kind, effects) == pytest.approx(case["expected"], abs=1e-12), case.get("note")
        if kind == "tpp":
            found = scr_tpp.tpp_scores(effects)
            assert found.keys() == case["expected_per_class"].keys()
            for chosen, values in case["expected_per_class"].items():
                assert found[chosen] == pytest.approx(values, abs=1e-12)


def a_task(kind, seed=0):
    """A small task of ragged texts: (task, its tokens).

    SCR: axis 0 tells the attribute (strongly), axis 1 the class.
    """
    generator = torch.Generator().manual_seed(seed)
    shifts = {"pp": (2, 1), "pn": (-2, 1), "qp": (2, -1), "qn": (-2, -1)}
    if kind == "tpp":
        shifts = {"a": (2, 0, 0), "b": (0, 2, 0), "c": (0, 0, 2)}
    parts, lists, first = [], {"train": {}, "test": {}}, 0
    for split, size in (("train", 40), ("test", 30)):
        for name, shift in shifts.items():
            lengths = torch.randint(1, 8, (size,), generator=generator).tolist()
            tokens = torch.randn(sum(lengths), 24, generator=generator)
            tokens[:, : len(shift)] += torch.tensor(shift)
            parts.append((tokens, lengths))
            lists[split][name] = torch.arange(first, first + size)
            first += size
        if kind == "scr":
            pp, pn, qp, qn = lists[split].values()
            half = size // 2
            pairs = [(pp, qp), (pn, qn), (pp, pn), (qp, qn)]
            chosen = [torch.cat([one[:half], other[:half]]) for one, other in pairs] + [pp, qn]
            lists[split] = dict(zip(scr_tpp.LISTS, chosen, strict=True))
    lengths = torch.tensor([length for _, part in parts for length in part])
    return Task(name="made up", sums_UD=sum_texts(parts), lengths_U=lengths, context=9, **lists), parts


@pytest.mark.parametrize("masked", [True, False], ids=["faithful", "ideal"])
def test_the_linear_identity_is_ablation_text_by_text(masked):
    generator = torch.Generator().manual_seed(4)
    weights = torch.randn(24, 320, generator=generator)
    view = SAE(
        name="random", architecture="standard", W_enc=weights, W_dec=weights.T / 24,
        b_enc=torch.randn(320, generator=generator),
        b_dec=torch.zeros(24),
    )  # fmt: skip
    task, parts = a_task("tpp")
    chosen = torch.tensor([3, 17, 200, 41, 5])
    silent_F = view.encode(torch.zeros(1, 24))[0]
    assert (silent_F[chosen] > 0).any()  # or masked positions would make no difference
    sums_UF = sum_latents(view, parts)
    vectors = scr_tpp._ablation(task, view, sums_UF, silent_F if masked else None, chosen)(torch.arange(210))
    row = 0
    for tokens, lengths in parts:
        for text in tokens.split(lengths):
            padded = torch.cat([text, torch.zeros(9 - len(text), 24)]) if masked else text
            latents = view.encode(padded)
            error = padded - view.decode(latents)
            latents[:, chosen] = 0
            expected = (view.decode(latents) + error).sum(0) / len(text)
            assert torch.allclose(vectors[row], expected, atol=2e-5)
            row += 1
    assert row == 210


def test_an_empty_selection_ablates_nothing():
    assert scr_tpp.selected(torch.zeros(7), 5).tolist() == []
    assert scr_tpp.selected(torch.tensor([0.0, -2.0, 0.5, 0.0]), 2).tolist()[0] == 2
    assert len(scr_tpp.selected(torch.tensor([0.0, -2.0, 0.5, 0.0]), 2)) == 2  # SAEBench fills up
    assert scr_tpp.selected(torch.tensor([0.0, -2.0, 0.5, 0.0]), 2, positive=True).tolist() == [2]


@pytest.mark.parametrize("kind", PARAMS)
def test_ideal_scores_have_intervals_and_do_not_depend_on_what_was_drawn_before(kind):
    axes = torch.cat([torch.eye(24), -torch.eye(24)])  # a latent for each direction of each axis
    parts_of_sae = {"W_enc": axes.T.contiguous(), "W_dec": axes, "b_enc": torch.zeros(48), "b_dec": torch.zeros(24)}
    view = SAE(name="axes", architecture="standard", **parts_of_sae)
    task, parts = a_task(kind)
    other = Task(**{**vars(task), "name": "another"})
    latents = lambda task: sum_latents(view, parts)  # noqa: E731
    seeds = [0, 1]
    both = scr_tpp.ideal(kind, [other, task], view, latents, scr_tpp.ideal_probes(kind, [other, task], seeds), [2, 7])
    alone = scr_tpp.ideal(kind, [task], view, latents, scr_tpp.ideal_probes(kind, [task], seeds), [2, 7])
    assert both["tasks"]["made up"] == alone["tasks"]["made up"]
    assert list(alone["measures"]) == scr_tpp.score_keys(kind, [2, 7])
    entry = alone["measures"][f"{kind}_dir1_threshold_7" if kind == "scr" else "tpp_threshold_7_total_metric"]
    assert len(set(entry["seeds"])) == 2 and entry["low"] < entry["value"] < entry["high"]
    assert entry["value"] > 0.05  # ablating what tells a class does change its probe
