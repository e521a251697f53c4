"""Levels in training: an encoder, a decoder, and between them an activation, a class of `Level` each.

Shapes: B vectors of a batch, I width of what a level reads, F latents of a level. `ACTIVATIONS` in hsae.registry names
the classes; what an activation is, is in its class.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hsae.train.config.run_config import RunConfig
from hsae.train.model import sparse_products
from hsae.train.model.activations import (
    batch_top_k,
    batch_top_k_entries,
    jump_relu,
    step_count,
    top_k,
    top_k_entries,
    widened,
)
from hsae.train.model.fused import Fused
from hsae.train.parallel.latent_sharding import UNDIVIDED, Latents
from hsae.train.parallel.workers import ALONE, Workers

THRESHOLD_DECAY = 0.99
BOUND_SHARE = 0.9  # of the last batch's smallest value kept: the next one keeps nothing below it, almost always


@dataclass
class LevelOutput:
    """What one level did with one batch."""

    read: Tensor
    """[B, I] the vectors the level read, before its bias was taken off."""
    pre: Tensor
    """[B, F] pre-activations."""
    code: sparse_products.Code
    """The level's code, [B, F], or its active entries if it was computed sparsely."""
    decoded: Tensor
    """[B, I] decoder output, without bias."""
    _dense: Tensor | None = None

    @property
    def acts(self) -> Tensor:
        """[B, F] the level's code."""
        if isinstance(self.code, Tensor):
            return self.code
        if self._dense is None:
            self._dense = sparse_products.dense(self.code)
        return self._dense

    def detached(self) -> "LevelOutput":
        """The same without gradients."""
        code = self.code
        code = code.detach() if isinstance(code, Tensor) else code._replace(values=code.values.detach())
        return LevelOutput(self.read.detach(), self.pre.detach(), code, self.decoded.detach())


