"""`hsae eval ravel`: each SAE's result from RAVEL's store.

The language model is loaded only if something has to be computed.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from hsae.cache.errors import NotApplicable, StoreError
from hsae.cache.language_model.generation import PassCounts
from hsae.cache.language_model.lm import LanguageModel
from hsae.cache.reading.provenance import check_model, pin_commit
from hsae.cache.storage.paths import size_of
from hsae.cache.suites.ravel_store import RavelStore, describe_counts
from hsae.eval.harness.estimates import mean_over_seeds
from hsae.eval.harness.evaluation import Result, cached_method
from hsae.eval.harness.options import DrawOptions
from hsae.eval.harness.result_files import hsae_version
from hsae.eval.harness.targets import Target
from hsae.eval.probing.evaluations import SuiteEvaluation
from hsae.eval.probing.text_probes import generator_for
from hsae.eval.ravel.config import RavelConfig, ravel_spec
from hsae.eval.ravel.exchange import (
    Attributes,
    Exchange,
    Pair,
    Scores,
    averaged,
    own_scores,
    pairs_of,
    resampled_scores,
    saebench_scores,
    split_entities,
)
from hsae.eval.ravel.ravel_file import RavelFile, SaebenchRavelConfig
from hsae.train.config.plan import Plan
from hsae.train.model.views import View

MEASURES = {
    "disentanglement_score": "disentangle_score",
    "cause_score": "cause_score",
    "isolation_score": "isolation_score",
}
"""SAEBench's names of the means -> those of one attribute."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """One attribute's pairs."""

    kind: str
    attribute: str
    train: list[Pair]
    test: list[Pair]

    @property
    def name(self) -> str:
        """SAEBench's name of the attribute."""
        return f"{self.kind}_{self.attribute}"


