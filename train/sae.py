"""The hierarchical SAE that is trained: levels, how they read and decode, and what a forward pass returns.

Shapes: B vectors of a batch, D residual width, I width of what a level reads (D, or the level below's F), F latents of a
level, K active latents, L levels. Levels are numbered 1 (finest, widest) to L (coarsest); lists hold them in that order.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hsae.train.config import RunConfig

THRESHOLD_DECAY = 0.99


def seed_of(*parts: int) -> int:
    """A 63-bit seed from small whole numbers, well mixed."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = ((state ^ part) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return state >> 1


class LevelOutput(NamedTuple):
    """What one level did with one batch."""

    read: Tensor
    """[B, I] the vectors the level read, before its bias was taken off."""
    pre: Tensor
    """[B, F] pre-activations."""
    acts: Tensor
    """[B, F] the level's code."""
    decoded: Tensor
    """[B, I] decoder output, without bias."""


class Output(NamedTuple):
    """A forward pass; dictionaries hold the levels that took part."""

    levels: dict[int, LevelOutput]
    reconstructions: dict[int, Tensor]
    """[B, D] for level l: additive b + sum of the levels >= l that took part; stacked: the cascade of decoders from level l."""


class Level(nn.Module):
    """One encoder and decoder: code = activation((read - bias) W_enc + b_enc), decoded = code W_dec."""

    threshold: Tensor
    """Scalar: smallest pre-activation that counts at inference (batchtopk), an average over batches; NaN before the first."""

    def __init__(self, width_in: int, width: int, activation: str, l0: float, generator: torch.Generator) -> None:
        super().__init__()
        rows = torch.randn(width, width_in, generator=generator)
        rows = rows / rows.norm(dim=1, keepdim=True)
        self.W_dec = nn.Parameter(rows)
        self.W_enc = nn.Parameter(rows.T.clone().contiguous())
        self.b_enc = nn.Parameter(torch.zeros(width))
        self.activation, self.l0 = activation, l0
        self.register_buffer("threshold", torch.tensor(math.nan))

    def forward(self, read_BI: Tensor, bias_I: Tensor) -> LevelOutput:
        """Encode and decode one batch; in training mode `batchtopk` picks across the batch and tracks its threshold."""
        pre_BF = (read_BI - bias_I) @ self.W_enc + self.b_enc
        acts_BF = self._activate(pre_BF)
        return LevelOutput(read_BI, pre_BF, acts_BF, acts_BF @ self.W_dec)

    def _activate(self, pre_BF: Tensor) -> Tensor:
        if self.activation == "relu":
            return torch.relu(pre_BF)
        if self.activation == "topk":
            values, indices = torch.topk(pre_BF, int(self.l0), dim=-1, sorted=False)
            return torch.zeros_like(pre_BF).scatter(-1, indices, values.relu())
        if not self.training:
            return torch.relu(pre_BF) * (pre_BF > self.threshold)
        flat = pre_BF.relu().flatten()
        values, indices = torch.topk(flat, round(pre_BF.shape[0] * self.l0), sorted=False)
        self._track_threshold(values.detach())
        return torch.zeros_like(flat).scatter(0, indices, values).view_as(pre_BF)

    @torch.no_grad()
    def _track_threshold(self, kept: Tensor) -> None:
        smallest = torch.where(kept > 0, kept, torch.inf).min().float()
        smallest = torch.where(
            torch.isfinite(smallest), smallest, 0.0
        )  # nothing fired: keep nothing but what is positive
        moved = self.threshold * THRESHOLD_DECAY + smallest * (1 - THRESHOLD_DECAY)
        self.threshold.copy_(torch.where(torch.isnan(self.threshold), smallest, moved))

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Take from the decoder's gradient what would only change the rows' norms."""
        if self.W_dec.grad is not None:
            self.W_dec.grad -= (self.W_dec.grad * self.W_dec).sum(1, keepdim=True) * self.W_dec

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Give the decoder rows unit norm."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12))


class HierarchicalSAE(nn.Module):
    """Levels that read the residual (`flat`, `additive`: one shared bias) or each other (`stacked`: a bias each)."""

    def __init__(self, run: RunConfig, d_in: int, *, seed: int = 0) -> None:
        super().__init__()
        self.structure, self.stop_gradient = run.structure, run.stop_gradient
        self.widths, self.d_in = run.widths, d_in
        generator = torch.Generator().manual_seed(seed_of(seed, run.number))
        reads = (d_in, *run.widths[:-1]) if run.structure == "stacked" else (d_in,) * run.levels
        self.levels = nn.ModuleList(
            Level(read, width, run.activation, l0, generator)
            for read, width, l0 in zip(reads, run.widths, run.l0, strict=True)
        )
        biases = reads if run.structure == "stacked" else reads[:1]
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(width)) for width in biases)

    def level(self, number: int) -> Level:
        """Level `number`, from 1 (finest)."""
        level = self.levels[number - 1]
        assert isinstance(level, Level)
        return level

    def bias(self, number: int) -> nn.Parameter:
        """The bias of what level `number` reads."""
        bias = self.biases[number - 1 if self.structure == "stacked" else 0]
        assert isinstance(bias, nn.Parameter)
        return bias

    def forward(self, x_BD: Tensor, active: Sequence[int] | None = None) -> Output:
        """Codes and reconstructions of the `active` levels (all if None); a stacked level needs those below it computed."""
        numbers = sorted(active) if active is not None else list(range(1, len(self.levels) + 1))
        if self.structure == "stacked":
            return self._stacked(x_BD, numbers)
        outputs = {number: self.level(number)(x_BD, self.bias(number)) for number in numbers}
        reconstructions: dict[int, Tensor] = {}
        total = self.bias(1).expand_as(x_BD)
        for number in reversed(numbers):  # coarsest first, so that each sum is the nested one
            total = total + outputs[number].decoded
            reconstructions[number] = total
        return Output(outputs, reconstructions)

    def _stacked(self, x_BD: Tensor, numbers: list[int]) -> Output:
        outputs: dict[int, LevelOutput] = {}
        reconstructions: dict[int, Tensor] = {}
        read = x_BD
        for number in range(1, max(numbers) + 1):
            output = self.level(number)(read, self.bias(number))
            read = output.acts.detach() if self.stop_gradient and self.training else output.acts
            if number in numbers:
                outputs[number] = output
                reconstructions[number] = self._cascade(output, number)
        return Output(outputs, reconstructions)

    def _cascade(self, output: LevelOutput, number: int) -> Tensor:
        decoded = output.decoded + self.bias(number)
        for lower in range(number - 1, 0, -1):
            W_dec: Tensor = self.level(lower).W_dec
            bias: Tensor = self.bias(lower)
            if self.stop_gradient and self.training:
                W_dec, bias = W_dec.detach(), bias.detach()
            decoded = decoded @ W_dec + bias
        return decoded

    def target(self, number: int, x_BD: Tensor, output: Output) -> tuple[Tensor, Tensor]:
        """What level `number` alone should still explain: ([B, I] target, [B, I] reconstruction without dead latents).

        additive: x and the nested reconstruction; stacked: what the level reads and its own reconstruction.
        """
        if self.structure == "stacked":
            level = output.levels[number]
            return level.read, level.decoded + self.bias(number)
        return x_BD, output.reconstructions[number]
