"""Absorption: SAEBench's own stages and result, a naive oracle for the formula, and what is refused."""

import json
from dataclasses import replace

import places
import pytest
import torch
from models import changed
from safetensors.torch import load_file

from hsae.cache.errors import UserError
from hsae.eval.probing import absorption
from hsae.eval.probing.absorption import (
    LETTERS,
    Letter,
    Settings,
    Sparse,
    Words,
    absorbed,
    check_letters,
    k_sparse,
    l1_probe,
    letter_f1,
    sparse_probes,
)
from hsae.train.model.sae import SAE
from hsae.train.model.saelens_folder import load

GOLDEN = places.GOLDEN / "absorption"
PARAMS = json.loads((GOLDEN / "params.json").read_text())
SETTINGS = Settings(
    max_k=PARAMS["max_k_value"],
    f1_jump=PARAMS["f1_jump_threshold"],
    l1_decay=PARAMS["k_sparse_probe"]["l1_decay"],
    batch=PARAMS["k_sparse_probe"]["batch_size"],
    epochs=PARAMS["k_sparse_probe"]["num_epochs"],
    min_f1=PARAMS["min_GT_probe_f1"],
    min_letters=PARAMS["min_feats_for_eval"],
)
CASES = [(sae, dtype) for sae in PARAMS["saes"] for dtype in PARAMS["dtypes"]]
TOLERANCES = PARAMS["tolerances"]


def golden_words(dtype):
    inputs = load_file(GOLDEN / "inputs.safetensors")
    prompts = load_file(GOLDEN / f"prompt_vectors_{dtype}.safetensors")
    return Words(
        train=inputs["X_train"],
        train_letters=inputs["y_train"],
        test=inputs["X_test"],
        test_letters=inputs["y_test"],
        weight=inputs["gt_weight"],
        bias=inputs["gt_bias"],
        prompts=prompts["vectors"],
        prompt_words=prompts["test_index"].long(),
    )


def expected(sae, dtype, part):
    return json.loads((GOLDEN / "expected" / f"{sae}_{dtype}{part}.json").read_text())


def the_view(sae, dtype):
    return load(GOLDEN / "saes" / sae).to(getattr(torch, dtype))


@pytest.mark.parametrize(("sae", "dtype"), CASES)
def test_the_sparse_probe_follows_saebenchs_random_stream(sae, dtype):
    generator = torch.Generator().manual_seed(PARAMS["k_sparse_probe_seed"])
    weight = l1_probe(the_view(sae, dtype), golden_words(dtype), SETTINGS, generator)
    wanted = load_file(GOLDEN / "expected" / f"{sae}_{dtype}_l1_probe.safetensors")["weight"]
    assert weight.shape == wanted.shape
    assert (weight.float() - wanted.float()).abs().max() <= TOLERANCES["l1_probe_weight_same_random_order"][dtype]


@pytest.mark.parametrize(("sae", "dtype"), CASES)
def test_every_stage_is_saebenchs(sae, dtype):
    view, words = the_view(sae, dtype), golden_words(dtype)
    weight = load_file(GOLDEN / "expected" / f"{sae}_{dtype}_l1_probe.safetensors")["weight"]
    letters, probes = k_sparse(view, words, weight, SETTINGS), sparse_probes(view, words, weight, SETTINGS)
    stages = expected(sae, dtype, "_k_sparse")
    scores = letter_f1(words)
    assert scores == pytest.approx([wanted["f1_probe"] for wanted in stages], abs=1e-9)
    for letter, wanted in zip(letters, stages, strict=True):
        assert LETTERS[letter.letter] == wanted["letter"] and letter.split == wanted["split_latents"]
        for probe, held in zip(probes(letter.letter), wanted["per_k"], strict=True):
            assert probe.latents == held["latents"]
            assert probe.f1 == pytest.approx(held["f1"], abs=TOLERANCES["f1"]["atol"])
            assert probe.weight == pytest.approx(held["weight"], rel=0.01, abs=0.02)  # the solver's own tolerance
    chosen = check_letters(scores, SETTINGS)
    good = [letters[number] for number in chosen]
    by_letter = {letter.letter: absorbed(view, words, letter) for letter in letters}
    held = {(entry["letter"], entry["test_index"]): entry for entry in expected(sae, dtype, "_words")}
    compared = 0
    for letter, one in by_letter.items():
        for prompt, fraction, full, projection in zip(one.prompts, one.fraction, one.full, one.projection, strict=True):
            wanted = held[LETTERS[letter], int(words.prompt_words[prompt])]
            assert float(fraction) == pytest.approx(
                wanted["absorption_fraction"], abs=TOLERANCES["absorption_fraction"][dtype]["atol"]
            )
            assert bool(full) == wanted["is_full_absorption"]
            assert float(projection) == pytest.approx(
                wanted["probe_projection"],
                rel=TOLERANCES["probe_projection"][dtype]["rtol"],
                abs=TOLERANCES["probe_projection"][dtype].get("atol", 1e-5),
            )
            compared += 1
    assert compared == len(held) > 0
    result, wanted = absorption.outcome(good, [by_letter[letter.letter] for letter in good]), expected(sae, dtype, "")
    tolerance = TOLERANCES["letter_and_mean_metrics"][dtype]["atol"]
    assert list(result.metrics["mean"]) == list(wanted["eval_result_metrics"]["mean"])
    assert result.metrics["mean"] == pytest.approx(wanted["eval_result_metrics"]["mean"], abs=tolerance)
    assert [list(entry) for entry in result.details] == [list(entry) for entry in wanted["eval_result_details"]]
    for entry, held_entry in zip(result.details, wanted["eval_result_details"], strict=True):
        assert entry.pop("first_letter") == held_entry.pop("first_letter")
        assert entry == pytest.approx(held_entry, abs=tolerance)


