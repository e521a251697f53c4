"""What the report says of one run."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hsae.cache.errors import UserError
from hsae.cache.format.spec import StoreSpec
from hsae.cache.reading.store import ActivationStore
from hsae.eval import figures
from hsae.eval.core.core_result import CoreResult, read_core
from hsae.eval.core.current import Current, interchangeable
from hsae.eval.harness.targets import model_digest
from hsae.eval.report import tables
from hsae.eval.report.cards import LatentCard, cards_of
from hsae.eval.report.composed import composed_of
from hsae.eval.report.tables import LevelLine, Row
from hsae.eval.unlearning import pareto
from hsae.train.model.hierarchical_sae import HierarchicalSAE
from hsae.train.model.model_files import load_model
from hsae.train.run_record import check_same_model
from hsae.train.runs.metrics_log import damaged_metrics, read_metrics

MOST_WARNINGS = 12


@dataclass(frozen=True, kw_only=True)
class Material:
    """What the report may use beside the runs."""

    specs: Mapping[str, StoreSpec]
    """Of the plan's stores `eval`, `forget` and `retain`, which need not be there: results of others are left out."""
    store: ActivationStore | None = None
    """The evaluation store, and the language model's tokenizer, for contexts."""
    tokenizer: Any = None

    @property
    def current(self) -> Current | None:
        """What results of the plan are made of; None if that is not known."""
        spec = self.specs.get("eval") or (self.store.spec if self.store is not None else None)
        return None if spec is None else Current.of(spec, self.store)

    @property
    def texts(self) -> dict[str, frozenset[str]]:
        """Fingerprints of the stores of unlearning, by side."""
        return {side: interchangeable(spec) for side, spec in self.specs.items() if side != "eval"}


class RunSection:
    """A run: its record, its evaluated views, what the page shows of it. What is missing or damaged is named."""

    def __init__(self, run_dir: Path, info: dict[str, Any], material: Material) -> None:
        self.info, self.log = info, read_metrics(run_dir)
        self.model, harm = _model(run_dir)
        weights = _weights(run_dir)
        self.rows, self.left_out = _rows(run_dir, self.label, weights, material.current)
        self.composed = composed_of(run_dir, self.model, material.current)
        self.unlearned, wrong = pareto.picture(run_dir / "eval" / "unlearning.json", weights, material.texts)
        self.cards: list[LatentCard] = []
        missing = [*self.left_out]
        if not self.is_measured:
            missing.append("no training metrics")
        if harmed := damaged_metrics(run_dir):
            missing.append(f"damaged lines of metrics.jsonl, left out: {', '.join(map(str, harmed))}")
        if self.model is None:
            missing.append(harm if info.get("complete") else "no trained model: the run was not finished")
        if not self.rows:
            missing.append(f"no core evaluation {'of this store ' if self.left_out else ''}yet; run `hsae eval core`")
        missing += [*self.composed.missing, *([] if wrong is None else [wrong])]
        if self.model is not None:
            try:
                self.cards = _cards(run_dir, info, self.model, material)
            except UserError as error:
                missing.append(f"no contexts: {error}")
        self.missing = missing

    @property
    def label(self) -> str:
        """`3 full`."""
        return f"{self.info['number']} {self.info['name']}"

    @property
    def about(self) -> str:
        """The run's configuration in a line."""
        config = self.info["config"]
        curriculum, mode = config["curriculum"], config["composition"]["mode"]
        parts = [
            f"{config['structure']}, {config['activation']}",
            f"{' + '.join(f'{width:,}' for width in config['widths'])} latents",
            f"target L0 {' + '.join(f'{l0:g}' for l0 in config['l0'])}",
        ]
        if len(config["widths"]) > 1:
            parts.append("no composition loss" if mode == "none" else f"composition {mode}")
            named = curriculum if isinstance(curriculum, str) else "of its own"
            parts.append("no curriculum" if named == "none" else f"curriculum {named}")
        return "; ".join(parts)

    @property
    def is_measured(self) -> bool:
        """Whether there are training metrics."""
        return any(line["kind"] == "metrics" for line in self.log)

    @property
    def stages(self) -> list[str]:
        """The stages of the curriculum, with their thousands of tokens."""
        ends = figures.stage_ends(self.log) if self.is_measured else []
        return [f"{name} ({start:,.0f}–{end:,.0f}k)" for name, start, end in ends]

    @cached_property
    def curves(self) -> str | None:
        """The training curves as SVG."""
        return figures.training_curves(self.log) if self.is_measured else None

    @property
    def warnings(self) -> list[str]:
        """What went wrong in training."""
        return [f"step {line['step']}: {line['message']}" for line in self.log if line["kind"] == "warning"]

    @property
    def levels(self) -> list[LevelLine]:
        """What each level is worth; nothing of a run with one."""
        config = self.info["config"]
        if len(config["widths"]) == 1:
            return []
        return tables.levels(self.rows, config["structure"], config["widths"], self.log)


def _model(run_dir: Path) -> tuple[HierarchicalSAE | None, str]:
    """The trained model, or why there is none to show."""
    try:
        return load_model(run_dir / "model"), ""
    except UserError as error:
        return None, str(error)


def _weights(run_dir: Path) -> str | None:
    """The digest of the trained model; None if a file of it is missing."""
    try:
        return model_digest(run_dir / "model")
    except UserError:
        return None


def _rows(run_dir: Path, run: str, weights: str | None, current: Current | None) -> tuple[list[Row], list[str]]:
    """A row for each evaluated view of a run, in the order whole, level 1, level 2, ...; and what was left out."""
    results: dict[str, CoreResult] = {}
    left_out: list[str] = []
    for path in sorted((run_dir / "eval" / "core").glob("*_eval_results.json")):
        try:
            result = read_core(path)
        except UserError as error:
            left_out.append(str(error))
            continue
        inputs = result.inputs
        if weights is not None and inputs.get("sae") not in (None, weights):
            left_out.append(f"{path.name} is of another model than the one here; run `hsae eval core --force`")
        elif current is not None and (reason := current.why_not(inputs)) is not None:
            left_out.append(f"{path.name} is {reason}; left out")
        elif result.name in results:
            left_out.append(f"{path.name} is a second result of {result.name}; left out")
        else:
            results[result.name] = result
    return [_row(run, name, results[name]) for name in sorted(results, key=_whole_first)], left_out


def _row(run: str, view: str, result: CoreResult) -> Row:
    notes = result.notes if result.dead or any("negative" in note for note in result.notes) else []
    return Row(run=run, view=view, latents=len(result.details) or None, result=result, notes=notes)


def _whole_first(view: str) -> tuple[bool, list[int], str]:
    return view != "sae", [int(digits) for digits in re.findall(r"\d+", view)], view


def _cards(run_dir: Path, info: Mapping[str, Any], model: HierarchicalSAE, material: Material) -> list[LatentCard]:
    """Latents in context. Raises UserError if they can't be shown."""
    store, tokenizer = material.store, material.tokenizer
    if store is None or tokenizer is None:
        raise UserError("the evaluation store or the tokenizer is not there")
    if info["hook"] not in store.spec.hooks or store.header.d_model != info["d_in"]:
        raise UserError("the evaluation store is one of another hook or width")
    check_same_model(run_dir, store)
    return cards_of(model, store, info["hook"], tokenizer)
