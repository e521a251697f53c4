"""Composition: W_l, level l's code as a sparse non-negative mixture of level l-1's.

Shapes: B vectors of a batch, F coarse latents (level l), G fine latents (level l-1).

normalised: codes are divided by their running root mean square before they meet W, because otherwise scale moves freely
between W and the codes; W >= 0 is kept by projection and thinned by a proximal step after the optimiser's.

literal: ||W h_{l-1} - h_l||^2 + l1 |W|, both codes with gradient.

probe and frozen are controls of normalised: W reads codes that don't feel it; the codes feel a random W that is not
trained.
"""

from typing import Any

import torch
from torch import Tensor, nn

from hsae.train.config.run_config import CompositionConfig
from hsae.train.model.activations import widened
from hsae.train.model.sparse_products import Active, Code, decode, mean_square
from hsae.train.parallel.latent_sharding import UNDIVIDED, Latents
from hsae.train.parallel.workers import ALONE, Workers

RMS_DECAY = 0.99
RMS_FLOOR = 1e-8


class Composition(nn.Module):
    """The map W [F, G] between two neighbouring levels, with the running rms of both codes.

    Where latents are divided, a worker's fine code [B, g], columns of W and rms of both codes are those of its own
    latents. `workers` are those who hold the rest of a batch.
    """

    rms_coarse: Tensor
    """[F] root mean square of the coarse code, over all tokens."""
    rms_fine: Tensor
    """[G] likewise of the fine code."""

    def __init__(
        self,
        fine: int,
        coarse: int,
        config: CompositionConfig,
        generator: torch.Generator,
        latents: Latents = UNDIVIDED,
        workers: Workers = ALONE,
    ) -> None:
        super().__init__()
        self.config, self.latents, self.workers = config, latents, workers

        def random(rows: int) -> Tensor:
            return torch.rand(rows, fine, generator=generator) * (2 / fine)

        def frozen(rows: int) -> Tensor:
            """Half-normal entries, rows of unit norm: mixtures of independent codes have rms 1."""
            entries = torch.randn(rows, fine, generator=generator).abs()
            return entries.div_(entries.norm(dim=1, keepdim=True))

        learns = config.mode != "frozen"
        self.W = nn.Parameter(latents.draw_own(random if learns else frozen, coarse, 1), requires_grad=learns)
        self.register_buffer("rms_coarse", torch.zeros(latents.own(coarse)))
        self.register_buffer("rms_fine", torch.zeros(latents.own(fine)))

    @torch.no_grad()
    def track(self, fine: Code, coarse: Code) -> None:
        """Move the running rms of both codes towards this batch's."""
        for rms, code in ((self.rms_fine, fine), (self.rms_coarse, coarse)):
            square = self.workers.mean(mean_square(code).to(rms.dtype))
            before = rms.square()
            rms.copy_(torch.where(before > 0, before * RMS_DECAY + square * (1 - RMS_DECAY), square).sqrt())

    def loss(self, fine: Code, coarse_BF: Tensor) -> Tensor:
        """The composition loss of one batch, a scalar; `track` it first."""
        if self.config.mode == "literal":
            difference = self._mixture(fine) - self.latents.whole(coarse_BF)
            return widened(difference).square().sum(1).mean() + self.config.l1 * self.latents.sum(self.W.abs().sum())
        probe = self.config.mode == "probe"
        scale = self.rms_fine.clamp_min(RMS_FLOOR)
        coarse = self.latents.whole(coarse_BF / self.rms_coarse.clamp_min(RMS_FLOOR))
        if isinstance(fine, Tensor):
            mixture = self._mixture((fine.detach() if probe else fine) / scale)
        else:
            values = fine.values.detach() if probe else fine.values
            mixture = self._mixture(Active(fine.at, values / scale.index_select(0, fine.at.latents)))
        commitment = 0.0 if probe else self.config.commitment
        distance: Tensor = _Distance.apply(widened(mixture), widened(coarse), commitment)  # type: ignore[no-untyped-call]
        return distance

    def _mixture(self, fine: Code) -> Tensor:
        """[B, F] W h of a fine code."""
        return self.latents.sum(fine @ self.W.T if isinstance(fine, Tensor) else decode(fine.values, self.W.T, fine.at))

    @torch.no_grad()
    def project(self, learning_rate: float, sparsify: bool) -> None:
        """After the optimiser's step (normalised, probe): soft-threshold by rate x l1 if `sparsify`, then W >= 0."""
        if self.config.mode in ("normalised", "probe"):
            self.W.sub_(learning_rate * self.config.l1 if sparsify else 0.0).clamp_min_(0)

    @torch.no_grad()
    def contributions(self) -> Tensor:
        """[F, G] share of coarse latent i's rms that fine latent j brings: w_ij rms_j / rms_i in the codes' units."""
        rms_coarse = self.latents.whole(self.rms_coarse)
        alive = (rms_coarse > RMS_FLOOR)[:, None] & (self.rms_fine > RMS_FLOOR)[None, :]
        if self.config.mode != "literal":
            return self.W * alive
        return self.W * alive * self.rms_fine[None, :] / rms_coarse[:, None].clamp_min(RMS_FLOOR)

    @torch.no_grad()
    def weight(self) -> Tensor:
        """[F, G] W in the codes' own units: h_l is compared with weight() @ h_{l-1}; rows of dead latents are zero."""
        if self.config.mode == "literal":
            return self.W.clone()
        return self.contributions() * self.rms_coarse[:, None] / self.rms_fine[None, :].clamp_min(RMS_FLOOR)

    @torch.no_grad()
    def parents(self) -> Tensor:
        """[G] for each fine latent the coarse one with the largest weight on it, or -1 if there is none."""
        largest, parents = self.W.max(0)
        return torch.where(largest > 0, parents, -1)

    @torch.no_grad()
    def health(self, fine_BG: Tensor, coarse_BF: Tensor) -> dict[str, float]:
        """How W does on a batch.

        `unexplained`: E||W h_f - h_c||^2 / E||h_c||^2 in the mode's own units (0 is perfect, 1 is what W = 0 gives).
        `nonzero`: share of W that is not 0. `participation`: median over coarse latents of (sum |C|)^2 / sum C^2.
        """
        if self.config.mode == "literal":
            fine, coarse = widened(fine_BG), widened(coarse_BF)
        else:
            fine = widened(fine_BG) / self.rms_fine.clamp_min(RMS_FLOOR)
            coarse = widened(coarse_BF) / self.rms_coarse.clamp_min(RMS_FLOOR)
        coarse = self.latents.whole(coarse)
        missed = self.workers.total((self._mixture(fine) - coarse).square().sum())
        unexplained = missed / self.workers.total(coarse.square().sum()).clamp_min(1e-12)
        shares = self.contributions().abs()
        sums, squares = self.latents.sum(shares.sum(1)), self.latents.sum(shares.square().sum(1))
        counted = squares > 0
        ratios = sums.square()[counted] / squares[counted]
        return {
            "unexplained": unexplained.item(),
            "nonzero": self.latents.workers.mean((self.W != 0).float().mean()).item(),
            "participation": ratios.median().item() if len(ratios) else 0.0,
        }


class _Distance(torch.autograd.Function):
    """(1 + c) times the mean square of a mixture minus its target, of which the target feels c parts."""

    @staticmethod
    def forward(ctx: Any, mixture: Tensor, target: Tensor, commitment: float) -> Tensor:
        difference = mixture - target
        ctx.save_for_backward(difference)
        ctx.commitment = commitment
        return (1 + commitment) * difference.square().mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor | None, None]:
        (difference,) = ctx.saved_tensors
        to_mixture = difference * (2 * gradients[0] / difference.numel())
        return to_mixture, -ctx.commitment * to_mixture if ctx.commitment else None, None
