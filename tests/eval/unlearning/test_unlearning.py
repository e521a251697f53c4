"""Hierarchical unlearning: SAEBench's own rule and intervention, naive oracles, choices, curves, files and messages.

FIX E: every size and setting of the reference data comes from its params.json.
"""

import json
import re
from dataclasses import replace

import pytest
import torch
from places import GOLDEN
from safetensors.torch import load_file
from typer.testing import CliRunner

from hsae.cache.building.build import build
from hsae.cache.building.repair import repair
from hsae.cache.building.verification import verify
from hsae.cache.errors import NotApplicable, StoreError, UserError
from hsae.cache.language_model.lm import LanguageModel
from hsae.cache.reading.store import ActivationStore
from hsae.cli.main import app
from hsae.eval.harness.estimates import estimate_of
from hsae.eval.harness.evaluation import evaluate_targets
from hsae.eval.harness.listener import Listener
from hsae.eval.harness.result_files import read_result, write_result
from hsae.eval.harness.targets import RunTarget
from hsae.eval.unlearning import arms, loss_meter, pareto, qa, selection
from hsae.eval.unlearning.config import UnlearningConfig
from hsae.eval.unlearning.intervention import Dictionary, Intervention, changed, of_means, of_model
from hsae.eval.unlearning.loss_meter import LossMeter, Texts
from hsae.eval.unlearning.questions import Question
from hsae.eval.unlearning.questions_evaluation import UnlearningQuestions
from hsae.eval.unlearning.rows import Rows, split_rows
from hsae.eval.unlearning.unlearning_evaluation import Unlearning
from hsae.train import run_record
from hsae.train.config.plan import load_plan
from hsae.train.model.hierarchical_sae import STRUCTURES, CompositionMap, FlatSAE
from hsae.train.model.sae import SAE
from hsae.train.model.saelens_folder import load
from hsae.train.runs import run_directory

EXPECTED = json.loads((GOLDEN / "unlearning" / "expected.json").read_text())
PARAMS = json.loads((GOLDEN / "unlearning" / "params.json").read_text())
HOOK, D = "blocks.2.hook_resid_post", 48
SENTENCES = {
    "weather": "Rain and wind come over the hills while clouds of day {} grow above the coast and the town, {}.",
    "cooking": "Stir the soup with {} spoons of salt until the pot of broth {} is warm and the bread is done.",
    "code": "def f_{0}(self, x): return self.x[{1}] + x.y({0}) if x is not None else [i for i in range({1})]",
    "shell": "for i in {0} {1}; do echo $i | grep -v {0} > /dev/null; done && ls -l {1}.txt",
}


# --- SAEBench's part ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    """(name, dtype) -> (dictionary, residuals and kept masks of both texts)."""
    tokens = load_file(GOLDEN / "unlearning" / "tokens.safetensors")

    def get(name, dtype):
        resid = load_file(GOLDEN / "unlearning" / f"resid_{dtype}.safetensors")
        view = load(GOLDEN / PARAMS["saes_folder"] / name).to(getattr(torch, dtype))
        kept = {side: ~torch.isin(tokens[side], torch.tensor(PARAMS["ignored_token_ids"])) for side in resid}
        dictionary = Dictionary(encode=view.encode, directions_FD=view.W_dec, widths=(view.d_sae,))
        return dictionary, resid, kept

    return get


@pytest.mark.parametrize("key", EXPECTED)
def test_densities_and_rankings_are_those_of_saebench(golden, key):
    dictionary, resid, kept = golden(*key.split("/"))
    expected = EXPECTED[key]
    found = {side: selection.densities(dictionary, [(resid[side], kept[side])])[0] for side in resid}
    atol = PARAMS["tolerances"]["sparsity"][key.split("/")[1]]
    for side, density_F in found.items():
        assert torch.allclose(
            density_F, torch.tensor(expected[f"{side}_sparsity"], dtype=torch.float64), rtol=0, atol=atol
        )
    given = {side: torch.tensor(expected[f"{side}_sparsity_rounded"], dtype=torch.float64) for side in resid}
    assert sorted(map(float, expected["ranking"])) == sorted(PARAMS["retain_thresholds"])
    for threshold, order in expected["ranking"].items():
        mine = selection.ranking(given["forget"], given["retain"], float(threshold))
        assert sorted(mine) == sorted(order)
        assert given["forget"][mine].tolist() == given["forget"][order].tolist()  # equal up to ties
    if key.endswith("float32"):
        for side in resid:
            assert selection.rounded(found[side]).tolist() == given[side].tolist()


