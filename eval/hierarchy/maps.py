"""A map between two levels read as a structure: who is made of whom, how sparsely, and what chance would give.

Everything is read off contributions C_ij = w_ij rms(h_j) / rms(h_i): the share of coarse latent i's rms that fine
latent j brings. Fine latent j is a *child* of i where C_ij >= EDGE_SHARE * max_j C_ij (and C_ij > 0); such pairs are
the *edges*.

Shapes: F coarse latents (level l), G fine latents (level l-1).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

EDGE_SHARE = 0.1
VISIBLE = 1e-3  # a contribution below this is as good as zero
NULL_DRAWS = 5
NULLS = ("permuted", "random")
INVARIANT = ("participation_ratio", "hoyer", "copy_index", "children_per_parent")
"""Measures that don't depend on where a row's entries stand."""


@dataclass(frozen=True, kw_only=True)
class CodeScale:
    """Root mean squares of both codes, over the text from which maps are read."""

    coarse_F: Tensor
    fine_G: Tensor

    def contributions(self, weight_FG: Tensor) -> Tensor:
        """[F, G] C of a map given in the codes' own units; 0 where either latent never fired."""
        return _quotient(weight_FG * self.fine_G, self.coarse_F[:, None])

    def weight(self, contributions_FG: Tensor) -> Tensor:
        """[F, G] the map in the codes' own units."""
        return _quotient(contributions_FG * self.coarse_F[:, None], self.fine_G)


def _quotient(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below, 0.0)


@dataclass(frozen=True, kw_only=True)
class LevelMap:
    """A map between two levels."""

    contributions_FG: Tensor
    weight_FG: Tensor
    """In the codes' own units: h_l is compared with weight @ h_{l-1}."""

    @classmethod
    def of_contributions(cls, contributions_FG: Tensor, scale: CodeScale) -> "LevelMap":
        """The map that has these contributions."""
        return cls(contributions_FG=contributions_FG, weight_FG=scale.weight(contributions_FG))

    @property
    def edges_FG(self) -> Tensor:
        """[F, G] True where the fine latent is a child of the coarse one."""
        return edges(self.contributions_FG)

    @property
    def parent_G(self) -> Tensor:
        """[G] the coarse latent to which each fine one brings most among those whose child it is; -1 for an orphan."""
        share_FG = torch.where(self.edges_FG, self.contributions_FG, 0.0)
        best_G, parent_G = share_FG.max(0)
        return torch.where(best_G > 0, parent_G, -1)


def edges(contributions_FG: Tensor) -> Tensor:
    """[F, G] True where the fine latent is a child of the coarse one."""
    largest_F1 = contributions_FG.amax(1, keepdim=True)
    return (contributions_FG > 0) & (contributions_FG >= EDGE_SHARE * largest_F1)


def nulls(contributions_FG: Tensor, alive_G: Tensor, draws: int = NULL_DRAWS) -> Iterator[tuple[str, Tensor]]:
    """Contributions without structure, (name, [F, G]), `draws` of each kind with seeds 0, 1, ...

    permuted: each row's entries in random places among the fine latents that fire. random: as many entries a row as are
    visible in it (|C| > VISIBLE), in random places, with half-normal values of their root mean square.
    """
    for name, draw in (("permuted", permuted), ("random", half_normal)):
        for seed in range(draws):
            yield name, draw(contributions_FG, alive_G, torch.Generator().manual_seed(seed))


def permuted(contributions_FG: Tensor, alive_G: Tensor, generator: torch.Generator) -> Tensor:
    """Each row's entries in random places among the fine latents that fire."""
    places_A = alive_G.nonzero().squeeze(1)
    order_FA = _order(len(contributions_FG), len(places_A), generator).to(contributions_FG.device)
    null_FG = torch.zeros_like(contributions_FG)
    null_FG[:, places_A] = contributions_FG[:, places_A].gather(1, order_FA)
    return null_FG


def half_normal(contributions_FG: Tensor, alive_G: Tensor, generator: torch.Generator) -> Tensor:
    """Half-normal entries, as many a row and of the same rms, in random places among the fine latents that fire."""
    places_A = alive_G.nonzero().squeeze(1)
    alive_FA = contributions_FG[:, places_A]
    visible_FA = alive_FA.abs() > VISIBLE
    count_F = visible_FA.sum(1)
    rms_F = ((alive_FA * visible_FA).square().sum(1) / count_F.clamp_min(1)).sqrt()
    order_FA = _order(len(alive_FA), len(places_A), generator).to(alive_FA.device)
    values_FA = torch.randn(alive_FA.shape, generator=generator).abs().to(alive_FA)
    null_FG = torch.zeros_like(contributions_FG)
    null_FG[:, places_A] = torch.where(order_FA < count_F[:, None], values_FA * rms_F[:, None], 0.0)
    return null_FG


def _order(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """[rows, columns] a random order of the columns for each row."""
    return torch.rand(rows, columns, generator=generator).argsort(1)


def participation_ratio(contributions_FG: Tensor) -> Tensor:
    """(sum |C|)^2 / sum C^2 of each row, [F]: how many fine latents a coarse one is made of; 1 is a copy, 0 empty."""
    total_F, square_F = contributions_FG.abs().sum(1), contributions_FG.square().sum(1)
    return total_F.square() / square_F.clamp_min(1e-30)


def hoyer(contributions_FG: Tensor) -> Tensor:
    """(sqrt(n) - |c|_1/|c|_2) / (sqrt(n) - 1) of each row, [F], n its length: 1 one entry, 0 all equal, NaN empty."""
    root = math.sqrt(contributions_FG.shape[1])
    norm_F: Tensor = contributions_FG.norm(dim=1)
    return (root - contributions_FG.abs().sum(1) / norm_F) / (root - 1)


def copy_index(contributions_FG: Tensor) -> Tensor:
    """max C^2 / sum C^2 of each row, [F]: 1 is a copy of one fine latent; NaN for an empty row."""
    square_FG = contributions_FG.square()
    return square_FG.amax(1) / square_FG.sum(1)
