"""Hierarchy measures of a trained model: how its levels are composed of each other, each number beside what chance would give.

A model's levels are compared pair by pair (level l with l-1). Which latents belong together is a *map* W of contributions; there are two
readings of it, and all measures are taken of both:

learned: the W trained with the run. fitted: a W read off the codes by non-negative regression (hsae.eval.hierarchy.fitted), the only one that runs
without a learned W have, and the one on which all runs compare.

Maps are read on one text (the training store, or the evaluation store's reconstruction rows) and measured on another (the evaluation
store's variance rows, the ones of core's explained variance), in one pass each. The language model is not needed.

Shapes: B rows of a batch, T context, N kept tokens of a batch, D residual width, F coarse latents, G fine latents.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from hsae.cache.errors import StoreError, UserError
from hsae.cache.reading.store import ActivationStore
from hsae.eval.core import corrected_measures
from hsae.eval.core.saebench_metrics import VarianceBatch
from hsae.eval.harness import estimates
from hsae.eval.hierarchy.fitted import FIT_L1, CodeMoments
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
from hsae.eval.hierarchy.measures import Estimate, PairGeometry, measures
from hsae.eval.hierarchy.pairs import CONTRIBUTES, MapSums, PairCounts
from hsae.eval.hierarchy.probes import TOKENS as PROBE_TOKENS
from hsae.eval.hierarchy.probes import Probes, train_probes
from hsae.train.model.trained_model import TrainedModel

BATCH_TOKENS = 4096
FIT_TOKENS = 1 << 17  # most tokens on which maps are read
READINGS = ("learned", "fitted")
SETTINGS = {
    "edge_share": EDGE_SHARE,
    "null_draws": NULL_DRAWS,
    "fit_l1": FIT_L1,
    "fit_tokens": FIT_TOKENS,
    "contributes": CONTRIBUTES,
    "probe_tokens": PROBE_TOKENS,
}
UNKNOWN = Estimate(None)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Null:
    """A measure over draws of a map without structure, and how many of its standard deviations the value lies above it."""

    mean: float
    sd: float
    z: float | None
    """None if all draws give the same."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One measure with its interval and its nulls by name; `reason` says why there is no value or no null."""

    value: float | None
    low: float | None = None
    high: float | None = None
    over: str | None = None
    """What the interval was bootstrapped over."""
    nulls: dict[str, Null] = field(default_factory=dict)
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Reading:
    """All measures of one map."""

    measures: dict[str, Measured]
    participation: list[float]
    """Participation ratio of each coarse latent, 0 for an empty row."""
    null_participation: list[float]
    """Likewise of the first random map."""
    contributions: Tensor | None = field(default=None, compare=False, repr=False)
    """[F, G]; not part of the JSON."""


@dataclass(frozen=True, kw_only=True)
class PairResult:
    """The measures of level `level` and the one below."""

    level: int
    coarse: int
    fine: int
    alive_fine: int
    """Fine latents that fire on the text on which maps are read."""
    readings: dict[str, Reading]
    reasons: dict[str, str]
    """Why a reading is not there."""
    facts: dict[str, float | None]
    """energy_ratio: E|h_l|^2 / E|h_{l-1}|^2; of the learned map mixture_energy: E|W h|^2 / E|h_l|^2, and
    visible_weights: the share of its entries with |C| > VISIBLE."""
    probes: dict[str, float]
    """candidates, sampled, valid; accuracy: their mean balanced accuracy on held-out tokens."""


@dataclass(frozen=True, kw_only=True)
class LevelResult:
    """What levels >= `level` are worth together, and how the level itself fires."""

    level: int
    latents: int
    l0: Estimate
    silent: float
    """Share of latents that never fire on the measured rows."""
    explained_variance: Estimate
    """Of the residual by levels >= `level`; stacked: decoded from this level down."""
    ce_loss_score: Estimate = UNKNOWN
    """Likewise; taken from a core result, if there is one."""