@pytest.mark.parametrize("name", PARAMS["intervention"]["saes"])
@pytest.mark.parametrize("dtype", sorted({key.split("/")[1] for key in EXPECTED}))
def test_the_intervention_is_that_of_saebench(golden, name, dtype):
    dictionary, resid, kept = golden(name, dtype)
    expected = load_file(GOLDEN / "unlearning" / "intervention.safetensors")
    rankings = {float(threshold): order for threshold, order in EXPECTED[f"{name}/{dtype}"]["ranking"].items()}
    order = rankings[PARAMS["intervention"]["retain_threshold"]]
    rows = slice(*map(int, re.match(r"rows (\d+):(\d+) ", PARAMS["intervention"]["input"]).groups()))
    share = float(re.search(r"(\S+) \* max\|x\|$", PARAMS["tolerances"]["intervention"][dtype])[1])
    x_RTD, kept_RT = resid["forget"][rows], kept["forget"][rows]
    checked = 0
    for count in PARAMS["intervention"]["n_features"]:
        for multiplier in PARAMS["intervention"]["multipliers"]:
            wanted = expected[f"{name}/{dtype}/n{count}/m{multiplier}"]
            chosen = tuple(order[:count])
            clamp = Intervention(latents=chosen, values=(-float(multiplier),) * len(chosen))
            acts = dictionary.encode(x_RTD)[..., list(chosen)]
            fired = clamp.fired(acts, kept_RT)
            got = changed(x_RTD, clamp.delta(acts, fired, dictionary.directions_FD), fired)
            largest = x_RTD.float().abs().max().item() if dtype == "float32" else wanted.float().abs().max().item()
            tolerance = share * max(largest, wanted.float().abs().max().item())
            assert (got.float() - wanted.float()).abs().max().item() <= tolerance
            assert torch.equal(got[:, 0], x_RTD[:, 0])
            checked += bool(fired.any())
    assert checked > 0


# --- two texts and three models on the tiny language model ---------------------------------------------------------


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    """Overrides of the tiny plan whose forget and retain stores have been built."""
    folder = tmp_path_factory.mktemp("unlearning")
    for side, topics in (("forget", ("code", "shell")), ("retain", ("weather", "cooking"))):
        (folder / side).mkdir()
        for topic in topics:
            lines = [
                json.dumps({"text": " ".join(SENTENCES[topic].format(7 * n + k, k) for k in range(14 if n % 3 else 5))})
                for n in range(7)
            ]
            (folder / side / f"{topic}.jsonl").write_text("\n".join(lines))
    chosen = [
        f"cache.dir={str(folder / 'activations')!r}",
        *(f"unlearning.{side}.corpus={str(folder / side)!r}" for side in ("forget", "retain")),
        *("unlearning.forget.first_document=0", "unlearning.retain.first_document=0"),
        *("unlearning.rows=29", "unlearning.rows_per_document=3", "unlearning.tune_rows=7", "unlearning.test_rows=9"),
        *("unlearning.positions_per_row=11", "unlearning.latents=[2, 5]", "unlearning.multipliers=[0, 1.5]"),
        *("unlearning.quantiles=[0.5]", "unlearning.retain_cap=0.6", "unlearning.resamples=50"),
    ]
    plan = load_plan("tiny", chosen)
    build([plan.store("forget"), plan.store("retain")], plan.cache.dir)
    return chosen


@pytest.fixture
def plan(overrides, tmp_path):
    return load_plan("tiny", [*overrides, f"train.dir={str(tmp_path / 'runs')!r}"])


@pytest.fixture(scope="module")
def language():
    return LanguageModel.load(load_plan("tiny").model)


def an_sae(latents, seed, name="level1", bias=-2.0, d_in=D):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(d_in, latents, generator=generator)
    W /= W.norm(dim=0)
    return SAE(
        name=name, architecture="standard", W_enc=W, W_dec=W.T.clone(), b_enc=torch.full((latents,), bias),
        b_dec=0.1 * torch.randn(d_in, generator=generator), metadata={"hook_name": HOOK},
    )  # fmt: skip


