"""How alike the runs of several seeds are: latents matched one to one, and the edges between matched latents.

Shapes: F latents of a level, G of the level below, D residual width.
"""

from collections.abc import Sequence
from itertools import combinations
from statistics import fmean, stdev

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn.functional import normalize

from hsae.cache.errors import UserError
from hsae.eval.hierarchy.composition_result import Null
from hsae.eval.hierarchy.maps import NULL_DRAWS, edges

Member = tuple[Sequence[Tensor], dict[str, Tensor]]
"""Of one seed: directions [F_l, D] of each level, finest first; contributions [F_l, F_{l-1}] by map (`learned2`)."""


class Agreement(BaseModel):
    """A measure of two seeds' likeness, averaged over all pairs of seeds."""

    model_config = ConfigDict(frozen=True)

    name: str
    """mean_max_correlation, or edge_jaccard of a reading."""
    level: int
    value: float
    sd: float | None
    """Over pairs of seeds; None for a single pair. Pairs share seeds, so it is no standard error."""
    pairs: list[float]
    null: Null


def stability(members: Sequence[Member]) -> list[Agreement]:
    """Agreement between seeds at every level, and of the edges between neighbouring levels, beside what chance gives.

    mean_max_correlation: mean cosine of directions under the one-to-one matching with the largest sum. Null: the other
    seed's directions with their D coordinates permuted, all alike, matched anew. edge_jaccard: |A and B| / |A or B| of
    the two sets of edges under that matching. Null: random matchings. Raises UserError if scipy is missing or fewer
    than two members are given.
    """
    if len(members) < 2:
        raise UserError(f"stability compares two seeds or more, not {len(members)}")
    pairs = list(combinations(members, 2))
    agreements: list[Agreement] = []
    matches: dict[int, list[Tensor]] = {}
    for level in range(1, len(members[0][0]) + 1):
        directions = [(one[level - 1], other[level - 1]) for (one, _), (other, _) in pairs]
        matched = [matching(one, other) for one, other in directions]
        chance = [[matching(one, _mixed(other, seed))[1] for one, other in directions] for seed in range(NULL_DRAWS)]
        matches[level] = [match for match, _ in matched]
        agreements.append(_agreement("mean_max_correlation", level, [cosine for _, cosine in matched], chance))
    for key in members[0][1]:
        if all(key in maps for _, maps in members):
            agreements.append(_edge_agreement(key, pairs, matches))
    return agreements


def _mixed(directions_FD: Tensor, seed: int) -> Tensor:
    """Directions with their coordinates permuted, all alike."""
    return directions_FD[:, torch.randperm(directions_FD.shape[1], generator=torch.Generator().manual_seed(seed))]


def matching(one_FD: Tensor, other_FD: Tensor) -> tuple[Tensor, float]:
    """([F] the latent of `other` matched to each of `one`, their mean cosine): the assignment with the largest sum.

    Takes 8 F^2 bytes, and time that grows a little slower than F^3. Raises UserError if scipy is missing.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise UserError("matching latents needs scipy; run: pip install 'hsae[eval]'") from None
    cosines_FF = (normalize(one_FD.double()) @ normalize(other_FD.double()).T).cpu()
    rows, columns = linear_sum_assignment(cosines_FF.numpy(), maximize=True)
    return torch.from_numpy(columns), float(cosines_FF[torch.from_numpy(rows), torch.from_numpy(columns)].mean())


def jaccard(one_FG: Tensor, other_FG: Tensor, coarse_F: Tensor, fine_G: Tensor) -> float:
    """|A and B| / |A or B| of two sets of edges under a matching of their latents; 0 if both are empty."""
    renamed_FG = torch.zeros_like(one_FG)
    renamed_FG[coarse_F[:, None], fine_G[None, :]] = one_FG
    either = int((renamed_FG | other_FG).sum())
    return int((renamed_FG & other_FG).sum()) / either if either else 0.0


def _edge_agreement(key: str, pairs: Sequence[tuple[Member, Member]], matches: dict[int, list[Tensor]]) -> Agreement:
    name = key.rstrip("0123456789")
    level = int(key.removeprefix(name))
    both = [(edges(one[key]), edges(other[key])) for (_, one), (_, other) in pairs]
    values = [
        jaccard(*sets, coarse_F, fine_G)
        for sets, coarse_F, fine_G in zip(both, matches[level], matches[level - 1], strict=True)
    ]
    chance = [[jaccard(*sets, *_random_match(sets[0], seed)) for sets in both] for seed in range(NULL_DRAWS)]
    return _agreement(f"edge_jaccard, {name}", level, values, chance)


def _random_match(edges_FG: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """A random order of the coarse latents, and one of the fine ones."""
    generator = torch.Generator().manual_seed(seed)
    coarse_F, fine_G = (torch.randperm(size, generator=generator) for size in edges_FG.shape)
    return coarse_F, fine_G


def _agreement(name: str, level: int, values: list[float], chance: list[list[float]]) -> Agreement:
    value = fmean(values)
    return Agreement(
        name=name,
        level=level,
        value=value,
        sd=stdev(values) if len(values) > 1 else None,
        pairs=values,
        null=Null.of(value, [fmean(draws) for draws in chance]),
    )
