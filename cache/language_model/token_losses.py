"""Cross-entropy and KL divergence per token, computed slice by slice so that memory stays bounded at V = 262,144.

Two families. `cross_entropy`, `distribution` and `kl_divergence` do exactly what SAEBench does: every element-wise
step is rounded to the type of the logits, and the logarithm is taken of the softmax, so that an underflowing
probability gives NaN or infinity. `stable_losses` works in float32 from log-softmax and has neither defect. All are
in nats, and none depends on how rows are grouped.

Shapes: N tokens, V vocabulary.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

SLICE_BYTES = 1 << 22  # of logits; what one slice touches stays in the processor's last-level cache


class Distribution(NamedTuple):
    """The clean model's next-token distribution, rounded as SAEBench rounds it."""

    probs: Tensor
    """[N, V] softmax of the clean logits."""
    log_probs: Tensor
    """[N, V] logarithm of `probs`."""


def slices(rows: int, row_bytes: int, slice_bytes: int = SLICE_BYTES) -> Iterator[slice]:
    """Near-equal slices of about `slice_bytes`; none of a single row, which torch reduces in another order."""
    wanted = max(2, slice_bytes // max(1, row_bytes))
    count = max(1, min(-(-rows // wanted), rows // 2))
    edges = [rows * index // count for index in range(count + 1)]
    for start, stop in pairwise(edges):
        yield slice(start, stop)


def _row_slices(logits_NV: Tensor) -> Iterator[slice]:
    size = SLICE_BYTES if logits_NV.device.type == "cpu" else SLICE_BYTES * 64
    return slices(logits_NV.shape[0], logits_NV.shape[1] * logits_NV.element_size(), size)


def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Next-token loss -log_softmax(logits)[target], [N] in the logits' type (SAEBench core)."""
    losses = torch.empty(logits_NV.shape[0], dtype=logits_NV.dtype, device=logits_NV.device)
    index_N1 = targets_N.long()[:, None]
    for part in _row_slices(logits_NV):
        losses[part] = -logits_NV[part].log_softmax(-1).gather(-1, index_N1[part])[:, 0]
    return losses


def _memory(logits_NV: Tensor, dtype: torch.dtype, out: Distribution | None) -> Distribution:
    rows = len(logits_NV)
    if out is None or len(out.probs) < rows or out.probs.shape[1:] != logits_NV.shape[1:]:
        out = Distribution(*(torch.empty(logits_NV.shape, dtype=dtype, device=logits_NV.device) for _ in range(2)))
    return Distribution(out.probs[:rows], out.log_probs[:rows])


def distribution(logits_NV: Tensor, out: Distribution | None = None) -> Distribution:
    """p0 = softmax(logits) and log(p0), both in the logits' type (SAEBench core); `out` is memory to use again."""
    probs, log_probs = result = _memory(logits_NV, logits_NV.dtype, out)
    for part in _row_slices(logits_NV):
        torch.softmax(logits_NV[part], -1, out=probs[part])
        torch.log(probs[part], out=log_probs[part])
    return result


def kl_divergence(clean_probs: Tensor, clean_log_probs: Tensor, logits_NV: Tensor) -> Tensor:
    """KL(clean || modified) = sum_v p0 (log p0 - log softmax(logits)), [N] in the logits' type (SAEBench core).

    NaN where both probabilities underflow to 0, infinite where only the modified one does, as in SAEBench.
    """
    divergence = torch.empty(logits_NV.shape[0], dtype=logits_NV.dtype, device=logits_NV.device)
    for part in _row_slices(logits_NV):
        terms = logits_NV[part].softmax(-1).log_()
        torch.sub(clean_log_probs[part], terms, out=terms)
        divergence[part] = terms.mul_(clean_probs[part]).sum(-1)
    return divergence


def divergence(clean: Distribution, log_probs_1V: Tensor) -> Tensor:
    """The same for a modified distribution that all tokens share, whose `Distribution.log_probs` is given."""
    divergence = torch.empty(len(clean.probs), dtype=clean.probs.dtype, device=clean.probs.device)
    for part in _row_slices(clean.probs):
        terms = clean.log_probs[part] - log_probs_1V
        divergence[part] = terms.mul_(clean.probs[part]).sum(-1)
    return divergence


class StableDistribution(NamedTuple):
    """The clean model's next-token distribution in float32."""

    probs: Tensor
    """[N, V] softmax of the clean logits."""
    expected: Tensor
    """[N] expected logarithm of `probs`: minus the entropy."""
    losses: Tensor
    """[N] next-token loss of the clean model."""


def stable_distribution(logits_NV: Tensor, targets_N: Tensor, out: Tensor | None = None) -> StableDistribution:
    """The clean distribution in float32, without log(0); `out` is memory to use again for `probs`."""
    if out is None or len(out) < len(logits_NV) or out.shape[1:] != logits_NV.shape[1:]:
        out = torch.empty(logits_NV.shape, dtype=torch.float32, device=logits_NV.device)
    expected, losses = torch.empty(2, len(logits_NV), dtype=torch.float32, device=logits_NV.device)
    result = StableDistribution(out[: len(logits_NV)], expected, losses)
    for part in _row_slices(logits_NV):
        log_probs = logits_NV[part].float().log_softmax(-1)
        torch.exp(log_probs, out=result.probs[part])
        losses[part] = -log_probs.gather(-1, targets_N[part, None])[:, 0]
        expected[part] = log_probs.mul_(result.probs[part]).sum(-1)
    return result


def stable_losses(clean: StableDistribution, logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Next-token loss and KL(clean || modified), [N] float32: 0 for the clean logits themselves."""
    losses = torch.empty(len(logits_NV), dtype=torch.float32, device=logits_NV.device)
    divergence = torch.empty_like(losses)
    for part in _row_slices(logits_NV):
        log_probs = logits_NV[part].float().log_softmax(-1)
        losses[part] = -log_probs.gather(-1, targets_N[part, None])[:, 0]
        divergence[part] = clean.expected[part] - log_probs.mul_(clean.probs[part]).sum(-1)
    return losses, divergence


def constant_losses(clean: StableDistribution, logits_V: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """The same where the modified logits are those of `logits_V` at every token."""
    log_probs_V, divergence = logits_V.float().log_softmax(-1), clean.expected.clone()
    for part in _row_slices(clean.probs):  # sums, not a product with a vector: that is off by 1e-4 at V = 262,144
        divergence[part] -= (clean.probs[part] * log_probs_V).sum(-1)
    return -log_probs_V[targets_N], divergence
