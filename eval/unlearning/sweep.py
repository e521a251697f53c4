"""Hierarchical unlearning on two texts: every arm swept on tune documents, reported on test documents.

Latents are chosen on a third set of documents. Losses are those of the language model with the intervention against the
model as it is, so an SAE's own error is in neither. A setting costs suffix passes only.

Shapes: R rows, T context, A chosen latents, S the data and its resamples.
"""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from hsae.eval.harness.estimates import estimate_of
from hsae.eval.harness.listener import SILENT, Progress
from hsae.eval.unlearning import pareto, selection
from hsae.eval.unlearning.arms import Arm, Setting, measure_shift, rate_threshold, sae_arms, shared_arms
from hsae.eval.unlearning.config import SIDES, Side, UnlearningConfig
from hsae.eval.unlearning.intervention import Dictionary, Intervention
from hsae.eval.unlearning.loss_meter import Change, MeasuredChanges, Texts
from hsae.train.model.hierarchical_sae import HierarchicalSAE

HARM_LIMIT = 2.0
"""A setting whose harm on tune documents exceeds so many times the largest budget is not measured further."""
ZERO: dict[str, float | None] = {"value": 0.0, "low": 0.0, "high": 0.0}
NOTHING: dict[str, Any] = {"forget_dce": 0.0, "low": 0.0, "high": 0.0, "retain_dce": ZERO, "setting": None}
"""What doing nothing gives."""


@dataclass(kw_only=True)
class PreparedArm:
    """One arm made ready: activations of its latents on all rows, and an intervention for every setting."""

    arm: Arm
    texts: Texts
    acts: dict[tuple[Side, str], Tensor] = field(default_factory=dict)
    interventions: dict[Setting, Intervention] = field(default_factory=dict)
    described: dict[Setting, dict[str, Any]] = field(default_factory=dict)
    """Of every setting how many latents it clamps, to what, and how far residuals move."""

    @property
    def settings(self) -> list[Setting]:
        """The settings of the sweep for which the arm has latents."""
        config = self.texts.config
        every = itertools.product(config.latents, (None, *config.quantiles), config.multipliers)
        return [Setting(latents=n, multiplier=m, quantile=q) for n, q, m in every if self.arm.chosen.get(n)]

    def activations(self, side: Side, part: str, latents: Sequence[int]) -> Tensor:
        """[R, T, A]"""
        union = self.arm.union
        if (side, part) not in self.acts:
            self.acts[side, part] = self.texts.rows[side][part].activations(self.arm.dictionary, union)
        return self.acts[side, part][..., [union.index(latent) for latent in latents]]

    def prepare(self, reference: "PreparedArm | None") -> None:
        """Thresholds, values and strengths of every setting; a control is matched to `reference`."""
        masks = {side: self.texts.rows[side]["select"].mask() for side in SIDES}
        for setting in self.settings:
            latents = self.arm.chosen[setting.latents]
            means = self.arm.profile.mean_F[list(latents)].tolist()
            acts = {side: self.activations(side, "select", latents) for side in SIDES}
            rate = rate_threshold(acts["retain"], masks["retain"], setting.quantile)
            still = Intervention(latents=latents, values=(0.0,) * len(latents), rate=rate)
            directions_FD = self.arm.dictionary.directions_FD
            shift = {side: measure_shift(still, means, acts[side], masks[side], directions_FD) for side in SIDES}
            multiplier, matched = setting.multiplier, dict[str, bool]()
            if reference is not None:
                solved = shift["retain"].multiplier(reference.described[setting]["dx_retain"])
                multiplier, matched = setting.multiplier if solved is None else solved, {"matched": solved is not None}
            self.interventions[setting] = replace(still, values=tuple(-multiplier * mean for mean in means))
            self.described[setting] = {
                "clamped": len(latents),
                "multiplier_used": multiplier,
                "dx_retain": shift["retain"].rms(multiplier),
                "dx_forget": shift["forget"].rms(multiplier),
                **matched,
            }

    def measure(self, changes: MeasuredChanges, setting: Setting, side: Side, part: str, *, kl: bool = False) -> Change:
        """What a setting does to the rows of one part."""
        intervention, dictionary = self.interventions[setting], self.arm.dictionary
        content = [dictionary.widths, intervention.latents, intervention.values, intervention.rate, kl]
        arm = self.arm.name if dictionary.widths == (1,) else ""

        def measure() -> Change:
            acts_RTA = self.activations(side, part, intervention.latents)
            return self.texts.meter(side, part).measure(intervention, acts_RTA, dictionary.directions_FD, kl=kl)

        return changes.get(f"{arm}{side}/{part}/{digest_of(content)}", measure)


