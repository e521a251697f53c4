"""SAEBench 0.6.0's core metrics with every rounding and quirk, accumulated batch by batch.

Element-wise steps run in the type of the residuals; per-token values are rounded to it, averaged over all kept tokens
and rounded again. Kept tokens are those that are not special (pad, EOS, BOS). What SAEBench gets wrong is kept here and
put right in `hsae.eval.core.corrected_measures`.

Shapes: B rows of a batch, T context, D residual width, F latents, N kept tokens of a batch.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from hsae.cache.language_model.matmul import product
from hsae.eval.core.batches import Batches
from hsae.train.model.views import View

SMALL_NORM = 1e-4  # residual norms below this are replaced by 1 in l2_ratio
COSINE_BLOCK_BYTES = 1 << 26


class Mean:
    """Mean over tokens of values that come in batches, rounded to `dtype` as torch rounds a mean of a tensor of that
    type. The sum stays on the device until the mean is asked for.
    """

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.dtype = dtype
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        self.count = 0

    def add(self, values: Tensor) -> None:
        """Take in values of any shape."""
        self.total += values.double().sum()
        self.count += values.numel()

    def tensor(self) -> Tensor:
        """The mean so far as a scalar of `dtype`; NaN if nothing was added."""
        return (self.total / self.count).float().to(self.dtype)

    def value(self) -> float:
        """The mean so far."""
        return self.tensor().item()


class InputMetrics:
    """What SAEBench measures on the residuals alone."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.norm = Mean(dtype, device)
        self.square = Mean(dtype, device)
        self.square_per_dimension = Mean(dtype, device)

    def add(self, batches: Batches) -> None:
        """Take in batches."""
        self.norm.add(batches.norm_N)
        for squared_ND in batches.each(batches.x_ND.pow(2)):
            self.square.add(squared_ND.sum(-1).mean(0))
            self.square_per_dimension.add(squared_ND.mean(0))


class LatentMetrics:
    """What SAEBench measures on one SAE in the sparsity and variance phase."""

    def __init__(self, d_sae: int, dtype: torch.dtype, device: str) -> None:
        names = ("norm_out", "ratio", "bias", "l1", "mse", "cosine", "legacy_variance", "residual")
        self.means = {name: Mean(dtype, device) for name in names}
        self.l0 = Mean(torch.float32, device)
        self.firings_F = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.rows_F = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.tokens = 0

    def add(self, batches: Batches, acts_BTF: Tensor, active_BT: Tensor, out_BTD: Tensor) -> None:
        """Take in the SAE's latents, the number of those that aren't 0, and its reconstruction."""
        x_ND, out_ND = batches.x_ND, batches.kept(out_BTD)
        norm_out_N = out_ND.norm(dim=-1)
        small_N = batches.norm_N.abs() < SMALL_NORM
        residual_N = (x_ND - out_ND).pow(2).sum(-1)
        self.means["norm_out"].add(norm_out_N)
        self.means["ratio"].add(norm_out_N / batches.norm_N.masked_fill(small_N, 1.0))
        self.means["l1"].add(batches.kept(acts_BTF.sum(-1)))
        self.means["cosine"].add((batches.unit_ND * (out_ND / norm_out_N[:, None])).sum(-1))
        self.means["legacy_variance"].add(1 - residual_N / batches.spread_N)
        self.l0.add(batches.kept(active_BT))
        per_token = (norm_out_N.pow(2), (x_ND * out_ND).sum(-1), residual_N)
        for squared_N, aligned_N, errors_N in zip(*map(batches.each, per_token), strict=True):
            self.means["bias"].add(squared_N.mean() / aligned_N.mean())
            self.means["mse"].add(errors_N / len(errors_N))
            self.means["residual"].add(errors_N.mean(0))
        firings_BF = ((acts_BTF > 0) & batches.mask_BT[..., None]).sum(1)
        self.firings_F += firings_BF.sum(0)
        self.rows_F += (firings_BF > 0).sum(0)
        self.tokens += len(x_ND)

    def explained_variance(self, inputs: InputMetrics) -> float:
        """SAEBench 0.6.0's formula 1 - R / (S - a^2), where a = S/D stands where a squared mean vector should.

        Step by step in the residuals' type. Above 1 for a bad SAE when S > D^2.
        """
        total = inputs.square.tensor() - inputs.square_per_dimension.tensor() ** 2
        return (1 - self.means["residual"].tensor() / total).item()

    def density_F(self) -> Tensor:
        """[F] float32: share of kept tokens on which each latent is positive."""
        return self.firings_F.float() / self.tokens

    def firings_per_row_F(self) -> Tensor:
        """[F] float32: firings in rows with at least one; NaN for latents that never fire."""
        return self.firings_F.float() / self.rows_F.float()


def score(ablated: float, with_sae: float, clean: float) -> float:
    """(ablated - with_sae) / (ablated - clean) in Python floats; NaN where the denominator is 0."""
    return (ablated - with_sae) / (ablated - clean) if ablated != clean else math.nan


def frequency_metrics(density_F: Tensor) -> dict[str, float]:
    """Shares of latents, and of all firings, above 1 % and 10 % density, and the share of latents alive at all."""
    total = density_F.sum()
    metrics: dict[str, float] = {}
    for percent in (1, 10):
        above_F = density_F > percent / 100
        metrics[f"freq_over_{percent}_percent"] = above_F.float().mean().item()
        share = density_F[above_F].sum() / total if total > 0 else torch.zeros(())
        metrics[f"normalized_freq_over_{percent}_percent"] = share.item()
    metrics["frac_alive"] = (density_F > 0).float().mean().item()
    return metrics


def weight_metrics(view: View) -> dict[str, Tensor]:
    """SAEBench's per-latent weight metrics, [F] each, in the type of the weights."""
    W_enc_FD, W_dec_FD = view.W_enc.T, view.W_dec
    encoder_norm_F = view.W_enc.norm(dim=0)
    unit_enc_FD = W_enc_FD / encoder_norm_F[:, None]  # normalised here and again by cosine_similarity, as SAEBench does
    unit_dec_FD = W_dec_FD / W_dec_FD.norm(dim=-1, keepdim=True)
    return {
        "encoder_bias": view.b_enc,
        "encoder_norm": encoder_norm_F,
        "encoder_decoder_cosine_sim": cosine_similarity(unit_dec_FD, unit_enc_FD),
        "max_decoder_cosine_sim": _largest_cosine(W_dec_FD),
        "max_encoder_cosine_sim": _largest_cosine(W_enc_FD),
    }


def _largest_cosine(rows_FD: Tensor) -> Tensor:
    """[F] largest cosine of each row with another row; a zero row counts as orthogonal to all.

    NaN if there is one row only.
    """
    unit_FD = normalize(rows_FD, dim=-1)
    rows = len(unit_FD)
    largest = torch.full((rows,), math.nan, dtype=unit_FD.dtype, device=unit_FD.device)
    block = max(1, COSINE_BLOCK_BYTES // (rows * unit_FD.element_size()))
    for start in range(0, rows if rows > 1 else 0, block):
        cosines = product(unit_FD[start : start + block], unit_FD.T)
        here = torch.arange(len(cosines), device=cosines.device)
        cosines[here, here + start] = -math.inf
        largest[start : start + block] = cosines.amax(-1)
    return largest
