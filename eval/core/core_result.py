"""A result of the core evaluation: hsae's or SAEBench's own, written as SAEBench 0.6.0 writes it, read in that and in
the older layout.

In SAEBench's part -1 stands for NaN. Layouts: *current* (0.2 on); *legacy* (up to 0.1): no `misc_metrics`, no
`explained_variance_legacy`, whose place `explained_variance` has.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hsae.cache.errors import UserError
from hsae.eval.harness.estimates import Estimate
from hsae.eval.harness.result_files import run_option
from hsae.eval.harness.saebench_file import envelope, first_problem, read_envelope

Layout = Literal["current", "legacy"]
CURRENT: dict[str, tuple[str, ...]] = {
    "model_behavior_preservation": ("kl_div_score", "kl_div_with_ablation", "kl_div_with_sae"),
    "model_performance_preservation": (
        "ce_loss_score",
        "ce_loss_with_ablation",
        "ce_loss_with_sae",
        "ce_loss_without_sae",
    ),
    "reconstruction_quality": ("explained_variance", "explained_variance_legacy", "mse", "cossim"),
    "shrinkage": ("l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias"),
    "sparsity": ("l0", "l1"),
    "token_stats": ("total_tokens_eval_reconstruction", "total_tokens_eval_sparsity_variance"),
    "misc_metrics": (
        "freq_over_1_percent",
        "freq_over_10_percent",
        "normalized_freq_over_1_percent",
        "normalized_freq_over_10_percent",
        "average_max_encoder_cosine_sim",
        "average_max_decoder_cosine_sim",
        "frac_alive",
    ),
}
DETAILS = (
    "index",
    "feature_density",
    "consistent_activation_heuristic",
    "encoder_bias",
    "encoder_norm",
    "encoder_decoder_cosine_sim",
    "max_decoder_cosine_sim",
    "max_encoder_cosine_sim",
)
SCORES = {
    "kl_div_score": ("kl_div_with_ablation", "kl_div_with_sae"),
    "ce_loss_score": ("ce_loss_with_ablation", "ce_loss_with_sae", "ce_loss_without_sae"),
    "explained_variance": ("l2_norm_in", "mse"),
    "explained_variance_legacy": ("l2_norm_in", "mse"),
}


@dataclass(frozen=True, kw_only=True)
class CoreResult:
    """Result of the core evaluation of one SAE: computed by hsae, or read from a file of hsae's or SAEBench's."""

    name: str
    """The view's name (`sae`, `level1`, ...); of a file read, its `sae_lens_id`."""
    eval_config: dict[str, Any]
    metrics: dict[str, dict[str, float]]
    """SAEBench's categories and numbers, -1 for NaN; `explained_variance` means what the layout says it means."""
    details: list[dict[str, float]]
    """One object for each latent; empty if featurewise statistics were off."""
    sae_config: dict[str, Any] | None
    release: str | None = None
    hsae: dict[str, Any] | None = None
    """hsae's own block; None in files that SAEBench wrote."""
    unstructured: Any = field(default_factory=dict)

    @property
    def legacy(self) -> bool:
        """Whether this is in the layout of SAEBench up to 0.1."""
        return "explained_variance_legacy" not in self.metrics["reconstruction_quality"]

    @property
    def dead(self) -> bool:
        """Whether no latent ever fired."""
        return self.metrics["sparsity"]["l0"] == 0

    def metric(self, name: str) -> float | None:
        """One of SAEBench's numbers by its key; None if it is absent or stands for NaN.

        `explained_variance_legacy` is answered for legacy files too; their `explained_variance` is None, because the
        quantity of that name did not exist then.
        """
        if self.legacy and name in ("explained_variance", "explained_variance_legacy"):
            return self._raw("explained_variance") if name == "explained_variance_legacy" else None
        return self._raw(name)

    def _raw(self, name: str) -> float | None:
        value = next((values[name] for values in self.metrics.values() if name in values), None)
        if value is None or math.isnan(value):
            return None
        if name in SCORES:
            parts = [self._raw(part) for part in SCORES[name]]
            range_is_empty = name.endswith("_score") and parts[0] == (parts[2] if len(parts) > 2 else 0)
            return None if any(part is None for part in parts) or (value == -1 and range_is_empty) else value
        return None if value == -1 else value

    def measure(self, name: str) -> Estimate | None:
        """One of hsae's corrected measures by its key; None in files that have none."""
        measures = (self.hsae or {}).get("measures")
        entry = measures.get(name) if isinstance(measures, dict) else None
        if not isinstance(entry, dict) or "value" not in entry:
            return None
        low, high = entry.get("low"), entry.get("high")
        return Estimate(entry["value"], low, high, None if low is None else "rows")

    @property
    def inputs(self) -> dict[str, Any]:
        """What the result was made of; empty if hsae did not make it."""
        block = self.hsae or {}
        inputs, store = block.get("inputs"), block.get("store")
        if isinstance(inputs, dict):
            return inputs
        return {"store": store.removesuffix(".zarr").rpartition("-")[2]} if isinstance(store, str) else {}

    @property
    def notes(self) -> list[str]:
        """What a reader should know before comparing these numbers, in plain words."""
        notes = []
        if self.legacy:
            notes.append(
                "Legacy SAEBench layout (up to 0.1): its explained_variance is the mean over tokens of "
                "1 - |x - x'|^2 / |x - batch mean|^2, which later versions call explained_variance_legacy; "
                "latent frequencies were not recorded."
            )
        undefined = [key for values in self.metrics.values() for key in values if self._raw(key) is None]
        if undefined:
            notes.append(f"-1 stands for NaN, not for a value, in {', '.join(undefined)}.")
        if self.dead:
            notes.append(dead_explanation(self.metrics))
        else:
            notes.extend(negative_explanation(self.metrics))
        return notes


