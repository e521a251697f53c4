"""Hierarchy measures of a trained model: how its levels are composed of each other, beside what chance would give.

Levels are compared pair by pair (level l with l-1). Which latents belong together is a *map* W of contributions. It is
read in two ways, and all measures are taken of both:

learned: the W trained with the run. fitted: a W read off the codes by non-negative regression (fitted.py), the only one
that runs without a learned W have, and the one on which all runs compare.

Maps are read on one text (the training store, or the evaluation store's reconstruction rows) and measured on another
(the evaluation store's variance rows, those of core's explained variance), in one pass each. No language model is run.

Shapes: B rows of a batch, T context, N kept tokens of a batch, D residual width, F coarse latents, G fine latents.
"""

from collections import defaultdict

import torch
from torch import Tensor

from hsae.cache.errors import StoreError, UserError
from hsae.cache.reading.store import ActivationStore
from hsae.eval.core.batches import Batches
from hsae.eval.core.corrected_measures import InputMoments, ReconstructionMoments
from hsae.eval.harness.estimates import Resampler
from hsae.eval.harness.listener import SILENT, Progress
from hsae.eval.hierarchy.composition_result import CompositionResult, LevelResult, Measured, Null, PairResult, Reading
from hsae.eval.hierarchy.fitted import FIT_L1
from hsae.eval.hierarchy.map_reading import FIT_TOKENS, MapReading, Text
from hsae.eval.hierarchy.maps import (
    EDGE_SHARE,
    INVARIANT,
    NULL_DRAWS,
    NULLS,
    VISIBLE,
    CodeScale,
    LevelMap,
    nulls,
    participation_ratio,
)
from hsae.eval.hierarchy.measures import PairGeometry, measures
from hsae.eval.hierarchy.pairs import CONTRIBUTES, MapSums, PairCounts
from hsae.eval.hierarchy.probes import TOKENS as PROBE_TOKENS
from hsae.eval.hierarchy.probes import Probes
from hsae.train.model.hierarchical_sae import HierarchicalSAE

READINGS = ("learned", "fitted")
SETTINGS = {
    "edge_share": EDGE_SHARE,
    "null_draws": NULL_DRAWS,
    "fit_l1": FIT_L1,
    "fit_tokens": FIT_TOKENS,
    "contributes": CONTRIBUTES,
    "probe_tokens": PROBE_TOKENS,
}
UNDEFINED = {
    "sibling_iou": "no coarse latent has two children that fire",
    "probe_top5": "no probed child has a parent and a probe that passes its held-out check",
    "composition_fvu": "the coarse level never fires",
    "gain_over_best_input": "the coarse level never fires",
    "runtime_l0": "the coarse level never fires",
    "orphan_rate": "no fine latent fires",
}
"""Why a measure is undefined, where it is not because the map is empty."""


def check(model: HierarchicalSAE, store: ActivationStore, hook: str, fit_store: ActivationStore | None) -> None:
    """Refuse what can't be measured. Raises UserError or StoreError."""
    for each in (store, fit_store) if fit_store is not None else (store,):
        if hook not in each.spec.hooks:
            raise StoreError(f"{each.url} has no activations of {hook}; it has {', '.join(each.spec.hooks)}")
        if model.levels[0].d_in != each.header.d_model:
            raise UserError(
                f"the model reads vectors of width {model.levels[0].d_in}; "
                f"{hook} in {each.url} has width {each.header.d_model}"
            )
    if store.clean_rows >= store.rows or (fit_store is None and store.clean_rows == 0):
        raise StoreError(
            f"{store.url} has {store.clean_rows} reconstruction rows and {store.rows - store.clean_rows} variance rows"
            "; hierarchy measures need both: give the evaluation store (hsae cache build --split eval)"
        )


