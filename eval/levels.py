"""A trained model seen level by level."""

from dataclasses import replace

from torch import Tensor

from hsae.train.model import StackedView, TrainedModel


def placed(model: TrainedModel, device: str) -> TrainedModel:
    """The model in float32 on a device."""
    import torch

    return replace(model, levels=tuple(level.to(dtype=torch.float32, device=device) for level in model.levels))


def codes(model: TrainedModel, x: Tensor) -> tuple[Tensor, ...]:
    """Each level's code [..., F_l] of vectors [..., D], finest first."""
    found: list[Tensor] = []
    for level in model.levels:
        found.append(level.encode(found[-1] if model.structure == "stacked" and found else x))
    return tuple(found)


def reconstruct(model: TrainedModel, coded: tuple[Tensor, ...], above: int) -> Tensor:
    """[..., D] from levels >= `above` alone."""
    if model.structure == "stacked":
        decoded = model.levels[above - 1].decode(coded[above - 1])
        for level in reversed(model.levels[: above - 1]):
            decoded = level.decode(decoded)
        return decoded
    total = model.levels[0].b_dec
    for level, code in zip(model.levels[above - 1 :], coded[above - 1 :], strict=True):
        total = total + code @ level.W_dec
    return total


def directions(model: TrainedModel, level: int) -> Tensor:
    """[F_l, D] what one unit of each latent's code adds to x."""
    if model.structure != "stacked" or level == 1:
        return model.levels[level - 1].W_dec
    view = StackedView.of(model.levels[:level])
    return view.W_dec * view.norms[:, None]