@dataclass(frozen=True, kw_only=True)
class CompositionResult:
    """All hierarchy measures of a model."""

    structure: str
    levels: list[LevelResult]
    """Finest first."""
    pairs: list[PairResult]
    """For levels 2 to L."""
    tokens: dict[str, int]
    """read: tokens on which maps were read; measured: tokens on which they were measured."""

    def json(self) -> dict[str, Any]:
        """JSON-ready content, without matrices."""
        content = asdict(self)
        for pair in content["pairs"]:
            for reading in pair["readings"].values():
                del reading["contributions"]
        return content

    @classmethod
    def of_json(cls, content: dict[str, Any]) -> "CompositionResult":
        """What `json` gave. Raises KeyError or TypeError for anything else."""
        return cls(
            structure=content["structure"],
            levels=[
                LevelResult(
                    **{
                        **level,
                        **{key: Estimate(**level[key]) for key in ("l0", "explained_variance", "ce_loss_score")},
                    }
                )
                for level in content["levels"]
            ],
            pairs=[
                PairResult(**{**pair, "readings": {name: _reading(part) for name, part in pair["readings"].items()}})
                for pair in content["pairs"]
            ],
            tokens=content["tokens"],
        )


def _reading(content: dict[str, Any]) -> Reading:
    measured = {
        name: Measured(**{**entry, "nulls": {key: Null(**null) for key, null in entry["nulls"].items()}})
        for name, entry in content["measures"].items()
    }
    return Reading(**{**content, "measures": measured})


def check(model: TrainedModel, store: ActivationStore, hook: str, fit_store: ActivationStore | None) -> None:
    """Refuse what can't be measured. Raises UserError or StoreError."""
    for given in (store, fit_store) if fit_store is not None else (store,):
        if hook not in given.spec.hooks:
            raise StoreError(f"{given.url} has no activations of {hook}; it has {', '.join(given.spec.hooks)}")
        if model.levels[0].d_in != given.header.d_model:
            raise UserError(
                f"the model reads vectors of width {model.levels[0].d_in}; {hook} in {given.url} has width {given.header.d_model}"
            )
    if store.clean_rows >= store.rows or (fit_store is None and store.clean_rows == 0):
        raise StoreError(
            f"{store.url} has {store.clean_rows} reconstruction rows and {store.rows - store.clean_rows} variance rows; "
            "hierarchy measures need both: give the evaluation store (hsae cache build --split eval)"
        )


