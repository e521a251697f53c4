"""Hierarchical unlearning on two texts: every arm swept on tune documents, reported on test documents.

Latents are chosen on a third set of documents. Losses are those of the language model with the intervention against the model as it is,
so an SAE's own error is in neither. A setting costs suffix passes only; what was measured is kept, so a sweep that was
interrupted goes on where it was.

Shapes: R rows, S resamples.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from hsae.cache.language_model.lm import LanguageModel
from hsae.eval.harness.result_files import read_result, write_result
from hsae.eval.unlearning import pareto, selection
from hsae.eval.unlearning.arms import Arm, Setting, moved, rate_threshold, sae_arms, settings, shared_arms
from hsae.eval.unlearning.config import SIDES, Side, UnlearningConfig
from hsae.eval.unlearning.intervention import Dictionary, Intervention
from hsae.eval.unlearning.passes import Change, LossMeter, Passes, Rows, Trial, split_rows
from hsae.train.model.hierarchical_sae import HierarchicalSAE

TOO_DEAR = (
    2.0  # a setting whose harm on tune documents exceeds so many times the largest budget is not measured further
)
SIGNATURE_ROWS = 16
ZERO: dict[str, float | None] = {"value": 0.0, "low": 0.0, "high": 0.0}
NOTHING: dict[str, Any] = {"forget_dce": 0.0, "low": 0.0, "high": 0.0, "retain_dce": ZERO, "setting": None}
"""What doing nothing gives."""
Progress = Callable[[str, int, int], None]
"""Told the arm, how many settings are done, and how many there are."""


class Pieces:
    """What was measured so far, by content; kept in a file as long as the inputs are the same."""

    def __init__(self, path: Path | None, inputs: dict[str, Any]) -> None:
        self.path, self.inputs = path, inputs
        self.held: dict[str, dict[str, Any]] = {}
        if path is not None and path.is_file():
            try:
                content = read_result(path, "hsae eval unlearning")
                if content["inputs"] == inputs:
                    self.held = content["pieces"]
            except (ValueError, KeyError, TypeError):
                pass  # damaged: measured again
        self.found = len(self.held)

    def change(self, key: str, measure: Callable[[], Change]) -> Change:
        """The change under a key, measured unless it is there."""
        if key not in self.held:
            self.held[key] = asdict(measure())
            if self.path is not None:
                write_result(self.path, {"inputs": self.inputs, "pieces": self.held}, allow_nan=True)
        return Change(**self.held[key])


@dataclass(kw_only=True)
class Texts:
    """Forget and retain rows, each split in three, with meters on tune and test."""

    language: LanguageModel
    config: UnlearningConfig
    rows: dict[Side, dict[str, Rows]]
    meters: dict[tuple[Side, str], LossMeter] = field(default_factory=dict)
    passes: Passes = field(default_factory=Passes)

    @classmethod
    def of(cls, forget: Rows, retain: Rows, language: LanguageModel, config: UnlearningConfig) -> "Texts":
        """Split the rows of both stores. Raises UserError if there are too few documents."""
        split = {
            side: dict(
                zip(("select", "tune", "test"), split_rows(rows, config.tune_rows, config.test_rows), strict=True)
            )
            for side, rows in zip(SIDES, (forget, retain), strict=True)
        }
        return cls(language=language, config=config, rows=split)

    def meter(self, side: Side, part: str) -> LossMeter:
        """The meter on one part of one side, made when first asked for."""
        if (side, part) not in self.meters:
            self.meters[side, part] = self.meter_on(self.rows[side][part])
        return self.meters[side, part]

    def meter_on(self, rows: Rows) -> LossMeter:
        """A meter on any rows."""
        return LossMeter(
            model=self.language,
            rows=rows,
            positions_per_row=self.config.positions_per_row,
            seed=self.config.seed,
            passes=self.passes,
        )

    def mean(self, side: Side, part: str, change: Change) -> float:
        """Mean change of the loss per position."""
        return sum(change.loss_R) / max(1, sum(self.meter(side, part).counts))


@dataclass(kw_only=True)
class Bench:
    """One arm made ready: activations of its latents on all rows, and an intervention for every setting."""

    arm: Arm
    texts: Texts
    acts: dict[tuple[Side, str], Tensor] = field(default_factory=dict)
    interventions: dict[Setting, Intervention] = field(default_factory=dict)
    reach: dict[Setting, dict[str, Any]] = field(default_factory=dict)

    def latents(self, setting: Setting) -> tuple[int, ...]:
        """The latents a setting clamps."""
        return self.arm.chosen[setting.latents]

    def activations(self, side: Side, part: str, latents: Sequence[int]) -> Tensor:
        """[R, T, A]"""
        union = self.arm.union
        if (side, part) not in self.acts:
            self.acts[side, part] = self.texts.rows[side][part].activations(self.arm.dictionary, union)
        return self.acts[side, part][..., [union.index(latent) for latent in latents]]

    def prepare(self, every: Sequence[Setting], reference: "Bench | None") -> None:
        """Thresholds, values and strengths of every setting; a control is matched to `reference`."""
        kept = {side: self.texts.rows[side]["select"].kept() for side in SIDES}
        for setting in every:
            latents = self.latents(setting)
            means = self.arm.means(latents)
            acts = {side: self.activations(side, "select", latents) for side in SIDES}
            rate = rate_threshold(acts["retain"], kept["retain"], setting.quantile)
            still = Intervention(latents=latents, values=(0.0,) * len(latents), rate=rate)
            reach = {
                side: moved(still, means, acts[side], kept[side], self.arm.dictionary.directions_FD) for side in SIDES
            }
            multiplier, matched = setting.multiplier, None
            if reference is not None:
                found = reach["retain"].multiplier(reference.reach[setting]["dx_retain"])
                matched, multiplier = found is not None, setting.multiplier if found is None else found
            self.interventions[setting] = still.scaled([-multiplier * mean for mean in means])
            self.reach[setting] = {
                "clamped": len(latents),
                "multiplier_used": multiplier,
                "dx_retain": reach["retain"].rms(multiplier),
                "dx_forget": reach["forget"].rms(multiplier),
            } | ({} if matched is None else {"matched": matched})

    def measure(self, pieces: Pieces, setting: Setting, side: Side, part: str, *, kl: bool = False) -> Change:
        """What a setting does to the rows of one part."""
        intervention = self.interventions[setting]
        content = [self.arm.dictionary.widths, intervention.latents, intervention.values, intervention.rate, kl]
        key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]

        def measured() -> Change:
            acts_RTA = self.activations(side, part, intervention.latents)
            trial = Trial(intervention=intervention, acts_RTA=acts_RTA, directions_FD=self.arm.dictionary.directions_FD)
            return self.texts.meter(side, part).measure(trial, kl=kl)

        return pieces.change(
            f"{self.arm.name if self.arm.dictionary.widths == (1,) else ''}{side}/{part}/{key}", measured
        )


def evaluate(
    model: HierarchicalSAE,
    dictionary: Dictionary,
    texts: Texts,
    pieces: Pieces,
    *,
    progress: Progress = lambda arm, done, total: None,
) -> dict[str, Any]:
    """All arms of one trained model and the shared ones: `arms` and `signature` of the result file."""
    config, rows = texts.config, texts.rows
    profile = selection.profile(dictionary, rows["forget"]["select"].batches(), rows["retain"]["select"].batches())
    contestants = [
        *shared_arms(rows["forget"]["select"], rows["retain"]["select"], config),
        *sae_arms(model, dictionary, profile, config),
    ]
    draws = {
        side: pareto.Draws.of(rows[side]["test"].documents, config.resamples, config.seed + place)
        for place, side in enumerate(SIDES)
    }
    results: dict[str, Any] = {"none": _nothing(config)}
    benches: dict[str, Bench] = {}
    for arm in contestants:
        benches[arm.name] = Bench(arm=arm, texts=texts)
        reference = benches[arm.control_of] if arm.control_of is not None else None
        every = [setting for setting in settings(config) if arm.chosen.get(setting.latents)]
        benches[arm.name].prepare(every, reference)
        results[arm.name] = _swept(benches[arm.name], every, texts, pieces, draws, progress)
        for bench in benches.values():
            bench.acts.clear()
    return {
        "arms": results,
        "signature": _signature(model, dictionary, texts, pieces, progress),
        "profile": _described(profile, config),
    }


def _nothing(config: UnlearningConfig) -> dict[str, Any]:
    at_retain = {f"{budget:g}": NOTHING for budget in config.budgets}
    return {"at_retain": at_retain, "pareto": [], "area": {**ZERO, "up_to": max(config.budgets)}}


def _described(profile: selection.Profile, config: UnlearningConfig) -> dict[str, Any]:
    eligible = selection.ranking(profile.forget_F, profile.retain_F, config.retain_cap)
    forget, retain = profile.tokens
    return {
        "forget_tokens": forget,
        "retain_tokens": retain,
        "below_retain_cap": len(eligible),
        "leaning_to_forget": int(profile.leaning_F.sum()),
    }


def _swept(
    bench: Bench,
    every: Sequence[Setting],
    texts: Texts,
    pieces: Pieces,
    draws: dict[Side, pareto.Draws],
    progress: Progress,
) -> dict[str, Any]:
    """One arm: all settings on tune, the best within each budget on test."""
    config = texts.config
    retain: list[float] = []
    forget: list[float | None] = []
    for done, setting in enumerate(every):
        progress(bench.arm.name, done, len(every))
        retain.append(texts.mean("retain", "tune", bench.measure(pieces, setting, "retain", "tune")))
        dear = retain[-1] > TOO_DEAR * max(config.budgets)
        forget.append(None if dear else texts.mean("forget", "tune", bench.measure(pieces, setting, "forget", "tune")))
    picked = {budget: pareto.choose(retain, forget, budget) for budget in config.budgets}
    tested: dict[int, dict[str, Tensor]] = {}
    for chosen in sorted({place for place in picked.values() if place is not None}):
        tested[chosen] = _tested(bench, every[chosen], texts, pieces, draws)
    progress(bench.arm.name, len(every), len(every))
    best = pareto.frontier(retain, forget)
    points = []
    for place, setting in enumerate(every):
        test = {name: pareto.interval(values) for name, values in tested[place].items()} if place in tested else None
        points.append(
            {
                "setting": {**asdict(setting), **bench.reach[setting]},
                "tune": {"retain_dce": retain[place], "forget_dce": forget[place]},
                "frontier": place in best,
                "test": test,
            }
        )
    harm, gain = ([values[name] for values in tested.values()] for name in ("retain_dce", "forget_dce"))
    area = pareto.interval(pareto.area(harm, gain, max(config.budgets))) if tested else ZERO
    return {
        "at_retain": {
            f"{budget:g}": NOTHING if place is None else _reported(points[place]) for budget, place in picked.items()
        },
        "pareto": points,
        "area": {**area, "up_to": max(config.budgets)},
        "latents": {str(count): list(latents) for count, latents in bench.arm.chosen.items()},
    }


def _reported(point: dict[str, Any]) -> dict[str, Any]:
    """A setting's results on test documents, the gain in front."""
    gain = point["test"]["forget_dce"]
    others = {name: values for name, values in point["test"].items() if name != "forget_dce"}
    return {
        "forget_dce": gain["value"],
        "low": gain["low"],
        "high": gain["high"],
        **others,
        "setting": point["setting"],
    }


