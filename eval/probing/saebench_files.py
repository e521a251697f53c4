"""Types of SAEBench's result files of sparse probing, SCR, TPP and absorption (sae_bench/evals/*/eval_output.py,
0.6.0).
"""

from typing import Annotated, Any

from hsae.eval.harness.saebench_file import Number, Part, SaebenchFile, keys
from hsae.eval.probing.scr_tpp import score_keys
from hsae.eval.probing.sparse_probing import accuracy_keys

LLM_KEYS, SAE_KEYS = accuracy_keys("llm"), accuracy_keys("sae")
SCR_KEYS, TPP_KEYS = score_keys("scr"), score_keys("tpp")
Numbers = dict[str, Number | None]
NamedNumbers = dict[str, Number | str | None]


class SparseProbingConfig(Part):
    """SAEBench's `eval_config` of sparse probing."""

    random_seed: int
    dataset_names: list[str]
    probe_train_set_size: int
    probe_test_set_size: int
    context_length: int
    sae_batch_size: int
    llm_batch_size: int | None
    llm_dtype: str
    model_name: str
    k_values: list[int]
    lower_vram_usage: bool


class _SparseProbingMetrics(Part):
    llm: Annotated[Numbers, keys(*LLM_KEYS)]
    sae: Annotated[Numbers, keys(*SAE_KEYS)]


class SparseProbingFile(SaebenchFile):
    """A result of sparse probing."""

    TYPE = "sparse_probing"
    eval_config: SparseProbingConfig
    eval_result_metrics: _SparseProbingMetrics
    eval_result_details: list[Annotated[NamedNumbers, keys("dataset_name", *LLM_KEYS, *SAE_KEYS)]]


class ScrTppConfig(Part):
    """SAEBench's `eval_config` of SCR and TPP."""

    random_seed: int
    dataset_names: list[str]
    perform_scr: bool
    early_stopping_patience: int
    train_set_size: int
    test_set_size: int
    context_length: int
    probe_train_batch_size: int
    probe_test_batch_size: int
    probe_epochs: int
    probe_lr: Number
    probe_l1_penalty: Number | None
    sae_batch_size: int
    llm_batch_size: int | None
    llm_dtype: str
    lower_vram_usage: bool
    model_name: str
    n_values: list[int]
    column1_vals_lookup: dict[str, Any]


class _ScrMetrics(Part):
    scr_metrics: Annotated[Numbers, keys(*SCR_KEYS)]


class ScrFile(SaebenchFile):
    """A result of SCR."""

    TYPE = "scr"
    eval_config: ScrTppConfig
    eval_result_metrics: _ScrMetrics
    eval_result_details: list[Annotated[NamedNumbers, keys("dataset_name", *SCR_KEYS)]]


class _TppMetrics(Part):
    tpp_metrics: Annotated[Numbers, keys(*TPP_KEYS)]


class TppFile(SaebenchFile):
    """A result of TPP."""

    TYPE = "tpp"
    eval_config: ScrTppConfig
    eval_result_metrics: _TppMetrics
    eval_result_details: list[Annotated[NamedNumbers, keys("dataset_name", *TPP_KEYS)]]


class AbsorptionConfig(Part):
    """SAEBench's `eval_config` of absorption."""

    model_name: str
    random_seed: int
    f1_jump_threshold: Number
    max_k_value: int
    prompt_template: str
    prompt_token_pos: int | None
    llm_batch_size: int | None
    llm_dtype: str
    k_sparse_probe_l1_decay: Number
    k_sparse_probe_batch_size: int
    k_sparse_probe_num_epochs: int
    min_GT_probe_f1: Number
    min_feats_for_eval: int
    eval_k_sparse_probe_batch_size: int
    precalc_k_sparse_probe_sae_acts: bool


class _AbsorptionMeans(Part):
    mean_absorption_fraction_score: Number | None
    mean_full_absorption_score: Number | None
    mean_num_split_features: Number | None
    std_dev_absorption_fraction_score: Number | None
    std_dev_full_absorption_score: Number | None
    std_dev_num_split_features: Number | None


class _AbsorptionMetrics(Part):
    mean: _AbsorptionMeans


class _Letter(Part):
    first_letter: str
    mean_absorption_fraction: Number
    full_absorption_rate: Number
    num_full_absorption: int
    num_probe_true_positives: int
    num_split_features: int


class AbsorptionFile(SaebenchFile):
    """A result of absorption."""

    TYPE = "absorption_first_letter"
    eval_config: AbsorptionConfig
    eval_result_metrics: _AbsorptionMetrics
    eval_result_details: list[_Letter]
