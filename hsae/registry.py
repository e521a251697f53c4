"""What can be added to hsae by one line: evaluations, tables of the plan, activations and losses.

Everything is named as `module:object` and imported when it is first used, so nothing here costs time or depends on what
it names. What is added at run time may be given itself.
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
    "unlearning": Entry(
        "hsae.eval.unlearning.unlearning_evaluation:Unlearning",
        "Make the model forget one text and keep another by clamping latents; every way of choosing them side by side.",
    ),
    "autointerp": Entry(
        "hsae.eval.autointerp.autointerp_evaluation:Autointerp",
        "Let a chat model explain latents and predict from that where they are active (SAEBench's autointerp).",
        is_in_all=False,
    ),
    "composition": Entry(
        "hsae.eval.hierarchy.composition_evaluation:Composition",
        "How a run's levels are composed of each other, beside what chance gives, and its known failures by name.",
        is_in_all=False,
    ),
    "stability": Entry(
        "hsae.eval.hierarchy.stability_evaluation:Stability",
        "How alike a run's seeds are: latents matched one to one, and the edges between them, beside what chance "
        "gives.",
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
    """Activation stores that it describes, beside `train` and `eval`: its model has a method `spec(split, ...)` for
    them.
    """


TABLES: dict[str, Table] = {
    "suite": Table("hsae.cache.suites.specs:SuiteConfig"),
    "unlearning": Table("hsae.eval.unlearning.config:UnlearningConfig", splits=("forget", "retain")),
    "ravel": Table("hsae.eval.ravel.config:RavelConfig"),
    "autointerp": Table("hsae.eval.autointerp.config:AutointerpConfig", splits=("autointerp",)),
}
"""Name of the table, such as `unlearning` -> what it is."""


@dataclass(frozen=True)
class Activation:
    """What stands between an encoder and a decoder: the `activation` of a run."""

    kind: Any
    """Its subclass of `Level`."""
    is_flat_only: bool = False
    """Whether it is for runs with one level."""
    needs_whole_l0: bool = False
    """Whether a level's `l0` must be a whole number."""


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation("hsae.train.model.levels:ReLULevel"),
    "topk": Activation("hsae.train.model.levels:TopKLevel", needs_whole_l0=True),
    "batchtopk": Activation("hsae.train.model.levels:BatchTopKLevel"),
    "jumprelu": Activation("hsae.train.model.levels:JumpReLULevel"),
    "gated": Activation("hsae.train.model.levels:GatedLevel", is_flat_only=True),
}


@dataclass(frozen=True)
class Loss:
    """A loss of one level in one step of training."""

    function: Any
    """Takes a `LevelStep`; returns a scalar, or None where it does not apply."""
    is_standard: bool = False
    """Whether it is part of every run; others are those that the `losses` of a run give a weight."""


LOSSES: dict[str, Loss] = {
    "reconstruction": Loss("hsae.train.training.training_losses:reconstruction", is_standard=True),
    "code": Loss("hsae.train.training.training_losses:code", is_standard=True),
    "sparsity": Loss("hsae.train.training.training_losses:sparsity", is_standard=True),
    "gate": Loss("hsae.train.training.training_losses:gate", is_standard=True),
    "auxiliary": Loss("hsae.train.training.training_losses:auxiliary", is_standard=True),
}
"""Name -> loss, in the order in which they are added up; metrics.jsonl names them with their level, such as `code2`."""


def resolve(name: Any) -> Any:
    """The object that `module:object` names, or what was given instead of a name."""
    if not isinstance(name, str):
        return name
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)