def a_model(structure="additive"):
    """Two levels whose latents fire often on a residual of the tiny model's size."""
    if structure == "flat":
        return FlatSAE((an_sae(37, 3, "sae"),))
    lower = an_sae(31, 1)
    upper = an_sae(13, 2, "level2", bias=-1.0, d_in=31 if structure == "stacked" else D)
    contributions = torch.rand(13, 31, generator=torch.Generator().manual_seed(4)) ** 4
    maps = (CompositionMap(level=2, weight=2 * contributions, contributions=contributions),)
    return STRUCTURES[structure]((lower, upper), maps, effective_thresholds=(1.0,))


def texts_of(plan, language):
    rows = {side: Rows.all_of(store, HOOK) for side, store in Unlearning.open_store(plan).items()}
    return Texts(rows, language, plan.table(UnlearningConfig))


def test_a_row_holds_one_document_and_splits_hold_whole_ones(plan):
    rows = Rows.all_of(Unlearning.open_store(plan)["forget"], HOOK)
    tokens = rows.tokens()
    assert (tokens[:, 0] == rows.store.header.bos_id).all() and not rows.store.special_mask(tokens[:, 1:]).any()
    assert max(rows.documents.count(document) for document in rows.documents) == 3
    assert set(rows.topics) == {"code", "shell"}
    config = plan.table(UnlearningConfig)
    parts_by_name = split_rows(rows, config.tune_rows, config.test_rows)
    select, tune, test = (parts_by_name[name] for name in ("select", "tune", "test"))
    parts = [set(part.documents) for part in (select, tune, test)]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert sum(len(part.numbers) for part in (select, tune, test)) == rows.store.rows == 29
    assert max(tune.numbers + test.numbers) < rows.store.clean_rows
    with pytest.raises(UserError, match=r"leaves no whole document to select on \(28 tune and 1 test rows of 29\)"):
        split_rows(rows, 28, 1)


@pytest.mark.parametrize("structure", ["flat", "additive", "stacked"])
@pytest.mark.parametrize("rate", [None, 0.3])
def test_losses_and_kl_agree_with_whole_forward_passes_through_hooks(plan, language, structure, rate, monkeypatch):
    """The oracle runs the whole model on the tokens and changes the layer's output in a hook, by latent and token."""
    dictionary = of_model(a_model(structure), "cpu")
    rows = texts_of(plan, language).rows["forget"]["test"]
    density_F = selection.densities(dictionary, rows.batches())[0]
    found = [dictionary.level(number) for number in range(1, len(dictionary.widths) + 1)]
    latents = tuple(
        level[place] for level in found for place in (density_F[list(level)] - 0.1).abs().argsort()[:3].tolist()
    )
    values = tuple(-1.0 - 0.5 * place for place in range(len(latents)))
    acts = rows.activations(dictionary, latents)
    rates = arms.firing_rates(acts, rows.mask())
    cut = None if rate is None else rates.median().item()
    clamp = Intervention(latents=latents, values=values, rate=cut)
    meter = LossMeter(model=language, rows=rows, positions_per_row=11, seed=0)
    change = meter.measure(clamp, acts, dictionary.directions_FD, kl=True)
    monkeypatch.setattr(loss_meter, "KEPT_BYTES", 0)  # clean logits are computed again
    again = LossMeter(model=language, rows=rows, positions_per_row=11, seed=0)
    assert again.measure(clamp, acts, dictionary.directions_FD, kl=True).kl_R == pytest.approx(change.kl_R, abs=1e-5)

    tokens = rows.tokens()
    clean = language.logits(tokens).log_softmax(-1)
    layer = language._layers[2]

    def hook(module, args, output):
        out = output.clone()
        for row in range(len(out)):
            firing = [
                bool((dictionary.encode(output[row, t])[list(latents)] > 0).any()) for t in range(1, out.shape[1])
            ]
            if cut is not None and sum(firing) / len(firing) <= cut:
                continue
            for t in range(1, out.shape[1]):
                code = dictionary.encode(output[row, t])
                for latent, value in zip(latents, values, strict=True):
                    if code[latent] > 0:
                        out[row, t] += (value - code[latent]) * dictionary.directions_FD[latent]
        return out

    handle = layer.register_forward_hook(hook)
    try:
        after = language.logits(tokens).log_softmax(-1)
    finally:
        handle.remove()
    for row, positions in enumerate(meter.positions):
        assert len(positions) == 11 and positions.max() < tokens.shape[1] - 1
        targets = tokens[row, positions + 1].long()
        loss = (clean[row, positions, targets] - after[row, positions, targets]).sum().item()
        divergence = (clean[row].exp() * (clean[row] - after[row])).sum(-1)[positions].sum().item()
        assert change.loss_R[row] == pytest.approx(loss, abs=2e-4)
        assert change.kl_R[row] == pytest.approx(divergence, abs=2e-4)
    assert max(map(abs, change.loss_R)) > 0.01
    if rate is not None:
        quiet = [row for row in range(len(tokens)) if rates[row] <= cut]
        assert quiet and all(change.loss_R[row] == 0 and change.kl_R[row] == 0 for row in quiet)
        assert meter.passes.spared == len(quiet)