@dataclass(kw_only=True)
class Sweep:
    """All arms of one trained model."""

    model: HierarchicalSAE
    dictionary: Dictionary
    texts: Texts
    changes: MeasuredChanges
    progress: Progress = SILENT.progress
    """Called with an arm, how many of its settings are done, and how many there are."""

    def __post_init__(self) -> None:
        config = self.texts.config
        self.bootstraps = {
            side: pareto.DocumentBootstrap(
                self.texts.rows[side]["test"].documents, config.resamples, config.seed + place
            )
            for place, side in enumerate(SIDES)
        }

    def run(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """`arms` and `profile` of the result file."""
        config = self.texts.config
        forget, retain = (self.texts.rows[side]["select"] for side in SIDES)
        profile = selection.profile(self.dictionary, forget.batches(), retain.batches())
        at_retain = {f"{budget:g}": NOTHING for budget in config.budgets}
        results: dict[str, Any] = {
            "none": {"at_retain": at_retain, "pareto": [], "area": {**ZERO, "up_to": max(config.budgets)}}
        }
        prepared: dict[str, PreparedArm] = {}
        for arm in (*shared_arms(forget, retain, config), *sae_arms(self.model, self.dictionary, profile, config)):
            prepared[arm.name] = PreparedArm(arm=arm, texts=self.texts)
            prepared[arm.name].prepare(prepared[arm.control_of] if arm.control_of is not None else None)
            results[arm.name] = self._sweep(prepared[arm.name])
            for each in prepared.values():
                each.acts.clear()
        return results, _describe(profile, config)

    def _sweep(self, arm: PreparedArm) -> dict[str, Any]:
        """One arm: all settings on tune, the best within each budget on test."""
        config, every = self.texts.config, arm.settings
        most = max(config.budgets)
        retain: list[float] = []
        forget: list[float | None] = []
        for done, setting in enumerate(every):
            self.progress(arm.arm.name, done, len(every))
            retain.append(self._mean(arm, setting, "retain"))
            forget.append(None if retain[-1] > HARM_LIMIT * most else self._mean(arm, setting, "forget"))
        best = {budget: pareto.choose(retain, forget, budget) for budget in config.budgets}
        chosen = sorted({place for place in best.values() if place is not None})
        tested = {place: self._test(arm, every[place]) for place in chosen}
        self.progress(arm.arm.name, len(every), len(every))
        frontier = pareto.frontier(retain, forget)
        points = [
            {
                "setting": {**asdict(setting), **arm.described[setting]},
                "tune": {"retain_dce": retain[place], "forget_dce": forget[place]},
                "frontier": place in frontier,
                "test": {name: estimate_of(values_S).to_dict() for name, values_S in tested[place].items()}
                if place in tested
                else None,
            }
            for place, setting in enumerate(every)
        ]
        harm, gain = ([values[name] for values in tested.values()] for name in ("retain_dce", "forget_dce"))
        area = estimate_of(pareto.area(harm, gain, most)).to_dict() if tested else ZERO
        return {
            "at_retain": {
                f"{budget:g}": NOTHING if place is None else _report(points[place]) for budget, place in best.items()
            },
            "pareto": points,
            "area": {**area, "up_to": most},
            "latents": {str(count): list(latents) for count, latents in arm.arm.chosen.items()},
        }

    def _mean(self, arm: PreparedArm, setting: Setting, side: Side) -> float:
        """Mean change of the loss per position on the tune documents of a side."""
        change = arm.measure(self.changes, setting, side, "tune")
        return sum(change.loss_R) / max(1, sum(self.texts.meter(side, "tune").counts))

    def _test(self, arm: PreparedArm, setting: Setting) -> dict[str, Tensor]:
        """[S] each: change of the loss and KL on both test texts."""
        tested: dict[str, Tensor] = {}
        for side in SIDES:
            change = arm.measure(self.changes, setting, side, "test", kl=True)
            counts = self.texts.meter(side, "test").counts
            assert change.kl_R is not None
            tested[f"{side}_dce"] = self.bootstraps[side].mean(change.loss_R, counts)
            tested[f"{side}_kl"] = self.bootstraps[side].mean(change.kl_R, counts)
        return tested


def digest_of(content: Any) -> str:
    """A short digest of JSON-ready content."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


def _describe(profile: selection.Profile, config: UnlearningConfig) -> dict[str, Any]:
    eligible = selection.ranking(profile.forget_F, profile.retain_F, config.retain_cap)
    forget, retain = profile.tokens
    return {
        "forget_tokens": forget,
        "retain_tokens": retain,
        "below_retain_cap": len(eligible),
        "leaning_to_forget": int(profile.leaning_F.sum()),
    }


def _report(point: dict[str, Any]) -> dict[str, Any]:
    """A setting's results on test documents, the gain in front."""
    others = dict(point["test"])
    gain = others.pop("forget_dce")
    return {
        "forget_dce": gain["value"],
        "low": gain["low"],
        "high": gain["high"],
        **others,
        "setting": point["setting"],
    }