class Level(nn.Module):
    """One encoder and decoder: code = activate((read - bias) W_enc + b_enc), decoded = code W_dec.

    Where latents are divided, weights, pre-activations and code are those of a worker's own, [B, f]; what is decoded is
    of all. `workers` are those who hold the rest of a batch. A subclass gives `activate`, and `architecture`: the form
    in SAELens's terms that it takes when it is trained.
    """

    architecture: ClassVar[str]
    """`standard`, `topk`, `jumprelu` or `gated`."""
    is_controlled: ClassVar[bool] = False
    """Whether a controller leads the L0 to its target by the coefficient of `penalty`."""
    is_masked: ClassVar[bool] = False
    """Whether the code is the pre-activation where it is not 0, so that gradients are needed at active latents only."""
    revives_dead: ClassVar[bool] = True
    """Whether the auxiliary loss can revive dead latents."""
    has_begun: bool = True
    """Whether nothing is left to be set from the first batch."""
    own_weights: ClassVar[tuple[str, ...]] = ()
    """Names of the activation's own parameters, [F] each, which begin at 0."""
    threshold: Tensor
    """Scalar: smallest pre-activation that counts at inference, an average over batches; NaN before the first."""
    smallest: Tensor
    """Scalar: the smallest value the last batch kept; 0 before the first."""

    def __init__(
        self,
        width_in: int,
        width: int,
        run: RunConfig,
        l0: float,
        generator: torch.Generator,
        latents: Latents = UNDIVIDED,
        workers: Workers = ALONE,
    ) -> None:
        super().__init__()

        def directions(count: int) -> Tensor:
            rows = torch.randn(count, width_in, generator=generator)
            return rows.div_(rows.norm(dim=1, keepdim=True))

        self.latents, self.workers, self.l0, self.run = latents, workers, l0, run
        rows = latents.draw_own(directions, width)
        self.W_dec = nn.Parameter(rows)
        self.W_enc = nn.Parameter(rows.T.clone().contiguous())
        self.b_enc = nn.Parameter(torch.zeros(len(rows)))
        for name in self.own_weights:
            self.register_parameter(name, nn.Parameter(torch.zeros(len(rows))))
        self.sparse = False
        self.register_buffer("threshold", torch.tensor(math.nan))
        self.register_buffer("smallest", torch.tensor(0.0), persistent=False)

    def activate(self, pre_BF: Tensor) -> Tensor:
        """The code [B, F]."""
        raise NotImplementedError

    def penalty(self, output: LevelOutput) -> Tensor:
        """What the controller's coefficient multiplies, a scalar: the code's mean L1."""
        return self.latents.sum(sparse_products.mean_sum(output.code))

    def folded(self, scale: float) -> dict[str, Tensor]:
        """Encoder bias and what the architecture has besides, [F] each, for vectors that are not scaled by `scale`."""
        return {"b_enc": self.b_enc / scale}

    def reset(self, dead: Tensor, living_F: Tensor) -> None:
        """Set the activation's own weights of latents that get new directions: `dead` by index, the living by mask."""
        for name in self.own_weights:
            self.get_parameter(name)[dead] = 0

    def pre(self, read_BI: Tensor, bias_I: Tensor) -> Tensor:
        """Pre-activations [B, F]; in a sparse pass without gradient, which the active ones alone will get."""
        fixed = bias_I.detach()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.sparse):
            pre_BF = torch.addmm(self.b_enc, read_BI - fixed, self.W_enc)  # where it rounds, so is the sum
            if bias_I.requires_grad and torch.is_grad_enabled():
                # zero, but brings the bias its gradient without a product of B rows
                pre_BF = pre_BF + (fixed - bias_I) @ self.W_enc
        return pre_BF

    def forward(self, read_BI: Tensor, bias_I: Tensor) -> LevelOutput:
        """Encode and decode one batch by this level's own activation."""
        pre_BF = self.pre(read_BI, bias_I)
        return self.decoded(read_BI, bias_I, pre_BF, self.select(pre_BF))

    @property
    def is_sparse(self) -> bool:
        """Whether this pass computes gradients at active latents only."""
        return self.sparse and torch.is_grad_enabled()

    def select(self, pre_BF: Tensor) -> Tensor | sparse_products.Pattern:
        """The code [B, F]; or, in a sparse pass, where it is active."""
        acts_BF = self.activate(pre_BF)
        at = sparse_products.pattern_of(acts_BF) if self.is_sparse else None
        return acts_BF if at is None else at

    def decoded(
        self, read_BI: Tensor, bias_I: Tensor, pre_BF: Tensor, selected: Tensor | sparse_products.Pattern
    ) -> LevelOutput:
        """The output for what `select` gave, with its gradients."""
        if isinstance(selected, sparse_products.Pattern):
            values_N = sparse_products.encode(read_BI, bias_I, self.W_enc, self.b_enc, pre_BF, selected)
            decoded_BI = self.latents.sum(sparse_products.decode(values_N, self.W_dec, selected))
            return LevelOutput(read_BI, pre_BF, sparse_products.Active(selected, values_N), decoded_BI)
        if self.is_sparse:
            pre_BF = sparse_products.encode(read_BI, bias_I, self.W_enc, self.b_enc, pre_BF, None)
            selected = pre_BF * (selected > 0)
        return LevelOutput(read_BI, pre_BF, selected, self.latents.sum(selected @ self.W_dec))

    def likely_bound(self) -> Tensor:
        """A scalar likely below the smallest value that the next batch keeps; 0 before the first."""
        return BOUND_SHARE * self.smallest

    @torch.no_grad()
    def track_threshold(self, smallest: Tensor) -> None:
        """Move the inference threshold towards the smallest value a batch kept."""
        self.smallest.copy_(smallest)
        moved = self.threshold * THRESHOLD_DECAY + smallest * (1 - THRESHOLD_DECAY)
        self.threshold.copy_(torch.where(torch.isnan(self.threshold), smallest, moved))

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Take from the decoder's gradient what would only change the rows' norms."""
        if self.W_dec.grad is not None:
            _remove_parallel(self.W_dec.grad, self.W_dec)

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Give the decoder rows unit norm."""
        _normalise(self.W_dec)


@Fused
def _remove_parallel(gradient_FI: Tensor, rows_FI: Tensor) -> None:
    """Take from each gradient its part along the row, which has unit norm."""
    gradient_FI.addcmul_(torch.linalg.vecdot(gradient_FI, rows_FI)[:, None], rows_FI, value=-1)


@Fused
def _normalise(rows_FI: Tensor) -> None:
    """Give rows unit norm."""
    rows_FI.div_(torch.linalg.vector_norm(rows_FI, dim=1, keepdim=True).clamp_min(1e-12))


class ReLULevel(Level):
    """ReLU with an L1 penalty."""

    architecture, is_controlled, is_masked = "standard", True, True
    revives_dead = False  # below zero a dead latent has no gradient

    def activate(self, pre_BF: Tensor) -> Tensor:
        """The code [B, F]."""
        return torch.relu(pre_BF)


