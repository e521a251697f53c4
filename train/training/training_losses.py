"""Losses of a run besides composition; the registry `LOSSES` in hsae.registry names those of a level.

Shapes: B vectors, D residual width, I width of what a level reads, F latents of a level.
Every reconstruction loss is a fraction of variance unexplained: mean squared error over the variance of its target, so
that levels and models of any scale weigh alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hsae.registry import LOSSES, resolve
from hsae.train.config.run_config import RunConfig
from hsae.train.model.activations import top_k, widened
from hsae.train.model.hierarchical_sae import STRUCTURES
from hsae.train.model.levels import GatedLevel, Level, LevelOutput
from hsae.train.parallel.latent_sharding import UNDIVIDED, Latents
from hsae.train.parallel.workers import ALONE, Workers


def fraction_unexplained(target_BI: Tensor, reconstruction_BI: Tensor, variance: Tensor | float) -> Tensor:
    """E||target - reconstruction||^2 / variance, a scalar; variance is E||target - E target||^2."""
    return (widened(target_BI) - widened(reconstruction_BI)).square().sum(-1).mean() / variance


def variance_of(target_BI: Tensor, workers: Workers = ALONE) -> Tensor:
    """E||target - E target||^2 over the batch of all `workers`, a scalar without gradient, above 0."""
    centred = target_BI - workers.mean(target_BI.mean(0))
    return workers.mean(widened(centred).square().sum(-1).mean()).detach().clamp_min(1e-12)


def explained_variance(target_BI: Tensor, reconstruction_BI: Tensor, workers: Workers = ALONE) -> Tensor:
    """1 - sum||r||^2 / sum||target - mean||^2 over the batch of all `workers`: 1 is perfect, 0 the batch mean."""
    centred = target_BI - workers.mean(target_BI.mean(0))
    residual = target_BI - widened(reconstruction_BI)
    return 1 - workers.total(residual.square().sum()) / workers.total(centred.square().sum())


class Dead(NamedTuple):
    """The dead latents of a level."""

    own_N: Tensor
    """[N] indices of this worker's; the first `number` are dead, the others fill up."""
    number: Tensor
    """Scalar."""
    is_any: bool
    """Whether any worker has some: known on the host, so that without any nothing has to be computed."""

    @classmethod
    def of(cls, mask_F: Tensor, latents: Latents = UNDIVIDED, *, filled: bool = False) -> "Dead":
        """Those of a mask; `filled` up to a power of two, so that few lengths occur. Waits for the device."""
        dead_N = mask_F.nonzero().squeeze(1)
        count = len(dead_N)
        own_N = dead_N.new_zeros(1 << (count - 1).bit_length() if filled and count else count)
        own_N[:count] = dead_N
        return cls(own_N, torch.full((), count, device=own_N.device), latents.workers.any(count > 0))


@dataclass(frozen=True, kw_only=True)
class LevelStep:
    """What a loss sees of one level in one step."""

    config: RunConfig
    number: int
    """The level's, from 1 (finest)."""
    level: Level
    output: LevelOutput
    bias_I: Tensor
    """The bias of what the level reads."""
    x_BD: Tensor
    reconstruction_BD: Tensor
    """Of x: additive, by this level and all coarser ones; stacked, through the cascade of decoders."""
    target_BI: Tensor
    """What the level should explain: additive x, stacked what it reads."""
    decoded_BI: Tensor
    """The reconstruction of that."""
    variance: float
    """E||x - E x||^2."""
    dead: Dead
    coefficient: Tensor
    """The sparsity controller's, a scalar."""

    @property
    def weight(self) -> float:
        """The level's in `level_weights`."""
        return self.config.level_weights[self.number - 1] if self.config.level_weights else 1.0


def reconstruction(step: LevelStep) -> Tensor:
    """What is unexplained of x."""
    return step.weight * fraction_unexplained(step.x_BD, step.reconstruction_BD, step.variance)


def code(step: LevelStep) -> Tensor | None:
    """What is unexplained of the code that a level of a stack reads."""
    if not STRUCTURES[step.config.structure].reads_code(step.number):
        return None
    variance = variance_of(step.target_BI, step.level.workers)
    return step.weight * fraction_unexplained(step.target_BI, step.decoded_BI, variance)


def sparsity(step: LevelStep) -> Tensor | None:
    """The activation's penalty, where a controller leads its L0."""
    return step.coefficient.float() * step.level.penalty(step.output) if step.level.is_controlled else None


def gate(step: LevelStep) -> Tensor | None:
    """Loss of a gated SAE's gate alone (Rajamanoharan et al. 2024, arXiv 2404.16014, eq. 8).

    ReLU of the gate's pre-activations, decoded by weights that don't feel it; a fraction of variance unexplained.
    """
    if not isinstance(step.level, GatedLevel):
        return None
    decoded = step.level.latents.sum(step.output.pre.relu() @ step.level.W_dec.detach())
    return fraction_unexplained(step.x_BD, decoded + step.bias_I.detach(), step.variance)


