"""The arms of an unlearning experiment: ways of choosing latents that compete at equal numbers of them.

    none             nothing is clamped
    mean-difference  one direction, between the mean residuals of the two texts
    sae              all latents of the model together (flat SAEs have only this arm)
    level1, level2   latents of one level
    descend          coarse latents, each with what it is made of
    ascend           fine latents, and the coarse ones that half of which are chosen
    descend-permuted as descend, through a map with its entries in random places
    random           latents as frequent as those of the main arm, drawn at random

The last two are controls: they are made to move the retain residual as far as the arm they are controls of.

Shapes: N tokens, D residual width, A chosen latents, F latents.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hsae.eval.unlearning import selection
from hsae.eval.unlearning.config import UnlearningConfig
from hsae.eval.unlearning.intervention import Dictionary, Intervention, firing_rates, of_means
from hsae.eval.unlearning.rows import Rows
from hsae.eval.unlearning.selection import Profile
from hsae.train.model.hierarchical_sae import HierarchicalSAE


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One point of the sweep."""

    latents: int
    """n: latents asked for; an arm may find fewer."""
    multiplier: float
    """m: an active latent is set to -m times its mean active value."""
    quantile: float | None
    """Static if None; else clamping is limited to rows beyond this quantile of the retain rows' firing rates."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way of choosing latents, with its choice for each number asked for."""

    name: str
    dictionary: Dictionary
    profile: Profile
    chosen: dict[int, tuple[int, ...]]
    control_of: str | None = None
    """The arm whose effect on the retain residual this control is matched to."""

    @property
    def union(self) -> tuple[int, ...]:
        """Every latent that any setting clamps."""
        return tuple(dict.fromkeys(latent for latents in self.chosen.values() for latent in latents))


def sae_arms(model: HierarchicalSAE, dictionary: Dictionary, profile: Profile, config: UnlearningConfig) -> list[Arm]:
    """The arms of one trained model, controls last, each after the arm it is a control of."""
    levels = len(dictionary.widths)
    cap, counts = config.retain_cap, config.latents

    def ranked(*numbers: int) -> list[int]:
        among = [latent for number in numbers for latent in dictionary.level(number)]
        return selection.ranking(profile.forget_F, profile.retain_F, cap, among)

    def first(latents: list[int]) -> dict[int, list[int]]:
        return {count: latents[:count] for count in counts}

    picks: dict[str, dict[int, list[int]]] = {}
    if model.is_nested:
        picks["sae"] = first(ranked(*range(1, levels + 1)))
    if levels > 1:
        picks |= {f"level{number}": first(ranked(number)) for number in range(1, levels + 1)}
    controls: dict[str, str] = {}
    maps = [part.contributions.float().cpu() for part in sorted(model.compositions, key=lambda part: -part.level)]
    if levels > 1 and len(maps) == levels - 1:
        coarse, fine, leaning_F = ranked(levels), ranked(1), profile.leaning_F

        def descended(through: Sequence[Tensor]) -> dict[int, list[int]]:
            return {count: selection.descend(dictionary, through, coarse, leaning_F, count) for count in counts}

        picks["descend"] = descended(maps)
        picks["ascend"] = {
            count: selection.ascend(dictionary, maps, fine, profile.retain_F, cap, count) for count in counts
        }
        shuffled = [selection.permuted_rows(map_CG, config.seed + place) for place, map_CG in enumerate(maps)]
        picks["descend-permuted"], controls["descend-permuted"] = descended(shuffled), "descend"
    main = "descend" if "descend" in picks else "sae" if "sae" in picks else "level1"
    picks["random"] = {
        count: selection.random_alike(profile, latents, config.seed) for count, latents in picks[main].items()
    }
    controls["random"] = main
    return [
        Arm(
            name=name,
            dictionary=dictionary,
            profile=profile,
            chosen={count: tuple(latents) for count, latents in chosen.items()},
            control_of=controls.get(name),
        )
        for name, chosen in picks.items()
    ]


def shared_arms(forget: Rows, retain: Rows, config: UnlearningConfig) -> list[Arm]:
    """The arms that need no SAE besides `none`."""
    dictionary = of_means(_mean(forget), _mean(retain))
    profile = selection.profile(dictionary, forget.batches(), retain.batches())
    chosen: dict[int, tuple[int, ...]] = dict.fromkeys(config.latents[:1], (0,))
    return [Arm(name="mean-difference", dictionary=dictionary, profile=profile, chosen=chosen)]


def _mean(rows: Rows) -> Tensor:
    total_D, tokens = torch.zeros(rows.store.header.d_model, dtype=torch.float64), 0
    for x_RTD, mask_RT in rows.batches():
        total_D += x_RTD[mask_RT].double().sum(0)
        tokens += int(mask_RT.sum())
    return total_D / max(1, tokens)


@dataclass(frozen=True, kw_only=True)
class Shift:
    """How far an intervention moves residuals: energy(m) = square m^2 + 2 cross m + constant, per kept token."""

    square: float
    cross: float
    constant: float

    def rms(self, multiplier: float) -> float:
        """Root mean square of |dx| over kept tokens."""
        return math.sqrt(max(0.0, self.square * multiplier**2 + 2 * self.cross * multiplier + self.constant))

    def multiplier(self, rms: float) -> float | None:
        """The m >= 0 at which residuals move by `rms`; None if there is none."""
        inside = self.cross**2 - self.square * (self.constant - rms**2)
        if self.square <= 0 or inside < 0:
            return None
        root = (inside**0.5 - self.cross) / self.square
        return root if root >= 0 else None


def measure_shift(
    intervention: Intervention, means: Sequence[float], acts_RTA: Tensor, mask_RT: Tensor, directions_FD: Tensor
) -> Shift:
    """How far an intervention that sets latents to -m times their means moves the kept tokens' residuals."""
    if not intervention.latents:
        return Shift(square=0.0, cross=0.0, constant=0.0)
    fired_RTA = intervention.fired(acts_RTA, mask_RT) & mask_RT[..., None]
    tokens = max(1, int(mask_RT[:, 1:].sum()))
    fired_NA = fired_RTA[fired_RTA.any(-1)]
    acts_NA = acts_RTA[fired_RTA.any(-1)].double() * fired_NA
    means_NA = fired_NA * torch.tensor(means, dtype=torch.float64)
    chosen_AD = directions_FD[list(intervention.latents)].double()
    gram_AA = chosen_AD @ chosen_AD.T
    return Shift(
        square=float((means_NA @ gram_AA * means_NA).sum()) / tokens,
        cross=float((means_NA @ gram_AA * acts_NA).sum()) / tokens,
        constant=float((acts_NA @ gram_AA * acts_NA).sum()) / tokens,
    )


def rate_threshold(acts_RTA: Tensor, mask_RT: Tensor, quantile: float | None) -> float | None:
    """The firing rate that `quantile` of these rows don't exceed; None for a static intervention."""
    if quantile is None or acts_RTA.shape[-1] == 0:
        return None
    return float(torch.quantile(firing_rates(acts_RTA, mask_RT), quantile))