def test_rows_where_nothing_fires_and_positions_before_the_first_firing_cost_nothing(plan, language):
    rows = texts_of(plan, language).rows["retain"]["tune"]
    meter = LossMeter(model=language, rows=rows, positions_per_row=6, seed=3)
    acts = torch.zeros(len(rows.numbers), 40, 1)
    acts[0, 0] = 1.0  # position 0 is never touched
    acts[2, 20] = 1.0
    clamp = Intervention(latents=(0,), values=(-30.0,))
    meter.measure(clamp, acts, torch.eye(1, D))
    before = meter.passes.unembedded
    change = meter.measure(clamp, acts, torch.eye(1, D))
    later = int((meter.positions[2] >= 20).sum())
    assert 0 < later < 6 and meter.passes.unembedded - before == later
    assert meter.passes.run == 2 and meter.passes.spared == 2 * (len(rows.numbers) - 1)
    assert [loss != 0 for loss in change.loss_R] == [row == 2 for row in range(len(rows.numbers))]


def test_clean_losses_are_those_of_the_store_and_rows_beyond_them_get_a_pass(plan, language):
    texts = texts_of(plan, language)
    for part in ("tune", "select"):
        rows = texts.rows["forget"][part]
        passes = sum(row >= rows.store.clean_rows for row in rows.numbers)
        assert (passes > 0) == (part == "select")
        meter = LossMeter(model=language, rows=rows, positions_per_row=5, seed=0)
        expected = language.logits(rows.tokens()).log_softmax(-1)
        for row, positions in enumerate(meter.positions):
            targets = meter.tokens_RT[row, positions + 1]
            assert torch.allclose(meter.clean_losses[row], -expected[row, positions, targets], atol=1e-4)
        assert meter.passes.run == passes


# --- choosing latents ----------------------------------------------------------------------------------------------

FINE = [[0.0, 5.0, 1.0, 0.4, 0.6], [2.0, 0.0, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0, 3.0]]  # 3 coarse, 5 fine


def toy():
    encode = lambda x: x  # noqa: E731
    return Dictionary(encode=encode, directions_FD=torch.eye(8), widths=(5, 3))


def test_descend_adds_children_that_bring_a_tenth_and_lean_to_forget():
    maps = [torch.tensor(FINE)]
    leaning = torch.tensor([True, True, True, True, False, True, True, True])
    assert selection.children(maps[0], 0) == [1, 2, 4]
    # 5, 6, 7 are coarse: 6 is the first seed with children 0 and 3, then 5 with 1 and 2 (4 doesn't lean)
    assert selection.descend(toy(), maps, [6, 5], leaning, 8) == [6, 0, 3, 5, 1, 2]
    assert selection.descend(toy(), maps, [6, 5], leaning, 5) == [6, 0, 3, 5, 1]


def test_ascend_adds_coarse_latents_half_of_which_are_chosen():
    maps, retain = [torch.tensor(FINE)], torch.zeros(8)
    assert selection.ascend(toy(), maps, [1, 0, 4], retain, 0.1, 2) == [1, 5]  # 1 is 5/7 of 5
    assert selection.ascend(toy(), maps, [0, 3, 1], retain, 0.1, 2) == [0, 6]  # 0 is exactly half of 6
    assert selection.ascend(toy(), maps, [1, 0, 4], retain, 0.1, 6) == [1, 0, 4, 5, 6, 7]
    retain[5] = 0.2
    assert selection.ascend(toy(), maps, [1, 0, 4], retain, 0.1, 2) == [1]  # 5 is above the cap; with 0 it would be 3
    assert selection.ascend(toy(), maps, [], retain, 0.1, 2) == []


