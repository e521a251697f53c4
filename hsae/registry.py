"""What can be added to hsae by one line: evaluations, and tables of the plan.

Everything is named as `module:object` and imported when it is first used, so nothing here costs time or depends on what it names.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Entry:
    """An evaluation: `hsae eval NAME`."""

    kind: str
    """Its class."""
    summary: str
    """A line of help."""
    is_in_all: bool = True
    """Whether `hsae eval all` runs it."""


EVALUATIONS: dict[str, Entry] = {
    "core": Entry(
        "hsae.eval.core.core_evaluation:Core",
        "SAEBench's core metrics, and corrected ones with intervals, from the evaluation store.",
    ),
    "sparse-probing": Entry(
        "hsae.eval.probing.evaluations:SparseProbing",
        "How much of a labelled class a few latents tell (SAEBench's sparse probing).",
    ),
    "scr": Entry(
        "hsae.eval.probing.evaluations:SCR",
        "Whether ablating a few latents removes a spurious correlation (SAEBench's SCR).",
    ),
    "tpp": Entry(
        "hsae.eval.probing.evaluations:TPP",
        "Whether ablating a few latents hurts one class's probe and no other (SAEBench's TPP).",
    ),
    "absorption": Entry(
        "hsae.eval.probing.evaluations:Absorption",
        "Whether a letter's latents stay silent where others speak for it (SAEBench's absorption).",
    ),
    "ravel": Entry(
        "hsae.eval.ravel.ravel_runs:Ravel",
        "Whether exchanging a few latents changes one attribute of an entity and no other (SAEBench's RAVEL).",
    ),
    "composition": Entry(
        "hsae.eval.hierarchy.composition_evaluation:Composition",
        "How a run's levels are composed of each other, beside what chance gives, and its known failures by name.",
        is_in_all=False,
    ),
    "stability": Entry(
        "hsae.eval.hierarchy.stability_evaluation:Stability",
        "How alike a run's seeds are: latents matched one to one, and the edges between them, beside what chance gives.",
        is_in_all=False,
    ),
}
"""Name -> evaluation, in the order in which `hsae eval all` runs them."""


@dataclass(frozen=True)
class Table:
    """A table of the plan that belongs to an evaluation."""

    kind: str
    """The pydantic model that checks it."""
    splits: tuple[str, ...] = ()
    """Activation stores that it describes, beside `train` and `eval`: its model has a method `spec(split, ...)` for them."""


TABLES: dict[str, Table] = {
    "suite": Table("hsae.cache.suites.specs:SuiteConfig"),
    "unlearning": Table("hsae.eval.unlearning.config:UnlearningConfig", splits=("forget", "retain")),
    "ravel": Table("hsae.eval.ravel.config:RavelConfig"),
    "autointerp": Table("hsae.eval.autointerp.config:AutointerpConfig", splits=("autointerp",)),
}
"""Name of the table, such as `unlearning` -> what it is."""


def resolve(name: str) -> Any:
    """The object that `module:object` names."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)
