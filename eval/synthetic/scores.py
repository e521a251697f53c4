"""Scores of a trained model against a synthetic world: are its latents the true features, and its edges the true tree?

Shapes: S vectors of the held-out sample, N true features, F latents of a level, A latents of all levels (finest first).

Firing: a latent fires where its code is above 0. F1 of (latent, feature) is that of the latent's firing as a detector
of the feature's. A latent is mapped to the feature it detects best if that F1 is above 0.5; else it is unmapped.

Edges are read in two ways, and every model gets all the readings it has: - composition: from the learned maps. Fine
latent j is a part of coarse latent i if its contribution c_ij (the share of i's rms that j brings) is at least 0.1 of
the largest in i's row, and at least 0.1. The first half is the rule by which unlearning descends; the second keeps a
coarse latent that has no parts from being given its largest speck of noise. - firing: for models without maps (flat,
Matryoshka, no composition), and beside the other for all, so that no arm is judged by a reader that another doesn't
get. j's parent is the more frequent latent i with the largest P(i fires | j fires), over all levels, if that is at
least 0.5 and at least twice P(i fires). This is the best reading a flat SAE has: it loses an edge only where the
parent's latent really stays off under the child's (absorption), or where a latent has no truth to stand for. An edge is
right if its two latents map to a true parent and its child; everything else, unmapped latents included, is wrong.
Precision is over the model's edges, recall over the tree's (each counted once).

Nulls, from the same contributions: permuted (the entries of each row shuffled) and random (half-normal contributions,
cut so that as many edges are left); of the firing reading, the children shuffled among the edges. Each is the mean of
20 draws.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hsae.eval.synthetic.worlds import World
from hsae.train.model.hierarchical_sae import HierarchicalSAE
from hsae.train.model.trainable_sae import seed_of

MAPPED_F1 = 0.5
RELATIVE_CUT, ABSOLUTE_CUT = 0.1, 0.1
FIRING_CUT, FIRING_LIFT = 0.5, 2.0
NULL_DRAWS = 20


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How often latents and features fire, alone and together, over a sample."""

    vectors: int
    both: Tensor
    """[A, N] vectors on which latent and feature fire."""
    latents: Tensor
    """[A]"""
    features: Tensor
    """[N]"""
    pairs: Tensor
    """[A, A] vectors on which two latents fire."""
    unexplained: float
    """Mean squared error over the variance of x."""
    l0: list[float]
    """Of each level, finest first."""

    def f1(self) -> Tensor:
        """[A, N] F1 of each latent as a detector of each feature; 0 where neither fires."""
        return 2 * self.both / (self.latents[:, None] + self.features).clamp_min(1)


@torch.no_grad()
def count(model: HierarchicalSAE, world: World, vectors: int) -> Counts:
    """Run the model over a held-out sample."""
    widths = model.level_widths
    both = torch.zeros(sum(widths), world.tier.features, dtype=torch.float64)
    pairs = torch.zeros(sum(widths), sum(widths), dtype=torch.float64)
    latents, features = (
        torch.zeros(sum(widths), dtype=torch.float64),
        torch.zeros(world.tier.features, dtype=torch.float64),
    )
    seen, error = 0, 0.0
    total, squares = torch.zeros(world.tier.width, dtype=torch.float64), 0.0
    for batch in world.held_out(vectors):
        codes = model.codes(batch.x)
        fires, on = (torch.cat(codes, 1) > 0).float(), (batch.features > 0).float()
        both += (fires.T @ on).double()  # whole numbers below 2^24: exact in float32
        pairs += (fires.T @ fires).double()
        latents += fires.sum(0).double()
        features += on.sum(0).double()
        wide = batch.x.double()
        error += float((wide - model.reconstruct(codes).double()).square().sum())
        total, squares, seen = total + wide.sum(0), squares + float(wide.square().sum()), seen + len(wide)
    variance = squares - float(total.square().sum()) / seen
    l0 = [float(part.sum()) / seen for part in torch.split(latents, list(widths))]
    return Counts(
        vectors=seen, both=both, latents=latents, features=features, pairs=pairs, unexplained=error / variance, l0=l0
    )


def mapping(f1: Tensor) -> Tensor:
    """[A] the feature each latent stands for, -1 for none."""
    best, feature = f1.max(1)
    return torch.where(best > MAPPED_F1, feature, -1)


def cut(contributions: Tensor) -> Tensor:
    """[F_l, F_{l-1}] which contributions are edges."""
    largest = contributions.amax(1, keepdim=True)
    return (contributions >= RELATIVE_CUT * largest) & (contributions >= ABSOLUTE_CUT)


def composition_edges(model: HierarchicalSAE, cuts: Sequence[Tensor]) -> Tensor:
    """[E, 2] (parent, child) latents, counted over all levels, of the edges in `cuts` (one for each map)."""
    starts = [0]
    for width in model.level_widths:
        starts.append(starts[-1] + width)
    found = [
        chosen.nonzero() + torch.tensor([starts[part.level - 1], starts[part.level - 2]])
        for part, chosen in zip(model.compositions, cuts, strict=True)
    ]
    return torch.cat(found)


