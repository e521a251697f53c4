"""The optimiser of a run: Adam with one parameter group a level, and the learning-rate schedule."""

from collections.abc import Collection
from inspect import unwrap

import torch
from torch import nn

from hsae.train.config.run_config import RunConfig
from hsae.train.model.trainable_sae import TrainableSAE
from hsae.train.training.curriculum import Moment

SHARED, COMPOSITION = 0, -1  # group names beside the level numbers


class Adam(torch.optim.Adam):
    """torch's fused Adam, which divides gradients by `grad_scale` in its own pass over them.

    It is without torch's wrappers around these methods, which import torch._dynamo: that takes as long as importing
    torch, and is for optimisers that are compiled.
    """

    grad_scale: torch.Tensor | None = None
    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = unwrap(torch.optim.Optimizer.zero_grad)
    step = torch.no_grad()(unwrap(torch.optim.Adam.step))


def make_optimiser(model: TrainableSAE, compositions: nn.ModuleList, run: RunConfig) -> Adam:
    """Adam (0.9, 0.999) over the levels, the shared bias and the maps W; groups are named by `level`."""
    groups = {number: list(model.level(number).parameters()) for number in range(1, run.levels + 1)}
    if model.is_nested:
        groups[SHARED] = [model.bias(1)]
    else:
        for number, parameters in groups.items():
            parameters.append(model.bias(number))
    if learned := [parameter for parameter in compositions.parameters() if parameter.requires_grad]:
        groups[COMPOSITION] = learned
    named = [{"params": parameters, "level": level} for level, parameters in groups.items()]
    return Adam(named, lr=run.rate, betas=(0.9, 0.999), fused=True)


def schedule(run: RunConfig, step: int, steps: int, warmup_start: int = 0) -> float:
    """Learning-rate factor at `step`: linear warm-up from step `warmup_start`, flat, linear fall to 0."""
    warmup = max(1, min(run.warmup_steps, steps // 10))
    rising = min(1.0, (step - warmup_start + 1) / warmup)
    decay_steps = run.decay * steps
    falling = min(1.0, (steps - step) / decay_steps) if decay_steps >= 1 else 1.0
    return rising * falling


def set_rates(optimiser: torch.optim.Adam, run: RunConfig, moment: Moment, step: int, steps: int) -> float:
    """Set every group's learning rate for `step`, freeze those at 0; returns the rate without curriculum."""
    base = run.rate * schedule(run, step, steps)
    for group in optimiser.param_groups:
        level = group["level"]
        if level > 0:
            factor = moment.stage.rates.get(level, 1.0) if level in moment.stage.levels else 0.0
            group["lr"] = run.rate * schedule(run, step, steps, moment.warmup_starts.get(level, 0)) * factor
        else:
            group["lr"] = base if level == SHARED or moment.composition > 0 else 0.0
        for parameter in group["params"]:
            parameter.requires_grad_(group["lr"] > 0)
    return base


def forget(optimiser: torch.optim.Adam, levels: Collection[int]) -> None:
    """Drop Adam's moments and step counts of some levels, as if they had just been made."""
    for group in optimiser.param_groups:
        if group["level"] in levels:
            for parameter in group["params"]:
                optimiser.state.pop(parameter, None)


def rename_state(optimiser: torch.optim.Adam, names: dict[nn.Parameter, str]) -> dict[str, torch.Tensor]:
    """Adam's state as flat tensors `<parameter>/exp_avg`, `/exp_avg_sq`, `/step`."""
    return {
        f"{name}/{key}": value
        for parameter, name in names.items()
        for key, value in optimiser.state.get(parameter, {}).items()
    }


def restore_state(
    optimiser: torch.optim.Adam, names: dict[nn.Parameter, str], tensors: dict[str, torch.Tensor]
) -> None:
    """Put back what `rename_state` gave."""
    for parameter, name in names.items():
        keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}/{key}" in tensors]
        if keys:
            device = parameter.device
            optimiser.state[parameter] = {key: tensors[f"{name}/{key}"].clone().to(device) for key in keys}
