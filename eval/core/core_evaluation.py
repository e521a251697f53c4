"""`hsae eval core`: all SAEs of a hook share one pass, and what is there already is read back."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from hsae.cache.reading.store import ActivationStore
from hsae.eval.core.core import CoreOptions, check, evaluate
from hsae.eval.core.core_result import CoreResult, as_json, core_result_of, read_core_file
from hsae.eval.harness.evaluation import Evaluation, Result, store_inputs
from hsae.eval.harness.saebench_file import write_envelope
from hsae.eval.harness.tables import Cell, Table, interval_cell
from hsae.eval.harness.targets import Target
from hsae.train.config.plan import Plan
from hsae.train.run_record import check_same_model

ALL_TOKENS = "all-tokens"  # in the names of results with the residual of special tokens replaced too
COLUMNS = {"CE score": "ce_loss_score", "KL score": "kl_div_score", "EV": "explained_variance", "L0": "l0"}


class Core(Evaluation[ActivationStore, Target]):
    """SAEBench's core metrics, and corrected ones with intervals, from the evaluation store."""

    name = "core"
    options_kind = CoreOptions
    shares_passes = True
    reads_splits = ("eval",)
    headlines: ClassVar[dict[str, str]] = COLUMNS

    @classmethod
    def open_store(cls, plan: Plan) -> ActivationStore:
        """The evaluation store."""
        return ActivationStore.of(plan.store("eval"), plan.cache.dir)

    def check(self, target: Target) -> None:
        """Refuse an SAE that does not belong to the store. Raises UserError."""
        check([target.view], self.store, None, target.hook)
        check_same_model(target.run_dir, self.store)

    def inputs(self, target: Target) -> dict[str, Any]:
        """All that a result depends on."""
        settings = {"exclude_special_tokens": not self.options.all_tokens}
        return {**target.inputs, **store_inputs(self.store), **settings}

    @property
    def variant(self) -> tuple[str, ...]:
        """A part of the file name with `all_tokens`."""
        return (ALL_TOKENS,) if self.options.all_tokens else ()

    def read(self, path: Path) -> tuple[dict[str, Any], Mapping[str, Any]]:
        """A result file's content, and what it was made of. Raises UserError if it is missing or damaged."""
        return read_core_file(path)

    def write(self, path: Path, content: dict[str, Any]) -> Path:
        """Write a result file, atomically and with its checksum."""
        return write_envelope(path, content)

    def measure(self, target: Target) -> dict[str, Any]:
        """The result of one SAE."""
        return next(self.measure_all([target]))

    def measure_all(self, targets: Sequence[Target]) -> Iterator[dict[str, Any]]:
        """The results in order, from one pass for each hook."""
        if not targets:
            return
        language = self.load_language_model()
        results: dict[int, dict[str, Any]] = {}
        for hook in dict.fromkeys(target.hook for target in targets):
            group = [index for index, target in enumerate(targets) if target.hook == hook]
            measured = evaluate(
                [targets[index].view for index in group],
                self.store,
                language,
                hook=hook,
                options=self.options,
                listener=self.listener,
                device=self.device,
            )
            for index, result in zip(group, measured, strict=True):
                target = targets[index]
                result = replace(result, hsae={**(result.hsae or {}), "inputs": self.inputs(target)})
                results[index] = as_json(result, release=target.release, sae_id=target.sae_id)
        yield from (results[index] for index in range(len(targets)))

    def title(self, results: Sequence[Result[Target]]) -> str:
        """Title of the table."""
        title = (
            "core, as SAEBench computes it"
            if self.options.faithful
            else "core, corrected; ± spans the 95 % interval over rows"
        )
        return title + ("; residual of special tokens replaced too" if self.options.all_tokens else "")

    def tables(self, results: Sequence[Result[Target]]) -> list[Table]:
        """The headline numbers, and which share of the latents is alive."""
        table = Table(self.title(results), ("SAE", *COLUMNS, "alive"))
        for item in results:
            result = core_result_of(item.content)
            dead = result.measure("dead_fraction")
            alive = "-" if dead is None or dead.value is None else f"{1 - dead.value:.0%}"
            cells = [self._cell(result, name, 1 if name == "l0" else 3) for name in COLUMNS.values()]
            table.add(item.label, *cells, alive, is_doubtful=result.dead)
        return [table]

    def _cell(self, result: CoreResult, name: str, digits: int) -> Cell:
        if self.options.faithful:
            value = result.metric(name)
            return "NaN" if value is None else f"{value:.{digits}f}"
        measure = result.measure(name)
        return "undefined" if measure is None else interval_cell(measure.value, measure.low, measure.high, digits)

    def notes(self, results: Sequence[Result[Target]]) -> list[str]:
        """The store's name."""
        return [f"on {self.store.spec.name}"]

    def warnings(self, results: Sequence[Result[Target]]) -> list[str]:
        """What is to be known of SAEs that are dead."""
        parsed = [(item.label, core_result_of(item.content)) for item in results]
        return [f"{label}: {' '.join(result.notes)}" for label, result in parsed if result.dead]

    def finish(self, results: Sequence[Result[Target]]) -> None:
        """With `legacy`, write every result as SAEBench up to 0.1 did, too."""
        if not self.options.legacy:
            return
        for item in results:
            names = {"release": item.target.release, "sae_id": item.target.sae_id}
            content = as_json(core_result_of(item.content), **names, layout="legacy")
            write_envelope(item.target.folder / "legacy" / item.path.name, content)
