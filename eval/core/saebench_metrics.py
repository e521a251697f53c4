"""SAEBench 0.6.0's core metrics with every rounding and quirk, accumulated batch by batch.

Element-wise steps run in the type of the residuals; per-token values are rounded to it, averaged over all kept tokens
and rounded again. Kept tokens are those that are not special (pad, EOS, BOS). What SAEBench gets wrong is kept here and
put right in `hsae.eval.core.corrected_measures`.

Shapes: B rows of a batch, T context, D residual width, F latents, N kept tokens of a batch.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from hsae.cache.language_model.matmul import product
from hsae.train.model.views import View

SMALL_NORM = 1e-4  # residual norms below this are replaced by 1 in l2_ratio
COSINE_BLOCK_BYTES = 1 << 26


class Mean:
    """Mean over tokens of values that come in batches, rounded to `dtype` as torch rounds a mean of a tensor of that
    type.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.total = 0.0
        self.count = 0

    def add(self, values: Tensor) -> None:
        """Take in values of any shape."""
        self.total += values.double().sum().item()
        self.count += values.numel()

    def tensor(self) -> Tensor:
        """The mean so far as a scalar of `dtype`; NaN if nothing was added."""
        mean = self.total / self.count if self.count else math.nan
        return torch.tensor(mean, dtype=torch.float32).to(self.dtype)

    def value(self) -> float:
        """The mean so far."""
        return self.tensor().item()


@dataclass(frozen=True)
class VarianceBatch:
    """The residuals of one batch of the sparsity and variance phase, and what all SAEs need to know of them."""

    x_BTD: Tensor
    mask_BT: Tensor
    """True for kept tokens."""
    x_ND: Tensor
    """Kept residuals, in their own type."""
    norm_N: Tensor
    unit_ND: Tensor
    spread_N: Tensor
    """Squared distance from the mean of this batch."""
    start: int
    """Row of the store at which the batch begins."""

    @classmethod
    def of(cls, x_BTD: Tensor, mask_BT: Tensor, start: int) -> "VarianceBatch":
        """Compute the shared quantities."""
        x_ND = x_BTD[mask_BT]
        norm_N = x_ND.norm(dim=-1)
        spread_N = (x_ND - x_ND.mean(dim=0)).pow(2).sum(-1)
        return cls(x_BTD, mask_BT, x_ND, norm_N, x_ND / norm_N[:, None], spread_N, start)


class InputMetrics:
    """What SAEBench measures on the residuals alone."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.norm = Mean(dtype)
        self.square = Mean(dtype)
        self.square_per_dimension = Mean(dtype)

    def add(self, batch: VarianceBatch) -> None:
        """Take in one batch."""
        squared_ND = batch.x_ND.pow(2)
        self.norm.add(batch.norm_N)
        self.square.add(squared_ND.sum(-1).mean(0))
        self.square_per_dimension.add(squared_ND.mean(0))


class LatentMetrics:
    """What SAEBench measures on one SAE in the sparsity and variance phase."""

    def __init__(self, d_sae: int, dtype: torch.dtype, device: str) -> None:
        names = ("norm_out", "ratio", "bias", "l1", "mse", "cosine", "legacy_variance", "residual")
        self.means = {name: Mean(dtype) for name in names}
        self.l0 = Mean(torch.float32)
        self.firings_F = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.rows_F = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.tokens = 0

    def add(self, batch: VarianceBatch, acts_BTF: Tensor, out_BTD: Tensor) -> None:
        """Take in the SAE's latents and reconstruction of one batch."""
        x_ND, out_ND, acts_NF = batch.x_ND, out_BTD[batch.mask_BT], acts_BTF[batch.mask_BT]
        norm_out_N = out_ND.norm(dim=-1)
        small_N = batch.norm_N.abs() < SMALL_NORM
        residual_N = (x_ND - out_ND).pow(2).sum(-1)
        bias = norm_out_N.pow(2).mean() / (x_ND * out_ND).sum(-1).mean()
        values = {
            "norm_out": norm_out_N,
            "ratio": norm_out_N / batch.norm_N.masked_fill(small_N, 1.0),
            "bias": bias,
            "l1": acts_NF.sum(-1),
            "mse": residual_N / len(x_ND),
            "cosine": (batch.unit_ND * (out_ND / norm_out_N[:, None])).sum(-1),
            "legacy_variance": 1 - residual_N / batch.spread_N,
            "residual": residual_N.mean(0),
        }
        for name, value in values.items():
            self.means[name].add(value)
        self.l0.add((acts_NF != 0).sum(-1))
        fires_BTF = (acts_BTF > 0) & batch.mask_BT[..., None]
        self.firings_F += fires_BTF.sum((0, 1))
        self.rows_F += fires_BTF.any(1).sum(0)
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