@torch.no_grad()
def evaluate_composition(
    model: HierarchicalSAE,
    store: ActivationStore,
    hook: str,
    *,
    fit_store: ActivationStore | None = None,
    device: str = "cpu",
    progress: Progress = SILENT.progress,
) -> tuple[CompositionResult, dict[str, Tensor]]:
    """Measure a model's hierarchy on the evaluation store.

    Maps are read on `fit_store` (the training store), or, without one, on the reconstruction rows of `store`. Returns
    the measures, and the contributions [F, G] of every map by reading and level: `learned2`, `fitted2`, `fitted3`, ...
    Raises UserError or StoreError for what `check` refuses.
    """
    check(model, store, hook, fit_store)
    placed = model.copy_to(dtype=torch.float32, device=device)
    read_from, rows = (fit_store, fit_store.rows) if fit_store else (store, store.clean_rows)
    reading = MapReading(placed, Text(read_from, hook, 0, rows, device), progress)
    pass_ = _MeasurePass(placed, reading, Text(store, hook, store.clean_rows, store.rows, device), progress)
    directions = tuple(placed.directions(number) for number in range(1, len(placed.levels) + 1))
    result = CompositionResult(
        structure=model.structure,
        levels=pass_.levels(),
        pairs=[pass_.pair(level, directions) for level in pass_.counts],
        tokens={"read": reading.tokens, "measured": pass_.tokens},
    )
    return result, pass_.contributions()


class _MeasurePass:
    """The pass in which maps are measured, on rows they were not read from."""

    def __init__(self, model: HierarchicalSAE, reading: MapReading, text: Text, progress: Progress) -> None:
        self.model, self.reading, self.tokens = model, reading, 0
        resampler, d_model = Resampler(text.last - text.first, text.device), model.levels[0].d_in
        self.inputs = InputMoments(resampler, d_model)
        self.reconstructions = [ReconstructionMoments(resampler) for _ in model.levels]
        self.fires = [torch.zeros(level.d_sae, dtype=torch.int64, device=text.device) for level in model.levels]
        widths = [level.d_sae for level in model.levels]
        self.counts = {
            level: PairCounts(widths[level - 1], widths[level - 2], d_model, self._maps(level, resampler), text.device)
            for level in reading.moments
        }
        batches = text.batches()
        for done, (start, stop) in enumerate(batches, 1):
            self._add(text, start, stop)
            progress("measuring", done, len(batches))

    def _maps(self, level: int, resampler: Resampler) -> dict[str, list[MapSums]]:
        """Of every map between two levels by name: the best of one input, the readings, and each reading's nulls."""
        alive_G, scale = self.reading.scales[level].fine_G > 0, self.reading.scales[level]
        parts = {"single": [MapSums(self.reading.moments[level].best_single(), resampler)]}
        for name, part in self.reading.maps(level).items():
            parts[name] = [MapSums(part, resampler)]
            for null, contributions_FG in nulls(part.contributions_FG, alive_G):
                null_map = LevelMap.of_contributions(contributions_FG, scale)
                parts.setdefault(f"{name} {null}", []).append(MapSums(null_map, None))
        return parts

    def _add(self, text: Text, start: int, stop: int) -> None:
        x_BTD, mask_BT = text.read(start, stop)
        batch = Batches.of(x_BTD, mask_BT, start)
        codes = self.model.codes(x_BTD)
        self.inputs.add(batch, text.first)
        for number, moments in enumerate(self.reconstructions, 1):
            active_BT = (codes[number - 1] != 0).sum(-1)
            moments.add(batch, text.first, active_BT, self.model.reconstruct(codes, number))
        token_codes = [code[mask_BT] for code in codes]
        row_N = mask_BT.nonzero()[:, 0]
        for fires, code in zip(self.fires, token_codes, strict=True):
            fires += (code > 0).sum(0)
        for level, counts in self.counts.items():
            counts.add(
                batch.x_ND, token_codes[level - 2], token_codes[level - 1], start - text.first, row_N, stop - start
            )
        self.tokens += len(row_N)

    def levels(self) -> list[LevelResult]:
        """What each level and the coarser ones are worth together."""
        results = []
        for number, (moments, fires) in enumerate(zip(self.reconstructions, self.fires, strict=True), 1):
            worth = moments.measures(self.inputs, self.model.levels[0].d_in)
            silent = float((fires == 0).float().mean())
            own = {name: worth[name] for name in ("l0", "explained_variance")}
            results.append(LevelResult(level=number, latents=len(fires), silent=silent, **own))
        return results

    def pair(self, level: int, directions: tuple[Tensor, ...]) -> PairResult:
        """The measures of a level and the one below."""
        counts, scale = self.counts[level], self.reading.scales[level]
        probes = self.reading.probes(level)
        geometry = PairGeometry.of(counts, directions, level, probes)
        alive_G = scale.fine_G > 0
        readings = {name: _measured(counts, name, geometry, alive_G) for name in READINGS if name in counts.maps}
        return PairResult(
            level=level,
            coarse=len(counts.fires_F),
            fine=len(counts.fires_G),
            alive_fine=int(alive_G.sum()),
            readings=readings,
            reasons={} if "learned" in readings else {"learned": "this run learned no W"},
            facts=_facts(counts.maps, scale),
            probes=_probe_facts(probes),
        )

    def contributions(self) -> dict[str, Tensor]:
        """[F, G] of every reading of every pair."""
        return {
            f"{name}{level}": counts.maps[name][0].map.contributions_FG.cpu()
            for level, counts in self.counts.items()
            for name in READINGS
            if name in counts.maps
        }


