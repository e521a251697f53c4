"""Latents divided among workers, for wide dictionaries: each sees whole batches and has 1/W of each level.

Of a level's F latents worker r has those from r F/W on: their columns of W_enc, rows of W_dec, biases, thresholds,
counters, Adam moments, and columns of the map W [F, G] that reads them. Only the bias of the residual is whole on each.
What all latents say together is a sum over workers, from which every worker computes the same loss; a sum hands its
gradient on as it is. So nothing is exchanged in the backward pass. Undivided, every method gives back what it was
given, untouched.

Shapes: B vectors of a batch, F latents of a level, f = F / W of one worker.
"""

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from hsae.train.parallel.workers import ALONE, Workers

ROWS = 64  # drawn at a time


class Latents:
    """How the latents of every level are divided, seen from one worker."""

    def __init__(self, workers: Workers = ALONE) -> None:
        self.workers, self.rank, self.world = workers, workers.rank, workers.world

    def own(self, width: int) -> int:
        """How many latents of a level this worker has."""
        return width // self.world

    def draw_own(self, draw: Callable[[int], Tensor], rows: int, dimension: int = 0) -> Tensor:
        """This worker's part, along `dimension`, of a matrix whose next n rows `draw(n)` makes, never the whole.

        torch fills matrices number by number, in sixteens, so that many rows or few come out alike.
        """
        if self.world == 1:
            return draw(rows)
        first, parts = self.rank * self.own(rows), []
        for start, stop in pairwise([*range(0, max(1, rows - ROWS + 1), ROWS), rows]):
            block = draw(stop - start)
            if dimension == 1:
                parts.append(block.chunk(self.world, 1)[self.rank].clone())
            else:
                parts.append(block[max(0, first - start) : max(0, first + self.own(rows) - start)].clone())
        return torch.cat(parts)

    def sum(self, part: Tensor) -> Tensor:
        """The sum of what every worker's latents give."""
        if self.world == 1:
            return part
        whole: Tensor = _Sum.apply(part, self)  # type: ignore[no-untyped-call]
        return whole

    def whole(self, part_f: Tensor) -> Tensor:
        """[..., F] of all latents from [..., f] of every worker's."""
        if self.world == 1:
            return part_f
        whole: Tensor = _Whole.apply(part_f, self)  # type: ignore[no-untyped-call]
        return whole

    def mean(self, values_N: Tensor) -> Tensor:
        """The mean of what all latents have, of which each worker gives any number; without gradient."""
        if self.world == 1:
            return values_N.mean()
        count = self.workers.total(torch.tensor(len(values_N)))
        return self.workers.total(values_N.sum()) / int(count)

    def once(self, shared: Tensor) -> Tensor:
        """What every worker has whole and uses alike: worker 0 alone gets its gradient, so that the sum has it once."""
        return shared if self.rank == 0 else shared.detach()

    def sum_gradients(self, shared: Iterable[nn.Parameter]) -> None:
        """Complete the gradients of what every worker has whole, of which each has its latents' part."""
        for parameter in shared if self.world > 1 else ():
            if parameter.requires_grad:
                part = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.workers.total(part)

    def gradient_scale(
        self, parameters: Iterable[nn.Parameter], shared: Iterable[nn.Parameter], limit: float
    ) -> Tensor:
        """What to divide gradients by so that their norm over all workers is at most `limit`, a scalar in float32.

        Shared parameters are counted once.
        """
        elsewhere = set(shared) if self.rank else set()
        gradients = [part.grad for part in parameters if part.grad is not None and part not in elsewhere]
        norm = nn.utils.get_total_norm(gradients)
        if self.world > 1:
            norm = self.workers.total(norm.square()).sqrt()
        return (norm / limit).clamp_min(1.0).float()

    def along(self, name: str) -> int | None:
        """The dimension in which a tensor of a run's state is divided; None if every worker has it whole."""
        parameter, _, moment = name.removeprefix("adam/").partition("/")
        leaf = parameter.rpartition(".")[2]
        if self.world == 1 or ".biases." in parameter or leaf == "threshold" or moment == "step":
            return None
        return 1 if leaf in ("W_enc", "W") else 0

    def collected(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A run's state made whole, one tensor after the other, on the processor of worker 0; nothing elsewhere."""
        if self.world == 1:
            return dict(tensors)
        whole = {}
        for name, tensor in tensors.items():
            dimension = self.along(name)
            parts = [tensor.cpu()] if dimension is None else self.workers.collect(tensor.cpu())
            if self.workers.is_first:
                whole[name] = torch.cat(parts, dimension) if dimension is not None else parts[0]
        return whole


UNDIVIDED = Latents()


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, latents: Latents) -> Tensor:
        return latents.workers.total(part)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return gradients[0], None


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, latents: Latents) -> Tensor:
        ctx.latents = latents
        return torch.cat(list(latents.workers.gather(part[None])), -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return gradients[0].chunk(ctx.latents.world, -1)[ctx.latents.rank], None
