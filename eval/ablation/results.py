"""Reads the ablation table from the results of core, composition, unlearning and a synthetic tier; computes nothing.

Results of another model, text or store than the plan's have no place in the table. Where the evaluation store is not
there to tell which text is the plan's, all must at least be of the same.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsae.cache.errors import UserError
from hsae.cache.reading.store import ActivationStore
from hsae.cache.storage.paths import place
from hsae.eval.ablation.table import COLUMNS, AblationTable, Cell, Column, Kind, Row
from hsae.eval.ablation.verdicts import COMPONENTS, judge
from hsae.eval.core.current import DIGESTS, Current, core_results, interchangeable
from hsae.eval.harness.result_files import read_result
from hsae.eval.harness.targets import RunTarget
from hsae.eval.hierarchy.composition_file import read_composition
from hsae.eval.unlearning.config import SIDES, UnlearningConfig
from hsae.train.config.plan import Plan
from hsae.train.config.run_config import RunConfig
from hsae.train.model.hierarchical_sae import STRUCTURES

BUDGET = "0.01"
"""Loss on retain, in nats a token, at which unlearning is compared."""
UNLEARNING_FILE = Path("eval") / "unlearning.json"
UNLEARNING_INPUTS = ("model", "tokenizer", "hook", "config", *(f"{side}_corpus" for side in SIDES))
"""Inputs that all results of unlearning share."""
MODELS = "models or evaluation texts"


@dataclass(frozen=True, kw_only=True)
class Number:
    """One number of one run and seed."""

    column: str
    value: float
    null: float | None = None
    map: str = ""
    """The map it is read off, `learned` or `fitted`; empty for numbers of no map."""


def read_table(
    plan: Plan, runs: Sequence[RunConfig], seeds: int, synthetic: Mapping[str, Any] | None = None
) -> AblationTable:
    """The table of these runs over seeds; `synthetic` is the content of a tier's results file.

    Raises UserError if a run isn't trained, or if results of one table are of different texts or settings.
    """
    reader = _Reader(plan, seeds)
    rows = [reader.row(config, synthetic) for config in runs]
    reader.check_inputs()
    judgements, comparisons = judge(COMPONENTS, {row.name: row for row in rows})
    return AblationTable(
        plan=plan.name, seeds=seeds, rows=rows, judgements=judgements, comparisons=comparisons, missing=reader.missing
    )


class _Reader:
    """Reads the rows, and remembers what their results were made of."""

    def __init__(self, plan: Plan, seeds: int) -> None:
        self.plan, self.seeds = plan, seeds
        store = None
        if isinstance(place(plan.cache.dir), Path):
            with suppress(UserError):
                store = ActivationStore.of(plan.store("eval"), plan.cache.dir)
        self.current = Current.of(plan.requested("eval"), store)
        self.missing: list[str] = []
        self.inputs: dict[str, dict[str, tuple[Kind, str]]] = {}
        """Sort of inputs -> their values -> a result that was made of those: its evaluation and its run."""
        self.runs_with: dict[Kind, dict[int, None]] = {}
        """The numbers of the runs that have results of an evaluation."""

    def row(self, config: RunConfig, synthetic: Mapping[str, Any] | None) -> Row:
        """A run's row."""
        numbers = {
            seed: list(self._numbers(RunTarget.of(self.plan.seeded(seed), config))) for seed in range(self.seeds)
        }
        for seed, number in _synthetic(synthetic, config.name):
            numbers.setdefault(seed, []).append(number)
        return Row(
            number=config.number,
            name=config.name,
            cells={column.key: _cell(numbers, column, ("", "learned", "fitted")) for column in COLUMNS},
            compared={column.key: _cell(numbers, column, ("", "fitted")) for column in COLUMNS},
        )

    def _numbers(self, target: RunTarget) -> Iterator[Number]:
        """All numbers of a run of one seed."""
        weights = target.inputs["sae"]
        results = {
            "core": self._core(target, weights),
            "composition": self._composition(target, weights) if target.config.levels > 1 else [],
            "unlearning": self._unlearning(target, weights),
        }
        for kind, numbers in results.items():
            if numbers is not None:
                yield from numbers
            elif kind != "unlearning" or (target.run_dir / UNLEARNING_FILE).is_file():  # it is measured on some runs
                self.missing.append(f"{kind} of {target.label}")

    def _core(self, target: RunTarget, weights: str) -> list[Number] | None:
        view = STRUCTURES[target.config.structure].whole_view
        result = core_results(target.run_dir, weights, self.current).get(view)
        if result is None:
            return None
        self._made_of("core", target, MODELS, *map(result.inputs.get, DIGESTS))
        measures = ((column.key, result.measure(column.key)) for column in _columns("core"))
        return [
            Number(column=key, value=measure.value)
            for key, measure in measures
            if measure is not None and measure.value is not None
        ]

    def _composition(self, target: RunTarget, weights: str) -> list[Number] | None:
        """Hierarchy numbers of the two coarsest levels."""
        content = read_composition(target.run_dir)
        if content is None:
            return None
        inputs = content.inputs
        if inputs.get("sae") != weights or self.current.why_not(inputs) is not None:
            return None
        self._made_of("composition", target, MODELS, *map(inputs.get, DIGESTS))
        read_from = inputs.get("read_from")
        if read_from in interchangeable(target.plan.requested("train")):
            read_from = "training store"
        self._made_of("composition", target, "texts to read maps on, or settings", read_from, inputs.get("settings"))
        numbers = []
        for column in _columns("composition"):
            for name, reading in content.result.pairs[-1].readings.items():
                measure = reading.measures.get(column.key)
                if measure is not None and measure.value is not None:
                    null = measure.nulls.get(column.null or "")
                    mean = None if null is None else null.mean
                    numbers.append(Number(column=column.key, value=measure.value, null=mean, map=name))
        return numbers

    def _unlearning(self, target: RunTarget, weights: str) -> list[Number] | None:
        """Loss on forget text at BUDGET, of the main arm; None unless of the plan's very texts, with its settings."""
        plan = target.plan
        try:
            content = read_result(target.run_dir / UNLEARNING_FILE, "hsae eval unlearning")
            inputs, arms = content["inputs"], content["arms"]
            if inputs["sae"] != weights or inputs["config"] != plan.table(UnlearningConfig).digest:
                return None
            if any(inputs[f"{side}_store"] not in interchangeable(plan.requested(side)) for side in SIDES):
                return None
            main = next(arms[name] for name in ("descend", "sae", "level1") if name in arms)
            value = main["at_retain"][BUDGET]["forget_dce"]
            made_of = [inputs[key] for key in UNLEARNING_INPUTS]
            numbers = [] if value is None else [Number(column="forget_dce", value=float(value))]
        except (ValueError, KeyError, TypeError, StopIteration):
            return None
        self._made_of("unlearning", target, "texts to forget and retain, or settings", *made_of)
        return numbers

    def _made_of(self, kind: Kind, target: RunTarget, sort: str, *values: object) -> None:
        """Remember a result's inputs of one sort; inputs that it says nothing of are not compared."""
        self.runs_with.setdefault(kind, {})[target.config.number] = None
        if any(value is not None for value in values):
            self.inputs.setdefault(sort, {}).setdefault(str(values), (kind, target.label))

    def check_inputs(self) -> None:
        """Raise UserError if two results were made of different inputs."""
        for sort, results in self.inputs.items():
            if len(results) > 1:
                (kind, label), (other_kind, other_label), *_ = results.values()
                commands = (
                    f"hsae eval {each} --run {','.join(map(str, self.runs_with[each]))} --seeds {self.seeds} --force"
                    for each in dict.fromkeys((kind, other_kind))
                )
                raise UserError(
                    f"{kind} of {label} and {other_kind} of {other_label} are of different {sort}, so they can't "
                    f"stand in one table; make them alike with: {' and '.join(commands)}"
                )


