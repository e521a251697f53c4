"""`hsae eval composition`: the hierarchy measures of trained runs, and their known failures by name.

Measures are used again while what they are made of is the same. What they say of other results (CE scores from core,
the flat run that is compared with) is made anew each time.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import Field

from hsae.cache.errors import StoreError, UserError
from hsae.cache.reading.store import ActivationStore
from hsae.eval.core.current import Current, core_results
from hsae.eval.harness.estimates import Estimate
from hsae.eval.harness.evaluation import Result, cached_method, check_target, store_inputs
from hsae.eval.harness.options import Options
from hsae.eval.harness.run_evaluation import RunEvaluation
from hsae.eval.harness.tables import Cell, Table, interval_cell, spread_cell
from hsae.eval.harness.targets import RunTarget
from hsae.eval.hierarchy.composition import SETTINGS, evaluate_composition
from hsae.eval.hierarchy.composition_file import FILE, FORMAT, maps_digest, read_composition, read_maps, write_maps
from hsae.eval.hierarchy.composition_result import CompositionResult, Measured, PairResult
from hsae.eval.hierarchy.failures import find_failures
from hsae.train.config.plan import Plan
from hsae.train.model.hierarchical_sae import STRUCTURES
from hsae.train.runs.metrics_log import read_metrics
from hsae.train.runs.run_directory import is_complete

RECONSTRUCTION_ROWS = "reconstruction rows"
"""What maps are read on where there is no training store, in a result's inputs."""


class CompositionOptions(Options):
    """Options of `hsae eval composition`."""

    compare: str | None = Field(
        default=None,
        description="The flat run a hierarchy must not fall behind; default the first trained of the same activation.",
        json_schema_extra={"metavar": "RUN"},
    )


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The stores of an evaluation; `fit` is the training store, on which maps are read, where it is there and whole."""

    evaluation: ActivationStore
    fit: ActivationStore | None
    why_not_fit: str = ""
    """Why there is no training store, if there is none."""

    @classmethod
    def of(cls, plan: Plan) -> "Sources":
        """The plan's stores. Raises StoreError if there is no evaluation store, or one that can't be trusted."""
        evaluation, fit, why_not = (
            ActivationStore.of(plan.store("eval"), plan.cache.dir),
            None,
            "no training store here",
        )
        if plan.store_path("train").is_dir():
            try:
                fit = ActivationStore.of(plan.store("train"), plan.cache.dir)
            except StoreError as error:
                why_not = f"the training store can't be used: {error}"
        return cls(evaluation=evaluation, fit=fit, why_not_fit=why_not)


class Composition(RunEvaluation[Sources]):
    """How a run's levels are composed of each other."""

    name, file = "composition", FILE.name
    options_kind = CompositionOptions

    @classmethod
    def open_store(cls, plan: Plan) -> Sources:
        """The evaluation store, and the training store where it is there."""
        return Sources.of(plan)

    def check(self, target: RunTarget) -> None:
        """Refuse runs of another model than the stores', and what can't be compared with. Raises UserError."""
        self._check_model(target)
        if (flat := self._named_flat(target)) is not None:
            self._check_model(flat)

    def _check_model(self, target: RunTarget) -> None:
        for store in (self.store.evaluation, self.store.fit):
            if store is not None:
                check_target(target, store)

    def inputs(self, target: RunTarget) -> dict[str, Any]:
        """All that measures made now depend on."""
        return self._inputs(target, self._texts(target)[-1])

    def _inputs(self, target: RunTarget, read_from: str | None) -> dict[str, Any]:
        stores = store_inputs(self.store.evaluation)
        return {**target.inputs, **stores, "read_from": read_from, "settings": SETTINGS}

    def _texts(self, target: RunTarget) -> list[str | None]:
        """What maps that count may have been read on; the last is what they are read on now."""
        if target.config.levels == 1:
            return [None]
        if self.store.fit is not None:
            return [self.store.fit.spec.fingerprint]
        return [target.plan.store("train").fingerprint, RECONSTRUCTION_ROWS]

    def is_current(self, target: RunTarget, content: dict[str, Any]) -> bool:
        """Whether measures and maps that lie there are whole and made of the same inputs."""
        accepted = (self._inputs(target, text) for text in self._texts(target))
        is_whole = read_composition(target.run_dir) is not None and read_maps(target.run_dir) is not None
        return is_whole and content["inputs"] in accepted

    def measure(self, target: RunTarget) -> dict[str, Any]:
        """The measures of a run; its maps are written."""
        has_levels = target.config.levels > 1
        if has_levels and self.store.fit is None:
            self._warn_of_fit()

        def progress(phase: str, done: int, total: int) -> None:
            self.listener.status(f"{self.name}: {target.label}: {phase}, batch {done} of {total}")

        result, maps = evaluate_composition(
            target.load(),
            self.store.evaluation,
            target.hook,
            fit_store=self.store.fit if has_levels else None,
            device=self.device,
            progress=progress,
        )
        write_maps(target.run_dir, maps)
        digest = maps_digest(target.run_dir)
        return {"format": FORMAT, "inputs": self.inputs(target), "result": result.model_dump(), "maps": digest}

    @cached_method
    def _warn_of_fit(self) -> None:
        """Say once that there is no training store."""
        self.listener.warn(f"{self.store.why_not_fit}; maps are read on the evaluation store's {RECONSTRUCTION_ROWS}")

    def complete(self, target: RunTarget, content: dict[str, Any]) -> dict[str, Any]:
        """The measures with CE scores from core, and the known failures that they show."""
        config, measured = target.config, CompositionResult.model_validate(content["result"])
        result = self._with_ce_scores(target, content["inputs"]["sae"], measured)
        flat = (self._named_flat(target) or self._flat_like(target)) if len(result.levels) > 1 else None
        comparison = (flat.label, self._measures(flat).levels[0].explained_variance) if flat is not None else None
        verdict = find_failures(result, config, read_metrics(target.run_dir), comparison)
        return {
            "format": FORMAT,
            "inputs": content["inputs"],
            "run": {"number": config.number, "name": config.name, "label": target.label},
            "compared": flat.label if flat is not None else None,
            "failures": [asdict(failure) for failure in verdict.failures],
            "unchecked": verdict.unchecked,
            "result": result.model_dump(),
            "maps": maps_digest(target.run_dir),
        }

    def _with_ce_scores(self, target: RunTarget, weights: str, result: CompositionResult) -> CompositionResult:
        """The measures with the CE scores of core, where a view of this very model reads exactly the levels >= l."""
        store, view_from = self.store.evaluation, STRUCTURES[result.structure].view_from
        by_view = core_results(target.run_dir, weights, Current.of(store.spec, store))
        levels = []
        for level in result.levels:
            core = by_view.get(view_from(level.level, len(result.levels)))
            score = core.measure("ce_loss_score") if core is not None else None
            levels.append(level.model_copy(update={"ce_loss_score": score or Estimate(None)}))
        return result.model_copy(update={"levels": levels})

    def _measures(self, target: RunTarget) -> CompositionResult:
        """The measures of a run that is compared with, made if they are not there."""
        place = self.find(target)
        if (content := place.content) is None:
            content = self.measure(target)
            self.write(place.path, content)
        return CompositionResult.model_validate(content["result"])

    def _named_flat(self, target: RunTarget) -> RunTarget | None:
        """The run of `--compare`, of the same seed. Raises UserError if it is none without levels, or not trained."""
        if (named := self.options.compare) is None:
            return None
        runs = target.plan.select(named)
        if len(runs) != 1 or runs[0].levels != 1:
            raise UserError(f"--compare {named}: name one run without levels (structure flat)")
        return RunTarget.of(target.plan, runs[0])

    def _flat_like(self, target: RunTarget) -> RunTarget | None:
        """The first trained run without levels, with the same activation, and of the stores' model."""
        for config in target.plan.runs.values():
            is_alike = config.levels == 1 and config.activation == target.config.activation
            if is_alike and is_complete(target.plan, config):
                flat = RunTarget(plan=target.plan, config=config)
                with suppress(UserError):
                    self._check_model(flat)
                    return flat
        return None

    # --- what people see ---------------------------------------------------------------------------------------------

    def tables(self, results: Sequence[Result[RunTarget]]) -> list[Table]:
        """Of each run a table of its levels, and one of each map beside its nulls."""
        return [table for result in results for table in _tables(result.label, result.content)]

    def warnings(self, results: Sequence[Result[RunTarget]]) -> list[str]:
        """The known failures."""
        return [f"run {item.label}: {failure['text']}" for item in results for failure in item.content["failures"]]