def test_permuted_maps_keep_each_rows_entries_and_random_latents_are_as_frequent():
    shuffled = selection.permuted_rows(torch.tensor(FINE), 1)
    assert torch.equal(shuffled.sort(1).values, torch.tensor(FINE).sort(1).values)
    assert not torch.equal(shuffled, torch.tensor(FINE))
    frequency = torch.logspace(-3, -0.5, 90, dtype=torch.float64)
    profile = selection.Profile(forget_F=frequency, retain_F=frequency, mean_F=frequency, tokens=(500, 700))
    chosen = [5, 40, 88]
    drawn = selection.random_alike(profile, chosen, 0)
    assert drawn == selection.random_alike(profile, chosen, 0) != selection.random_alike(profile, chosen, 1)
    assert len(set(drawn)) == 3 and not set(drawn) & set(chosen)
    assert all(abs(a - b) <= 11 for a, b in zip(drawn, chosen, strict=True))


def test_log_ratios_are_finite_and_lean_only_where_a_latent_fires_on_forget():
    forget, retain = torch.tensor([0.5, 0.0, 0.1, 0.0]), torch.tensor([0.1, 0.2, 0.1, 0.0])
    profile = selection.Profile(forget_F=forget, retain_F=retain, mean_F=forget, tokens=(10, 100))
    assert torch.isfinite(profile.log_ratio_F).all()
    assert profile.log_ratio_F[0].item() == pytest.approx(torch.log(torch.tensor(0.55 / 0.105)).item())
    assert profile.leaning_F.tolist() == [True, False, True, False]


def test_how_far_residuals_move_is_a_quadratic_that_can_be_solved():
    generator = torch.Generator().manual_seed(0)
    acts = torch.relu(torch.randn(5, 9, 3, generator=generator))
    kept = torch.rand(5, 9, generator=generator) > 0.2
    directions = torch.randn(7, 11, generator=generator)
    means, still = [0.7, 1.1, 0.2], Intervention(latents=(6, 0, 2), values=(0.0, 0.0, 0.0))
    moved = arms.measure_shift(still, means, acts, kept, directions)
    for multiplier in (0.0, 1.0, 2.5):
        clamp = replace(still, values=tuple(-multiplier * mean for mean in means))
        delta = clamp.delta(acts, clamp.fired(acts, kept), directions)
        kept_only = delta[:, 1:][kept[:, 1:]].double()
        assert moved.rms(multiplier) == pytest.approx(kept_only.pow(2).sum(1).mean().sqrt().item(), rel=1e-5)
    assert moved.multiplier(moved.rms(1.7)) == pytest.approx(1.7)
    assert moved.multiplier(moved.rms(0) * 0.01) is None
    assert arms.measure_shift(still, means, torch.zeros_like(acts), kept, directions).multiplier(1.0) is None


def test_difference_of_means_at_zero_takes_the_difference_away():
    forget, retain = torch.randn(D, generator=torch.Generator().manual_seed(1)), torch.zeros(D)
    dictionary = of_means(forget, retain)
    acts = dictionary.encode(forget[None, None].repeat(1, 2, 1))
    clamp = Intervention(latents=(0,), values=(0.0,))
    fired = clamp.fired(acts, torch.ones(1, 2, dtype=torch.bool))
    after = changed(forget[None, None].repeat(1, 2, 1), clamp.delta(acts, fired, dictionary.directions_FD), fired)
    assert torch.allclose(after[0, 1], retain, atol=1e-5) and torch.equal(after[0, 0], forget)


# --- curves ---------------------------------------------------------------------------------------------------------


def test_the_best_setting_within_a_budget_and_the_frontier():
    retain, forget = [0.001, 0.02, 0.3, 0.004, 0.004], [0.1, 0.5, None, -0.2, 0.05]
    assert pareto.choose(retain, forget, 0.01) == 0
    assert pareto.choose(retain, forget, 0.05) == 1
    assert pareto.choose([0.001], [-0.1], 0.05) is None
    assert pareto.frontier(retain, forget) == [0, 1]


def test_the_area_is_the_mean_over_budgets_of_the_best_within_each():
    retain, forget = [0.04, 0.01, -0.002, 0.02], [1.0, 0.3, 0.1, 0.2]
    naive = [
        max([0.0, *(gain for harm, gain in zip(retain, forget, strict=True) if harm <= budget)])
        for budget in torch.linspace(0, 0.05, 20_001).tolist()
    ]
    found = pareto.area([torch.tensor([h]) for h in retain], [torch.tensor([g]) for g in forget], 0.05)
    assert found.item() == pytest.approx(sum(naive) / len(naive), rel=1e-3)
    assert pareto.area([torch.tensor([0.2])], [torch.tensor([9.0])], 0.05).item() == 0