@torch.no_grad()
def evaluate_composition(
    model: TrainedModel,
    store: ActivationStore,
    hook: str,
    *,
    fit_store: ActivationStore | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> CompositionResult:
    """Measure a model's hierarchy on the evaluation store.

    Maps are read on `fit_store` (the training store), or, without one, on the reconstruction rows of `store`. `progress` hears of
    each pass as (name, batches done, batches). Raises UserError or StoreError for what `check` refuses.
    """
    check(model, store, hook, fit_store)
    report = progress or (lambda _name, _done, _total: None)
    placed = model.to(dtype=torch.float32, device=device)
    text = (
        _Text(fit_store, hook, 0, fit_store.rows, device)
        if fit_store
        else _Text(store, hook, 0, store.clean_rows, device)
    )
    read = _ReadPass(placed, text, device)
    read.run(report)
    measured = _MeasurePass(placed, read, _Text(store, hook, store.clean_rows, store.rows, device), device)
    measured.run(report)
    directions = tuple(placed.directions(number) for number in range(1, len(placed.levels) + 1))
    return CompositionResult(
        structure=model.structure,
        levels=measured.levels(),
        pairs=[measured.pair(level, directions) for level in range(2, len(placed.levels) + 1)],
        tokens={"read": read.tokens, "measured": measured.tokens},
    )


@dataclass(frozen=True)
class _Text:
    """Rows `first` to `last` - 1 of a store, in batches; from a long text evenly spaced batches up to a number of tokens."""

    store: ActivationStore
    hook: str
    first: int
    last: int
    device: str

    def batches(self, most_tokens: int | None = None) -> list[tuple[int, int]]:
        rows = max(1, BATCH_TOKENS // self.store.context)
        every = [(start, min(start + rows, self.last)) for start in range(self.first, self.last, rows)]
        if most_tokens is None or len(every) * rows * self.store.context <= most_tokens:
            return every
        count = max(1, most_tokens // (rows * self.store.context))
        return [every[index * len(every) // count] for index in range(count)]

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Residuals [B, T, D] in float32 and the mask [B, T] of tokens that are not special."""
        mask_BT = ~self.store.special_mask(self.store.tokens(start, stop))
        return self.store.acts(self.hook, start, stop).to(self.device).float(), mask_BT.to(self.device)


class _ReadPass:
    """The pass in which maps are read: second moments of neighbouring codes, and a sample of tokens for probes."""

    def __init__(self, model: TrainedModel, text: _Text, device: str) -> None:
        self.model, self.text, self.tokens = model, text, 0
        sizes = [level.d_sae for level in model.levels]
        self.moments = {
            level: CodeMoments(sizes[level - 1], sizes[level - 2], device) for level in range(2, len(sizes) + 1)
        }
        self.sample: list[Tensor] = []

    def run(self, report: Progress) -> None:
        batches = self.text.batches(FIT_TOKENS) if self.moments else []
        sampled = max(1, PROBE_TOKENS // max(1, len(batches)))
        for done, (start, stop) in enumerate(batches, 1):
            x_BTD, mask_BT = self.text.read(start, stop)
            x_ND = x_BTD[mask_BT]
            codes = self.model.codes(x_ND)
            for level, moments in self.moments.items():
                moments.add(codes[level - 2], codes[level - 1])
            self.sample.append(x_ND[:: max(1, -(-len(x_ND) // sampled))])
            self.tokens += len(x_ND)
            report("reading maps", done, len(batches))
        self.scales = {level: moments.scale() for level, moments in self.moments.items()}

    def maps(self, level: int) -> dict[str, LevelMap]:
        """The readings that there are."""
        moments, scale = self.moments[level], self.scales[level]
        learned = next((part for part in self.model.compositions if part.level == level), None)
        found = {}
        if learned is not None:
            found["learned"] = LevelMap.of_contributions(scale.contributions(learned.weight), scale)
        return found | {"fitted": moments.fit()}

    def probes(self, level: int) -> Probes | None:
        """Probes of the fine latents of a pair, from the sampled tokens."""
        x_ND = torch.cat(self.sample)
        fires_NG = torch.cat([self.model.codes(part)[level - 2] > 0 for part in torch.split(x_ND, BATCH_TOKENS)])
        probes = train_probes(x_ND, fires_NG)
        return probes if len(probes.children_C) else None


class _MeasurePass:
    """The pass in which maps are measured, on rows they were not read from."""

    def __init__(self, model: TrainedModel, read: _ReadPass, text: _Text, device: str) -> None:
        self.model, self.text, self.tokens = model, text, 0
        self.read = read
        resampler = estimates.Resampler(text.last - text.first, device)
        d_model = model.levels[0].d_in
        self.inputs = corrected_measures.InputMoments(resampler, d_model)
        self.reconstructions = [corrected_measures.ReconstructionMoments(resampler) for _ in model.levels]
        self.fires = [torch.zeros(level.d_sae, dtype=torch.int64, device=device) for level in model.levels]
        self.sums: dict[int, dict[str, list[MapSums]]] = {}
        self.counts: dict[int, PairCounts] = {}
        for level, moments in read.moments.items():
            parts: dict[str, list[MapSums]] = {"single": [MapSums(moments.best_single(), resampler)]}
            alive_G, scale = read.scales[level].fine_G > 0, read.scales[level]
            for name, part in read.maps(level).items():
                parts[name] = [MapSums(part, resampler)]
                for null, contributions_FG in nulls(part.contributions_FG, alive_G):
                    drawn = LevelMap.of_contributions(contributions_FG, scale)
                    parts.setdefault(f"{name} {null}", []).append(MapSums(drawn, None))
            self.sums[level] = parts
            every = [sums for group in parts.values() for sums in group]
            coarse, fine = model.levels[level - 1].d_sae, model.levels[level - 2].d_sae
            self.counts[level] = PairCounts(coarse, fine, d_model, every, device)

    def run(self, report: Progress) -> None:
        first = self.text.first
        batches = self.text.batches()
        for done, (start, stop) in enumerate(batches, 1):
            x_BTD, mask_BT = self.text.read(start, stop)
            batch = VarianceBatch.of(x_BTD, mask_BT, start)
            codes = self.model.codes(x_BTD)
            self.inputs.add(batch, first)
            for number, moments in enumerate(self.reconstructions, 1):
                moments.add(batch, first, codes[number - 1], self.model.reconstruct(codes, number))
            kept = [code[mask_BT] for code in codes]
            row_N = mask_BT.nonzero()[:, 0]
            for fires, code in zip(self.fires, kept, strict=True):
                fires += (code > 0).sum(0)
            for level, counts in self.counts.items():
                counts.add(batch.x_ND, kept[level - 2], kept[level - 1], start - first, row_N, stop - start)
            self.tokens += len(row_N)
            report("measuring", done, len(batches))

    def levels(self) -> list[LevelResult]:
        found = []
        for number, (moments, fires) in enumerate(zip(self.reconstructions, self.fires, strict=True), 1):
            entries = moments.measures(self.inputs, self.model.levels[0].d_in)
            estimates = {
                name: Estimate(
                    entry["value"], entry["low"], entry["high"], "rows" if entry["low"] is not None else None
                )
                for name, entry in entries.items()
            }
            found.append(
                LevelResult(
                    level=number,
                    latents=len(fires),
                    l0=estimates["l0"],
                    silent=float((fires == 0).float().mean()),
                    explained_variance=estimates["explained_variance"],
                )
            )
        return found

    def pair(self, level: int, directions: tuple[Tensor, ...]) -> PairResult:
        counts, sums, scale = self.counts[level], self.sums[level], self.read.scales[level]
        probes = self.read.probes(level)
        geometry = PairGeometry.of(counts, directions, level, probes)
        alive_G = scale.fine_G > 0
        readings = {name: _measured(counts, sums, name, geometry, alive_G) for name in READINGS if name in sums}
        reasons = {} if "learned" in readings else {"learned": "this run learned no W"}
        return PairResult(
            level=level,
            coarse=len(counts.fires_F),
            fine=len(counts.fires_G),
            alive_fine=int(alive_G.sum()),
            readings=readings,
            reasons=reasons,
            facts=_facts(sums, scale),
            probes=_probe_facts(probes),
        )


def _measured(
    counts: PairCounts, sums: dict[str, list[MapSums]], name: str, geometry: PairGeometry, alive_G: Tensor
) -> Reading:
    """All measures of one reading beside its nulls."""
    single, own = sums["single"][0], sums[name][0]
    values = {key: part.estimate() for key, part in measures(counts, own, single, geometry, alive_G).items()}
    drawn: dict[str, dict[str, list[float]]] = defaultdict(lambda: {null: [] for null in NULLS})
    for null in NULLS:
        for draw in sums[f"{name} {null}"]:
            for key, part in measures(counts, draw, single, geometry, alive_G).items():
                value = part.value()
                if value is not None and not (null == "permuted" and key in INVARIANT):
                    drawn[key][null].append(value)
    found = {
        key: Measured(
            **asdict(estimate),
            nulls={null: null_of(estimate.value, draws) for null, draws in drawn[key].items() if len(draws) > 1},
            reason=None if estimate.value is not None else _undefined(key),
        )
        for key, estimate in values.items()
    }
    if geometry.probes is None:
        found["probe_top5"] = Measured(
            value=None, reason="no fine latent fires often enough in the sample to train a probe"
        )
    first = sums[f"{name} random"][0].map.contributions_FG
    return Reading(
        measures=found,
        participation=_rounded(participation_ratio(own.map.contributions_FG)),
        null_participation=_rounded(participation_ratio(first)),
        contributions=own.map.contributions_FG.cpu(),
    )


def null_of(value: float | None, draws: Sequence[float]) -> Null:
    """A value beside the draws of its null."""
    mean, sd = fmean(draws), stdev(draws)
    return Null(mean, sd, (value - mean) / sd if value is not None and sd > 1e-12 * max(1.0, abs(mean)) else None)


def _undefined(key: str) -> str:
    return {
        "sibling_iou": "no coarse latent has two children that fire",
        "probe_top5": "no probed child has a parent and a probe that passes its held-out check",
        "composition_fvu": "the coarse level never fires",
        "gain_over_best_input": "the coarse level never fires",
        "runtime_l0": "the coarse level never fires",
        "orphan_rate": "no fine latent fires",
    }.get(key, "the map is empty")


def _facts(sums: dict[str, list[MapSums]], scale: CodeScale) -> dict[str, float | None]:
    fine, coarse = float(scale.fine_G.square().sum()), float(scale.coarse_F.square().sum())
    facts: dict[str, float | None] = {"energy_ratio": coarse / fine if fine > 0 else None}
    if "learned" in sums:
        own = sums["learned"][0]
        columns = {name: float(values[0]) for name, values in own.columns().items()}
        facts["mixture_energy"] = columns["mixture"] / columns["energy"] if columns["energy"] > 0 else None
        facts["visible_weights"] = float((own.map.contributions_FG.abs() > VISIBLE).float().mean())
    return facts


def _probe_facts(probes: Probes | None) -> dict[str, float]:
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
