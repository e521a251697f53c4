"""Types of SAEBench's result file of autointerp (sae_bench/evals/autointerp/eval_output.py, 0.6.0)."""

from typing import Any

from hsae.eval.harness.saebench_file import Number, Part, SaebenchFile


class SaebenchAutointerpConfig(Part):
    """SAEBench's `eval_config` of autointerp."""

    model_name: str
    n_latents: int | None
    override_latents: list[Any] | None
    dead_latent_threshold: Number
    random_seed: int
    dataset_name: str
    llm_context_size: int
    llm_batch_size: int | None
    llm_dtype: str
    buffer: int
    no_overlap: bool
    act_threshold_frac: Number
    total_tokens: int
    scoring: bool
    max_tokens_in_explanation: int
    use_demos_in_explanation: bool
    n_top_ex_for_generation: int
    n_iw_sampled_ex_for_generation: int
    n_top_ex_for_scoring: int
    n_random_ex_for_scoring: int
    n_iw_sampled_ex_for_scoring: int


class _Scores(Part):
    autointerp_score: Number | None
    autointerp_std_dev: Number | None


class _AutointerpMetrics(Part):
    autointerp: _Scores


class AutointerpFile(SaebenchFile):
    """A result of autointerp; SAEBench gives no details."""

    TYPE = "autointerp"
    eval_config: SaebenchAutointerpConfig
    eval_result_metrics: _AutointerpMetrics
    eval_result_details: list[Part]