def test_intervals_draw_whole_documents():
    draws = pareto.DocumentBootstrap([4, 4, 9, 7, 7, 7], 400, 0)
    assert draws.weights_SK.shape == (401, 3) and (draws.weights_SK.sum(1) == 3).all()
    sums, counts = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [2, 2, 3, 1, 1, 1]
    means = draws.mean(sums, counts)
    assert means[0].item() == pytest.approx(21 / 10)
    documents = {0: (3.0, 4), 1: (3.0, 3), 2: (15.0, 3)}
    for number in (1, 2, 3):
        drawn = draws.weights_SK[number].tolist()
        above = sum(times * documents[place][0] for place, times in enumerate(drawn))
        below = sum(times * documents[place][1] for place, times in enumerate(drawn))
        assert means[number].item() == pytest.approx(above / below)
    entry = estimate_of(means)
    assert entry.low < entry.value < entry.high


# --- whole evaluations -----------------------------------------------------------------------------------------------


def trained(plan, number, model):
    """A run directory as training leaves it."""
    config, run_dir = plan.runs[number], plan.run_dir(plan.runs[number])
    model.save(run_dir / "model")
    content = {
        "identity": run_directory.identities(plan, config)[0], "complete": True, "plan": plan.name,
        "number": config.number, "name": config.name,
    }  # fmt: skip
    run_record.write_run(run_dir, content)
    return RunTarget.of(plan, config)


def unlearn(plan, targets, language=None, *, kind=Unlearning, sets=None, force=False, listener=None):
    """Results of an evaluation to which the language model is given; without one, nothing can be computed."""
    evaluation = kind(Unlearning.open_store(plan), None, plan.table(UnlearningConfig), listener=listener or Listener())
    evaluation.sets, evaluation.language = sets, language
    return evaluate_targets(evaluation, targets, force=force)


def test_every_arm_is_swept_chosen_on_tune_and_reported_on_test(plan, language):
    runs = [trained(plan, 3, a_model()), trained(plan, 0, a_model("flat")), trained(plan, 1, a_model("stacked"))]
    done = unlearn(plan, runs, language)
    names = [list(item.content["arms"]) for item in done]
    hierarchical = ["level1", "level2", "descend", "ascend", "descend-permuted", "random"]
    assert names[0] == ["none", "mean-difference", "sae", *hierarchical]
    assert names[1] == ["none", "mean-difference", "sae", "random"]
    assert names[2] == ["none", "mean-difference", *hierarchical]
    texts, result = texts_of(plan, language), done[0].content
    tested = 0
    for name, arm in result["arms"].items():
        assert list(arm["at_retain"]) == ["0.005", "0.01", "0.02", "0.05"]
        for budget, entry in arm["at_retain"].items():
            within = [
                point for point in arm["pareto"]
                if point["tune"]["forget_dce"] is not None and point["tune"]["retain_dce"] <= float(budget)
            ]  # fmt: skip
            best = max(within, key=lambda point: point["tune"]["forget_dce"], default=None)
            if best is None or best["tune"]["forget_dce"] <= 0:
                assert entry["setting"] is None and entry["forget_dce"] == 0
                continue
            assert entry["setting"] == best["setting"] and entry["forget_dce"] == best["test"]["forget_dce"]["value"]
            assert entry["low"] <= entry["high"] and entry["forget_kl"]["value"] >= 0
            tested += 1
        if name not in ("none", "mean-difference"):
            assert all(len(latents) <= int(count) for count, latents in arm["latents"].items())
    assert tested > 3
    for point, of_other in zip(result["arms"]["random"]["pareto"], result["arms"]["descend"]["pareto"], strict=True):
        if point["setting"]["matched"]:
            assert point["setting"]["dx_retain"] == pytest.approx(of_other["setting"]["dx_retain"])
    # one number by hand: static ablation of level 1's five latents on the tune rows of retain
    point = next(
        p for p in result["arms"]["level1"]["pareto"]
        if p["setting"]["latents"] == 5 and p["setting"]["multiplier"] == 0 and p["setting"]["quantile"] is None
    )  # fmt: skip
    latents = result["arms"]["level1"]["latents"]["5"]
    dictionary, rows = of_model(a_model(), "cpu"), texts.rows["retain"]["tune"]
    meter = LossMeter(model=language, rows=rows, positions_per_row=11, seed=0)
    clamp = Intervention(latents=tuple(latents), values=(0.0,) * len(latents))
    change = meter.measure(clamp, rows.activations(dictionary, latents), dictionary.directions_FD)
    assert point["tune"]["retain_dce"] == pytest.approx(sum(change.loss_R) / sum(meter.counts))
    assert result["signature"]["explanation"] is None
    assert [pair["selected_on"] for pair in result["signature"]["pairs"]] == ["code", "shell"]
    folder = plan.run_dir(plan.runs[3]) / "eval"
    assert (folder / "unlearning.png").read_bytes().startswith(b"\x89PNG")
    assert not (folder / "unlearning.partial.json").exists()
    svg, wrong = pareto.picture(folder / "unlearning.json", result["inputs"]["sae"])
    assert wrong is None and svg.startswith("<svg ") and "descend-permuted" in svg
    assert pareto.picture(folder / "unlearning.json", "another") == (
        None,
        "unlearning.json is of another model than the one here; run `hsae eval unlearning --force`",
    )
    assert pareto.picture(folder / "absent.json", None) == (None, None)
    assert read_result(folder / "unlearning.json", "") == result


