"""SAEBench's result files: exact layout on writing, both layouts on reading, and clear errors."""

import json
import re
from dataclasses import replace

import pytest
from places import GOLDEN, TESTS

from hsae.cache.errors import UserError
from hsae.eval.core.core_result import as_json, read_core
from hsae.eval.harness.estimates import Estimate
from hsae.eval.harness.saebench_file import file_name, write_envelope

BASELINE = TESTS / "golden" / "user_baseline_core.json"
EXPECTED = GOLDEN / "core" / "expected"
ENVELOPE = [
    "eval_type_id",
    "eval_config",
    "eval_id",
    "datetime_epoch_millis",
    "eval_result_metrics",
    "eval_result_details",
    "sae_bench_commit_hash",
    "sae_lens_id",
    "sae_lens_release_id",
    "sae_lens_version",
    "sae_cfg_dict",
    "eval_result_unstructured",
]


def a_result():
    return read_core(sorted(EXPECTED.glob("jumprelu*.json"))[0])


def edited(tmp_path, change):
    content = json.loads(BASELINE.read_text())
    change(content)
    path = tmp_path / "edited.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("path", sorted(EXPECTED.glob("*.json")), ids=lambda path: path.stem)
def test_a_file_of_saebench_is_written_again_key_for_key(path, tmp_path):
    original = json.loads(path.read_text())
    result = read_core(path)
    path = write_envelope(tmp_path / "it.json", as_json(result, release=result.release, sae_id=result.name))
    written = json.loads(path.read_text())
    assert list(original) == ENVELOPE and list(written) == [*ENVELOPE, "hsae"]
    own = {"eval_id", "datetime_epoch_millis", "sae_bench_commit_hash", "sae_lens_version"}
    assert json.dumps({key: written[key] for key in ENVELOPE if key not in own}) == json.dumps(
        {key: original[key] for key in ENVELOPE if key not in own}
    )
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", written["eval_id"])
    assert written["sae_bench_commit_hash"].startswith("hsae ")


def test_files_are_named_as_saebench_names_them(tmp_path):
    content = as_json(a_result(), release="google/gemma_3", sae_id="level/1")
    path = write_envelope(tmp_path / "new" / file_name("google/gemma_3", "level/1"), content)
    assert path == tmp_path / "new" / "google_gemma_3_level_1_eval_results.json"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_the_legacy_baseline_is_read_as_what_it_is():
    result = read_core(BASELINE)
    assert result.legacy and result.dead
    assert result.release == "google/gemma-2-2b_layer_19_sae" and result.hsae is None
    assert result.metric("explained_variance_legacy") == -0.78515625
    assert result.metric("explained_variance") is None
    assert result.metric("cossim") is None and result.metric("relative_reconstruction_bias") is None
    assert result.metric("kl_div_score") == -0.5279503105590062
    assert result.metric("frac_alive") is None
    assert result.measure("explained_variance") is None
    notes = " ".join(result.notes)
    assert "Legacy SAEBench layout" in notes
    assert "-1 stands for NaN, not for a value, in cossim, relative_reconstruction_bias." in notes
    assert "The SAE is dead: no latent fired on any token (L0 = 0)" in notes
    assert "KL 15.375 against 10.0625, cross-entropy 18 against 12.4375 nats" in notes


def test_current_files_have_both_explained_variances():
    result = a_result()
    quality = result.metrics["reconstruction_quality"]
    assert not result.legacy and not result.dead
    assert result.metric("explained_variance") == quality["explained_variance"]
    assert result.metric("explained_variance_legacy") == quality["explained_variance_legacy"]
    assert result.notes == []


def test_the_legacy_layout_has_the_legacy_files_keys_and_meaning(tmp_path):
    result = a_result()
    path = write_envelope(tmp_path / "it.json", as_json(result, release="r", sae_id="s", layout="legacy"))
    written, baseline = json.loads(path.read_text()), json.loads(BASELINE.read_text())
    assert [*baseline, "hsae"] == list(written)
    for category, values in baseline["eval_result_metrics"].items():
        assert list(values) == list(written["eval_result_metrics"][category])
    assert list(baseline["eval_result_metrics"]) == list(written["eval_result_metrics"])
    assert list(baseline["eval_config"]) == list(written["eval_config"])
    assert "max_decoder_cosine_sim" not in written["eval_result_details"][0]
    again = read_core(path)
    assert again.legacy
    assert again.metric("explained_variance_legacy") == result.metric("explained_variance_legacy")


def test_a_score_of_minus_one_is_a_value_unless_its_parts_are_nan():
    result = a_result()
    behaviour = result.metrics["model_behavior_preservation"]
    changed = {**result.metrics, "model_behavior_preservation": {**behaviour, "kl_div_score": -1.0}}
    assert replace(result, metrics=changed).metric("kl_div_score") == -1.0
    nan = dict.fromkeys(behaviour, -1.0)
    assert (
        replace(result, metrics={**result.metrics, "model_behavior_preservation": nan}).metric("kl_div_score") is None
    )


def test_measures_come_from_the_hsae_block():
    block = {"measures": {"mse": {"value": 0.5, "low": 0.4, "high": 0.6}, "dead_fraction": {"value": None}}}
    result = replace(a_result(), hsae=block)
    assert result.measure("mse") == Estimate(0.5, 0.4, 0.6, "rows")
    assert result.measure("dead_fraction") == Estimate(None)
    assert result.measure("l0") is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.pop("eval_config"), "eval_config: Field required"),
        (lambda c: c.update(eval_type_id="scr"), "holds a 'scr' result; only 'core' results"),
        (lambda c: c["eval_result_metrics"]["sparsity"].pop("l0"), "eval_result_metrics.sparsity.l0 is missing"),
        (lambda c: c["eval_result_metrics"].pop("shrinkage"), "eval_result_metrics.shrinkage.l2_norm_in is missing"),
        (lambda c: c["eval_result_metrics"]["sparsity"].update(l0="many"), "eval_result_metrics.sparsity.l0"),
        (lambda c: c.update(eval_result_details="none"), "eval_result_details: Input should be a valid list"),
        (lambda c: c.update(hsae=[1]), "hsae: Input should be a valid dictionary"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(change, said, tmp_path):
    path = edited(tmp_path, change)
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        read_core(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "\x00", "3"])
def test_a_file_that_is_no_result_is_refused(text, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(str(path))):
        read_core(path)


def test_a_missing_file_is_a_users_error(tmp_path):
    with pytest.raises(UserError, match="can't be read: No such file"):
        read_core(tmp_path / "absent.json")


def test_a_minus_one_that_stands_for_nan_is_never_taken_for_a_score():
    result = read_core(BASELINE)
    quality = {**result.metrics["reconstruction_quality"], "mse": -1.0, "explained_variance": -1.0}
    loss = {**result.metrics["model_performance_preservation"], "ce_loss_with_ablation": 2.9375, "ce_loss_score": -1.0}
    broken = replace(
        result, metrics={**result.metrics, "reconstruction_quality": quality, "model_performance_preservation": loss}
    )
    assert broken.metric("explained_variance_legacy") is None
    assert broken.metric("ce_loss_score") is None
    assert result.metric("ce_loss_score") == pytest.approx(-0.5855, abs=1e-4)
