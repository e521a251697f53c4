"""The hierarchy measures of one map between two levels, from the counts of one pass; docs/measures.md explains each.

Shapes: F coarse latents (parents), G fine latents (children), D residual width, S the data and its resamples.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hsae.eval.harness.estimates import Estimate, UnitMean, estimate_of
from hsae.eval.hierarchy import maps
from hsae.eval.hierarchy.maps import LevelMap
from hsae.eval.hierarchy.pairs import MapSums, PairCounts
from hsae.eval.hierarchy.probes import Probes

SIBLINGS = 16  # strongest children of a parent between which IoU is taken


@dataclass(frozen=True)
class Resampled:
    """A statistic of the data (first) and of resampled rows (the rest, if there are any)."""

    values_S: Tensor

    def value(self) -> float | None:
        """None where it is undefined."""
        value = float(self.values_S[0])
        return value if math.isfinite(value) else None

    def estimate(self) -> Estimate:
        """The value with its interval over rows."""
        return estimate_of(self.values_S)


@dataclass(frozen=True, kw_only=True)
class PairGeometry:
    """What measures need besides counts: directions in the residual, and probes."""

    alignment_FG: Tensor
    """[F, G] cosine of each parent's direction with what each child's concept has beside the child's own direction."""
    probes: Probes | None
    directions_AD: Tensor
    """Latents of all levels, finest first."""
    fine_offset: int
    coarse_offset: int

    @classmethod
    def of(
        cls, counts: PairCounts, directions: tuple[Tensor, ...], level: int, probes: Probes | None
    ) -> "PairGeometry":
        """The geometry between `level` and the one below, from the directions of all levels, finest first."""
        fine_GD, coarse_FD = normalize(directions[level - 2]), normalize(directions[level - 1])
        concept_GD = counts.concept_GD()
        left_GD = concept_GD - (concept_GD * fine_GD).sum(1, keepdim=True) * fine_GD
        sizes = [len(part) for part in directions]
        return cls(
            alignment_FG=coarse_FD @ normalize(left_GD).T,
            probes=probes,
            directions_AD=torch.cat(directions),
            fine_offset=sum(sizes[: level - 2]),
            coarse_offset=sum(sizes[: level - 1]),
        )


def measures(
    counts: PairCounts, part: MapSums, single: MapSums, geometry: PairGeometry, alive_G: Tensor
) -> dict[str, UnitMean | Resampled]:
    """Every measure of a map. `alive_G`: fine latents that fire where it was read; `single`: the best one-input map."""
    return {
        **sparsity(part.map, alive_G),
        **composition(part, single),
        **consistency(counts, part, geometry),
    }


def sparsity(part: LevelMap, alive_G: Tensor) -> dict[str, UnitMean | Resampled]:
    """What is read off the weights alone, over the fine latents that are alive."""
    used_G = alive_G if bool(alive_G.any()) else ~alive_G  # of a dead level all, whose rows are empty
    contributions_FA, edges_FA = part.contributions_FG[:, used_G], part.edges_FG[:, used_G]
    filled_F = contributions_FA.abs().sum(1) > 0
    parents_A = edges_FA.sum(0)
    values: dict[str, UnitMean | Resampled] = {
        name: UnitMean(torch.where(filled_F, measured(contributions_FA), 0.0), filled_F, "coarse latents")
        for name, measured in (
            ("participation_ratio", maps.participation_ratio),
            ("hoyer", maps.hoyer),
            ("copy_index", maps.copy_index),
        )
    }
    values["children_per_parent"] = UnitMean(edges_FA.sum(1), filled_F, "coarse latents")
    values["parents_per_child"] = UnitMean(parents_A, parents_A > 0, "fine latents")
    values["orphan_rate"] = UnitMean(parents_A == 0, alive_G[used_G], "fine latents")
    return values


def composition(part: MapSums, single: MapSums) -> dict[str, UnitMean | Resampled]:
    """How well the map gives the coarse code, and of how many active inputs."""
    columns, alone = part.columns(), single.columns()
    samples = len(columns["error"])
    return {
        "runtime_l0": Resampled(columns["contributing"] / columns["coarse_firings"]),
        "composition_fvu": Resampled(columns["error"] / columns["energy"]),
        "gain_over_best_input": Resampled((alone["error"][:samples] - columns["error"]) / columns["energy"]),
    }


def consistency(counts: PairCounts, part: MapSums, geometry: PairGeometry) -> dict[str, UnitMean | Resampled]:
    """Whether parents and children behave as such on text the map was not read from."""
    edges_FG = part.map.edges_FG & (counts.fires_G > 0)
    child_F = edges_FG.sum(1)
    coverage_FG = counts.cross_FG / counts.fires_G.clamp_min(1)
    covered_F = torch.where(edges_FG, coverage_FG, 0.0).sum(1)
    base_F = counts.fires_F / max(1, counts.tokens) * child_F
    judged_F = (child_F > 0) & (counts.fires_F > 0)
    agreement_F = matthews(part.both_F, counts.fires_F.double(), part.or_F, counts.tokens)
    iou_F, families_F = sibling_iou(counts, part.map.contributions_FG, edges_FG)
    values: dict[str, UnitMean | Resampled] = {
        "coverage": UnitMean(covered_F, child_F, "coarse latents"),
        "coverage_lift": UnitMean(covered_F, base_F, "coarse latents"),
        "or_agreement": UnitMean(torch.where(judged_F, agreement_F, 0.0), judged_F, "coarse latents"),
        "sibling_iou": UnitMean(torch.where(families_F, iou_F, 0.0), families_F, "coarse latents"),
        "residual_cosine": UnitMean(
            torch.where(edges_FG, geometry.alignment_FG, 0.0).sum(1), child_F, "coarse latents"
        ),
    }
    if geometry.probes is not None:
        hits_C, counted_C = geometry.probes.hits(
            part.map.parent_G, geometry.directions_AD, geometry.fine_offset, geometry.coarse_offset
        )
        values["probe_top5"] = UnitMean(hits_C & counted_C, counted_C, "probed children")
    return values


def matthews(both: Tensor, first: Tensor, second: Tensor, tokens: int) -> Tensor:
    """Matthews correlation of two firings from their counts, elementwise; 0 where either always or never fires."""
    spread = first * (tokens - first) * second * (tokens - second)
    return torch.where(spread > 0, (tokens * both - first * second) / spread.clamp_min(1e-30).sqrt(), 0.0)


def sibling_iou(counts: PairCounts, contributions_FG: Tensor, edges_FG: Tensor) -> tuple[Tensor, Tensor]:
    """([F] mean IoU of the firings of two children, [F] whether the parent has two) among the SIBLINGS strongest."""
    count = min(SIBLINGS, edges_FG.shape[1])
    values_FK, child_FK = torch.where(edges_FG, contributions_FG, 0.0).topk(count, dim=1)
    there_FK = values_FK > 0
    both_FKK = counts.fine_GG[child_FK[:, :, None], child_FK[:, None, :]]
    fires_FK = counts.fires_G[child_FK]
    either_FKK = fires_FK[:, :, None] + fires_FK[:, None, :] - both_FKK
    pairs_FKK = (there_FK[:, :, None] & there_FK[:, None, :]).triu(1)
    total_F = torch.where(pairs_FKK, both_FKK / either_FKK.clamp_min(1), 0.0).sum((1, 2))
    count_F = pairs_FKK.sum((1, 2))
    return total_F / count_F.clamp_min(1), count_F > 0
