"""Which results may stand in one table: those of the plan's evaluation store and of the standard settings."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Self

from hsae.cache.errors import UserError
from hsae.cache.format.spec import StoreSpec, gpu_rows
from hsae.cache.reading.store import ActivationStore
from hsae.eval.core.core_result import CoreResult, read_core

LOSSLESS = ("mappable", "compact")
DIGESTS = {"model": "weights", "tokenizer": "tokenizer", "corpus": "text"}


@dataclass(frozen=True, kw_only=True)
class Current:
    """The evaluation store that results must be made of to stand in one table."""

    name: str
    """The store's."""
    fingerprints: frozenset[str]
    """Those of the store, see `interchangeable`."""
    digests: Mapping[str, str]
    """Of `DIGESTS`, where the store is there to tell."""

    @classmethod
    def of(cls, spec: StoreSpec, store: ActivationStore | None = None) -> Self:
        """What a plan's evaluation store stands for, whether it is there or not."""
        digests = {key: getattr(store.header, f"{key}_digest") for key in DIGESTS} if store is not None else {}
        return cls(name=spec.name, fingerprints=interchangeable(spec), digests=digests)

    def why_not(self, inputs: Mapping[str, Any]) -> str | None:
        """Why a result of these inputs does not belong beside the others; None if it does, or says nothing of where it
        is from.
        """
        if inputs.get("exclude_special_tokens") is False:
            return "of other settings (--all-tokens)"
        if inputs.get("store") is not None and str(inputs["store"]) not in self.fingerprints:
            return f"of another store ({inputs['store']}) than the plan's evaluation store {self.name}"
        for key, noun in DIGESTS.items():
            if key in self.digests and inputs.get(key) not in (None, self.digests[key]):
                return f"of another state of {self.name}, with other {noun}"
        return None


def interchangeable(spec: StoreSpec) -> frozenset[str]:
    """Fingerprints of a store in every codec that keeps its bits, made on a processor or on a GPU."""
    codecs = LOSSLESS if spec.codec in LOSSLESS else (spec.codec,)
    passes = product({spec.forward_rows, None, gpu_rows(spec.context, spec.batch_rows)}, (False, True))
    same = [{"forward_rows": rows, "compiled": compiled} for rows, compiled in passes]
    return frozenset(spec.model_copy(update={**one, "codec": codec}).fingerprint for one in same for codec in codecs)


def core_results(run_dir: Path, weights: str, current: Current) -> dict[str, CoreResult]:
    """A run's core results by view: those of the very model whose digest is `weights`, that may stand beside others."""
    results: dict[str, CoreResult] = {}
    for path in sorted((run_dir / "eval" / "core").glob("*_eval_results.json")):
        try:
            result = read_core(path)
        except UserError:
            continue
        if result.inputs.get("sae") == weights and current.why_not(result.inputs) is None:
            results.setdefault(result.name, result)
    return results