def dead_explanation(metrics: dict[str, dict[str, float]]) -> str:
    """Why the numbers of an SAE with no active latent look as they do."""
    norm_out = metrics["shrinkage"]["l2_norm_out"]
    text = (
        "The SAE is dead: no latent fired on any token (L0 = 0), so every reconstruction is the same constant vector"
        f"{', zero' if norm_out == 0 else f' of norm {norm_out:g}'}. "
    )
    if norm_out == 0:
        text += "Cosine similarity and reconstruction bias are 0/0. "
    return text + " ".join(negative_explanation(metrics))


def negative_explanation(metrics: dict[str, dict[str, float]]) -> list[str]:
    """Why a loss or KL score below zero is below zero: one text, or none."""
    behaviour, loss = metrics["model_behavior_preservation"], metrics["model_performance_preservation"]
    parts = []
    if behaviour["kl_div_with_sae"] > behaviour["kl_div_with_ablation"] > 0:
        parts.append(f"KL {behaviour['kl_div_with_sae']:g} against {behaviour['kl_div_with_ablation']:g}")
    if loss["ce_loss_with_sae"] > loss["ce_loss_with_ablation"] > 0:
        parts.append(f"cross-entropy {loss['ce_loss_with_sae']:g} against {loss['ce_loss_with_ablation']:g}")
    if not parts:
        return []
    return [
        "Scores are negative because the model does worse with the SAE than with the residual set to zero "
        f"({', '.join(parts)} nats): a zero residual gives near-uniform predictions, whereas with the SAE the tokens "
        "kept as they are (BOS) draw the attention and the predictions are confidently wrong. Scores have no lower "
        "bound."
    ]


def nan_to_minus_one(value: float) -> float:
    """SAEBench's mark for NaN; infinity is left as it is."""
    return -1.0 if math.isnan(value) else value


def as_json(
    result: CoreResult, *, release: str, sae_id: str, layout: Layout = "current", eval_id: str | None = None
) -> dict[str, Any]:
    """The result as the JSON object that SAEBench writes, in its key order, and `hsae` behind it."""
    metrics: dict[str, dict[str, float]] = {}
    for category, keys in CURRENT.items():
        if layout == "legacy" and category == "misc_metrics":
            continue
        values = dict(result.metrics[category])
        if layout == "legacy" and category == "reconstruction_quality":
            values["explained_variance"] = values.pop("explained_variance_legacy")
        metrics[category] = {key: values[key] for key in keys if key in values}
    columns = DETAILS[:-2] if layout == "legacy" else DETAILS
    return envelope(
        "core",
        eval_config=result.eval_config,
        metrics=metrics,
        details=[{key: entry[key] for key in columns} for entry in result.details],
        sae_config=result.sae_config,
        unstructured=result.unstructured,
        hsae=result.hsae,
        release=release,
        sae_id=sae_id,
        eval_id=eval_id,
    )


class _File(BaseModel):
    """What a core result file must have; keys that hsae has no use for are let through."""

    model_config = ConfigDict(extra="ignore", strict=True)

    eval_type_id: str
    eval_config: dict[str, Any]
    eval_result_metrics: dict[str, dict[str, int | float]]
    eval_result_details: list[dict[str, int | float]] = Field(default_factory=list)
    sae_lens_id: str | None = None
    sae_lens_release_id: str | None = None
    sae_cfg_dict: dict[str, Any] | None = None
    eval_result_unstructured: Any = None
    hsae: dict[str, Any] | None = None


def read_core(path: Path) -> CoreResult:
    """Read a core result of hsae or of SAEBench, current or legacy layout.

    Raises UserError naming the file, the key and what is wrong with it.
    """
    return core_result_of(read_envelope(path, f"hsae eval core{run_option(path)}"), str(path))


def read_core_file(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A core result as JSON, and what it was made of, nothing if hsae did not make it.

    Raises UserError as `read_core` does.
    """
    content: dict[str, Any] = read_envelope(path, f"hsae eval core{run_option(path)}")
    inputs = (core_result_of(content, str(path)).hsae or {}).get("inputs")
    return content, inputs if isinstance(inputs, dict) else {}


def core_result_of(content: Any, path: str = "the result") -> CoreResult:
    """A core result from its JSON. Raises UserError naming `path`, the key and what is wrong with it."""
    try:
        file = _File.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path} is not a SAEBench core result: {first_problem(error)}") from None
    if file.eval_type_id != "core":
        raise UserError(f"{path} holds a {file.eval_type_id!r} result; only 'core' results can be read here")
    metrics = file.eval_result_metrics
    for category, keys in CURRENT.items():
        needed = set() if category == "misc_metrics" else set(keys) - {"explained_variance_legacy"}
        if missing := sorted(needed - metrics.get(category, {}).keys()):
            raise UserError(
                f"{path} is not a SAEBench core result: eval_result_metrics.{category}.{missing[0]} is missing"
            )
    return CoreResult(
        name=file.sae_lens_id or Path(path).stem.removesuffix("_eval_results"),
        eval_config=file.eval_config,
        metrics=metrics,
        details=file.eval_result_details,
        sae_config=file.sae_cfg_dict,
        release=file.sae_lens_release_id,
        hsae=file.hsae,
        unstructured=file.eval_result_unstructured,
    )
