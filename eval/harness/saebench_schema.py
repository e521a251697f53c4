"""SAEBench 0.6.0's result files for the evaluations beside core and unlearning: what keys of which types they have, in which order.

A file is core's envelope (see `hsae.eval.harness.envelope`) around an evaluation's own config, metrics and details. Null stands for a number
that was not asked for or does not exist. hsae's block `hsae` stands behind SAEBench's keys.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsae.cache.errors import UserError
from hsae.eval.harness.result_files import read_envelope, run_option
from hsae.eval.probing.scr_tpp import score_keys
from hsae.eval.probing.sparse_probing import SCHEMA_K

ENVELOPE: dict[str, tuple[type, ...]] = {
    "eval_type_id": (str,),
    "eval_config": (dict,),
    "eval_id": (str,),
    "datetime_epoch_millis": (int,),
    "eval_result_metrics": (dict,),
    "eval_result_details": (list,),
    "sae_bench_commit_hash": (str,),
    "sae_lens_id": (str, type(None)),
    "sae_lens_release_id": (str, type(None)),
    "sae_lens_version": (str, type(None)),
    "sae_cfg_dict": (dict, type(None)),
    "eval_result_unstructured": (dict, type(None)),
}
TEXT, WHOLE, REAL, FLAG, LIST, TABLE = (str,), (int,), (int, float), (bool,), (list,), (dict,)
OPTIONAL, OPTIONAL_WHOLE = (int, float, type(None)), (int, type(None))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Keys and types of one evaluation's own parts."""

    eval_type_id: str
    config: dict[str, tuple[type, ...]]
    metrics: dict[str, dict[str, tuple[type, ...]]]
    details: dict[str, tuple[type, ...]]


def _accuracies(kind: str) -> dict[str, tuple[type, ...]]:
    return {f"{kind}{key}": OPTIONAL for key in ("_test_accuracy", *(f"_top_{k}_test_accuracy" for k in SCHEMA_K))}


_SPARSE = {"dataset_name": TEXT, **_accuracies("llm"), **_accuracies("sae")}
_SCR_TPP = {
    "random_seed": WHOLE,
    "dataset_names": LIST,
    "perform_scr": FLAG,
    "early_stopping_patience": WHOLE,
    "train_set_size": WHOLE,
    "test_set_size": WHOLE,
    "context_length": WHOLE,
    "probe_train_batch_size": WHOLE,
    "probe_test_batch_size": WHOLE,
    "probe_epochs": WHOLE,
    "probe_lr": REAL,
    "probe_l1_penalty": REAL,
    "sae_batch_size": WHOLE,
    "llm_batch_size": OPTIONAL_WHOLE,
    "llm_dtype": TEXT,
    "lower_vram_usage": FLAG,
    "model_name": TEXT,
    "n_values": LIST,
    "column1_vals_lookup": TABLE,
}
_ABSORPTION_MEANS = ("absorption_fraction_score", "full_absorption_score", "num_split_features")
LAYOUTS = {
    "sparse-probing": Layout(
        eval_type_id="sparse_probing",
        config={
            "random_seed": WHOLE,
            "dataset_names": LIST,
            "probe_train_set_size": WHOLE,
            "probe_test_set_size": WHOLE,
            "context_length": WHOLE,
            "sae_batch_size": WHOLE,
            "llm_batch_size": OPTIONAL_WHOLE,
            "llm_dtype": TEXT,
            "model_name": TEXT,
            "k_values": LIST,
            "lower_vram_usage": FLAG,
        },
        metrics={"llm": _accuracies("llm"), "sae": _accuracies("sae")},
        details=_SPARSE,
    ),
    **{
        kind: Layout(
            eval_type_id=kind,
            config=_SCR_TPP,
            metrics={f"{kind}_metrics": dict.fromkeys(score_keys(kind), OPTIONAL)},
            details={"dataset_name": TEXT, **dict.fromkeys(score_keys(kind), OPTIONAL)},
        )
        for kind in ("scr", "tpp")
    },
    "absorption": Layout(
        eval_type_id="absorption_first_letter",
        config={
            "model_name": TEXT,
            "random_seed": WHOLE,
            "f1_jump_threshold": REAL,
            "max_k_value": WHOLE,
            "prompt_template": TEXT,
            "prompt_token_pos": WHOLE,
            "llm_batch_size": OPTIONAL_WHOLE,
            "llm_dtype": TEXT,
            "k_sparse_probe_l1_decay": REAL,
            "k_sparse_probe_batch_size": WHOLE,
            "k_sparse_probe_num_epochs": WHOLE,
            "min_GT_probe_f1": REAL,
            "min_feats_for_eval": WHOLE,
            "eval_k_sparse_probe_batch_size": WHOLE,
            "precalc_k_sparse_probe_sae_acts": FLAG,
        },
        metrics={"mean": {f"{part}_{name}": OPTIONAL for part in ("mean", "std_dev") for name in _ABSORPTION_MEANS}},
        details={
            "first_letter": TEXT,
            "mean_absorption_fraction": REAL,
            "full_absorption_rate": REAL,
            "num_full_absorption": WHOLE,
            "num_probe_true_positives": WHOLE,
            "num_split_features": WHOLE,
        },
    ),
    "autointerp": Layout(
        eval_type_id="autointerp",
        config={
            "model_name": TEXT,
            "n_latents": OPTIONAL_WHOLE,
            "override_latents": (list, type(None)),
            "dead_latent_threshold": REAL,
            "random_seed": WHOLE,
            "dataset_name": TEXT,
            "llm_context_size": WHOLE,
            "llm_batch_size": OPTIONAL_WHOLE,
            "llm_dtype": TEXT,
            "buffer": WHOLE,
            "no_overlap": FLAG,
            "act_threshold_frac": REAL,
            "total_tokens": WHOLE,
            "scoring": FLAG,
            "max_tokens_in_explanation": WHOLE,
            "use_demos_in_explanation": FLAG,
            "n_top_ex_for_generation": WHOLE,
            "n_iw_sampled_ex_for_generation": WHOLE,
            "n_top_ex_for_scoring": WHOLE,
            "n_random_ex_for_scoring": WHOLE,
            "n_iw_sampled_ex_for_scoring": WHOLE,
        },
        metrics={"autointerp": {"autointerp_score": OPTIONAL, "autointerp_std_dev": OPTIONAL}},
        details={},
    ),
    "ravel": Layout(
        eval_type_id="ravel",
        config={
            "entity_attribute_selection": TABLE,
            "top_n_entities": WHOLE,
            "top_n_templates": WHOLE,
            "full_dataset_downsample": OPTIONAL_WHOLE,
            "num_pairs_per_attribute": WHOLE,
            "train_test_split": REAL,
            "force_dataset_recompute": FLAG,
            "model_name": TEXT,
            "llm_dtype": TEXT,
            "llm_batch_size": OPTIONAL_WHOLE,
            "learning_rate": REAL,
            "num_epochs": WHOLE,
            "train_mdas": FLAG,
            "n_generated_tokens": WHOLE,
            "random_seed": WHOLE,
            "artifact_dir": TEXT,
        },
        metrics={"ravel": dict.fromkeys(("disentanglement_score", "cause_score", "isolation_score"), OPTIONAL)},
        details={},
    ),
}