class TopKLevel(Level):
    """Each vector's k largest (Gao et al. 2024, arXiv 2406.04093); k is `l0`."""

    architecture, is_masked = "topk", True

    def activate(self, pre_BF: Tensor) -> Tensor:
        """The code [B, F]."""
        return top_k(pre_BF, int(self.l0), self.latents)

    def select(self, pre_BF: Tensor) -> Tensor | sparse_products.Pattern:
        """The code [B, F]; or, in a sparse pass, where it is active."""
        if not self.is_sparse:
            return self.activate(pre_BF)
        return sparse_products.Pattern(top_k_entries(pre_BF, int(self.l0), self.latents), pre_BF)


class BatchTopKLevel(Level):
    """The batch's largest (Bussmann et al. 2024, arXiv 2412.06410); at inference those above a threshold."""

    architecture, is_masked = "jumprelu", True

    def activate(self, pre_BF: Tensor) -> Tensor:
        """The code [B, F]; in training mode the threshold follows what the batch keeps."""
        if not self.training:
            return torch.relu(pre_BF) * (pre_BF > self.threshold)
        acts_BF, smallest = batch_top_k(pre_BF, self.l0, self.likely_bound(), self.workers, self.latents)
        self.track_threshold(smallest)
        return acts_BF

    def select(self, pre_BF: Tensor) -> Tensor | sparse_products.Pattern:
        """The code [B, F]; or, in a sparse pass, where it is active."""
        if not (self.training and self.is_sparse):
            return super().select(pre_BF)
        bound = self.likely_bound()
        (entries_N,), smallest = batch_top_k_entries([pre_BF], self.l0, bound, self.workers, self.latents)
        self.track_threshold(smallest)
        return sparse_products.Pattern(entries_N, pre_BF)

    def folded(self, scale: float) -> dict[str, Tensor]:
        """Encoder bias and threshold."""
        return {**super().folded(scale), "threshold": torch.full_like(self.b_enc, self.threshold.item()) / scale}


class JumpReLULevel(Level):
    """A learned threshold for each latent (Rajamanoharan et al. 2024, arXiv 2407.14435)."""

    architecture, is_controlled, own_weights = "jumprelu", True, ("log_threshold",)
    log_threshold: nn.Parameter
    has_begun = False

    def activate(self, pre_BF: Tensor) -> Tensor:
        """The code [B, F]."""
        return jump_relu(pre_BF, self.thresholds(pre_BF), self.run.bandwidth)

    def penalty(self, output: LevelOutput) -> Tensor:
        """The code's mean L0."""
        return self.latents.sum(step_count(output.pre, self.thresholds(output.pre), self.run.bandwidth))

    def thresholds(self, pre_BF: Tensor) -> Tensor:
        """[F]; they begin, all equal, where the first batch has the level's L0."""
        if self.training and not self.has_begun:
            self.has_begun = True
            with torch.no_grad():
                self.track_threshold(batch_top_k(pre_BF, self.l0, workers=self.workers, latents=self.latents)[1])
                self.log_threshold.copy_(self.threshold.clamp_min(1e-3).log().expand_as(self.log_threshold))
        return self.log_threshold.exp().to(pre_BF.dtype)

    def folded(self, scale: float) -> dict[str, Tensor]:
        """Encoder bias and thresholds."""
        return {**super().folded(scale), "threshold": self.log_threshold.exp() / scale}

    def reset(self, dead: Tensor, living_F: Tensor) -> None:
        """The threshold becomes the living ones' mean."""
        has_living = bool(self.latents.whole(living_F).any())
        self.log_threshold[dead] = self.latents.mean(self.log_threshold[living_F]) if has_living else 0.0


class GatedLevel(Level):
    """A gate, with `b_enc` as its bias, and a magnitude (Rajamanoharan et al. 2024, arXiv 2404.16014)."""

    architecture, is_controlled, revives_dead, own_weights = "gated", True, False, ("r_mag", "b_mag")
    r_mag: nn.Parameter
    b_mag: nn.Parameter

    def activate(self, pre_BF: Tensor) -> Tensor:
        """The code [B, F]."""
        return torch.relu((pre_BF - self.b_enc) * self.r_mag.exp() + self.b_mag) * (pre_BF > 0)

    def penalty(self, output: LevelOutput) -> Tensor:
        """The gate's mean L1."""
        return self.latents.sum(widened(output.pre.relu()).sum(1).mean())

    def folded(self, scale: float) -> dict[str, Tensor]:
        """Biases of gate and magnitude; r_mag scales pre-activations and has no unit."""
        gate, magnitude = self.b_enc / scale, self.b_mag / scale
        return {"b_enc": torch.zeros_like(gate), "b_gate": gate, "b_mag": magnitude, "r_mag": self.r_mag}
