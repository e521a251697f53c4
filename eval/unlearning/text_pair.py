"""What both forms of `hsae eval unlearning` share: the forget and the retain store, and what results depend on."""

import platform
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import Field

from hsae.cache.config import at_commit
from hsae.cache.errors import NotApplicable, StoreError
from hsae.cache.language_model.lm import LanguageModel
from hsae.cache.reading.provenance import check_model
from hsae.cache.reading.store import ActivationStore
from hsae.cache.storage.paths import exists
from hsae.eval.harness.evaluation import check_target
from hsae.eval.harness.options import Options
from hsae.eval.harness.result_files import hsae_version, write_result
from hsae.eval.harness.run_evaluation import RunEvaluation
from hsae.eval.harness.targets import RunTarget
from hsae.eval.unlearning.config import SIDES, Side, UnlearningConfig
from hsae.eval.unlearning.rows import Rows
from hsae.train.config.plan import Plan

LIBRARIES = ("torch", "transformers")
Stores = dict[Side, ActivationStore]


class UnlearningOptions(Options):
    """Options of `hsae eval unlearning`."""

    qa: bool = Field(
        default=False,
        description="SAEBench's form instead: multiple-choice questions, an instruction-tuned model ([unlearning.qa]).",
    )


class TextPairEvaluation(RunEvaluation[Stores]):
    """An evaluation of runs on text to be forgotten and text to be kept."""

    name = "unlearning"
    options_kind, config_kind = UnlearningOptions, UnlearningConfig
    reads_splits = SIDES

    @classmethod
    def open_store(cls, plan: Plan) -> Stores:
        """The forget and the retain store.

        Raises StoreError with what to run if one is missing or they don't belong together, NotApplicable if none was
        begun.
        """
        if missing := [side for side in SIDES if not plan.store_path(side).is_dir()]:
            kind = StoreError if any(exists(plan.store_path(side)) for side in SIDES) else NotApplicable
            named = plan.source.removeprefix("packaged plan ")
            raise kind(
                f"no {missing[0]} store at {plan.store_path(missing[0])}; "
                f"make it with: hsae cache build --plan {named} --suite unlearning"
            )
        stores: Stores = {side: ActivationStore.of(plan.store(side), plan.cache.dir) for side in SIDES}
        if len({(store.header.model_digest, store.header.tokenizer_digest) for store in stores.values()}) > 1:
            raise StoreError(
                f"{stores['forget'].url} and {stores['retain'].url} were made with different weights or tokenizers; "
                "move them away and build them again"
            )
        return stores

    def check(self, target: RunTarget) -> None:
        """Refuse a run of another model than the stores'. Raises UserError."""
        check_target(target, self.store["forget"])

    def inputs(self, target: RunTarget) -> dict[str, Any]:
        """All that a result depends on, by content."""
        header = self.store["forget"].header
        return {
            **target.inputs,
            "config": self.config.digest,
            "model": header.model_digest,
            "tokenizer": header.tokenizer_digest,
            **{f"{side}_store": store.spec.fingerprint for side, store in self.store.items()},
            **{f"{side}_corpus": store.header.corpus_digest for side, store in self.store.items()},
        }

    @cached_property
    def language(self) -> LanguageModel:
        """The language model, checked to be the stores'."""
        store = self.store["forget"]
        config = at_commit(store.spec.model, store.header.model_commit)
        model = LanguageModel.load(config, device=self.device, late_tokenizer=True)
        for store in self.store.values():
            check_model(store.root, store.header, model)
        return model

    def rows(self, target: RunTarget) -> dict[Side, Rows]:
        """All rows of both stores."""
        return {side: Rows.all_of(self.store[side], target.hook) for side in SIDES}

    def result(self, kind: str, target: RunTarget, content: dict[str, Any]) -> dict[str, Any]:
        """The result file of a run: what was measured, with what it was made of and what it was computed with."""
        plan, config = target.plan, target.config
        libraries = {name: version(name) for name in LIBRARIES}
        return {
            "eval_type_id": kind,
            "run": {"plan": plan.name, "number": config.number, "name": config.name, "seed": plan.train.seed},
            **content,
            "inputs": self.inputs(target),
            "versions": {"hsae": hsae_version(), "python": platform.python_version(), **libraries},
        }

    def write(self, path: Path, content: dict[str, Any]) -> Path:
        """Write the result, in which a number can be undefined."""
        return write_result(path, content, allow_nan=True)
