"""Folding: a trained run's model in the residual's own units.

Training works on x = scale * vector. relu, top-k and a threshold are homogeneous, so the same model in raw units
has the same weight matrices, with every bias and threshold divided by the scale; codes come out divided by it too.
"""

from typing import Any

import torch
from torch import Tensor

from hsae.train.model.hierarchical_sae import STRUCTURES, CompositionMap, HierarchicalSAE, StackedSAE
from hsae.train.model.sae import SAE
from hsae.train.model.trainable_sae import Level
from hsae.train.model.views import StackedView
from hsae.train.training.training_run import TrainingRun

ARCHITECTURES = {"relu": "standard", "topk": "topk", "batchtopk": "jumprelu", "jumprelu": "jumprelu", "gated": "gated"}


@torch.no_grad()
def fold(run: TrainingRun, metadata: dict[str, Any], sample_BD: Tensor) -> HierarchicalSAE:
    """Return the run's model in raw units.

    `metadata` goes into SAELens folders; `sample_BD` [B, D] (scaled) calibrates the one-layer forms of a stack.
    """
    config, scale = run.config, run.scaling.scale
    structure, levels = STRUCTURES[config.structure], []
    for number in range(1, config.levels + 1):
        level = run.model.level(number)
        d_sae = level.W_dec.shape[0]
        architecture = ARCHITECTURES[config.activation]
        extra = {name: tensor.detach().cpu() for name, tensor in _extra(level, d_sae, scale).items()}
        b_enc = level.b_enc.detach().cpu() / scale
        inner = config.structure == "stacked" and number > 1
        place = {"hook_name": f"code of level {number - 1} at {metadata['hook_name']}"} if inner else {}
        levels.append(
            SAE(
                name=structure.level_name(number),
                architecture=architecture,
                W_enc=level.W_enc.detach().cpu().clone(),
                W_dec=level.W_dec.detach().cpu().clone(),
                b_enc=torch.zeros_like(b_enc) if architecture == "gated" else b_enc,
                b_dec=run.model.bias(number).detach().cpu() / scale,
                extra=extra,
                k=int(level.l0) if architecture == "topk" else None,
                metadata={**metadata, **place},
            )
        )
    maps = [
        CompositionMap(level=number, weight=module.weight().cpu(), contributions=module.contributions().cpu())
        for number, module in ((number, run.composition(number)) for number in range(2, len(run.compositions) + 2))
    ]
    parents = (run.model.parents(number) for number in range(1, config.levels))
    model = structure(levels, maps, gates=[part.cpu() for part in parents if part is not None])
    if not isinstance(model, StackedSAE):
        return model
    thresholds = []
    for number in range(2, config.levels + 1):
        stack = StackedView(levels[:number])
        pre = (sample_BD.cpu() / scale) @ (stack.W_enc / stack.norms) + stack.b_enc / stack.norms
        kept = max(1, round(len(sample_BD) * config.l0[number - 1]))
        thresholds.append(max(0.0, torch.topk(pre.flatten(), kept).values[-1].item()))
    model.effective_thresholds = tuple(thresholds)
    return model


def _extra(level: Level, d_sae: int, scale: float) -> dict[str, Tensor]:
    """What an architecture has besides weights and biases, in raw units; r_mag scales pre-activations and has no unit."""
    if level.activation == "batchtopk":
        return {"threshold": torch.full((d_sae,), level.threshold.item()) / scale}
    if level.activation == "jumprelu":
        return {"threshold": level.log_threshold.exp() / scale}
    if level.activation == "gated":
        return {"b_gate": level.b_enc / scale, "b_mag": level.b_mag / scale, "r_mag": level.r_mag}
    return {}
