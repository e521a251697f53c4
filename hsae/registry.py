"""What can be added to hsae by one line: evaluations, and tables of the plan.

Everything is named as `module:object` and imported when it is first used, so nothing here costs time or depends on what it names.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

EVALUATIONS: dict[str, str] = {}
"""`hsae eval NAME` -> the class of the evaluation."""


@dataclass(frozen=True)
class Table:
    """A table of the plan that belongs to an evaluation."""

    kind: str
    """The pydantic model that checks it."""
    splits: tuple[str, ...] = ()
    """Activation stores that it describes, beside `train` and `eval`: its model has a method `spec(split, ...)` for them."""


TABLES: dict[str, Table] = {
    "suite": Table("hsae.cache.suites.suite_spec:SuiteConfig"),
    "unlearning": Table("hsae.eval.unlearning.config:UnlearningConfig", splits=("forget", "retain")),
    "ravel": Table("hsae.eval.ravel.config:RavelConfig"),
    "autointerp": Table("hsae.eval.autointerp.config:AutointerpConfig", splits=("autointerp",)),
}
"""Name of the table, such as `unlearning` -> what it is."""


def resolve(name: str) -> Any:
    """The object that `module:object` names."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)