def _tables(label: str, content: dict[str, Any]) -> list[Table]:
    """The tables of one run; below the last one the failures that were not looked for."""
    result = CompositionResult.model_validate(content["result"])
    maps = [_pair_table(label, pair, name) for pair in result.pairs for name in pair.readings]
    tables = [_level_table(label, result), *maps]
    below = tables[-1].notes
    if len(result.levels) == 1:
        below.append("one level: there is nothing to compose")
        return tables
    if not content["failures"]:
        below.append("no known failure")
    for reason in dict.fromkeys(content["unchecked"].values()):
        names = [name for name, why in content["unchecked"].items() if why == reason]
        below.append(f"not looked for: {', '.join(names)} ({reason})")
    return tables


def _level_table(label: str, result: CompositionResult) -> Table:
    worth = "this level and all coarser ones" if STRUCTURES[result.structure].is_nested else "decoded from this level"
    columns = ("level", "latents", "L0", "silent", "EV", "CE score")
    table = Table(f"run {label}: levels; EV and CE score: {worth}", columns)
    for level in reversed(result.levels):
        ce = "no result" if level.ce_loss_score.value is None else _cell(level.ce_loss_score)
        table.add(
            str(level.level),
            str(level.latents),
            _cell(level.l0),
            f"{level.silent:.1%}",
            _cell(level.explained_variance),
            ce,
        )
    for pair in result.pairs:
        table.notes.extend(f"{name} map of level {pair.level}: none, {why}" for name, why in pair.reasons.items())
    return table


def _pair_table(label: str, pair: PairResult, name: str) -> Table:
    levels = f"level {pair.level} ({pair.coarse}) of level {pair.level - 1} ({pair.alive_fine} of {pair.fine} alive)"
    columns = ("measure", "value", "permuted", "z", "random", "z")
    table = Table(f"run {label}: {levels}, {name} map", columns)
    for key, entry in pair.readings[name].measures.items():
        measure = key.replace("_", " ")
        table.add(measure, _cell(entry), *_null_cells(entry, "permuted"), *_null_cells(entry, "random"))
        if entry.reason is not None:
            table.notes.append(f"{measure} is undefined: {entry.reason}")
    return table


def _cell(estimate: Estimate | Measured) -> Cell:
    return interval_cell(estimate.value, estimate.low, estimate.high, digits=None)


def _null_cells(entry: Measured, name: str) -> tuple[Cell, Cell]:
    """Mean and standard deviation of a null's draws, and z."""
    if (null := entry.nulls.get(name)) is None:
        return "", ""
    return spread_cell(null.mean, null.sd), "" if null.z is None else f"{null.z:+.1f}"
