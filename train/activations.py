"""From pre-activations to a sparse code. Shapes: B vectors of a batch, F latents."""

from typing import Any

import torch
from torch import Tensor


def top_k(pre_BF: Tensor, k: int) -> Tensor:
    """Keep each vector's k largest positive pre-activations (Gao et al. 2024, arXiv 2406.04093)."""
    values, indices = torch.topk(pre_BF, k, dim=-1, sorted=False)
    return torch.zeros_like(pre_BF).scatter(-1, indices, values.relu())


def batch_top_k(pre_BF: Tensor, l0: float, guess: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Keep the batch's round(B * l0) largest positive pre-activations (Bussmann et al. 2024, arXiv 2412.06410).

    Returns the code [B, F] and the smallest value kept, a scalar (0 if nothing is positive). `guess`, a scalar on the processor that
    is likely below the smallest, saves the search among values below it; the result is the same.
    """
    count = round(pre_BF.shape[0] * l0)
    flat = pre_BF.relu().flatten()
    likely = (flat > guess).nonzero().squeeze(1) if guess is not None else None
    if likely is not None and len(likely) >= count:
        values, chosen = torch.topk(flat[likely], count, sorted=False)
        indices = likely[chosen]
    else:
        values, indices = torch.topk(flat, count, sorted=False)
    kept = values.detach().float()
    smallest = torch.where(kept > 0, kept, torch.inf).min()
    smallest = torch.where(torch.isfinite(smallest), smallest, 0.0)
    return torch.zeros_like(flat).scatter(0, indices, values).view_as(pre_BF), smallest


def jump_relu(pre_BF: Tensor, threshold_F: Tensor, bandwidth: float) -> Tensor:
    """pre where it exceeds the latent's threshold, else 0 (Rajamanoharan et al. 2024, arXiv 2407.14435, eq. 11 for gradients)."""
    code: Tensor = _JumpReLU.apply(pre_BF.relu(), threshold_F, bandwidth)  # type: ignore[no-untyped-call]
    return code


def step_count(pre_BF: Tensor, threshold_F: Tensor, bandwidth: float) -> Tensor:
    """Mean L0 of a jumprelu code, a scalar; only thresholds have a gradient (arXiv 2407.14435, eq. 12)."""
    steps: Tensor = _Step.apply(pre_BF.relu(), threshold_F, bandwidth)  # type: ignore[no-untyped-call]
    return steps.float().sum(-1).mean()


def _kernel(pre_BF: Tensor, threshold_F: Tensor, bandwidth: float) -> Tensor:
    """The rectangle of height 1/bandwidth around each threshold."""
    return ((pre_BF - threshold_F).abs() < bandwidth / 2).to(pre_BF.dtype) / bandwidth


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        to_threshold = -threshold * _kernel(pre, threshold, ctx.bandwidth) * gradients[0]
        return gradients[0] * (pre > threshold), to_threshold.sum(0).to(threshold.dtype), None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[None, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        to_threshold = -_kernel(pre, threshold, ctx.bandwidth) * gradients[0]
        return None, to_threshold.sum(0).to(threshold.dtype), None
