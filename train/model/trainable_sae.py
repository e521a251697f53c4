"""The hierarchical SAE that is trained: levels, how they read and decode, and what a forward pass returns.

Shapes: B vectors of a batch, D residual width, I width of what a level reads (D, or the level below's F), F latents of
a level, K active latents, L levels. Levels are numbered 1 (finest, widest) to L (coarsest); lists hold them in that
order.
"""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from hsae.registry import ACTIVATIONS, resolve
from hsae.train.config.run_config import RunConfig
from hsae.train.model.activations import batch_top_k_entries, batch_top_k_masks, masked
from hsae.train.model.hierarchical_sae import STRUCTURES
from hsae.train.model.levels import Level, LevelOutput
from hsae.train.model.sparse_products import DENSEST, Pattern, pays_off
from hsae.train.model.views import NO_PARENT, parent_fires
from hsae.train.parallel.latent_sharding import UNDIVIDED, Latents
from hsae.train.parallel.workers import ALONE, Workers


def seed_of(*parts: int) -> int:
    """A 63-bit seed from small whole numbers, well mixed."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = ((state ^ part) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return state >> 1


class Output(NamedTuple):
    """A forward pass; dictionaries hold the levels that took part."""

    levels: dict[int, LevelOutput]
    reconstructions: dict[int, Tensor]
    """[B, D] for level l. additive: b + sum of the levels >= l that took part; stacked: the decoders from l down."""


class TrainableSAE(nn.Module):
    """Levels that all read the residual, with one shared bias (`flat`, `additive`)."""

    is_nested: ClassVar[bool] = True
    """Whether a level's reconstruction is the sum with all coarser ones, so that its loss reaches those too."""

    def __init__(
        self,
        run: RunConfig,
        d_in: int,
        *,
        seed: int = 0,
        latents: Latents = UNDIVIDED,
        workers: Workers = ALONE,
    ) -> None:
        super().__init__()
        self.latents, self.run = latents, run
        generator = torch.Generator().manual_seed(seed_of(seed, run.number))
        kind, reads = resolve(ACTIVATIONS[run.activation].kind), STRUCTURES[run.structure].widths_read(d_in, run.widths)
        self.levels = nn.ModuleList(
            kind(read, width, run, l0, generator, latents, workers)
            for read, width, l0 in zip(reads, run.widths, run.l0, strict=True)
        )
        self.biases = nn.ParameterList(
            nn.Parameter(torch.zeros(width)) for width in (reads[:1] if self.is_nested else reads)
        )
        for number in range(1, run.levels) if run.child_gate else ():
            self.register_buffer(f"parents{number}", torch.full((latents.own(run.widths[number - 1]),), NO_PARENT))

    def level(self, number: int) -> Level:
        """Level `number`, from 1 (finest)."""
        level = self.levels[number - 1]
        assert isinstance(level, Level)
        return level

    def bias(self, number: int) -> nn.Parameter:
        """The bias of what level `number` reads."""
        bias = self.biases[0 if self.is_nested else number - 1]
        assert isinstance(bias, nn.Parameter)
        return bias

    def parents(self, number: int) -> Tensor | None:
        """[F] for each latent of level `number` its parent in the level above, or NO_PARENT; None without a gate."""
        return self._buffers.get(f"parents{number}")

    def use_sparse(self) -> None:
        """Compute gradients at active latents only, where the activation allows it and the level is large enough."""
        for number in range(1, len(self.levels) + 1):
            level = self.level(number)
            is_thin = level.is_controlled or level.l0 <= DENSEST * len(level.b_enc)
            level.sparse = level.is_masked and is_thin and pays_off(level.W_enc.numel(), level.W_enc.device)

    def forward(self, x_BD: Tensor, active: Sequence[int] | None = None) -> Output:
        """Codes and reconstructions of the `active` levels, all if None."""
        numbers = sorted(active or range(1, len(self.levels) + 1))
        pres = {number: self.level(number).pre(x_BD, self.bias(number)) for number in numbers}
        is_joint = self.run.selection == "joint" and self.training
        codes = self._joint(pres) if is_joint else self._codes(pres)
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

    def target(self, number: int, x_BD: Tensor, output: Output) -> tuple[Tensor, Tensor]:
        """What level `number` should explain, and its reconstruction of that, [B, I] each: x and the nested sum."""
        return x_BD, output.reconstructions[number]

    def _codes(self, pres: dict[int, Tensor]) -> dict[int, Tensor | Pattern]:
        codes: dict[int, Tensor | Pattern] = {}
        for number in sorted(pres, reverse=True):
            parents, pre_BF = self.parents(number), pres[number]
            if parents is not None and number + 1 in codes:
                above = codes[number + 1]
                above_BF = above.dense(pre_BF.new_ones(len(above.flat))) if isinstance(above, Pattern) else above
                pre_BF = pre_BF * parent_fires(self.latents.whole(above_BF), parents)
            codes[number] = self.level(number).select(pre_BF)
        return codes

    def _joint(self, pres: dict[int, Tensor]) -> dict[int, Tensor | Pattern]:
        """One BatchTopK over all levels side by side; they share its threshold."""
        l0 = sum(self.level(number).l0 for number in pres)
        coarsest = self.level(max(pres))
        bound, workers = coarsest.likely_bound(), coarsest.workers
        is_sparse = all(self.level(number).is_sparse for number in pres)
        choose = batch_top_k_entries if is_sparse else batch_top_k_masks
        kept, smallest = choose(list(pres.values()), l0, bound, workers, self.latents)
        for number in pres:
            self.level(number).track_threshold(smallest)
        return {
            number: Pattern(where, pres[number]) if is_sparse else masked(pres[number], where)
            for number, where in zip(pres, kept, strict=True)
        }


class TrainableStack(TrainableSAE):
    """Levels that read each other, level 1 the residual, with a bias each (`stacked`)."""

    is_nested = False

    def forward(self, x_BD: Tensor, active: Sequence[int] | None = None) -> Output:
        """Codes and reconstructions of the `active` levels, all if None; levels below an active one are computed."""
        numbers = sorted(active or range(1, len(self.levels) + 1))
        outputs: dict[int, LevelOutput] = {}
        reconstructions: dict[int, Tensor] = {}
        read = x_BD
        for number in range(1, max(numbers) + 1):
            output = self.level(number)(read, self.bias(number))
            read = output.acts.detach() if self._stops_gradient() else output.acts
            if number in numbers:
                outputs[number] = output
                reconstructions[number] = self._cascade(output, number)
        return Output(outputs, reconstructions)

    def target(self, number: int, x_BD: Tensor, output: Output) -> tuple[Tensor, Tensor]:
        """What level `number` should explain, and its reconstruction of that, [B, I] each: what it reads, decoded."""
        level = output.levels[number]
        return level.read, level.decoded + self.bias(number)

    def _stops_gradient(self) -> bool:
        return self.run.stop_gradient and self.training

    def _cascade(self, output: LevelOutput, number: int) -> Tensor:
        decoded = output.decoded + self.bias(number)
        for lower in range(number - 1, 0, -1):
            W_dec: Tensor = self.level(lower).W_dec
            bias: Tensor = self.bias(lower)
            if self._stops_gradient():
                W_dec, bias = W_dec.detach(), bias.detach()
            decoded = decoded @ W_dec + bias
        return decoded


TRAINABLE: dict[str, type[TrainableSAE]] = {
    "flat": TrainableSAE,
    "additive": TrainableSAE,
    "stacked": TrainableStack,
}
"""How a structure is trained; what it becomes is its class in `hierarchical_sae.STRUCTURES`."""
