"""The hierarchical SAE that is trained: levels, how they read and decode, and what a forward pass returns.

Shapes: B vectors of a batch, D residual width, I width of what a level reads (D, or the level below's F), F latents of a
level, K active latents, L levels. Levels are numbered 1 (finest, widest) to L (coarsest); lists hold them in that order.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hsae.train.config.run_config import RunConfig
from hsae.train.model import sparse_products
from hsae.train.model.activations import batch_top_k, jump_relu, top_k
from hsae.train.model.views import NO_PARENT, parent_fires
from hsae.train.training.latent_sharding import UNDIVIDED, Latents
from hsae.train.training.workers import ALONE, Workers

THRESHOLD_DECAY = 0.99
GUESS = 0.7  # of the average threshold: most batches keep nothing below it
SMALLEST_SPARSE = 1 << 16  # entries of W_enc below which a dense step is the faster one


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
    active: sparse_products.Active | None = None
    """Where the code is active and with what values, if it was computed sparsely."""


class Output(NamedTuple):
    """A forward pass; dictionaries hold the levels that took part."""

    levels: dict[int, LevelOutput]
    reconstructions: dict[int, Tensor]
    """[B, D] for level l: additive b + sum of the levels >= l that took part; stacked: the cascade of decoders from level l."""


class Level(nn.Module):
    """One encoder and decoder: code = activation((read - bias) W_enc + b_enc), decoded = code W_dec.

    Where latents are divided, weights, pre-activations and code are those of a worker's own, [B, f]; what is decoded is of all.
    """

    workers: Workers = ALONE
    """Who holds the rest of a batch in training."""
    threshold: Tensor
    """Scalar: smallest pre-activation that counts at inference (batchtopk), an average over batches; NaN before the first batch."""

    def __init__(
        self,
        width_in: int,
        width: int,
        run: RunConfig,
        l0: float,
        generator: torch.Generator,
        latents: Latents = UNDIVIDED,
    ) -> None:
        super().__init__()

        def directions(count: int) -> Tensor:
            drawn = torch.randn(count, width_in, generator=generator)
            return drawn.div_(drawn.norm(dim=1, keepdim=True))

        self.latents = latents
        rows, width = latents.drawn(directions, width), latents.own(width)
        self.W_dec = nn.Parameter(rows)
        self.W_enc = nn.Parameter(rows.T.clone().contiguous())
        self.b_enc = nn.Parameter(torch.zeros(width))
        if run.activation == "jumprelu":
            self.log_threshold = nn.Parameter(torch.zeros(width))
        if run.activation == "gated":  # b_enc is the gate's bias
            self.r_mag = nn.Parameter(torch.zeros(width))
            self.b_mag = nn.Parameter(torch.zeros(width))
        self.activation, self.l0, self.bandwidth = run.activation, l0, run.bandwidth
        self.sparse = False
        self.register_buffer("threshold", torch.tensor(math.nan))

    def pre(self, read_BI: Tensor, bias_I: Tensor) -> Tensor:
        """Pre-activations [B, F]; without gradient where the active ones alone will get it (`sparse`)."""
        fixed = bias_I.detach()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.sparse):
            pre_BF = (read_BI - fixed) @ self.W_enc + self.b_enc
            if (
                bias_I.requires_grad and torch.is_grad_enabled()
            ):  # zero, but brings the bias its gradient without a product of B rows
                pre_BF = pre_BF + (fixed - bias_I) @ self.W_enc
        return pre_BF

    def forward(self, read_BI: Tensor, bias_I: Tensor) -> LevelOutput:
        """Encode and decode one batch by this level's own activation."""
        pre_BF = self.pre(read_BI, bias_I)
        return self.decoded(read_BI, bias_I, pre_BF, self.activate(pre_BF))

    def decoded(self, read_BI: Tensor, bias_I: Tensor, pre_BF: Tensor, acts_BF: Tensor) -> LevelOutput:
        """The output for a code, with its gradients."""
        if self.sparse and torch.is_grad_enabled():
            if (at := sparse_products.pattern_of(acts_BF)) is not None:
                values_N = sparse_products.encode(read_BI, bias_I, self.W_enc, self.b_enc, pre_BF, at)
                acts_BF = torch.zeros_like(acts_BF).flatten().index_put((at.flat,), values_N).view_as(acts_BF)
                decoded_BI = self.latents.sum(sparse_products.decode(values_N, self.W_dec, at))
                return LevelOutput(read_BI, pre_BF, acts_BF, decoded_BI, sparse_products.Active(at, values_N))
            pre_BF = (read_BI - bias_I) @ self.W_enc + self.b_enc
            acts_BF = pre_BF * (acts_BF > 0)
        return LevelOutput(read_BI, pre_BF, acts_BF, self.latents.sum(acts_BF @ self.W_dec))

    def activate(self, pre_BF: Tensor) -> Tensor:
        """The code [B, F]; in training mode batchtopk picks across the batch and tracks its threshold."""
        if self.activation == "relu":
            return torch.relu(pre_BF)
        if self.activation == "topk":
            return top_k(pre_BF, int(self.l0), self.latents)
        if self.activation == "jumprelu":
            return jump_relu(pre_BF, self.jump_threshold(pre_BF), self.bandwidth)
        if self.activation == "gated":
            return torch.relu((pre_BF - self.b_enc) * self.r_mag.exp() + self.b_mag) * (pre_BF > 0)
        if not self.training:
            return torch.relu(pre_BF) * (pre_BF > self.threshold)
        acts_BF, smallest = batch_top_k(pre_BF, self.l0, self.guess(), self.workers, self.latents)
        self.track_threshold(smallest)
        return acts_BF

    def guess(self) -> Tensor | None:
        """A value likely below the smallest that the next batch keeps; None where it saves nothing."""
        return GUESS * self.threshold if self.threshold.device.type == "cpu" and self.threshold > 0 else None

    def jump_threshold(self, pre_BF: Tensor) -> Tensor:
        """jumprelu's thresholds [F]; they begin, all equal, where the first batch has the level's L0."""
        if self.training and torch.isnan(self.threshold):
            with torch.no_grad():
                self.track_threshold(batch_top_k(pre_BF, self.l0, workers=self.workers, latents=self.latents)[1])
                self.log_threshold.copy_(self.threshold.clamp_min(1e-3).log().expand_as(self.log_threshold))
        return self.log_threshold.exp().to(pre_BF.dtype)

    @torch.no_grad()
    def track_threshold(self, smallest: Tensor) -> None:
        """Move the inference threshold towards the smallest value a batch kept."""
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


