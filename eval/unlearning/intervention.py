"""Clamping latents: what changes in the residual where a chosen latent is active.

In delta form, x' = x + sum over chosen active latents of (value - f) d. The SAE's own error never enters: where nothing
chosen fires, x stays as it is to the last bit. Position 0 is never touched.

Shapes: R rows, T context, D residual width, F latents, A chosen latents.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hsae.train.model.hierarchical_sae import HierarchicalSAE


@dataclass(frozen=True, kw_only=True)
class Dictionary:
    """Latents side by side, from whatever model they come."""

    encode: Callable[[Tensor], Tensor]
    """Activations [..., F] of residuals [..., D]."""
    directions_FD: Tensor
    """What one unit of each latent adds to the residual."""
    widths: tuple[int, ...]
    """Latents of each level, finest first; the latents of a level lie together."""

    def level(self, number: int) -> range:
        """The latents of level `number`."""
        start = sum(self.widths[: number - 1])
        return range(start, start + self.widths[number - 1])


def of_model(model: HierarchicalSAE, device: str) -> Dictionary:
    """All levels of a trained model, in float32; encoding happens on `device`, everything else where residuals lie."""
    moved = model.copy_to(dtype=torch.float32, device=device)
    numbers = range(1, len(moved.levels) + 1)
    return Dictionary(
        encode=lambda x: torch.cat(moved.codes(x.to(device).float()), -1).to(x.device),
        directions_FD=torch.cat([moved.directions(number) for number in numbers]).cpu(),
        widths=moved.level_widths,
    )


def of_means(forget_D: Tensor, retain_D: Tensor) -> Dictionary:
    """One latent along the difference of two means, active beyond the retain mean: clamping it to 0 ablates it."""
    unit_1D = normalize(forget_D.float() - retain_D.float(), dim=0)[None]
    offset = retain_D.float() @ unit_1D.T
    return Dictionary(encode=lambda x: torch.relu(x.float() @ unit_1D.T - offset), directions_FD=unit_1D, widths=(1,))


@dataclass(frozen=True, kw_only=True)
class Intervention:
    """Chosen latents, what they are set to where active, and in which rows."""

    latents: tuple[int, ...]
    values: tuple[float, ...]
    """What each chosen latent is set to where it is active."""
    rate: float | None = None
    """Only in rows where a larger share of kept tokens has a chosen latent active; None: in all rows (static)."""

    def fired(self, acts_RTA: Tensor, mask_RT: Tensor) -> Tensor:
        """[R, T, A] where a chosen latent is changed."""
        fired_RTA = acts_RTA > 0
        fired_RTA[:, 0] = False
        if self.rate is not None:
            fired_RTA &= (firing_rates(acts_RTA, mask_RT) > self.rate)[:, None, None]
        return fired_RTA

    def delta(self, acts_RTA: Tensor, fired_RTA: Tensor, directions_FD: Tensor) -> Tensor:
        """[R, T, D] what is added to the residual, in float32."""
        values_A = torch.tensor(self.values, device=acts_RTA.device)
        change_RTA = torch.where(fired_RTA, values_A - acts_RTA.float(), 0.0)
        return change_RTA @ directions_FD[list(self.latents)].float()


def firing_rates(acts_RTA: Tensor, mask_RT: Tensor) -> Tensor:
    """[R] share of a row's kept tokens at which any of the latents is active; position 0 doesn't count."""
    counted_RT = mask_RT.clone()
    counted_RT[:, 0] = False
    active_RT = (acts_RTA > 0).any(-1) & counted_RT
    return active_RT.sum(1).double() / counted_RT.sum(1).clamp_min(1)


def changed(x_RTD: Tensor, delta_RTD: Tensor, fired_RTA: Tensor) -> Tensor:
    """x + delta in the type of x; bit-equal to x where nothing fired."""
    moved_RTD = (x_RTD.float() + delta_RTD).to(x_RTD.dtype)
    return torch.where(fired_RTA.any(-1)[..., None], moved_RTD, x_RTD)