def test_from_one_end_to_the_other():
    result = absorption.faithful(
        the_view("standard", "float32"), golden_words("float32"), SETTINGS, seed=PARAMS["k_sparse_probe_seed"]
    )
    wanted = expected("standard", "float32", "")["eval_result_metrics"]["mean"]
    assert result.metrics["mean"] == pytest.approx(wanted, abs=1e-6)


def test_the_formula_word_by_word():
    """Against a plain transcription of the definition, with loops."""
    view, words = the_view("jumprelu", "float32"), golden_words("float32")
    letter = Letter(letter=3, split=[7, 30])
    one = absorbed(view, words, letter)
    u = words.weight[3] / words.weight[3].norm()
    assert len(one.prompts) >= 5
    for position, prompt in enumerate(one.prompts):
        x = words.prompts[prompt]
        f = view.encode(x)
        cos = [float(u @ d / d.norm()) for d in view.W_dec]
        q = [float(f[i]) * cos[i] for i in range(view.d_sae)]
        total, main = float(x @ u), q[7] + q[30]
        others = sorted(
            (q[i] for i in range(view.d_sae) if i not in (7, 30) and cos[i] >= 0.1 and q[i] > 0), reverse=True
        )
        a = sum(others[:3])
        if main >= total or a / total < 0.4:
            fraction = 0.0
        elif main <= 0:
            fraction = 1.0
        else:
            fraction = min(a, total - main) / (min(a, total - main) + main)
        assert float(one.fraction[position]) == pytest.approx(fraction, abs=1e-5)
        j = max(range(view.d_sae), key=q.__getitem__)
        full = float(f[[7, 30]].max()) < 1e-8 and cos[j] >= 0.025 and total >= 0 and q[j] / total >= 0.4
        assert bool(one.full[position]) == full


def test_decoder_norms_count_where_they_are_not_assumed():
    view, words = the_view("standard", "float32"), golden_words("float32")
    letter = Letter(letter=0, split=[0])
    unit = absorbed(view, words, letter)
    scale = torch.linspace(0.5, 3, view.d_sae)
    scaled = changed(view, W_dec=view.W_dec * scale[:, None], W_enc=view.W_enc / scale, b_enc=view.b_enc / scale)
    same = absorbed(scaled, words, letter, assume_unit_norm=False)
    assert torch.allclose(same.fraction, unit.fraction, atol=1e-5) and torch.equal(same.full, unit.full)
    assert not torch.allclose(absorbed(scaled, words, letter).fraction, unit.fraction, atol=1e-2)


@pytest.mark.parametrize(
    ("scores", "accepted"), [([0.5, 0.54, 0.56, 0.9], 2), ([0.5, 0.53, 0.9], 1), ([0.2, 0.4, 0.6], 3), ([], 0)]
)
def test_split_latents_stop_at_the_first_small_step(scores, accepted):
    per_k = (Sparse(latents=list(range(k)), weight=[], bias=0.0, f1=value) for k, value in enumerate(scores, 1))
    assert absorption.split_latents(per_k, 0.03) == list(range(accepted))
    assert len(list(per_k)) == max(0, len(scores) - accepted - 1)  # which need not be fitted


def test_too_few_letters_are_an_error_not_a_silence():
    scores = [0.7 if n < 19 else 0.6 for n in range(26)]
    with pytest.raises(UserError) as raised:
        check_letters(scores, Settings())
    assert str(raised.value) == (
        "absorption: the ground-truth probe reaches F1 > 0.6 for 19 letters; 20 are needed. "
        "Use more words (suite.words), another hook, or lower suite.min_letters"
    )
    assert check_letters(scores, Settings(min_letters=19)) == list(range(19))


def test_the_ground_truth_probe_tells_letters_and_is_deterministic():
    words = golden_words("float32")
    weight, bias = absorption.ground_truth(words.train, words.train_letters)
    said = words.test @ weight.T + bias > 0
    scores = [absorption.f1(said[:, n], words.test_letters == n) for n in range(26)]
    assert sum(score > 0.6 for score in scores) >= 20
    again, _ = absorption.ground_truth(words.train, words.train_letters)
    assert torch.equal(weight, again)


def test_ideal_measures_have_intervals():
    view, words = the_view("standard", "float32"), golden_words("float32")
    settings = replace(SETTINGS, max_k=2, batch=4096)
    measures = absorption.ideal(view, words, settings, seeds=[0, 1])["measures"]
    assert list(measures) == [
        "mean_absorption_fraction_score",
        "mean_full_absorption_score",
        "mean_num_split_features",
    ]
    entry = measures["mean_absorption_fraction_score"]
    assert 0 < entry["value"] < 1 and entry["low"] < entry["value"] < entry["high"]
    assert 1 <= measures["mean_num_split_features"]["value"] <= 2


def test_a_dead_sae_is_evaluated():
    parts = {
        "W_enc": torch.zeros(40, 12),
        "W_dec": torch.eye(12, 40),
        "b_enc": -torch.ones(12),
        "b_dec": torch.zeros(40),
    }
    dead = SAE(name="dead", architecture="standard", **parts)
    result = absorption.faithful(dead, golden_words("float32"), replace(SETTINGS, max_k=2))
    assert result.metrics["mean"]["mean_absorption_fraction_score"] == 0.0
    assert result.metrics["mean"]["mean_full_absorption_score"] == 0.0