def _columns(kind: Kind) -> list[Column]:
    return [column for column in COLUMNS if column.kind == kind]


def _synthetic(content: Mapping[str, Any] | None, name: str) -> Iterator[tuple[int, Number]]:
    """(seed, number) of a run in the results of a synthetic tier."""
    for result in (content or {}).get("arms", {}).get(name, {}).get("seeds", ()):
        for column in _columns("synthetic"):
            if isinstance(value := result.get(column.key), float | int):
                null = result.get(f"{column.key}_{column.null}") if column.null else None
                yield int(result["seed"]), Number(column=column.key, value=float(value), null=null)


def _cell(numbers: Mapping[int, Sequence[Number]], column: Column, maps: Sequence[str]) -> Cell:
    """A column's numbers over seeds, each of the first of `maps` that has one."""
    chosen: dict[int, Number] = {}
    for seed, every in numbers.items():
        candidates = [number for number in every if number.column == column.key and number.map in maps]
        if candidates:
            chosen[seed] = min(candidates, key=lambda number: maps.index(number.map))
    return Cell(
        values=tuple(number.value for number in chosen.values()),
        seeds=tuple(chosen),
        nulls=tuple(number.null for number in chosen.values() if number.null is not None),
        fitted=any(number.map == "fitted" for number in chosen.values()),
    )