def auxiliary(step: LevelStep) -> Tensor | None:
    """AuxK (Gao et al. 2024, arXiv 2406.04093, A.2): dead latents reconstruct what the living left over.

    The k dead latents with the largest pre-activations of each vector decode the residual; the loss is the fraction of
    it left unexplained, and 0 while no latent is dead. k is `aux_latents`, but at most half the width read.
    """
    level, config = step.level, step.config
    if not config.aux_weight or not level.revives_dead:
        return None
    indices, number, is_any = step.dead
    if not is_any:
        return config.aux_weight * torch.zeros((), device=step.target_BI.device)
    residual_BI = widened(step.target_BI - step.decoded_BI).detach()
    pre = (step.output.read - step.bias_I) @ level.W_enc[:, indices] + level.b_enc[indices]
    pre = torch.where(torch.arange(len(indices), device=pre.device) < number, pre, 0)
    k = min(config.aux_latents, max(1, step.target_BI.shape[1] // 2))
    acts = top_k(pre, k, level.latents)
    variance = level.workers.mean(residual_BI.square().sum(-1).mean()).clamp_min(1e-12)
    loss = fraction_unexplained(residual_BI, level.latents.sum(acts @ level.W_dec[indices]), variance)
    return config.aux_weight * loss


Weighted = tuple[str, float, Callable[[LevelStep], Tensor | None]]
"""Name, weight and function of a loss."""


def losses_of(config: RunConfig) -> list[Weighted]:
    """The losses of a run's levels: those of every run, and those with a weight."""
    weights = {name: config.losses.get(name, 1.0 if entry.is_standard else 0.0) for name, entry in LOSSES.items()}
    return [(name, weight, resolve(LOSSES[name].function)) for name, weight in weights.items() if weight]


def level_losses(step: LevelStep, losses: Sequence[Weighted]) -> dict[str, Tensor]:
    """Those of the losses that apply to a level, named as in metrics.jsonl."""
    parts = {}
    for name, weight, function in losses:
        if (loss := function(step)) is not None:
            parts[f"{name}{step.number}"] = loss if weight == 1 else weight * loss
    return parts


class SparsityController:
    """Leads the L0 of relu, jumprelu or gated to its target by moving the sparsity coefficient.

    A reference falls geometrically from the first batch's L0 to the target over `ramp_steps` and stays there. With d
    the smoothed log(L0 / reference) and v its smoothed change a step, log(coefficient) += GAIN * (d + HORIZON * v): the
    change damps what would otherwise overshoot, because the weights follow the coefficient only after many steps and a
    relu latent pushed to zero doesn't come back.

    All it remembers are float64 scalars on the device, so that no step waits for it.
    """

    GAIN, HORIZON, SMOOTHING, LARGEST = 0.05, 20.0, 0.8, 2.0

    def __init__(self, target: float, start: float, ramp_steps: int, device: str = "cpu") -> None:
        self.target, self.ramp_steps, self.steps, self.device = target, max(1, ramp_steps), 0, device
        self.coefficient = self._scalar(start)
        self.first, self.distance, self.change = (self._scalar(0.0) for _ in range(3))

    def _scalar(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=self.device)

    def update(self, l0: Tensor) -> None:
        """Take a step after a batch of mean L0 `l0`, a scalar; it moves log(coefficient) by at most GAIN * LARGEST."""
        if self.steps == 0:
            self.first = l0.double().clamp_min(self.target)
        self.steps += 1
        reference = self.first * (self.target / self.first) ** min(1.0, self.steps / self.ramp_steps)
        distance, before = (l0.double().clamp_min(1e-3) / reference).log(), self.distance
        if self.steps > 1:
            distance = self.SMOOTHING * before + (1 - self.SMOOTHING) * distance
            self.change = self.SMOOTHING * self.change + (1 - self.SMOOTHING) * (distance - before)
        self.distance = distance
        error = (distance + self.HORIZON * self.change).clamp(-self.LARGEST, self.LARGEST)
        self.coefficient = self.coefficient * (self.GAIN * error).exp()

    def state(self) -> dict[str, float]:
        """JSON-ready state."""
        names = ("coefficient", "first", "distance", "change")
        return {"steps": self.steps, **{name: getattr(self, name).item() for name in names}}

    def restore(self, state: dict[str, float]) -> None:
        """Put back what `state` gave."""
        self.steps = int(state["steps"])
        for name in ("coefficient", "first", "distance", "change"):
            setattr(self, name, self._scalar(state[name]))