class Ravel(SuiteEvaluation[RavelStore]):
    """Whether exchanging a few latents changes one attribute of an entity and no other."""

    name = "ravel"
    file_kind = RavelFile
    config_kind = RavelConfig
    headlines: ClassVar[dict[str, str]] = {name.removesuffix("_score"): name for name in MEASURES}

    @classmethod
    def packages(cls, options: DrawOptions) -> tuple[tuple[str, str, str], ...]:
        """An interval over several draws is Student's."""
        return (("scipy", "scipy", "eval"),) if options.draws > 1 else ()

    @classmethod
    def open_store(cls, plan: Plan) -> RavelStore:
        """RAVEL's store. Raises NotApplicable if it has not been built."""
        spec = ravel_spec(plan)
        try:
            return RavelStore(spec, plan.cache.dir)
        except StoreError as error:
            if size_of(spec.path(plan.cache.dir)) is None:
                raise NotApplicable(str(error)) from None
            raise

    # --- what all SAEs share ------------------------------------------------------------------------------------------

    def load_language_model(self) -> LanguageModel:
        """The language model that was given, or the one at the commit that stores beside this one were made with."""
        if self.lm is not None:
            return self.lm
        config = pin_commit(self.store.spec.model, self.store.root)
        return LanguageModel.load(config, device=self.device, late_tokenizer=True)

    @cached_property
    def language(self) -> LanguageModel:
        """The language model, checked to be the store's."""
        model = self.load_language_model()
        check_model(self.store.path, self.store.header, model, "ravel")
        return model

    @cached_property
    def saebench_splits(self) -> list[Split]:
        """SAEBench's pairs: one random stream over all attributes; the first mixed pairs train, the rest test."""
        mixed, splits = random.Random(self.config.seed), []
        for kind, prompts in self.store.prompts.items():
            for attribute in prompts:
                pairs = pairs_of(prompts, attribute, self.config.pairs, mixed)
                cut = int(self.config.train_share * len(pairs))
                splits.append(Split(kind=kind, attribute=attribute, train=pairs[:cut], test=pairs[cut:]))
        return splits

    @cached_property
    def splits(self) -> list[Split]:
        """Pairs whose entities are either trained on or tested on."""
        splits = []
        for kind, prompts in self.store.prompts.items():
            sides: tuple[Attributes, Attributes] = split_entities(
                prompts, self.config.train_share, random.Random(f"{self.config.seed} {kind}")
            )
            shares = (self.config.train_share, 1 - self.config.train_share)
            for attribute in prompts:
                mixed = random.Random(f"{self.config.seed} {kind} {attribute}")
                train, test = (
                    pairs_of(side, attribute, max(1, round(share * self.config.pairs)), mixed)
                    for side, share in zip(sides, shares, strict=True)
                )
                splits.append(Split(kind=kind, attribute=attribute, train=train, test=test))
        return splits

    @cached_method
    def residual(self, hook: str) -> dict[str, Any]:
        """Measures with the whole residual exchanged.

        Raises NotApplicable if that changes too few answers for RAVEL to mean anything.
        """
        self.listener.status("ravel: the whole residual exchanged")
        exchange = self._exchange(hook)
        outcomes = [exchange.whole(split.test) for split in self.splits]
        measures = self._measures(self.splits, outcomes)
        cause = measures["cause_score"]["value"]
        if cause is None or cause < self.config.least_ceiling:
            raise NotApplicable(
                f"exchanging the whole residual of an entity at {hook} changes {cause or 0:.0%} of the answers to the "
                "other entity's: by there the attributes have moved on to later tokens, and no latent can score; "
                "evaluate SAEs of an earlier layer (or lower ravel.least_ceiling)"
            )
        return measures

    def _exchange(self, hook: str) -> Exchange:
        return Exchange(store=self.store, hook=hook, language=self.language, config=self.config)

    # --- one SAE ------------------------------------------------------------------------------------------------------

    def measure(self, target: Target) -> dict[str, Any]:
        """A target's result as SAEBench's JSON object with hsae's block."""
        residual = self.residual(target.hook)
        exchange, label = self._exchange(target.hook), target.label
        plain = target.view.copy_to(dtype=self.language.dtype, device=self.device)
        faithful = []
        for split in self.saebench_splits:
            self.listener.status(f"ravel: {label}, {split.name}")
            mask_F = exchange.train(plain, split.train, keep_error=False)
            faithful.append(saebench_scores(split.test, exchange.outcomes(plain, split.test, mask_F, keep_error=False)))
        spent = {"saebench": asdict(exchange.passes)}
        exchange.passes = PassCounts()
        exact = target.view.copy_to(dtype=torch.float32, device=self.device)
        chosen, outcomes, by_chance = [], [], []
        for split in self.splits:
            self.listener.status(f"ravel: {label}, {split.name}, error kept")
            mask_F = exchange.train(exact, split.train, keep_error=True)
            chosen.append(mask_F)
            outcomes.append(exchange.outcomes(exact, split.test, mask_F, keep_error=True))
            other_F = self._random(exchange, exact, split, mask_F)
            by_chance.append(exchange.outcomes(exact, split.test, other_F, keep_error=True))
        spent["measures"] = asdict(exchange.passes)
        means, unstructured = self._tables(self.saebench_splits, faithful)
        attributes = {
            split.name: {
                **own_scores(split.test, results),
                "latents": mask_F.nonzero()[:, 0].tolist(),
                "pairs": {"train": len(split.train), "test": len(split.test)},
            }
            for split, results, mask_F in zip(self.splits, outcomes, chosen, strict=True)
        }
        return self.file_kind.content(
            eval_config=self.eval_config(),
            metrics={"ravel": {name: means[short] for name, short in MEASURES.items()}},
            details=[],
            sae_config={**target.view.config, "dtype": self.store.spec.model.dtype, "device": self.device},
            unstructured=unstructured,
            hsae={
                "version": hsae_version(),
                "measures": self._measures(self.splits, outcomes),
                "random": self._measures(self.splits, by_chance),
                "residual": residual,
                "attributes": attributes,
                "interval": "mean over seeds +- Student's t times the standard deviation over seeds, 95 %; a seed "
                "draws the tested entities with replacement, the mask is trained once",
                "lm_passes": spent,
                "store": {"path": self.store.path.name, "passes": self.store.header.passes},
                "asked": self.store.header.asked,
                "right": self.store.header.right,
                "sources": self.store.header.sources,
                "inputs": self.inputs(target),
            },
            release=target.release,
            sae_id=target.sae_id,
        )

    def _random(self, exchange: Exchange, view: View, split: Split, mask_F: Tensor) -> Tensor:
        """As many other latents, drawn among those that differ in some tested pair."""
        base_BF, source_BF = exchange.latents(view, split.test)
        alive_F = (base_BF != source_BF).any(0)
        others = (alive_F & ~mask_F).nonzero()[:, 0]
        order = torch.randperm(len(others), generator=generator_for("random latents", split.name, self.config.seed))
        random_F = torch.zeros_like(mask_F)
        random_F[others[order.to(others.device)[: int((mask_F & alive_F).sum())]]] = True
        return random_F

    def _tables(self, splits: Sequence[Split], entries: Sequence[Scores]) -> tuple[Scores, dict[str, Any]]:
        """The means over attributes, then types; and SAEBench's table of the attributes."""
        by_kind: dict[str, dict[str, Scores]] = {}
        for split, entry in zip(splits, entries, strict=True):
            by_kind.setdefault(split.kind, {})[split.name] = entry
        means = averaged([averaged(list(entries.values())) for entries in by_kind.values()])
        return means, {f"{kind}_results": entries for kind, entries in by_kind.items()}

    def _measures(self, splits: Sequence[Split], outcomes: Sequence[Sequence[bool]]) -> dict[str, Any]:
        resampled = []
        for seed in self.seeds:
            entries = [
                resampled_scores(split.test, results, split.name, seed)
                for split, results in zip(splits, outcomes, strict=True)
            ]
            resampled.append(self._tables(splits, entries)[0])
        return {
            name: mean_over_seeds([entry[short] for entry in resampled]).to_dict() for name, short in MEASURES.items()
        }

    def inputs(self, target: Target) -> dict[str, Any]:
        """All that a result depends on."""
        inputs = super().inputs(target)
        seeds = inputs.pop("seeds")  # stays the last
        config = hashlib.sha256(self.config.model_dump_json().encode()).hexdigest()[:16]
        return {**inputs, "config": config, "seeds": seeds}

    def notes(self, results: Sequence[Result[Target]]) -> list[str]:
        """The passes behind the results, and what the model answered."""
        parts = [part for result in results for part in result.content["hsae"]["lm_passes"].values()]
        spent = {name: sum(part[name] for part in parts) for name in asdict(PassCounts())}
        passes = (
            f"behind these results: {spent['suffix']:,} prompts through the suffix ({spent['backward']:,} of them back "
            f"too), {spent['prefix']:,} through the prefix for further tokens, {spent['spared']:,} spared because no "
            "chosen latent differs"
        )
        return [*super().notes(results), passes, describe_store(self.store)]

    def eval_config(self) -> SaebenchRavelConfig:
        """SAEBench's `eval_config`."""
        config, prompts_by_kind = self.config, self.store.prompts
        return SaebenchRavelConfig(
            entity_attribute_selection={kind: list(prompts) for kind, prompts in prompts_by_kind.items()},
            top_n_entities=config.top_entities,
            top_n_templates=90,
            full_dataset_downsample=None,
            num_pairs_per_attribute=config.pairs,
            train_test_split=config.train_share,
            force_dataset_recompute=False,
            model_name=self.store.spec.model.id,
            llm_dtype=self.store.spec.model.dtype,
            llm_batch_size=config.batch_pairs,
            learning_rate=config.learning_rate,
            num_epochs=config.epochs,
            train_mdas=False,
            n_generated_tokens=config.new_tokens,
            random_seed=config.seed,
            artifact_dir="",
        )


def describe_store(store: RavelStore) -> str:
    """What was asked and what of it was answered right, for people."""
    header = store.header
    used = sum(len(group) for prompts in store.prompts.values() for group in prompts.values())
    return f"answered right and kept: {describe_counts(header.right, header.asked)}; {used} prompts used"