def firing_edges(counts: Counts) -> Tensor:
    """[E, 2] (parent, child) latents by the firing reading."""
    frequency = counts.latents
    given = counts.pairs / frequency.clamp_min(1)  # [i, j] P(i fires | j fires)
    allowed = (frequency[:, None] > frequency) & (given >= FIRING_LIFT * frequency[:, None] / counts.vectors)
    best, parent = torch.where(allowed, given, -1.0).max(0)
    children = (best >= FIRING_CUT).nonzero().squeeze(1)
    return torch.stack([parent[children], children], 1)


def edge_scores(edges: Tensor, mapped: Tensor, parents: Tensor) -> tuple[float, float, float]:
    """Precision, recall and F1 of `edges` [E, 2] under the map `mapped` [A] of latents to features and the tree
    `parents` [N].
    """
    above, below = mapped[edges].unbind(1)
    right = (below >= 0) & (above >= 0) & (parents[below] == above)
    hits, found = int(right.sum()), len(set(below[right].tolist()))
    precision = hits / len(edges) if len(edges) else 0.0
    recall = found / int((parents >= 0).sum())
    return precision, recall, 2 * precision * recall / (precision + recall) if hits else 0.0


def _null_f1(draws: Callable[[torch.Generator], Tensor], mapped: Tensor, parents: Tensor) -> float:
    generator = torch.Generator().manual_seed(seed_of(NULL_DRAWS))
    return sum(edge_scores(draws(generator), mapped, parents)[2] for _ in range(NULL_DRAWS)) / NULL_DRAWS


def _shuffled_rows(matrix: Tensor, generator: torch.Generator) -> Tensor:
    return matrix.gather(1, torch.rand(matrix.shape, generator=generator).argsort(1))


def _random_cut(chosen: Tensor, generator: torch.Generator) -> Tensor:
    """As many edges as `chosen` has: the largest of half-normal contributions."""
    drawn = torch.randn(chosen.shape, generator=generator).abs().flatten()
    kept = drawn.topk(int(chosen.sum())).indices
    return torch.zeros_like(drawn, dtype=torch.bool).index_fill(0, kept, True).view_as(chosen)


def score(model: HierarchicalSAE, world: World, *, vectors: int = 65_536) -> dict[str, Any]:
    """All scores of one model (JSON-ready); features that the sample never shows are left out of the means."""
    counts = count(model, world, vectors)
    f1, parents = counts.f1(), world.parents
    mapped, (best, latent) = mapping(f1), f1.max(0)
    seen = counts.features > 0
    is_parent = torch.zeros_like(seen).index_fill(0, parents[parents >= 0], True)
    children = ((parents >= 0) & seen).nonzero().squeeze(1)
    awake = counts.both[latent[parents[children]], children] / counts.features[children]
    rows = torch.cat([model.directions(number) for number in range(1, len(model.levels) + 1)])
    cosines = (normalize(rows, dim=1) @ world.directions.T).amax(0)
    return {
        "parent_f1": float(best[is_parent & seen].mean()),
        "child_f1": float(best[children].mean()),
        "single_f1": float(best[~is_parent & (parents < 0) & seen].mean()),
        "mmc": float(cosines[seen].mean()),
        **_all_edge_scores(model, counts, mapped, parents),
        "absorption": float(1 - awake.mean()),
        "ev": 1 - counts.unexplained,
        "l0": counts.l0,
        "unmapped_latents": int((mapped < 0).sum()),
        "dead_latents": int((counts.latents == 0).sum()),
    }


def _all_edge_scores(model: HierarchicalSAE, counts: Counts, mapped: Tensor, parents: Tensor) -> dict[str, Any]:
    edges = firing_edges(counts)
    names = ("precision", "recall", "f1")
    firing = dict(zip((f"firing_edge_{name}" for name in names), edge_scores(edges, mapped, parents), strict=True))

    def shuffled_children(generator: torch.Generator) -> Tensor:
        return torch.stack([edges[:, 0], edges[torch.randperm(len(edges), generator=generator), 1]], 1)

    firing["firing_edge_f1_permuted"] = _null_f1(shuffled_children, mapped, parents)
    if not model.compositions:
        by_firing = {name.removeprefix("firing_"): value for name, value in firing.items()}
        return {"edge_reading": "firing", **by_firing, "edge_f1_random": None, **firing}
    maps = [part.contributions for part in model.compositions]
    cuts = [cut(matrix) for matrix in maps]
    by_maps = edge_scores(composition_edges(model, cuts), mapped, parents)

    def permuted(generator: torch.Generator) -> Tensor:
        return composition_edges(model, [cut(_shuffled_rows(matrix, generator)) for matrix in maps])

    def random(generator: torch.Generator) -> Tensor:
        return composition_edges(model, [_random_cut(chosen, generator) for chosen in cuts])

    return {
        "edge_reading": "composition",
        **dict(zip((f"edge_{name}" for name in names), by_maps, strict=True)),
        "edge_f1_permuted": _null_f1(permuted, mapped, parents),
        "edge_f1_random": _null_f1(random, mapped, parents),
        **firing,
    }