def _tested(
    bench: Bench, setting: Setting, texts: Texts, pieces: Pieces, draws: dict[Side, pareto.Draws]
) -> dict[str, Tensor]:
    """[S] each: change of the loss and KL on both test texts."""
    found: dict[str, Tensor] = {}
    for side in SIDES:
        change = bench.measure(pieces, setting, side, "test", kl=True)
        counts = texts.meter(side, "test").counts
        assert change.kl_R is not None
        found[f"{side}_dce"] = draws[side].mean(change.loss_R, counts)
        found[f"{side}_kl"] = draws[side].mean(change.kl_R, counts)
    return found


# --- does what was learned of one topic carry over to its sibling? ------------------------------------------------------


def signature_topics(rows: Rows, wanted: Sequence[str]) -> list[str]:
    """The two topics of the test: those wanted, or those with the most documents (at least two each); fewer if there are none."""
    documents: dict[str, set[int]] = {}
    for document, topic in zip(rows.documents, rows.topics, strict=True):
        if topic is not None:
            documents.setdefault(topic, set()).add(document)
    fit = [topic for topic, held in documents.items() if len(held) >= 2]
    if wanted:
        return [topic for topic in wanted if topic in fit]
    return sorted(fit, key=lambda topic: (-len(documents[topic]), topic))[:2]


