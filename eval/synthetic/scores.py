"""Scores of a trained model against a synthetic world: are its latents the true features, and its edges the true tree?

Shapes: S vectors of the held-out sample, N true features, F latents of a level, A latents of all levels (finest first).

Firing: a latent fires where its code is above 0. F1 of (latent, feature) is that of the latent's firing as a detector
of the feature's. A latent is mapped to the feature it detects best if that F1 is above 0.5; else it is unmapped.

Edges are read in two ways, and every model gets all the readings it has:
- composition: from the learned maps. Fine latent j is a part of coarse latent i if its contribution c_ij (the share of
  i's rms that j brings) is at least 0.1 of the largest in i's row, as in unlearning, and at least 0.1, so that a coarse
  latent without parts does not get its largest speck of noise.
- firing: for models without maps (flat, Matryoshka, no composition), and beside the other for all. j's parent is the
  more frequent latent i with the largest P(i fires | j fires), over all levels, if that is at least 0.5 and at least
  twice P(i fires). It loses an edge only where the parent's latent stays off under the child's (absorption), or where a
  latent stands for no feature.
An edge is right if its two latents map to a true parent and its child; everything else, unmapped latents included, is
wrong. Precision is over the model's edges, recall over the tree's (each counted once).

Nulls, from the same contributions: permuted (the entries of each row shuffled) and random (half-normal contributions,
cut so that as many edges are left); of the firing reading, the children shuffled among the edges. Each is the mean of
20 draws.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
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
    pairs: Tensor
    """[A, A] vectors on which two latents fire."""
    features: Tensor
    """[N]"""
    unexplained: float
    """Mean squared error over the variance of x."""

    @property
    def latents(self) -> Tensor:
        """[A]"""
        return self.pairs.diagonal()


@torch.no_grad()
def count(model: HierarchicalSAE, world: World, vectors: int) -> Counts:
    """Run the model over a held-out sample."""
    zeros = partial(torch.zeros, dtype=torch.float64)
    latents, width = sum(model.level_widths), world.tier.width
    both, pairs = zeros(latents, world.tier.features), zeros(latents, latents)
    features, total = zeros(world.tier.features), zeros(width)
    seen, error, squares = 0, 0.0, 0.0
    for batch in world.held_out(vectors):
        codes, x_BD = model.codes(batch.x), batch.x.double()
        fires, on = (torch.cat(codes, 1) > 0).float(), (batch.features > 0).float()
        both += (fires.T @ on).double()  # whole numbers below 2^24: exact in float32
        pairs += (fires.T @ fires).double()
        features += on.sum(0).double()
        error += float((x_BD - model.reconstruct(codes).double()).square().sum())
        total += x_BD.sum(0)
        squares += float(x_BD.square().sum())
        seen += len(x_BD)
    variance = squares - float(total.square().sum()) / seen
    return Counts(vectors=seen, both=both, pairs=pairs, features=features, unexplained=error / variance)


def cut(contributions: Tensor) -> Tensor:
    """[F_l, F_{l-1}] which contributions are edges."""
    largest = contributions.amax(1, keepdim=True)
    return (contributions >= RELATIVE_CUT * largest) & (contributions >= ABSOLUTE_CUT)


def composition_edges(model: HierarchicalSAE, cuts: Sequence[Tensor]) -> Tensor:
    """[E, 2] (parent, child) latents, counted over all levels, of the edges in `cuts` (one for each map)."""
    starts = list(accumulate(model.level_widths, initial=0))
    return torch.cat(
        [
            is_edge.nonzero() + torch.tensor([starts[part.level - 1], starts[part.level - 2]])
            for part, is_edge in zip(model.compositions, cuts, strict=True)
        ]
    )


def firing_edges(counts: Counts) -> Tensor:
    """[E, 2] (parent, child) latents by the firing reading."""
    frequency = counts.latents
    conditional = counts.pairs / frequency.clamp_min(1)  # [i, j] P(i fires | j fires)
    allowed = (frequency[:, None] > frequency) & (conditional >= FIRING_LIFT * frequency[:, None] / counts.vectors)
    best, parent = torch.where(allowed, conditional, -1.0).max(0)
    children = (best >= FIRING_CUT).nonzero().squeeze(1)
    return torch.stack([parent[children], children], 1)


def edge_scores(edges: Tensor, mapped: Tensor, parents: Tensor) -> dict[str, float]:
    """How well `edges` [E, 2] match the tree `parents` [N], with latents mapped to the features `mapped` [A]."""
    above, below = mapped[edges].unbind(1)
    is_right = (below >= 0) & (above >= 0) & (parents[below] == above)
    right = int(is_right.sum())
    precision = right / len(edges) if len(edges) else 0.0
    recall = len(set(below[is_right].tolist())) / int((parents >= 0).sum())
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    return {"precision": precision, "recall": recall, "f1": f1}


def score(model: HierarchicalSAE, world: World, *, vectors: int) -> dict[str, Any]:
    """All scores of one model (JSON-ready); features that the sample never shows are left out of the means."""
    counts, parents = count(model, world, vectors), world.parents
    f1 = 2 * counts.both / (counts.latents[:, None] + counts.features).clamp_min(1)
    (best_of_latent, feature), (best, latent) = f1.max(1), f1.max(0)
    mapped = torch.where(best_of_latent > MAPPED_F1, feature, -1)
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
        "l0": [float(level.sum()) / counts.vectors for level in torch.split(counts.latents, list(model.level_widths))],
        "unmapped_latents": int((mapped < 0).sum()),
        "dead_latents": int((counts.latents == 0).sum()),
    }


def _all_edge_scores(model: HierarchicalSAE, counts: Counts, mapped: Tensor, parents: Tensor) -> dict[str, Any]:
    """The scores of both readings, with their nulls; a model without maps gets those by firing twice."""

    def null_f1(draw: Callable[[torch.Generator], Tensor]) -> float:
        generator = torch.Generator().manual_seed(seed_of(NULL_DRAWS))
        return sum(edge_scores(draw(generator), mapped, parents)["f1"] for _ in range(NULL_DRAWS)) / NULL_DRAWS

    def shuffled_children(generator: torch.Generator) -> Tensor:
        return torch.stack([edges[:, 0], edges[torch.randperm(len(edges), generator=generator), 1]], 1)

    def permuted(generator: torch.Generator) -> Tensor:
        return composition_edges(model, [cut(_shuffle_rows(matrix, generator)) for matrix in maps])

    def random(generator: torch.Generator) -> Tensor:
        return composition_edges(model, [_random_cut(is_edge, generator) for is_edge in cuts])

    edges = firing_edges(counts)
    firing = {**edge_scores(edges, mapped, parents), "f1_permuted": null_f1(shuffled_children)}
    maps = [part.contributions for part in model.compositions]
    cuts = [cut(matrix) for matrix in maps]
    main: dict[str, float | None] = {**firing, "f1_random": None}
    if maps:
        nulls = {"f1_permuted": null_f1(permuted), "f1_random": null_f1(random)}
        main = {**edge_scores(composition_edges(model, cuts), mapped, parents), **nulls}
    return {
        "edge_reading": "composition" if maps else "firing",
        **{f"edge_{name}": value for name, value in main.items()},
        **{f"firing_edge_{name}": value for name, value in firing.items()},
    }


def _shuffle_rows(matrix: Tensor, generator: torch.Generator) -> Tensor:
    return matrix.gather(1, torch.rand(matrix.shape, generator=generator).argsort(1))


def _random_cut(is_edge: Tensor, generator: torch.Generator) -> Tensor:
    """As many edges as `is_edge` has: the largest of half-normal contributions."""
    contributions = torch.randn(is_edge.shape, generator=generator).abs().flatten()
    largest = contributions.topk(int(is_edge.sum())).indices
    return torch.zeros_like(contributions, dtype=torch.bool).index_fill(0, largest, True).view_as(is_edge)
