"""Which latents to clamp: densities on two texts, SAEBench's sparsity rule, and walks along a hierarchy.

Shapes: N kept tokens, F latents, C coarse latents, G finer ones (a map between two levels is [C, G]).
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hsae.eval.unlearning.intervention import Dictionary

SHARE_OF_STRONGEST = 0.1  # a child counts if it brings at least this share of what the strongest child brings
MASS = 0.5  # a coarse latent is added once this share of what it is made of is chosen
NEIGHBOURS = 10  # of so many latents of the nearest frequency one is drawn


@dataclass(frozen=True, kw_only=True)
class Profile:
    """How often each latent fires on forget and retain tokens, and how strongly on forget tokens."""

    forget_F: Tensor
    """Share of kept forget tokens at which the latent is active."""
    retain_F: Tensor
    mean_F: Tensor
    """Mean activation over the forget tokens at which it is active; 0 if there are none."""
    tokens: tuple[int, int]
    """Kept tokens of forget and retain."""

    @property
    def log_ratio_F(self) -> Tensor:
        """ln of forget density over retain density, each with half a token added so that it is finite."""
        forget, retain = (0.5 / count for count in self.tokens)
        return torch.log((self.forget_F + forget) / (self.retain_F + retain))

    @property
    def leaning_F(self) -> Tensor:
        """Whether a latent fires on forget, and more than on retain."""
        return (self.forget_F > 0) & (self.log_ratio_F > 0)


def densities(dictionary: Dictionary, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, int]:
    """([F] share of kept tokens at which a latent is active, [F] mean activation where it is, kept tokens)."""
    width = sum(dictionary.widths)
    fired_F, total_F, tokens = torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64), 0
    for x_RTD, mask_RT in batches:
        acts_NF = dictionary.encode(x_RTD)[mask_RT]
        fired_F += (acts_NF > 0).sum(0).double().cpu()
        total_F += acts_NF.double().clamp_min(0).sum(0).cpu()
        tokens += len(acts_NF)
    return fired_F / max(1, tokens), total_F / fired_F.clamp_min(1), tokens


def profile(
    dictionary: Dictionary, forget: Iterable[tuple[Tensor, Tensor]], retain: Iterable[tuple[Tensor, Tensor]]
) -> Profile:
    """The profile of all latents over batches of residuals [R, T, D] and masks of kept tokens [R, T]."""
    forget_F, mean_F, forget_tokens = densities(dictionary, forget)
    retain_F, _, retain_tokens = densities(dictionary, retain)
    return Profile(forget_F=forget_F, retain_F=retain_F, mean_F=mean_F, tokens=(forget_tokens, retain_tokens))


def rounded(density_F: Tensor) -> Tensor:
    """Six decimals, as SAEBench keeps its densities between two steps."""
    return (density_F.double() * 1e6).round() / 1e6


def ranking(forget_F: Tensor, retain_F: Tensor, cap: float, among: Sequence[int] | None = None) -> list[int]:
    """SAEBench's sparsity rule: latents with retain density below `cap` that fire on forget, most frequent there first.

    Ties go by number. `among` are the latents that take part; all unless given.
    """
    kept_F = torch.where(retain_F < cap, forget_F, 0.0)
    order = torch.sort(kept_F, descending=True, stable=True).indices.tolist()
    allowed = None if among is None else set(among)
    return [latent for latent in order if kept_F[latent] > 0 and (allowed is None or latent in allowed)]


def children(map_CG: Tensor, parent: int) -> list[int]:
    """Finer latents that bring at least a tenth of what the strongest brings, strongest first."""
    row = map_CG[parent].abs()
    order = torch.sort(row, descending=True, stable=True).indices.tolist()
    least = SHARE_OF_STRONGEST * float(row.max())
    return [latent for latent in order if row[latent] > 0 and row[latent] >= least]


def descend(
    dictionary: Dictionary, maps: Sequence[Tensor], seeds: Sequence[int], eligible_F: Tensor, count: int
) -> list[int]:
    """Seeds of the coarsest level in their order, each with its eligible descendants; `count` in all.

    `maps` are the [C, G] maps from each level to the next finer one, coarsest first.
    """
    chosen: dict[int, None] = {}
    for seed in seeds:
        family, parents = [seed], [seed]
        for number, map_CG in zip(range(len(dictionary.widths), 1, -1), maps, strict=True):
            coarse, fine = dictionary.level(number), dictionary.level(number - 1)
            offspring = [fine[child] for parent in parents for child in children(map_CG, parent - coarse.start)]
            parents = [child for child in dict.fromkeys(offspring) if eligible_F[child]]
            family += parents
        chosen.update(dict.fromkeys(family))
        if len(chosen) >= count:
            break
    return list(chosen)[:count]


def ascend(
    dictionary: Dictionary,
    maps: Sequence[Tensor],
    seeds: Sequence[int],
    retain_F: Tensor,
    cap: float,
    count: int,
) -> list[int]:
    """As many seeds of the finest level as fit, with every coarser latent of which half is chosen; `count` in all.

    `maps` as for `descend`. A coarse latent must keep below the retain cap.
    """
    best: list[int] = []
    for taken in range(1, min(count, len(seeds)) + 1):
        chosen = set(seeds[:taken])
        added: list[int] = []
        for number, map_CG in zip(range(2, len(dictionary.widths) + 1), reversed(maps), strict=True):
            coarse, fine = dictionary.level(number), dictionary.level(number - 1)
            mass_CG = map_CG.abs()
            is_chosen_G = torch.tensor([latent in chosen for latent in fine], dtype=mass_CG.dtype)
            share_C = mass_CG @ is_chosen_G / mass_CG.sum(1).clamp_min(1e-30)
            covered = [
                latent
                for latent, share in zip(coarse, share_C.tolist(), strict=True)
                if share >= MASS and retain_F[latent] < cap
            ]
            added += covered
            chosen.update(covered)
        if taken + len(added) > count:
            break
        best = [*seeds[:taken], *added]
    return best


def permuted_rows(map_CG: Tensor, seed: int) -> Tensor:
    """Every coarse latent keeps its own entries, in random places."""
    generator = torch.Generator().manual_seed(seed)
    order_CG = torch.stack([torch.randperm(map_CG.shape[1], generator=generator) for _ in range(len(map_CG))])
    return map_CG.gather(1, order_CG)


def random_alike(profile: Profile, latents: Sequence[int], seed: int) -> list[int]:
    """For each latent another one, drawn from the NEIGHBOURS unchosen ones nearest in frequency; none twice."""
    forget, retain = profile.tokens
    frequency = ((profile.forget_F * forget + profile.retain_F * retain) / (forget + retain)).tolist()
    generator, clamped = random.Random(seed), set(latents)
    free = [latent for latent in range(len(frequency)) if latent not in clamped and frequency[latent] > 0]
    controls = []
    for latent in latents:
        near = sorted(free, key=lambda other: (abs(math.log(frequency[other] / frequency[latent])), other))[:NEIGHBOURS]
        if near:
            controls.append(generator.choice(near))
            free.remove(controls[-1])
    return controls
