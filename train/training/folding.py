"""Folding: a trained run's model in the residual's own units.

Training works on x = scale * vector. relu, top-k and a threshold are homogeneous, so the same model in raw units
has the same weight matrices, with every bias and threshold divided by the scale; codes come out divided by it too.
"""

from typing import Any

import torch
from torch import Tensor

from hsae.train.model.hierarchical_sae import STRUCTURES, CompositionMap, HierarchicalSAE
from hsae.train.model.sae import SAE
from hsae.train.training.training_run import TrainingRun


@torch.no_grad()
def fold(run: TrainingRun, metadata: dict[str, Any], sample_BD: Tensor) -> HierarchicalSAE:
    """Return the run's model in raw units.

    `metadata` goes into SAELens folders; `sample_BD` [B, D] (scaled) calibrates the one-layer forms of a stack.
    """
    config, scale = run.config, run.scaling.scale
    structure, levels = STRUCTURES[config.structure], []
    for number in range(1, config.levels + 1):
        level = run.model.level(number)
        weights = {name: tensor.detach().cpu() for name, tensor in level.folded(scale).items()}
        levels.append(
            SAE(
                name=structure.level_name(number),
                architecture=level.architecture,
                W_enc=level.W_enc.detach().cpu().clone(),
                W_dec=level.W_dec.detach().cpu().clone(),
                b_enc=weights.pop("b_enc"),
                b_dec=run.model.bias(number).detach().cpu() / scale,
                extra=weights,
                k=int(level.l0) if level.architecture == "topk" else None,
                metadata=_reading_code(metadata, number - 1) if structure.reads_code(number) else dict(metadata),
            )
        )
    maps = [
        CompositionMap(level=number, weight=module.weight().cpu(), contributions=module.contributions().cpu())
        for number, module in ((number, run.composition(number)) for number in range(2, len(run.compositions) + 2))
    ]
    parents = (run.model.parents(number) for number in range(1, config.levels))
    return structure(
        levels,
        maps,
        gates=[part.cpu() for part in parents if part is not None],
        effective_thresholds=structure.calibrated(levels, sample_BD.cpu() / scale, config.l0),
    )


def _reading_code(metadata: dict[str, Any], below: int) -> dict[str, Any]:
    """The metadata of a level that reads the code of the level `below` it."""
    hook = metadata.get("hook_name")
    return {**metadata, "hook_name": f"code of level {below}{f' at {hook}' if hook else ''}"}
