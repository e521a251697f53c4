"""Core evaluation: SAEBench's own results, naive oracles for the corrected measures, and what is refused."""

import json
import math

import pytest
import torch
from models import changed
from places import GOLDEN
from safetensors.torch import load_file

from hsae.cache.building.build import build
from hsae.cache.building.contents import TokenisedText
from hsae.cache.config import CorpusConfig, ModelConfig
from hsae.cache.errors import StoreError, UserError
from hsae.cache.format.spec import StoreSpec
from hsae.cache.language_model.lm import LanguageModel
from hsae.cache.reading.store import ActivationStore
from hsae.eval.core import batches, reconstruction
from hsae.eval.core.core import CoreOptions, evaluate
from hsae.eval.core.core_result import CURRENT, DETAILS
from hsae.eval.core.saebench_metrics import weight_metrics
from hsae.eval.harness import estimates
from hsae.eval.harness.listener import Listener
from hsae.train.model.sae import SAE
from hsae.train.model.saelens_folder import load

PARAMS = json.loads((GOLDEN / "core" / "params.json").read_text())
HOOK = PARAMS["hook_name"]
NAMES = tuple(PARAMS["saes"])
VARIANTS = {"exclude_special": True, "all_tokens": False}


def golden_spec(dtype, clean_rows=PARAMS["reconstruction_rows"][1]):
    return StoreSpec(
        split="eval",
        model=ModelConfig(id=str(GOLDEN / "model"), dtype=dtype),
        hooks=(HOOK,),
        corpus=CorpusConfig(corpus="golden"),
        context=PARAMS["context_size"],
        prepend_bos=PARAMS["dataset"]["prepend_bos"],
        batch_rows=PARAMS["batch_size_prompts"],
        chunk_mib=0.1,
        codec="mappable",
        rows=PARAMS["variance_rows"][1],
        clean_rows=clean_rows,
    )


