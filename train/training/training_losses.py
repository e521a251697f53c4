"""Losses of a run besides composition. Shapes: B vectors, I width of what a level reads, F latents of a level.

Every reconstruction loss is a fraction of variance unexplained: mean squared error over the variance of its target, so
that levels and models of any scale weigh alike.
"""

import math

import torch
from torch import Tensor

from hsae.train.model.activations import step_count, top_k
from hsae.train.model.trainable_sae import Level, LevelOutput
from hsae.train.training.workers import ALONE, Workers


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is where it is wider: sums of squares are never taken in half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def fraction_unexplained(target_BI: Tensor, reconstruction_BI: Tensor, variance: Tensor | float) -> Tensor:
    """E||target - reconstruction||^2 / variance, a scalar; variance is E||target - E target||^2."""
    return (widened(target_BI) - widened(reconstruction_BI)).square().sum(-1).mean() / variance


def variance_of(target_BI: Tensor, workers: Workers = ALONE) -> Tensor:
    """E||target - E target||^2 over the batch of all `workers`, a scalar without gradient, above 0."""
    centred = target_BI - workers.mean(target_BI.mean(0))
    return workers.mean(widened(centred).square().sum(-1).mean()).detach().clamp_min(1e-12)


def explained_variance(target_BI: Tensor, reconstruction_BI: Tensor, workers: Workers = ALONE) -> Tensor:
    """1 - sum||r||^2 / sum||target - mean||^2 over the batch of all `workers`, a scalar (1 is perfect, 0 the batch mean)."""
    centred = target_BI - workers.mean(target_BI.mean(0))
    residual = target_BI - widened(reconstruction_BI)
    return 1 - workers.total(residual.square().sum()) / workers.total(centred.square().sum())


def auxiliary(
    level: Level,
    read_BI: Tensor,
    bias_I: Tensor,
    target_BI: Tensor,
    reconstruction_BI: Tensor,
    dead_F: Tensor,
    latents: int,
    workers: Workers = ALONE,
) -> Tensor:
    """AuxK (Gao et al. 2024, arXiv 2406.04093, A.2): dead latents reconstruct what the living left over.

    The k dead latents with the largest pre-activations of each vector decode the residual; the loss is the fraction of it
    left unexplained, and 0 while no latent is dead. k is `latents`, but at most half the width read.
    """
    indices = dead_F.nonzero().squeeze(1)
    dead = int(level.latents.workers.total(torch.tensor(len(indices))))
    if dead == 0:
        return torch.zeros((), device=target_BI.device)
    residual_BI = widened(target_BI - reconstruction_BI).detach()
    pre = (read_BI - bias_I) @ level.W_enc[:, indices] + level.b_enc[indices]
    acts = top_k(pre, min(latents, max(1, target_BI.shape[1] // 2), dead), level.latents)
    variance = workers.mean(residual_BI.square().sum(-1).mean()).clamp_min(1e-12)
    return fraction_unexplained(residual_BI, level.latents.sum(acts @ level.W_dec[indices]), variance)


def gated_auxiliary(level: Level, output: LevelOutput, target_BI: Tensor, bias_I: Tensor, variance: float) -> Tensor:
    """Loss of a gated SAE's gate alone (Rajamanoharan et al. 2024, arXiv 2404.16014, eq. 8): ReLU of the gate's pre-activations
    decoded by weights that don't feel it, a fraction of variance unexplained."""
    decoded = level.latents.sum(output.pre.relu() @ level.W_dec.detach())
    return fraction_unexplained(target_BI, decoded + bias_I.detach(), variance)


def sparsity(level: Level, output: LevelOutput) -> Tensor:
    """What the controller's coefficient multiplies, a scalar: mean L1 of relu's code or of the gate, mean L0 of jumprelu's."""
    if level.activation == "jumprelu":
        return level.latents.sum(step_count(output.pre, level.jump_threshold(output.pre), level.bandwidth))
    penalised = output.pre.relu() if level.activation == "gated" else output.acts
    return level.latents.sum(widened(penalised).sum(1).mean())


class SparsityController:
    """Leads the L0 of relu, jumprelu or gated to its target by moving the sparsity coefficient.

    A reference falls geometrically from the first batch's L0 to the target over `ramp_steps` and stays there. With d the smoothed
    log(L0 / reference) and v its smoothed change a step, log(coefficient) += GAIN * (d + HORIZON * v): the change damps what would
    otherwise overshoot, because the weights follow the coefficient only after many steps and a relu latent pushed to zero doesn't come back.
    """

    GAIN, HORIZON, SMOOTHING, LARGEST = 0.05, 20.0, 0.8, 2.0

    def __init__(self, target: float, start: float, ramp_steps: int) -> None:
        self.target, self.coefficient, self.ramp_steps = target, start, max(1, ramp_steps)
        self.steps, self.first, self.distance, self.change = 0, 0.0, 0.0, 0.0

    def update(self, l0: float) -> None:
        """Take a step after a batch whose mean L0 was `l0`; one step moves log(coefficient) by at most GAIN * LARGEST."""
        if self.steps == 0:
            self.first = max(l0, self.target)
        self.steps += 1
        reference = self.first * (self.target / self.first) ** min(1.0, self.steps / self.ramp_steps)
        distance, before = math.log(max(l0, 1e-3) / reference), self.distance
        if self.steps > 1:
            distance = self.SMOOTHING * before + (1 - self.SMOOTHING) * distance
            self.change = self.SMOOTHING * self.change + (1 - self.SMOOTHING) * (distance - before)
        self.distance = distance
        error = max(-self.LARGEST, min(self.LARGEST, distance + self.HORIZON * self.change))
        self.coefficient *= math.exp(self.GAIN * error)

    def state(self) -> dict[str, float]:
        """JSON-ready state."""
        names = ("coefficient", "steps", "first", "distance", "change")
        return {name: getattr(self, name) for name in names}

    def restore(self, state: dict[str, float]) -> None:
        """Put back what `state` gave."""
        for name, value in state.items():
            setattr(self, name, value)
