"""Synthetic residuals whose features, and the tree they form, are known.

A feature is a direction that is added, times its activation, when it fires; a child fires only where its parent does,
and of the children of one parent at most one fires. Everything is a pure function of (tier, seed, step): no state, no
files.

T1 and T2 are small forests with set probabilities. T3 follows the recipe of SynthSAEBench-16k (Chanin & Garriga-Alonso
2026, arXiv 2602.14687): Zipfian frequencies, a Gaussian copula of low rank, magnitudes that differ from feature to
feature, probabilities raised so that a child's rate is what Zipf says although its parent and its siblings hold it
back.

Shapes: B vectors of a batch, D width, N features, S vectors of a sample.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hsae.cache.building.statistics import geometric_median
from hsae.train.model.trainable_sae import seed_of
from hsae.train.training.scaling import Scaling

HELD_OUT = 2**40
"""First step of the batches that training never sees."""
HELD_OUT_BATCH = 4096
SCALING_SAMPLE = 8192
ORTHOGONALISE_CHUNK = 1024


@dataclass(frozen=True, kw_only=True)
class Tier:
    """How a synthetic world is made: roots come first, then children by depth, then single features."""

    name: str
    width: int
    """D."""
    roots: int
    branching: int
    """Children of every feature that has any."""
    depth: int
    """Generations below the roots."""
    singles: int
    """Features outside any tree."""
    directions: str
    """`orthogonal`, `random` unit vectors, or `repelled`: random, then pushed apart."""
    scaled_children: bool
    """Multiply a child's activation by its parent's, in units of the parent's mean."""
    latents: int
    """Of the SAEs that are trained on it, in all levels together."""
    frequencies: tuple[float, float, float] | None = None
    """P(root), P(child | parent), P(single); None for Zipf's law and correlated firing (T3)."""
    spread: float = 0.0
    """Standard deviation of an activation, whose mean is 1 (T1, T2)."""

    @property
    def features(self) -> int:
        """N."""
        return self.roots * sum(int(self.branching**depth) for depth in range(self.depth + 1)) + self.singles


TIERS = {
    tier.name: tier
    for tier in (
        Tier(
            name="T1", width=28, latents=24, roots=3, branching=3, depth=1, singles=8, directions="orthogonal",
            scaled_children=False, frequencies=(0.15, 0.2, 0.05), spread=0.05,
        ),
        Tier(
            name="T2", width=48, latents=64, roots=10, branching=4, depth=1, singles=10, directions="random",
            scaled_children=True, frequencies=(0.12, 0.2, 0.05), spread=0.15,
        ),
        Tier(
            name="T3", width=128, latents=256, roots=8, branching=4, depth=3, singles=344, directions="repelled",
            scaled_children=True,
        ),
        Tier(
            name="T3-full", width=768, latents=4096, roots=128, branching=4, depth=3, singles=5504,
            directions="repelled", scaled_children=True,
        ),
    )
}  # fmt: skip
"""T3-full is SynthSAEBench-16k's size (N = 16,384, D = 768); T3 has a sixteenth of its features, a sixth of its width.
"""


class Batch(NamedTuple):
    """Vectors and what they are made of."""

    x: Tensor
    """[B, D]"""
    features: Tensor
    """[B, N] activation of every true feature, 0 where it is off."""


class World:
    """One synthetic world: a dictionary, a tree, and endless batches. Same (tier, seed, step): same bits."""

    parents: Tensor
    """[N] index of each feature's parent, -1 for roots and single features."""
    directions: Tensor
    """[N, D] unit rows."""

    def __init__(self, tier: Tier, seed: int) -> None:
        self.tier, self.seed = tier, seed
        self._key = (list(TIERS).index(tier.name) if tier.name in TIERS else len(TIERS), seed)
        generator = torch.Generator().manual_seed(seed_of(*self._key, 0))
        self.parents, self._generations = _tree(tier)
        self.directions = _directions(tier, generator)
        self.bias = torch.zeros(tier.width)
        if tier.frequencies is None:
            self._zipf = _Zipf(tier, self.parents, generator)
            direction = torch.randn(tier.width, generator=generator)
            self.bias = 0.5 * direction / direction.norm()

    def batch(self, step: int, size: int) -> Batch:
        """Batch number `step` of `size` vectors."""
        generator = torch.Generator().manual_seed(seed_of(*self._key, 1, step))
        draw = self._zipf_features if self.tier.frequencies is None else self._set_features
        features = draw(size, generator)
        return Batch(features @ self.directions + self.bias, features)

    def batches(self, size: int) -> Iterator[Batch]:
        """Batches 0, 1, ... without end."""
        return (self.batch(step, size) for step in count())

    def held_out(self, vectors: int) -> Iterator[Batch]:
        """About `vectors` vectors that training doesn't see."""
        for index in range(max(1, round(vectors / HELD_OUT_BATCH))):
            yield self.batch(HELD_OUT + index, min(HELD_OUT_BATCH, vectors))

    def scaling(self) -> Scaling:
        """What a training run needs to know, estimated from a held-out sample."""
        x_SD = torch.cat([batch.x for batch in self.held_out(SCALING_SAMPLE)]).double()
        scale = (self.tier.width / float(x_SD.square().sum(1).mean())) ** 0.5
        x_SD = x_SD * scale
        variance = float((x_SD - x_SD.mean(0)).square().sum(1).mean())
        return Scaling(scale=scale, median=geometric_median(x_SD).float(), variance=variance)

    def _set_features(self, size: int, generator: torch.Generator) -> Tensor:
        """T1 and T2: every parent draws one child, or none."""
        assert self.tier.frequencies is not None
        root, child, single = self.tier.frequencies
        features = (1 + self.tier.spread * torch.randn(size, self.tier.features, generator=generator)).clamp_min(0)
        roots, singles = slice(0, self.tier.roots), slice(self.tier.features - self.tier.singles, None)
        features[:, roots] *= torch.rand(size, self.tier.roots, generator=generator) < root
        features[:, singles] *= torch.rand(size, self.tier.singles, generator=generator) < single
        for children in self._generations:
            above = features[:, self.parents[children[:, 0]]]
            uniform = torch.rand(size, len(children), generator=generator)[..., None]
            place = torch.arange(children.shape[1])
            fires = (uniform >= place * child) & (uniform < (place + 1) * child) & (above > 0)[..., None]
            gain = above[..., None] if self.tier.scaled_children else 1.0
            features[:, children] *= fires * gain
        return features

    def _zipf_features(self, size: int, generator: torch.Generator) -> Tensor:
        """T3: features fire by a Gaussian copula; then, by depth, parents gate and siblings exclude each other."""
        features = self._zipf.fire(size, generator)
        for children in self._generations:
            parents = self.parents[children[:, 0]]
            gain = (features[:, parents] / self._zipf.means[parents])[..., None]
            firing = (features[:, children] > 0) & (gain > 0)
            lots = torch.where(firing, torch.rand(firing.shape, generator=generator), -1.0)
            features[:, children] *= gain * (firing & (lots == lots.amax(-1, keepdim=True)))
        return features


