"""Several evaluations of the same targets, one after the other; one that fails does not stop the others."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from hsae import registry
from hsae.eval.harness.evaluation import Result, evaluate_plan
from hsae.eval.harness.listener import SILENT, Listener
from hsae.eval.harness.targets import Selection
from hsae.train.config.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How an evaluation ended."""

    name: str
    seconds: float
    results: Sequence[Result[Any]] = ()
    error: Exception | None = None
    """What ended it; NotApplicable if it has nothing to measure here."""


def names_in_all() -> list[str]:
    """The evaluations that `evaluate_all` runs, in their order."""
    return [name for name, entry in registry.EVALUATIONS.items() if entry.is_in_all]


def evaluate_all(
    plan: Plan,
    selection: Selection,
    *,
    draws: int = 5,
    force: bool = False,
    device: str = "auto",
    listen: Callable[[str], AbstractContextManager[Listener]] = lambda name: nullcontext(SILENT),
) -> Iterator[Outcome]:
    """Run every evaluation of `names_in_all` and write the results where the command line does.

    `draws` is for those that draw at random; `listen` gives the listener of an evaluation by its name.
    """
    for name in names_in_all():
        began, results, failure = time.perf_counter(), list[Result[Any]](), None
        try:
            with listen(name) as listener:
                results = evaluate_one(name, plan, selection, draws, force=force, device=device, listener=listener)
        except Exception as error:
            failure = error
        yield Outcome(name=name, seconds=time.perf_counter() - began, results=results, error=failure)


def evaluate_one(name: str, plan: Plan, selection: Selection, draws: int, **settings: Any) -> list[Result[Any]]:
    """Run one of them."""
    kind = registry.resolve(registry.EVALUATIONS[name].kind)
    options = kind.options_kind(**({"draws": draws} if "draws" in kind.options_kind.model_fields else {}))
    return evaluate_plan(kind, plan, selection, options, **settings)
