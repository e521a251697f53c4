"""From pre-activations to a sparse code. Shapes: B vectors of a batch, F latents."""

from collections.abc import Sequence
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
    return masked(pre_BF, top_k_mask(pre_BF, k, latents))


def top_k_mask(pre_BF: Tensor, k: int, latents: Latents = UNDIVIDED) -> Tensor:
    """[B, F] where `top_k` keeps something."""
    indices, kept = _top_k(pre_BF, k, latents)
    return torch.zeros_like(pre_BF, dtype=torch.bool).scatter(-1, indices, kept)


def top_k_entries(pre_BF: Tensor, k: int, latents: Latents = UNDIVIDED) -> Tensor:
    """[N] where `top_k` keeps something: positions in the flattened batch, vector by vector."""
    indices, kept = _top_k(pre_BF, k, latents)
    first_B = torch.arange(len(pre_BF), device=pre_BF.device) * pre_BF.shape[1]
    return (indices + first_B[:, None])[kept]


def _top_k(pre_BF: Tensor, k: int, latents: Latents) -> tuple[Tensor, Tensor]:
    """[B, k] each vector's largest, and whether they are kept."""
    others = latents.world > 1
    values, indices = torch.topk(pre_BF.detach(), min(k, pre_BF.shape[1]), dim=-1, sorted=others)
    kept = ~(values <= 0)
    if others:
        own_B, _ = _among_all(values.relu().float(), k, k, ALONE, latents)
        kept &= torch.arange(values.shape[1], device=values.device) < own_B[:, None]
    return indices, kept


def batch_top_k(
    pre_BF: Tensor,
    l0: float,
    bound: Tensor | None = None,
    workers: Workers = ALONE,
    latents: Latents = UNDIVIDED,
) -> tuple[Tensor, Tensor]:
    """Keep the batch's round(B * l0) largest positive pre-activations (Bussmann et al. 2024, arXiv 2412.06410).

    Returns the code [B, F] and the smallest value kept, a scalar (0 if nothing is positive).
    """
    bound = pre_BF.new_zeros(()) if bound is None else bound
    (mask_BF,), smallest = batch_top_k_masks([pre_BF], l0, bound, workers, latents)
    return masked(pre_BF, mask_BF), smallest


def batch_top_k_masks(
    pres: Sequence[Tensor], l0: float, bound: Tensor, workers: Workers = ALONE, latents: Latents = UNDIVIDED
) -> tuple[list[Tensor], Tensor]:
    """[B, F] for each level where `batch_top_k_entries` keeps something, and the smallest value kept.

    To torch.compile it is one operator, into which it doesn't look: how many values are above the bound is read.
    """
    fixed = [pre.detach() for pre in pres]
    if torch.compiler.is_compiling():
        *masks, smallest = _batch_top_k_operator(fixed, l0, bound)
        return masks, smallest
    entries, kept, smallest = _candidates(fixed, l0, bound, workers, latents)
    masks = [torch.zeros_like(pre, dtype=torch.bool) for pre in fixed]
    for mask, level, part in zip(masks, entries, kept, strict=True):
        mask.view(-1)[level] = part
    return masks, smallest


@torch.library.custom_op("hsae::batch_top_k", mutates_args=())
def _batch_top_k_operator(pres: list[Tensor], l0: float, bound: Tensor) -> list[Tensor]:
    masks, smallest = batch_top_k_masks(pres, l0, bound)
    return [*masks, smallest]


@_batch_top_k_operator.register_fake
def _(pres: list[Tensor], l0: float, bound: Tensor) -> list[Tensor]:
    masks = [torch.empty_like(pre, dtype=torch.bool) for pre in pres]
    return [*masks, bound.new_empty((), dtype=torch.float32)]


def batch_top_k_entries(
    pres: Sequence[Tensor],
    l0: float,
    bound: Tensor | float = 0.0,
    workers: Workers = ALONE,
    latents: Latents = UNDIVIDED,
) -> tuple[list[Tensor], Tensor]:
    """Where one BatchTopK over several levels' pre-activations [B, F] keeps something, and the smallest value kept.

    A level's entries are positions in its flattened batch, ascending; of values equal to the smallest, the first are
    kept. `bound`, a scalar from 0 on that is likely below the smallest, saves the search among values below it; the
    result is the same. The batch is that of all `workers`, or of all workers' `latents`, who tell each other their
    largest values: at most 4 * count bytes from each.
    """
    entries, kept, smallest = _candidates([pre.detach() for pre in pres], l0, bound, workers, latents)
    return [level[part] for level, part in zip(entries, kept, strict=True)], smallest


def _candidates(
    pres: Sequence[Tensor], l0: float, bound: Tensor | float, workers: Workers, latents: Latents
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Entries that may be kept, whether each is, and the smallest value kept."""
    flats = [pre.flatten() for pre in pres]
    count = round(len(pres[0]) * workers.world * l0)
    entries, counts = _above(flats, bound, workers, latents)
    if int(counts.sum()) < count:
        entries, counts = _above(flats, 0, workers, latents)
    values = torch.cat([flat.index_select(0, level) for flat, level in zip(flats, entries, strict=True)])
    count = min(count, int(counts.sum()))
    if count == 0:
        return entries, [level > 0 for level in entries], values.new_zeros((), dtype=torch.float32)
    if workers.world * latents.world > 1:
        falling, longest = torch.topk(values, min(count, len(values))).values, min(count, int(counts.max()))
        own_1, largest = _among_all(falling.float()[None], longest, count, workers, latents)
        (is_kept, _), smallest = _largest(values, int(own_1)), largest.amin()
    else:
        is_kept, smallest = _largest(values, count)
    return entries, list(torch.split(is_kept, [len(level) for level in entries])), smallest


def _above(
    flats: Sequence[Tensor], bound: Tensor | float, workers: Workers, latents: Latents
) -> tuple[list[Tensor], Tensor]:
    """Where each of these is above a bound, or not a number; and how many such every worker has."""
    entries = [(flat <= bound).logical_not_().nonzero().squeeze(1) for flat in flats]
    return entries, _every(torch.tensor([sum(map(len, entries))]), workers, latents)


def _largest(values_N: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """[N] whether a value is among the `count` largest, of equal ones the first; and the smallest of those."""
    if count == 0:
        return torch.zeros_like(values_N, dtype=torch.bool), values_N.new_zeros((), dtype=torch.float32)
    edge = torch.topk(values_N, count, sorted=False).values.amin()
    is_kept, is_equal = (values_N <= edge).logical_not_(), values_N == edge
    is_kept |= is_equal & (is_equal.cumsum(0) <= count - is_kept.sum())
    return is_kept, edge.float()


def masked(pre_BF: Tensor, mask_BF: Tensor) -> Tensor:
    """[B, F] the pre-activations where the mask is, and 0 elsewhere."""
    return torch.where(mask_BF, pre_BF, 0)


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