def _measured(counts: PairCounts, name: str, geometry: PairGeometry, alive_G: Tensor) -> Reading:
    """All measures of one reading beside its nulls."""
    single, own = counts.maps["single"][0], counts.maps[name][0]
    estimates = {key: part.estimate() for key, part in measures(counts, own, single, geometry, alive_G).items()}
    draws: dict[str, dict[str, list[float]]] = defaultdict(lambda: {null: [] for null in NULLS})
    for null in NULLS:
        for null_sums in counts.maps[f"{name} {null}"]:
            for key, part in measures(counts, null_sums, single, geometry, alive_G).items():
                value = part.value()
                if value is not None and not (null == "permuted" and key in INVARIANT):
                    draws[key][null].append(value)
    entries = {
        key: Measured(
            **estimate.to_dict(),
            over=estimate.over,
            nulls={null: Null.of(estimate.value, values) for null, values in draws[key].items() if len(values) > 1},
            reason=None if estimate.value is not None else UNDEFINED.get(key, "the map is empty"),
        )
        for key, estimate in estimates.items()
    }
    if geometry.probes is None:
        reason = "no fine latent fires often enough in the sample to train a probe"
        entries["probe_top5"] = Measured(value=None, reason=reason)
    first = counts.maps[f"{name} random"][0].map.contributions_FG
    return Reading(
        measures=entries,
        participation=_rounded(participation_ratio(own.map.contributions_FG)),
        null_participation=_rounded(participation_ratio(first)),
    )


def _facts(maps: dict[str, list[MapSums]], scale: CodeScale) -> dict[str, float | None]:
    fine, coarse = float(scale.fine_G.square().sum()), float(scale.coarse_F.square().sum())
    facts: dict[str, float | None] = {"energy_ratio": coarse / fine if fine > 0 else None}
    if "learned" in maps:
        own = maps["learned"][0]
        columns = {name: float(values[0]) for name, values in own.columns().items()}
        facts["mixture_energy"] = columns["mixture"] / columns["energy"] if columns["energy"] > 0 else None
        facts["visible_weights"] = float((own.map.contributions_FG.abs() > VISIBLE).float().mean())
    return facts


def _probe_facts(probes: Probes | None) -> dict[str, int | float]:
    if probes is None:
        return {"candidates": 0, "sampled": 0, "valid": 0}
    return {
        "candidates": probes.candidates,
        "sampled": len(probes.children_C),
        "valid": int(probes.valid_C.sum()),
        "accuracy": float(probes.accuracy_C.mean()),
    }


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]
