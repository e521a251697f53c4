"""Resampling of dead latents (Bricken et al. 2023, "Towards Monosemanticity", appendix on neuron resampling).

A dead latent takes the direction of a vector that the model reconstructs badly, drawn in proportion to its squared
loss. Every level resamples in the space it reads: the residual's for additive levels and level 1, the code below for
the others of a stack.

Shapes: B vectors of a batch, I width of what the level reads, F latents of the level.
"""

import torch
from torch import Tensor

from hsae.train.model.activations import widened
from hsae.train.model.levels import Level

ENCODER_SHARE = 0.2


@torch.no_grad()
def resample(
    level: Level,
    read_BI: Tensor,
    bias_I: Tensor,
    loss_B: Tensor,
    dead_F: Tensor,
    optimiser: torch.optim.Adam,
    generator: torch.Generator,
) -> int:
    """Give the dead latents of `level` new weights and forget their Adam moments; returns how many there were.

    Decoder row: the drawn vector less the bias, with unit norm. Encoder column: the same, 0.2 times the mean norm of
    the living latents' columns (0.2 if none lives). Encoder bias 0; a threshold of jumprelu is set to the living ones'
    mean, a gated latent's magnitude to the gate's.
    """
    latents = level.latents
    all_dead = latents.whole(dead_F)
    count = int(all_dead.sum())
    if count == 0:
        return 0
    weights = widened(level.workers.gather(loss_B)).square().cpu().double()
    if not weights.sum() > 0:
        return 0
    sampled = torch.multinomial(weights, count, replacement=True, generator=generator).to(read_BI.device)
    dead, living = dead_F.nonzero().squeeze(1), ~dead_F
    before = int(all_dead[: latents.rank * len(dead_F)].sum())
    rows = widened(level.workers.rows(read_BI, sampled[before : before + len(dead)]) - bias_I)
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    norm = latents.mean(level.W_enc[:, living].norm(dim=0)) if count < len(all_dead) else 1.0
    level.W_dec[dead] = rows
    level.W_enc[:, dead] = (ENCODER_SHARE * norm * rows).T
    level.b_enc[dead] = 0
    level.reset(dead, living)
    for name, parameter in level.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            if (tensor := optimiser.state.get(parameter, {}).get(moment)) is not None:
                (tensor.T if name == "W_enc" else tensor)[dead] = 0
    return count
