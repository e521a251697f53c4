"""hsae's own core measures, beside SAEBench's: float64 moments, real token counts, bootstrap intervals over rows.

Memory does not grow with the store (one byte a row and resample apart). Rows are the unit of resampling because tokens
of a row depend on each other.

Shapes: R rows of a phase, B rows of a batch, T context, D residual width, C columns (sums kept), S resamples.
"""

import math

import torch
from torch import Tensor

from hsae.eval.core.batches import Batches
from hsae.eval.harness.estimates import Estimate, ResampledSums, Resampler, estimate_of

RECONSTRUCTION_COLUMNS = ("ce_tokens", "ce_without_sae", "ce_with_ablation", "kl_tokens", "kl_with_ablation")
SAE_COLUMNS = ("ce_with_sae", "kl_with_sae")


class InputMoments:
    """Kept tokens, sum of squared norms and sum of the residuals themselves: shared by all SAEs."""

    def __init__(self, resampler: Resampler, d_model: int) -> None:
        self.sums = ResampledSums(resampler, 2 + d_model)

    def add(self, batches: Batches, first_row: int) -> None:
        """Take in batches of the variance phase, which starts at row `first_row` of the store."""
        x_BTD = _masked(batches.x_BTD, batches)
        tokens_B = batches.mask_BT.sum(1).double()
        columns = torch.cat([tokens_B[:, None], x_BTD.pow(2).sum((1, 2))[:, None], x_BTD.sum(1)], dim=1)
        self.sums.add(batches.start - first_row, columns)

    def total_variance_S(self) -> Tensor:
        """E|x|^2 - |E x|^2 of the data and of each resample."""
        mean_SC = self.sums.sums_SC / self.tokens_S()[:, None]
        return mean_SC[:, 1] - mean_SC[:, 2:].pow(2).sum(1)

    def tokens_S(self) -> Tensor:
        """Kept tokens of the data and of each resample."""
        return self.sums.sums_SC[:, 0]


class ReconstructionMoments:
    """Squared error and active latents of one SAE."""

    def __init__(self, resampler: Resampler) -> None:
        self.sums = ResampledSums(resampler, 2)

    def add(self, batches: Batches, first_row: int, active_BT: Tensor, out_BTD: Tensor) -> None:
        """Take in the number of latents that aren't 0, and the reconstruction, of batches of the variance phase."""
        error_B = _masked(batches.x_BTD.double() - out_BTD.double(), batches).pow(2).sum((1, 2))
        active_B = (active_BT * batches.mask_BT).sum(1)
        self.sums.add(batches.start - first_row, torch.stack([error_B, active_B.double()], dim=1))

    def measures(self, inputs: InputMoments, d_model: int) -> dict[str, Estimate]:
        """Explained variance 1 - E|r|^2 / (E|x|^2 - |E x|^2), squared error per element, and L0."""
        mean_SC = self.sums.sums_SC / inputs.tokens_S()[:, None]
        return {
            "explained_variance": estimate_of(1 - mean_SC[:, 0] / inputs.total_variance_S()),
            "mse": estimate_of(mean_SC[:, 0] / d_model),
            "l0": estimate_of(mean_SC[:, 1]),
        }


def _masked(values_BTD: Tensor, batches: Batches) -> Tensor:
    return torch.where(batches.mask_BT[..., None], values_BTD.double(), 0.0)


def loss_measures(shared: ResampledSums, own: ResampledSums) -> dict[str, Estimate]:
    """Mean losses, mean KL and the two scores; columns as in RECONSTRUCTION_COLUMNS (shared) and SAE_COLUMNS (own)."""
    columns = dict(zip(RECONSTRUCTION_COLUMNS, shared.sums_SC.unbind(1), strict=True))
    columns |= dict(zip(SAE_COLUMNS, own.sums_SC.unbind(1), strict=True))
    ce = {name: columns[f"ce_{name}"] / columns["ce_tokens"] for name in ("without_sae", "with_ablation", "with_sae")}
    kl = {name: columns[f"kl_{name}"] / columns["kl_tokens"] for name in ("with_ablation", "with_sae")}
    score = _ratio(ce["with_ablation"] - ce["with_sae"], ce["with_ablation"] - ce["without_sae"])
    return {
        "ce_loss_score": estimate_of(score),
        "kl_div_score": estimate_of(_ratio(kl["with_ablation"] - kl["with_sae"], kl["with_ablation"])),
        **{f"ce_loss_{name}": estimate_of(values) for name, values in ce.items()},
        **{f"kl_div_{name}": estimate_of(values) for name, values in kl.items()},
    }


def _ratio(above_S: Tensor, below_S: Tensor) -> Tensor:
    return torch.where(below_S == 0, math.nan, above_S / below_S)


def differences(
    metrics: dict[str, dict[str, float]], own: dict[str, Estimate], dtype: str, tokens: dict[str, int]
) -> list[str]:
    """What differs between SAEBench's numbers and hsae's, and why, in plain words."""
    quality, stats = metrics["reconstruction_quality"], metrics["token_stats"]
    return [
        f"explained_variance: {_shown(own['explained_variance'])} here, {quality['explained_variance']:.4f} in "
        "SAEBench 0.6.0, whose denominator is E|x|^2 - (E|x|^2/D)^2 instead of E|x|^2 - |E x|^2: it measures "
        "variance about zero when that correction is small, and can exceed 1.",
        f"explained_variance_legacy: {quality['explained_variance_legacy']:.4f} is a mean over tokens of 1 - |x - "
        "x'|^2 / |x - batch mean|^2 (a mean of ratios); here it is the ratio of the sums.",
        f"mse: {_shown(own['mse'])} here is the squared error per element (divided by the width); SAEBench's "
        f"{quality['mse']:.6g} is the squared error per token divided by the number of kept tokens of a batch, so it "
        "depends on the batch size.",
        f"token counts: {tokens['reconstruction']} and {tokens['variance']} tokens were used; SAEBench reports the "
        f"nominal {stats['total_tokens_eval_reconstruction']:.0f} and "
        f"{stats['total_tokens_eval_sparsity_variance']:.0f}, special tokens included.",
        "losses and KL: here in float32 from log-softmax, averaged in float64; SAEBench takes the logarithm of a "
        f"softmax, rounds every step and every mean to {dtype}, and computes scores from the rounded means.",
        "undefined numbers are null here; in SAEBench's part -1 stands for NaN.",
    ]


def _shown(estimate: Estimate) -> str:
    return "undefined" if estimate.value is None else f"{estimate.value:.6g}"