def test_results_are_used_again_only_if_made_of_the_same_inputs(plan, overrides, language, undrawn):
    run = trained(plan, 0, a_model("flat"))
    (first,) = unlearn(plan, [run], language)
    (again,) = unlearn(plan, [run])
    assert again.is_reused and again.content == first.content
    (forced,) = unlearn(plan, [run], language, force=True)
    assert not forced.is_reused and forced.content == first.content  # the same bits
    figure = run.folder / "unlearning.png"
    figure.unlink()
    assert unlearn(plan, [run])[0].is_reused and figure.is_file()
    other = load_plan("tiny", [*overrides, f"train.dir={plan.train.dir!r}", "unlearning.multipliers=[0, 2]"])
    listener = Listener()
    said = []
    listener.say = said.append
    assert not unlearn(other, [RunTarget.of(other, other.runs[0])], language, listener=listener)[0].is_reused
    assert said == ["evaluated anew, with other settings: 0 baseline"]
    changed_model = a_model("flat")
    changed_model.levels[0].W_dec[0] += 1
    changed_model.save(run.run_dir / "model")
    assert not unlearn(plan, [run], language)[0].is_reused


def test_a_sweep_that_was_interrupted_goes_on_where_it_was(plan, language, undrawn):
    run = trained(plan, 0, a_model("flat"))

    class Stopped(Exception):
        pass

    class Stopping(Listener):
        def progress(self, phase, done, total):
            if phase == "0 baseline: random" and done == 1:
                raise Stopped

    partial = run.folder / "unlearning.partial.json"

    def interrupt():
        with pytest.raises(Stopped):
            unlearn(plan, [run], language, listener=Stopping())
        return json.loads(partial.read_text())

    held = interrupt()
    resumed = unlearn(plan, [run], language)[0].content
    assert resumed["passes"]["measured_before"] == len(held["pieces"]) > 5
    (run.folder / "unlearning.json").unlink()
    interrupt()
    whole = unlearn(plan, [run], language, force=True)[0].content
    assert whole["passes"]["measured_before"] == 0
    assert {**resumed, "passes": None} == {**whole, "passes": None}
    assert resumed["passes"]["run"] < whole["passes"]["run"]
    held["inputs"]["sae"] = "another"
    write_result(partial, held, allow_nan=True)
    (partial.parent / "unlearning.json").unlink()
    fresh = unlearn(plan, [run], language)[0].content
    assert fresh["passes"]["measured_before"] == 0


def test_what_is_missing_is_said_with_what_to_run(plan, overrides, tmp_path, monkeypatch):
    elsewhere = load_plan("tiny", [*overrides, f"cache.dir={str(tmp_path / 'none')!r}"])
    path = elsewhere.store_path("forget")
    with pytest.raises(NotApplicable) as error:
        Unlearning.open_store(elsewhere)
    assert str(error.value) == (
        f"no forget store at {path}; make it with: hsae cache build --plan tiny --suite unlearning"
    )
    with pytest.raises(UserError, match=r"run 3 \(full\) of plan tiny has not been trained to its end"):
        RunTarget.of(plan, plan.runs[3])
    with pytest.raises(UserError, match=r"unknown key unlearning\.row; allowed: budgets"):
        load_plan("tiny", ["unlearning.row=3"])
    with pytest.raises(UserError, match=r"unlearning\.retain_cap: Input should be less than 1 \(given: 2\)"):
        load_plan("tiny", ["unlearning.retain_cap=2"])