class TrainableSAE(nn.Module):
    """Levels that read the residual (`flat`, `additive`: one shared bias) or each other (`stacked`: a bias each)."""

    def __init__(self, run: RunConfig, d_in: int, *, seed: int = 0, latents: Latents = UNDIVIDED) -> None:
        super().__init__()
        self.latents = latents
        self.structure, self.stop_gradient, self.selection = run.structure, run.stop_gradient, run.selection
        self.widths, self.d_in = run.widths, d_in
        generator = torch.Generator().manual_seed(seed_of(seed, run.number))
        reads = (d_in, *run.widths[:-1]) if run.structure == "stacked" else (d_in,) * run.levels
        self.levels = nn.ModuleList(
            Level(read, width, run, l0, generator, latents)
            for read, width, l0 in zip(reads, run.widths, run.l0, strict=True)
        )
        biases = reads if run.structure == "stacked" else reads[:1]
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(width)) for width in biases)
        for number in range(1, run.levels) if run.child_gate else ():
            self.register_buffer(f"parents{number}", torch.full((latents.own(run.widths[number - 1]),), NO_PARENT))

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

    def parents(self, number: int) -> Tensor | None:
        """[F] for each latent of level `number` its parent in the level above, or NO_PARENT; None if nothing gates it."""
        return self._buffers.get(f"parents{number}")

    def use_sparse(self) -> None:
        """Compute gradients at active latents only, where the activation allows it and the level is large enough for it to pay."""
        for number in range(1, len(self.levels) + 1):
            level = self.level(number)
            allowed = level.activation in ("relu", "topk", "batchtopk")
            level.sparse = allowed and level.W_enc.numel() >= SMALLEST_SPARSE

    def forward(self, x_BD: Tensor, active: Sequence[int] | None = None) -> Output:
        """Codes and reconstructions of the `active` levels (all if None); a stacked level needs those below it computed."""
        numbers = sorted(active) if active is not None else list(range(1, len(self.levels) + 1))
        if self.structure == "stacked":
            return self._stacked(x_BD, numbers)
        pres = {number: self.level(number).pre(x_BD, self.bias(number)) for number in numbers}
        joint = self.selection == "joint" and self.training
        codes = self._joint(pres) if joint else self._codes(pres)
        outputs = {
            number: self.level(number).decoded(x_BD, self.bias(number), pres[number], codes[number])
            for number in numbers
        }
        reconstructions: dict[int, Tensor] = {}
        total = self.latents.once(self.bias(1)).expand_as(x_BD)
        for number in reversed(numbers):  # coarsest first, so that each sum is the nested one
            total = total + outputs[number].decoded
            reconstructions[number] = total
        return Output(outputs, reconstructions)

    def _codes(self, pres: dict[int, Tensor]) -> dict[int, Tensor]:
        codes: dict[int, Tensor] = {}
        for number in sorted(pres, reverse=True):
            parents, pre_BF = self.parents(number), pres[number]
            if parents is not None and number + 1 in codes:
                pre_BF = pre_BF * parent_fires(self.latents.whole(codes[number + 1]), parents)
            codes[number] = self.level(number).activate(pre_BF)
        return codes

    def _joint(self, pres: dict[int, Tensor]) -> dict[int, Tensor]:
        """One BatchTopK over all levels side by side; they share its threshold."""
        l0 = sum(self.level(number).l0 for number in pres)
        coarsest = self.level(max(pres))
        side_by_side = torch.cat(list(pres.values()), 1)
        code_BF, smallest = batch_top_k(side_by_side, l0, coarsest.guess(), coarsest.workers, self.latents)
        for number in pres:
            self.level(number).track_threshold(smallest)
        return dict(zip(pres, torch.split(code_BF, [pre.shape[1] for pre in pres.values()], 1), strict=True))

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
