"""Types of SAEBench's result file of RAVEL (sae_bench/evals/ravel/eval_output.py, 0.6.0)."""

from typing import Any

from hsae.eval.harness.saebench_file import Number, Part, SaebenchFile


class SaebenchRavelConfig(Part):
    """SAEBench's `eval_config` of RAVEL."""

    entity_attribute_selection: dict[str, Any]
    top_n_entities: int
    top_n_templates: int
    full_dataset_downsample: int | None
    num_pairs_per_attribute: int
    train_test_split: Number
    force_dataset_recompute: bool
    model_name: str
    llm_dtype: str
    llm_batch_size: int | None
    learning_rate: Number
    num_epochs: int
    train_mdas: bool
    n_generated_tokens: int
    random_seed: int
    artifact_dir: str


class _Scores(Part):
    disentanglement_score: Number | None
    cause_score: Number | None
    isolation_score: Number | None


class _RavelMetrics(Part):
    ravel: _Scores


class RavelFile(SaebenchFile):
    """A result of RAVEL; SAEBench gives no details."""

    TYPE = "ravel"
    eval_config: SaebenchRavelConfig
    eval_result_metrics: _RavelMetrics
    eval_result_details: list[Part]