@pytest.mark.parametrize("mend", ["build", "repair"])
def test_a_lost_or_damaged_documents_json_is_made_again(plan, mend):
    """FIX C4, C8."""
    root = plan.store_path("forget")
    path = root / "documents.json"
    whole, header = path.read_bytes(), (root / "zarr.json").read_bytes()
    path.write_text(path.read_text().replace("[1, ", "[3, ", 1)) if mend == "repair" else path.unlink()
    damages = verify(root)
    assert [damage.path for damage in damages] == [path]
    with pytest.raises(StoreError, match=r"documents.json is .*hsae cache verify .* --repair"):
        ActivationStore.open(root).documents()
    if mend == "repair":
        assert repair(root, damages) == []
    else:
        build([plan.store("forget"), plan.store("retain")], plan.cache.dir)
    assert path.read_bytes() == whole and (root / "zarr.json").read_bytes() == header and verify(root) == []


def test_too_little_text_is_said_with_the_key_to_change(overrides, tmp_path):
    plan = load_plan("tiny", [*overrides, f"cache.dir={str(tmp_path)!r}", "unlearning.rows=400"])
    with pytest.raises(UserError, match=r"400 were asked for\. Lower unlearning\.rows, or use more text"):
        build([plan.store("forget")], plan.cache.dir)


def test_the_command_builds_evaluates_and_prints(plan, overrides, language, monkeypatch, undrawn):
    monkeypatch.setenv("COLUMNS", "90")
    trained(plan, 3, a_model())
    options = [part for value in [*overrides, f"train.dir={plan.train.dir!r}"] for part in ("--set", value)]
    built = CliRunner().invoke(
        app, ["cache", "build", "--plan", "tiny", "--suite", "unlearning", "--dry-run", *options]
    )
    assert built.exit_code == 0 and "forget" in built.output and "complete" in built.output
    shown = CliRunner().invoke(app, ["eval", "unlearning", "--plan", "tiny", "--run", "3", "--device", "cpu", *options])
    assert shown.exit_code == 0, shown.output
    for text in (
        "descend-permuted",
        "≤ 0.05",
        "latents chosen on code, tested on shell",
        "spared because nothing fired",
    ):
        assert text in shown.output


def test_the_question_form_scores_every_level_and_is_used_again(plan, overrides, language, monkeypatch, undrawn):
    text = (
        "{% for m in messages %}<user>{{ m.content }}</user>{% endfor %}"
        "{% if add_generation_prompt %}<model>{% endif %}"
    )
    monkeypatch.setattr(language.tokenizer, "chat_template", text, raising=False)
    answers = [0, 1, 2, 0, 2, 1, 1, 0, 2]
    sets = {
        side: [
            Question(text=f"Which of {n}?", choices=("one", f"list {n}", "return"), answer=answer, subject=side)
            for n, answer in enumerate(answers)
        ]
        for side in ("forget", "retain")
    }
    asked = [
        "unlearning.qa.permutations=1",
        "unlearning.qa.retain_thresholds=[0.9]",
        "unlearning.qa.multipliers=[5, 50]",
    ]
    chosen = load_plan("tiny", [*overrides, f"train.dir={plan.train.dir!r}", *asked])
    runs = [trained(plan, number, a_model(kind)) for number, kind in ((3, "additive"), (1, "stacked"))]
    runs = [RunTarget.of(chosen, run.config) for run in runs]
    done = unlearn(chosen, runs, language, kind=UnlearningQuestions, sets=sets)
    assert [list(item.content["arms"]) for item in done] == [["sae", "level1", "level2"], ["level1", "level2"]]
    for item in done:
        for arm in item.content["arms"].values():
            assert len(arm["configurations"]) == 4 and 0 <= arm["unlearning_score"] <= 1
            assert arm["unlearning_score"] == qa.score(arm["configurations"], 0.99)
        assert item.content["questions"]["forget"]["given"] == 9
    assert "level2" in str(done[0].table()) and "9 forget questions" in done[0].evaluation.notes(done)[0]
    again = unlearn(chosen, runs, kind=UnlearningQuestions, sets=sets)
    assert all(item.is_reused for item in again) and [i.content for i in again] == [i.content for i in done]
    fewer = {**sets, "forget": sets["forget"][:-1]}
    assert not unlearn(chosen, runs[:1], language, kind=UnlearningQuestions, sets=fewer)[0].is_reused
