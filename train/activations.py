"""From pre-activations to a sparse code. Shapes: B vectors of a batch, F latents."""

from typing import Any

import torch
from torch import Tensor

from hsae.train.workers import ALONE, Workers


def top_k(pre_BF: Tensor, k: int) -> Tensor:
    """Keep each vector's k largest positive pre-activations (Gao et al. 2024, arXiv 2406.04093)."""
    values, indices = torch.topk(pre_BF, k, dim=-1, sorted=False)
    return torch.zeros_like(pre_BF).scatter(-1, indices, values.relu())


def batch_top_k(
    pre_BF: Tensor, l0: float, guess: Tensor | None = None, workers: Workers = ALONE
) -> tuple[Tensor, Tensor]:
    """Keep the batch's round(B * l0) largest positive pre-activations (Bussmann et al. 2024, arXiv 2412.06410).

    Returns the code [B, F] and the smallest value kept, a scalar (0 if nothing is positive). `guess`, a scalar on the processor that
    is likely below the smallest, saves the search among values below it; the result is the same. The batch is that of all `workers`,
    who tell each other their largest values: at most 4 * count bytes from each.
    """
    count = round(pre_BF.shape[0] * workers.world * l0)
    flat = pre_BF.relu().flatten()
    likely = (flat > guess).nonzero().squeeze(1) if guess is not None else None
    candidates = workers.gather(torch.tensor([len(likely)])) if likely is not None else None
    if likely is not None and candidates is not None and int(candidates.sum()) >= count:
        values, chosen = torch.topk(flat[likely], min(count, len(likely)), sorted=workers.world > 1)
        indices, longest = likely[chosen], min(count, int(candidates.max()))
    else:
        longest = min(count, len(flat))
        values, indices = torch.topk(flat, longest, sorted=workers.world > 1)
    kept = values.detach().float()
    if workers.world > 1:
        own, kept = _among_all(kept, longest, count, workers)
        values, indices = values[:own], indices[:own]
    smallest = torch.where(kept > 0, kept, torch.inf).min()
    smallest = torch.where(torch.isfinite(smallest), smallest, 0.0)
    return torch.zeros_like(flat).scatter(0, indices, values).view_as(pre_BF), smallest


def _among_all(falling_N: Tensor, longest: int, count: int, workers: Workers) -> tuple[int, Tensor]:
    """How many of this worker's values are among the `count` largest of all workers', and those [count].

    No worker has more than `longest` values. Of equal ones at the edge those of the first workers are kept.
    """
    padded = falling_N.new_full((longest,), -1.0)
    padded[: len(falling_N)] = falling_N.nan_to_num(torch.inf)
    every_WN = workers.gather(padded).view(workers.world, longest)
    kept = torch.topk(every_WN.flatten(), count, sorted=False).values
    edge = kept.min()
    above, equal = (every_WN > edge).sum(1).tolist(), (every_WN == edge).sum(1).tolist()
    spare = count - sum(above) - sum(equal[: workers.rank])
    return above[workers.rank] + max(0, min(equal[workers.rank], spare)), kept


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
