"""Folding: a trained run's model in the residual's own units.

Training works on x = scale * vector. relu, top-k and a threshold are homogeneous, so the same model in raw units
has the same weight matrices, with every bias and threshold divided by the scale; codes come out divided by it too.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hsae.train.model.saelens_folder import SAE
from hsae.train.model.trainable_sae import Level
from hsae.train.model.trained_model import CompositionMap, StackedView, TrainedModel
from hsae.train.training.training_run import TrainingRun

ARCHITECTURES = {"relu": "standard", "topk": "topk", "batchtopk": "jumprelu", "jumprelu": "jumprelu", "gated": "gated"}


@torch.no_grad()
def fold(run: TrainingRun, metadata: dict[str, Any], sample_BD: Tensor) -> TrainedModel:
    """Return the run's model in raw units.

    `metadata` goes into SAELens folders; `sample_BD` [B, D] (scaled) calibrates the one-layer forms of a stack.
    """
    config, scale = run.config, run.scaling.scale
    levels = []
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
                name="sae" if config.structure == "flat" else f"level{number}",
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
    maps = tuple(
        CompositionMap(level=number, weight=module.weight().cpu(), contributions=module.contributions().cpu())
        for number, module in ((number, run.composition(number)) for number in range(2, len(run.compositions) + 2))
    )
    gates = (run.model.parents(number) for number in range(1, config.levels))
    parents = tuple(part.cpu() for part in gates if part is not None)
    model = TrainedModel(structure=config.structure, levels=tuple(levels), compositions=maps, parents=parents)
    if config.structure != "stacked":
        return model
    thresholds = []
    for number in range(2, config.levels + 1):
        stack = StackedView.of(model.levels[:number])
        pre = (sample_BD.cpu() / scale) @ (stack.W_enc / stack.norms) + stack.b_enc / stack.norms
        kept = max(1, round(len(sample_BD) * config.l0[number - 1]))
        thresholds.append(max(0.0, torch.topk(pre.flatten(), kept).values[-1].item()))
    return replace(model, effective_thresholds=tuple(thresholds))


def _extra(level: Level, d_sae: int, scale: float) -> dict[str, Tensor]:
    """What an architecture has besides weights and biases, in raw units; r_mag scales pre-activations and has no unit."""
    if level.activation == "batchtopk":
        return {"threshold": torch.full((d_sae,), level.threshold.item()) / scale}
    if level.activation == "jumprelu":
        return {"threshold": level.log_threshold.exp() / scale}
    if level.activation == "gated":
        return {"b_gate": level.b_enc / scale, "b_mag": level.b_mag / scale, "r_mag": level.r_mag}
    return {}
