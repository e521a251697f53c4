"""Core for several targets: what is there already is read back, and all SAEs of a hook share one pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hsae.cache.language_model.lm import LanguageModel
from hsae.cache.reading.store import ActivationStore
from hsae.eval.core.core import CoreOptions, Listener, check, evaluate
from hsae.eval.harness.envelope import CoreResult, read_core, write_core
from hsae.eval.harness.targets import Target, find
from hsae.train.runs.run_record import check_same_model

ALL_TOKENS = "all-tokens"  # in the names of results with the residual of special tokens replaced too


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """A target and its result."""

    target: Target
    result: CoreResult
    reused: bool
    """Whether the result had been there."""
    path: Path
    """The result file."""


def evaluate_targets(
    targets: Sequence[Target],
    store: ActivationStore,
    load: Callable[[], LanguageModel],
    *,
    options: CoreOptions,
    force: bool = False,
    listener: Listener | None = None,
    device: str = "cpu",
) -> list[Evaluated]:
    """Evaluate the targets and write their results; results made of the same inputs are read back unless `force`.

    The language model is loaded only if something has to be computed. Raises UserError before any compute.
    """
    for target in targets:
        check([target.view], store, None, target.hook)
        check_same_model(target.run_dir, store.url, store.header)
    apart = () if options.exclude_special_tokens else (ALL_TOKENS,)
    found = [find(target, _inputs(target, store, options), _read, *apart) for target in targets]
    missing = [i for i, held in enumerate(found) if force or held.result is None]
    for i in missing:
        if listener is not None and found[i].changed:
            listener.warning(targets[i].label, f"evaluated anew, with {found[i].changed}")
    computed: dict[int, CoreResult] = {}
    model = load() if missing else None
    for hook in dict.fromkeys(targets[i].hook for i in missing):
        assert model is not None
        group = [i for i in missing if targets[i].hook == hook]
        views = [targets[i].view for i in group]
        results = evaluate(views, store, model, hook=hook, options=options, listener=listener, device=device)
        for i, result in zip(group, results, strict=True):
            target = targets[i]
            result = replace(result, hsae={**(result.hsae or {}), "inputs": _inputs(target, store, options)})
            write_core(result, target.folder, release=target.release, sae_id=target.sae_id, name=found[i].path.name)
            computed[i] = result
    evaluated = []
    for i, target in enumerate(targets):
        held = computed.get(i) or found[i].result
        assert held is not None
        evaluated.append(Evaluated(target=target, result=held, reused=i not in computed, path=found[i].path))
    return evaluated


def _inputs(target: Target, store: ActivationStore, options: CoreOptions) -> dict[str, Any]:
    """All that a result depends on."""
    return {
        **target.inputs,
        "store": store.spec.fingerprint,
        "model": store.header.model_digest,
        "tokenizer": store.header.tokenizer_digest,
        "corpus": store.header.corpus_digest,
        "exclude_special_tokens": options.exclude_special_tokens,
    }


def _read(path: Path) -> tuple[CoreResult, dict[str, Any]]:
    result = read_core(path)
    inputs = (result.hsae or {}).get("inputs")
    return result, inputs if isinstance(inputs, dict) else {}