def golden_documents():
    """The documents' token ids, in the order of the shards SAEBench read."""
    stored = load_file(GOLDEN / "core" / "documents.safetensors")
    bounds = stored["offsets"].tolist()
    shards = {shard["shard"]: shard["docs"] for shard in PARAMS["dataset"]["shards"]}
    for shard in PARAMS["dataset"]["shard_order_used"]:
        for document in range(*shards[shard]):
            yield stored["ids"][bounds[document] : bounds[document + 1]].tolist()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(dtype) -> (store, model), each made once."""
    held = {}

    def make(dtype):
        if dtype not in held:
            spec = golden_spec(dtype)
            path = build([spec], tmp_path_factory.mktemp(dtype), text=TokenisedText(golden_documents()))[0]
            held[dtype] = (ActivationStore.open(path), LanguageModel.load(spec.model))
        return held[dtype]

    return make


@pytest.fixture(scope="module")
def saes():
    return [load(GOLDEN / PARAMS["saes"][name], name) for name in NAMES]


@pytest.fixture(scope="module")
def evaluated(made, saes):
    """(dtype, variant) -> results by SAE name."""
    held = {}

    def run(dtype, variant):
        if (dtype, variant) not in held:
            store, model = made(dtype)
            options = CoreOptions(all_tokens=not VARIANTS[variant])
            held[dtype, variant] = dict(
                zip(NAMES, evaluate(saes, store, model, hook=HOOK, options=options), strict=True)
            )
        return held[dtype, variant]

    return run


def small_sae(seed=0, latents=29, **changes):
    """A ReLU SAE with d_in of the golden model, whose L0 is around half its width."""
    generator = torch.Generator().manual_seed(seed)
    width = json.loads((GOLDEN / "model" / "config.json").read_text())["hidden_size"]
    W_dec = torch.randn(latents, width, generator=generator)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    parts = {
        "name": f"small{seed}",
        "architecture": "standard",
        "W_enc": W_dec.T.clone(),
        "W_dec": W_dec,
        "b_enc": torch.randn(latents, generator=generator),
        "b_dec": torch.randn(width, generator=generator),
    }
    return SAE(**(parts | changes))


# ---- SAEBench's own results ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", PARAMS["dtypes"])
def test_the_store_holds_saebenchs_rows(made, dtype):
    store, _ = made(dtype)
    assert torch.equal(store.tokens(0, store.rows), load_file(GOLDEN / "core" / "tokens.safetensors")["tokens"])
    kept = ~store.special_mask(store.tokens(0, store.rows))
    for phase, tokens in PARAMS["kept_tokens"].items():
        first, last = PARAMS[f"{phase}_rows"]
        assert int(kept[first:last].sum()) == tokens


@pytest.mark.parametrize("folder", ["expected", "expected_hf_numerics"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", PARAMS["dtypes"])
@pytest.mark.parametrize("name", NAMES)
def test_saebenchs_numbers(evaluated, name, dtype, variant, folder):
    result = evaluated(dtype, variant)[name]
    expected = json.loads((GOLDEN / "core" / folder / f"{name}_{dtype}_{variant}.json").read_text())
    tolerances = PARAMS["tolerances"][folder][dtype]
    pairs = {
        key: (result.metrics[category][key], value)
        for category, values in expected["eval_result_metrics"].items()
        for key, value in values.items()
    }
    assert len(result.details) == len(expected["eval_result_details"])
    for mine, theirs in zip(result.details, expected["eval_result_details"], strict=True):
        assert list(mine) == list(theirs) and mine["index"] == theirs["index"]
        pairs |= {f"details.{key}:{mine['index']}": (mine[key], theirs[key]) for key in theirs if key != "index"}
    outside = {}
    for key, (mine, theirs) in pairs.items():
        tolerance = tolerances[key.partition(":")[0]]
        if not abs(mine - theirs) <= tolerance["atol"] + tolerance["rtol"] * abs(theirs):
            outside[key] = (mine, theirs)
    assert not outside
    assert result.eval_config | {"model_name": "", "dataset": ""} == expected["eval_config"] | {
        "model_name": "",
        "dataset": "",
    }
    assert {category: set(keys) for category, keys in CURRENT.items()} == {
        category: set(values) for category, values in result.metrics.items()
    }


# ---- cost and independence -------------------------------------------------------------------------------------------


def test_one_suffix_pass_per_sae_and_reconstruction_row_and_no_prefix_pass(made, saes, monkeypatch):
    store, model = made("float32")
    passes = []
    suffix = model.suffix

    def counted(hook, resid):
        passes.append(resid.shape[:2])
        return suffix(hook, resid)

    def forbidden(*_):
        raise AssertionError("the prefix was run")

    monkeypatch.setattr(model, "suffix", counted)
    monkeypatch.setattr(model, "prefix", forbidden)
    evaluate(saes[:3], store, model, hook=HOOK)
    assert sum(rows for rows, tokens in passes if tokens > 1) == 3 * store.clean_rows
    assert [rows * tokens for rows, tokens in passes if tokens == 1] == [1]  # the zero residual, once for all


@pytest.mark.parametrize("dtype", PARAMS["dtypes"])
def test_several_saes_at_once_equal_each_alone_bit_for_bit(made, saes, evaluated, dtype):
    store, model = made(dtype)
    together = evaluated(dtype, "exclude_special")
    for sae in saes:
        (alone,) = evaluate([sae], store, model, hook=HOOK)
        assert alone == together[sae.name]


def test_batches_computed_together_leave_the_numbers(made, evaluated, saes, monkeypatch):
    store, model = made("bfloat16")
    monkeypatch.setattr(batches, "rows_together", lambda store, device: 5 * store.spec.batch_rows)
    for result in evaluate(saes, store, model, hook=HOOK):
        alone = evaluated("bfloat16", "exclude_special")[result.name]
        assert result.metrics == alone.metrics and result.details == alone.details
        for name in result.hsae["measures"]:
            one, other = result.measure(name), alone.measure(name)
            for value, wanted in zip((one.value, one.low, one.high), (other.value, other.low, other.high), strict=True):
                assert value is wanted is None or value == pytest.approx(wanted, rel=1e-9), name


def test_slicing_of_the_vocabulary_leaves_the_numbers(made, monkeypatch):
    store, model = made("float32")
    sae = small_sae()
    (whole,) = evaluate([sae], store, model, hook=HOOK)
    monkeypatch.setitem(reconstruction.SLICE_BYTES, "cpu", 37 * model.vocab_size * 4)
    (sliced,) = evaluate([sae], store, model, hook=HOOK)
    for category, values in whole.metrics.items():
        assert sliced.metrics[category] == pytest.approx(values, rel=1e-6, abs=1e-6)


# ---- corrected measures ----------------------------------------------------------------------------------------------


def naive_rows(store, model, sae, exclude_special=True):
    """Per row, in float64 and one token at a time: everything the corrected measures are made of."""
    tokens, x = store.tokens(0, store.rows), store.acts(HOOK, 0, store.rows)
    clean_logits = torch.cat([model.logits(tokens[start : start + 8]) for start in range(0, store.clean_rows, 8)])
    out = sae.decode(sae.encode(x))
    replaced = torch.where(store.special_mask(tokens)[..., None], x, out) if exclude_special else out
    sae_logits = model.unembed(model.suffix(HOOK, replaced[: store.clean_rows]))
    zero_logits = model.unembed(model.suffix(HOOK, torch.zeros_like(x[: store.clean_rows])))
    losses, moments = [], []
    for row in range(store.rows):
        kept = [t for t in range(store.context) if int(tokens[row, t]) not in store.header.special_ids]
        if row < store.clean_rows:
            log_q = {
                name: logits[row].double().log_softmax(-1)
                for name, logits in (("clean", clean_logits), ("sae", sae_logits), ("zero", zero_logits))
            }
            ce = {
                name: -sum(log[t, int(tokens[row, t + 1])] for t in kept if t + 1 < store.context)
                for name, log in log_q.items()
            }
            kl = {
                name: sum((log_q["clean"][t].exp() * (log_q["clean"][t] - log_q[name][t])).sum() for t in kept)
                for name in ("sae", "zero")
            }
            count = sum(t + 1 < store.context for t in kept)
            losses.append([count, ce["clean"], ce["zero"], ce["sae"], len(kept), kl["zero"], kl["sae"]])
        else:
            x_row, out_row = x[row][kept].double(), out[row][kept].double()
            active = (sae.encode(x[row]) != 0)[kept].sum()
            moments.append([len(kept), (x_row - out_row).pow(2).sum(), x_row.pow(2).sum(), active, *x_row.sum(0)])
    return torch.tensor(losses, dtype=torch.float64), torch.tensor(moments, dtype=torch.float64)


def naive_measures(losses, moments, width):
    count, ce_clean, ce_zero, ce_sae, kl_count, kl_zero, kl_sae = losses.sum(0).tolist()
    tokens, error, square, active, *sums = moments.sum(0).tolist()
    variance = square / tokens - sum((value / tokens) ** 2 for value in sums)
    return {
        "explained_variance": 1 - error / tokens / variance,
        "mse": error / tokens / width,
        "l0": active / tokens,
        "ce_loss_without_sae": ce_clean / count,
        "ce_loss_with_ablation": ce_zero / count,
        "ce_loss_with_sae": ce_sae / count,
        "ce_loss_score": (ce_zero - ce_sae) / (ce_zero - ce_clean),
        "kl_div_with_ablation": kl_zero / kl_count,
        "kl_div_with_sae": kl_sae / kl_count,
        "kl_div_score": (kl_zero - kl_sae) / kl_zero,
    }


@pytest.fixture(scope="module")
def oracle(made):
    store, model = made("float32")
    return small_sae(), naive_rows(store, model, small_sae())


def test_corrected_measures_agree_with_a_naive_float64_oracle(made, oracle):
    store, model = made("float32")
    sae, (losses, moments) = oracle
    (result,) = evaluate([sae], store, model, hook=HOOK)
    expected = naive_measures(losses, moments, sae.d_in)
    assert result.hsae is not None
    measures = result.hsae["measures"]
    assert set(measures) == {*expected, "dead_fraction"}
    for name, value in expected.items():
        assert measures[name]["value"] == pytest.approx(value, rel=2e-6, abs=2e-6), name
    assert result.hsae["tokens"] == {
        "reconstruction": losses[:, 4].sum(),
        "reconstruction_losses": losses[:, 0].sum(),
        "variance": moments[:, 0].sum(),
    }


def test_intervals_are_percentiles_over_resampled_rows(made, oracle, monkeypatch):
    monkeypatch.setattr(estimates, "RESAMPLES", 40)
    store, model = made("float32")
    sae, (losses, moments) = oracle
    (result,) = evaluate([sae], store, model, hook=HOOK)
    draws = []
    for rows in (losses, moments):
        generator = torch.Generator().manual_seed(estimates.SEED)
        draws.append([rows[torch.randint(len(rows), (len(rows),), generator=generator)] for _ in range(40)])
    drawn = [naive_measures(*pair, sae.d_in) for pair in zip(*draws, strict=True)]
    for name in drawn[0]:
        values = torch.tensor([measures[name] for measures in drawn], dtype=torch.float64)
        measure = result.measure(name)
        assert measure is not None
        assert measure.low == pytest.approx(values.quantile(0.025).item(), rel=1e-5, abs=1e-5), name
        assert measure.high == pytest.approx(values.quantile(0.975).item(), rel=1e-5, abs=1e-5), name


def test_the_interval_holds_the_value_and_narrows_with_rows():
    generator = torch.Generator().manual_seed(1)
    widths = []
    for rows in (20, 2000):
        sums = estimates.ResampledSums(estimates.Resampler(rows, "cpu"), 1)
        sums.add(0, torch.randn(rows, 1, generator=generator) + 3)
        entry = estimates.estimate_of(sums.sums_SC[:, 0] / rows).to_dict()
        assert entry["low"] < entry["value"] < entry["high"]
        widths.append(entry["high"] - entry["low"])
    assert widths[1] == pytest.approx(2 * 1.96 / math.sqrt(2000), rel=0.15)
    assert widths[0] > 5 * widths[1]


def test_undefined_measures_are_null():
    values = torch.tensor([math.nan, 1.0, 2.0], dtype=torch.float64)
    assert estimates.estimate_of(values).to_dict() == {"value": None, "low": None, "high": None}
    values = torch.tensor([1.0, 1.0, math.inf], dtype=torch.float64)
    assert estimates.estimate_of(values).to_dict() == {"value": 1.0, "low": None, "high": None}


def test_what_differs_is_said_with_the_numbers(evaluated):
    result = evaluated("float32", "exclude_special")[NAMES[0]]
    text = "\n".join(result.hsae["differences"])
    for part in ("explained_variance:", "explained_variance_legacy:", "mse:", "token counts:", "losses and KL:"):
        assert part in text
    assert f"{result.metrics['reconstruction_quality']['explained_variance']:.4f}" in text


# ---- dead SAEs and NaN -----------------------------------------------------------------------------------------------


class Heard(Listener):
    def __init__(self):
        self.warnings, self.steps = [], []

    def warn(self, text):
        self.warnings.append((text, len(self.steps)))

    def progress(self, phase, done, total):
        self.steps.append((phase, done, total))


def test_a_dead_sae_is_reported_before_the_long_part_and_evaluated(made):
    store, model = made("float32")
    dead = small_sae(5, name="silent", b_enc=torch.full((29,), -1e6), b_dec=torch.zeros(small_sae().d_in))
    heard = Heard()
    alive, result = evaluate([small_sae(), dead], store, model, hook=HOOK, listener=heard)
    assert [steps for _, steps in heard.warnings] == [0]
    assert heard.warnings[0][0].startswith("silent: ") and "looks dead" in heard.warnings[0][0]
    assert heard.steps[-1] == ("variance", *[PARAMS["n_eval_sparsity_variance_batches"]] * 2)
    assert result.dead and result.hsae["dead"] and not alive.dead and alive.hsae["explanation"] is None
    assert "The SAE is dead" in result.hsae["explanation"]
    assert result.metrics["reconstruction_quality"]["cossim"] == -1.0
    assert result.metrics["shrinkage"]["relative_reconstruction_bias"] == -1.0
    assert all(entry["consistent_activation_heuristic"] == -1.0 for entry in result.details)
    assert result.measure("dead_fraction").value == 1.0
    json.dumps(result.hsae, allow_nan=False)


def test_kl_that_underflows_is_minus_one_in_saebenchs_part_and_a_number_in_hsaes(made, monkeypatch):
    store, model = made("float32")
    unembed = model.unembed
    monkeypatch.setattr(model, "unembed", lambda final: unembed(final) * 40)
    (result,) = evaluate([small_sae()], store, model, hook=HOOK)
    assert result.metrics["model_behavior_preservation"]["kl_div_with_sae"] == -1.0
    assert result.metrics["model_behavior_preservation"]["kl_div_score"] == -1.0
    assert result.measure("kl_div_with_sae").value > 0


def test_weight_metrics_against_loops():
    sae = small_sae(3, latents=13)
    sae = changed(sae, W_dec=torch.cat([torch.zeros(1, sae.d_in), sae.W_dec[1:]]))
    metrics = weight_metrics(sae)
    rows, columns = sae.W_dec.double(), sae.W_enc.double().T

    def cosine(a, b):
        return (a @ b / (a.norm() * b.norm())).item() if a.norm() and b.norm() else 0.0

    for index in range(13):
        others = [other for other in range(13) if other != index]
        largest = {
            "max_decoder_cosine_sim": max(cosine(rows[index], rows[other]) for other in others),
            "max_encoder_cosine_sim": max(cosine(columns[index], columns[other]) for other in others),
            "encoder_norm": columns[index].norm().item(),
            "encoder_bias": sae.b_enc[index].item(),
        }
        for name, value in largest.items():
            assert metrics[name][index].item() == pytest.approx(value, abs=1e-6), name
    assert math.isnan(metrics["encoder_decoder_cosine_sim"][0])
    assert metrics["encoder_decoder_cosine_sim"][1].item() == pytest.approx(cosine(rows[1], columns[1]), abs=1e-6)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_an_sae_of_another_width_is_refused(made):
    store, model = made("float32")
    with pytest.raises(UserError, match=r"SAE 'wide' reads vectors of width 50; .* has width"):
        narrow = small_sae()
        wide = changed(narrow, name="wide", W_enc=torch.ones(50, 29), W_dec=torch.ones(29, 50), b_dec=torch.ones(50))
        evaluate([narrow, wide], store, model, hook=HOOK)


def test_an_sae_of_another_hook_is_refused(made):
    store, model = made("float32")
    other = small_sae(metadata={"hook_name": "blocks.1.hook_resid_post"})
    with pytest.raises(UserError, match=rf"was made for blocks.1.hook_resid_post; this evaluation is of {HOOK}"):
        evaluate([other], store, model, hook=HOOK)
    with pytest.raises(StoreError, match=r"has no activations of blocks.1.hook_resid_post; it has "):
        evaluate([other], store, model, hook="blocks.1.hook_resid_post")


def test_a_store_without_clean_losses_is_refused(made, tmp_path):
    _, model = made("float32")
    path = build([golden_spec("float32", clean_rows=0)], tmp_path, text=TokenisedText(golden_documents()))[0]
    with pytest.raises(StoreError, match="keeps no clean losses"):
        evaluate([small_sae()], ActivationStore.open(path), model, hook=HOOK)


def test_a_model_with_other_weights_is_refused(made):
    store, _ = made("float32")
    _, model = made("float32")

    class Other:
        def digest_like(self, what, other):
            return "something else"

        def __getattr__(self, name):
            return getattr(model, name)

    with pytest.raises(StoreError, match="made with other weights"):
        evaluate([small_sae()], store, Other(), hook=HOOK)


def test_details_have_saebenchs_keys(evaluated):
    assert all(tuple(entry) == DETAILS for entry in evaluated("float32", "exclude_special")[NAMES[0]].details)