def problems(content: Any, suite: str) -> list[str]:
    """What keeps a JSON value from being a result of this evaluation; nothing if it is one."""
    layout = LAYOUTS[suite]
    if not isinstance(content, dict):
        return ["it is not an object"]
    own = {key: value for key, value in content.items() if key != "hsae"}
    found = _compare(own, ENVELOPE, "")
    if found:
        return found
    if content["eval_type_id"] != layout.eval_type_id:
        found.append(f"eval_type_id is {content['eval_type_id']!r}, not {layout.eval_type_id!r}")
    found += _compare(content["eval_config"], layout.config, "eval_config.")
    metrics = content["eval_result_metrics"]
    found += _compare(metrics, dict.fromkeys(layout.metrics, TABLE), "eval_result_metrics.")
    for category, keys in layout.metrics.items():
        if isinstance(metrics.get(category), dict):
            found += _compare(metrics[category], keys, f"eval_result_metrics.{category}.")
    for number, entry in enumerate(content["eval_result_details"]):
        if isinstance(entry, dict):
            found += _compare(entry, layout.details, f"eval_result_details.{number}.")
        else:
            found.append(f"eval_result_details.{number} is not an object")
    return found


def _compare(held: dict[str, Any], wanted: dict[str, tuple[type, ...]], where: str) -> list[str]:
    found = [f"{where}{key} is missing" for key in wanted if key not in held]
    found += [f"{where}{key} is not SAEBench's" for key in held if key not in wanted]
    if not found and list(held) != list(wanted):
        found.append(f"the keys of {where or 'the top level'} are in another order")
    for key, types in wanted.items():
        value = held.get(key)
        if key in held and (not isinstance(value, types) or (isinstance(value, bool) and bool not in types)):
            found.append(f"{where}{key} is {type(value).__name__}")
    return found


def read_suite(path: Path, suite: str) -> dict[str, Any]:
    """A result file's content. Raises UserError naming the file and what is wrong with it."""
    content = read_envelope(path, f"hsae eval {suite}{run_option(path)}")
    if found := problems(content, suite):
        raise UserError(f"{path} is not a SAEBench {LAYOUTS[suite].eval_type_id} result: {found[0]}")
    result: dict[str, Any] = content
    return result


def read_measured(path: Path, suite: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A result and what it was made of, nothing if hsae did not make it. Raises UserError."""
    content = read_suite(path, suite)
    hsae = content.get("hsae")
    inputs = hsae.get("inputs") if isinstance(hsae, dict) and isinstance(hsae.get("measures"), dict) else None
    if not isinstance(hsae, dict) or not isinstance(inputs, dict):
        return content, {}
    store = hsae.get("store")
    if (
        "state" not in inputs and isinstance(store, dict) and isinstance(store.get("path"), str)
    ):  # made by an older hsae
        inputs = {**inputs, "store": Path(store["path"]).stem.rpartition("-")[2], "state": inputs.get("store")}
    return content, inputs
