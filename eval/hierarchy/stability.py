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
    levels = len(members[0][0])
    matched, chance = _matchings(members, levels)
    agreements = [
        _agreement(
            "mean_max_correlation", level, [cosines[level - 1] for _, cosines in matched.values()], chance[level]
        )
        for level in range(1, levels + 1)
    ]
    for key in members[0][1]:
        if all(key in maps for _, maps in members):
            agreements.append(_edge_agreement(key, members, {pair: matches for pair, (matches, _) in matched.items()}))
    return agreements


def _matchings(
    members: Sequence[Member], levels: int
) -> tuple[dict[tuple[int, int], tuple[list[Tensor], list[float]]], dict[int, list[list[float]]]]:
    """For each pair of seeds the matching of every level and its mean cosine; for each level the null, [draw][pair]."""
    matched: dict[tuple[int, int], tuple[list[Tensor], list[float]]] = {}
    chance: dict[int, list[list[float]]] = {level: [[] for _ in range(NULL_DRAWS)] for level in range(1, levels + 1)}
    for first, second in combinations(range(len(members)), 2):
        matches, cosines = [], []
        for level in range(1, levels + 1):
            one, other = members[first][0][level - 1], members[second][0][level - 1]
            match, cosine = matching(one, other)
            matches.append(match)
            cosines.append(cosine)
            for seed, draws in enumerate(chance[level]):
                order = torch.randperm(other.shape[1], generator=torch.Generator().manual_seed(seed))
                draws.append(matching(one, other[:, order])[1])
        matched[first, second] = (matches, cosines)
    return matched, chance


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


def _edge_agreement(key: str, members: Sequence[Member], matched: dict[tuple[int, int], list[Tensor]]) -> Agreement:
    level = int(key.lstrip("abcdefghijklmnopqrstuvwxyz"))
    values: list[float] = []
    chance: list[list[float]] = [[] for _ in range(NULL_DRAWS)]
    for (first, second), matches in matched.items():
        one_FG, other_FG = edges(members[first][1][key]), edges(members[second][1][key])
        values.append(jaccard(one_FG, other_FG, matches[level - 1], matches[level - 2]))
        for seed, draws in enumerate(chance):
            generator = torch.Generator().manual_seed(seed)
            coarse_F, fine_G = (torch.randperm(size, generator=generator) for size in one_FG.shape)
            draws.append(jaccard(one_FG, other_FG, coarse_F, fine_G))
    return _agreement(f"edge_jaccard, {key.removesuffix(str(level))}", level, values, chance)


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