def _signature(
    model: HierarchicalSAE, dictionary: Dictionary, texts: Texts, pieces: Pieces, progress: Progress
) -> dict[str, Any]:
    """Latents selected on one topic (against retain text), tested on other documents of it and on the sibling topic, both ways."""
    everything = Rows.all_of(texts.rows["forget"]["select"].store, texts.rows["forget"]["select"].hook)
    topics = signature_topics(everything, texts.config.topics)
    if len(topics) < 2:
        return {"explanation": "the forget text has no two topics with at least two documents each", "pairs": []}
    pairs = []
    for number, (own, sibling) in enumerate((topics, topics[::-1])):
        progress(f"signature {own} to {sibling}", number, 2)
        pairs.append(_carried(model, dictionary, texts, pieces, everything, own, sibling))
    return {"explanation": None, "pairs": pairs}


def _carried(
    model: HierarchicalSAE,
    dictionary: Dictionary,
    texts: Texts,
    pieces: Pieces,
    everything: Rows,
    own: str,
    sibling: str,
) -> dict[str, Any]:
    config = texts.config
    mine = everything.where(lambda place: everything.topics[place] == own)
    documents = list(dict.fromkeys(mine.documents))
    selecting = set(documents[::2])
    seen = mine.where(lambda place: mine.documents[place] in selecting)
    tests = {
        "own": mine.where(lambda place: mine.documents[place] not in selecting),
        "sibling": everything.where(lambda place: everything.topics[place] == sibling),
        "retain": texts.rows["retain"]["tune"],
    }
    tests = {name: rows.where(lambda place: place < SIGNATURE_ROWS) for name, rows in tests.items()}
    profile = selection.profile(dictionary, seen.batches(), texts.rows["retain"]["select"].batches())
    setting = Setting(
        latents=max(config.latents), multiplier=config.multipliers[len(config.multipliers) // 2], quantile=None
    )
    meters = {name: texts.meter_on(rows) for name, rows in tests.items()}
    draws = {
        name: pareto.Draws.of(rows.documents, config.resamples, config.seed + place)
        for place, (name, rows) in enumerate(tests.items())
    }
    results = {}
    for arm in sae_arms(model, dictionary, profile, config):
        latents = arm.chosen[setting.latents]
        if (arm.control_of is not None and arm.name != "descend-permuted") or not latents:
            continue
        intervention = Intervention(
            latents=latents, values=tuple(-setting.multiplier * mean for mean in arm.means(latents))
        )
        means = {}
        for name, meter in meters.items():
            content = json.dumps([own, sibling, name, intervention.latents, intervention.values])
            key = f"signature/{hashlib.sha256(content.encode()).hexdigest()[:24]}"
            change = pieces.change(
                key,
                lambda meter=meter, intervention=intervention: _on(meter, dictionary, intervention),  # type: ignore[misc]
            )
            means[name] = draws[name].mean(change.loss_R, meter.counts)
        results[arm.name] = {
            **{name: pareto.interval(values) for name, values in means.items()},
            "carried": pareto.interval(means["sibling"] / means["own"]),
            "clamped": len(latents),
        }
    return {
        "selected_on": own,
        "tested_on": sibling,
        "documents": {name: len(set(rows.documents)) for name, rows in [("selecting", seen), *tests.items()]},
        "setting": asdict(setting),
        "arms": results,
    }


def _on(meter: LossMeter, dictionary: Dictionary, intervention: Intervention) -> Change:
    acts_RTA = meter.rows.activations(dictionary, intervention.latents)
    return meter.measure(Trial(intervention=intervention, acts_RTA=acts_RTA, directions_FD=dictionary.directions_FD))
