"""From pre-activations to a sparse code. Shapes: B vectors of a batch, F latents."""

from typing import Any

import torch
from torch import Tensor

from hsae.train.parallel.latent_sharding import UNDIVIDED, Latents
from hsae.train.parallel.workers import ALONE, Workers


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is where it is wider: sums of squares are never taken in half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def top_k(pre_BF: Tensor, k: int, latents: Latents = UNDIVIDED) -> Tensor:
    """Keep each vector's k largest positive pre-activations among all `latents` (Gao et al. 2024, arXiv 2406.04093)."""
    others = latents.world > 1
    values, indices = torch.topk(pre_BF, min(k, pre_BF.shape[1]), dim=-1, sorted=others)
    values = values.relu()
    if others:
        own_B, _ = _among_all(values.detach().float(), k, k, ALONE, latents)
        values = values.masked_fill(torch.arange(values.shape[1], device=values.device) >= own_B[:, None], 0)
    return torch.zeros_like(pre_BF).scatter(-1, indices, values)


def batch_top_k(
    pre_BF: Tensor,
    l0: float,
    bound: Tensor | None = None,
    workers: Workers = ALONE,
    latents: Latents = UNDIVIDED,
) -> tuple[Tensor, Tensor]:
    """Keep the batch's round(B * l0) largest positive pre-activations (Bussmann et al. 2024, arXiv 2412.06410).

    Returns the code [B, F] and the smallest value kept, a scalar (0 if nothing is positive). `bound`, a scalar on the
    processor that is likely below the smallest, saves the search among values below it; the result is the same. The
    batch is that of all `workers`, or of all workers' `latents`, who tell each other their largest values: at most 4 *
    count bytes from each.
    """
    count = round(pre_BF.shape[0] * workers.world * l0)
    others = workers.world * latents.world > 1
    flat = pre_BF.relu().flatten()
    above = (flat > bound).nonzero().squeeze(1) if bound is not None else None
    counts = _every(torch.tensor([len(above)]), workers, latents) if above is not None else None
    if above is not None and counts is not None and int(counts.sum()) >= count:
        values, places = torch.topk(flat[above], min(count, len(above)), sorted=others)
        indices, longest = above[places], min(count, int(counts.max()))
    else:
        longest = min(count, len(flat))
        values, indices = torch.topk(flat, longest, sorted=others)
    largest = values.detach().float()
    if others:
        own_1, largest = _among_all(largest[None], longest, count, workers, latents)
        own = int(own_1)
        values, indices = values[:own], indices[:own]
    smallest = torch.where(largest > 0, largest, torch.inf).min()
    smallest = torch.where(torch.isfinite(smallest), smallest, 0.0)
    return torch.zeros_like(flat).scatter(0, indices, values).view_as(pre_BF), smallest


def _every(part: Tensor, workers: Workers, latents: Latents) -> Tensor:
    """[W, ...] what every worker gives, whatever they divide among them."""
    return workers.gather(latents.workers.gather(part[None]))


def _among_all(
    falling_RN: Tensor, longest: int, count: int, workers: Workers, latents: Latents
) -> tuple[Tensor, Tensor]:
    """[R] how many of this worker's values are among the `count` largest of all workers' rows, and those [R, count].

    No worker has more than `longest` values in a row. Of equal ones at the edge those of the first workers are kept.
    """
    rows, count_own = falling_RN.shape
    padded = falling_RN.new_full((rows, longest), -1.0)
    padded[:, :count_own] = falling_RN.nan_to_num(torch.inf)
    every_WRN, rank = _every(padded, workers, latents), workers.rank * latents.world + latents.rank
    largest = torch.topk(every_WRN.transpose(0, 1).flatten(1), count, sorted=False).values
    edge_R1 = largest.amin(1, keepdim=True)
    above_WR, equal_WR = (every_WRN > edge_R1).sum(-1), (every_WRN == edge_R1).sum(-1)
    spare_R = count - above_WR.sum(0) - equal_WR[:rank].sum(0)
    return above_WR[rank] + torch.minimum(equal_WR[rank], spare_R).clamp_min(0), largest


def jump_relu(pre_BF: Tensor, threshold_F: Tensor, bandwidth: float) -> Tensor:
    """pre where it exceeds the latent's threshold, else 0 (arXiv 2407.14435; gradients: eq. 11)."""
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