def _tree(tier: Tier) -> tuple[Tensor, list[Tensor]]:
    """Parent of every feature [N], and each generation's children [parents, branching]."""
    parents = torch.full((tier.features,), -1, dtype=torch.int64)
    generations = []
    above, next_index = torch.arange(tier.roots), tier.roots
    for _ in range(tier.depth):
        children = torch.arange(next_index, next_index + len(above) * tier.branching).view(len(above), tier.branching)
        parents[children] = above[:, None]
        generations.append(children)
        above, next_index = children.flatten(), next_index + children.numel()
    return parents, generations


def _directions(tier: Tier, generator: torch.Generator) -> Tensor:
    rows = torch.randn(tier.features, tier.width, generator=generator)
    if tier.directions == "orthogonal":
        orthonormal: Tensor = torch.linalg.qr(rows.T.double()).Q
        return orthonormal.T.float().contiguous()
    rows = normalize(rows, dim=1)
    return _repel(rows) if tier.directions == "repelled" else rows


def _repel(rows: Tensor) -> Tensor:
    """SynthSAEBench's way to spread directions: 100 steps of Adam on the squared cosines, in chunks to save memory."""
    rows = rows.clone().requires_grad_(True)
    optimiser = torch.optim.Adam([rows], lr=3e-4)
    for _ in range(100):
        optimiser.zero_grad()
        for first in range(0, len(rows), ORTHOGONALISE_CHUNK):
            chunk = rows[first : first + ORTHOGONALISE_CHUNK]
            own = chunk.square().sum(1)
            loss = (chunk @ rows.T).square().sum() - own.square().sum() + len(rows) * (own - 1).square().sum()
            torch.autograd.backward(loss)
        optimiser.step()
    return normalize(rows.detach(), dim=1)


class _Zipf:
    """Firing and magnitudes of T3, before the tree has its say."""

    RANK, CORRELATION, EXPONENT, MOST, LEAST = 25, 0.1, 0.5, 0.4, 5e-4

    def __init__(self, tier: Tier, parents: Tensor, generator: torch.Generator) -> None:
        count = tier.features
        falling = torch.arange(1, count + 1, dtype=torch.float64) ** -self.EXPONENT
        span = (falling - falling[-1]) / (falling[0] - falling[-1])
        target = self.LEAST + span * (self.MOST - self.LEAST)
        self.thresholds = (math.sqrt(2) * torch.erfinv(1 - 2 * _raise(target, parents))).float()
        self.means = torch.linspace(5.0, 4.0, count)
        self.deviations = (0.5 + 0.5 * torch.randn(count, generator=generator)).abs()
        factor = self.CORRELATION * torch.randn(count, self.RANK, generator=generator)
        shared = factor.square().sum(1, keepdim=True)
        self.factor = factor * (0.99 / shared.clamp_min(0.99)).sqrt()
        self.own = (1 - self.factor.square().sum(1)).sqrt()

    def fire(self, size: int, generator: torch.Generator) -> Tensor:
        """[B, N] activations."""
        shared = torch.randn(size, self.RANK, generator=generator) @ self.factor.T
        fires = shared + self.own * torch.randn(size, len(self.own), generator=generator) > self.thresholds
        magnitudes = self.means + self.deviations * torch.randn(size, len(self.own), generator=generator)
        features: Tensor = magnitudes.clamp_min(0) * fires
        return features


def _raise(target_N: Tensor, parents_N: Tensor) -> Tensor:
    """Probabilities before gating and exclusion that leave about `target`: by the parent's, times 1 + siblings'."""
    child = parents_N >= 0
    above = target_N[parents_N[child]]
    brood = torch.zeros_like(target_N).index_add(0, parents_N[child], target_N[child])[parents_N[child]]
    raised = target_N.clone()
    raised[child] = target_N[child] / above * (1 + (brood - target_N[child]) / above)
    return raised.clamp(max=1 - 1e-9)
