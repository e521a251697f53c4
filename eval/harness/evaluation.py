"""What an evaluation is, and how one is run: what every evaluation shares exists here once.

An evaluation is a subclass of `Evaluation` and a line in `hsae/registry.py`. It says what it needs from the cache (`open_store`), what
a result depends on (`inputs`), and how one target is measured (`measure`). Finding results that are there already, refusing targets
before compute, writing, tables, notes and the command `hsae eval NAME` follow from that.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from hsae import registry
from hsae.cache.device import pick_device
from hsae.cache.errors import UserError, need
from hsae.cache.format.spec import Config, Split
from hsae.cache.language_model.lm import LanguageModel, pinned
from hsae.eval.harness.envelope import write_result
from hsae.eval.harness.estimates import Estimate, differ_by_noise_only
from hsae.eval.harness.fits import check_fits
from hsae.eval.harness.listener import SILENT, Listener
from hsae.eval.harness.result_files import describe_changes
from hsae.eval.harness.tables import Cell, Table, interval_cell
from hsae.eval.harness.targets import Found, Selection, Target, select_targets
from hsae.train.config.plan import Plan
from hsae.train.model.trained_model import TrainedModel
from hsae.train.model.views import View
from hsae.train.runs.run_record import check_same_model

StoreT = TypeVar("StoreT")
TargetT = TypeVar("TargetT", bound=Target)


class Options(BaseModel):
    """What a caller may choose of one evaluation. Each field is an option of its command, its description the option's help."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True, kw_only=True)
class Result(Generic[TargetT]):
    """The result of one target."""

    target: TargetT
    content: dict[str, Any]
    """The result file as JSON."""
    path: Path
    """Where it lies, or would lie if it was not written."""
    is_reused: bool = False
    """Whether it had been there, made of the same inputs."""
    evaluation: "Evaluation[Any, Any]"

    @property
    def label(self) -> str:
        """Short name of what was evaluated."""
        return self.target.label

    @property
    def measures(self) -> dict[str, Estimate]:
        """hsae's measures by name."""
        entries = (self.content.get("hsae") or self.content).get("measures", {})
        return {name: Estimate.of_dict(entry) for name, entry in entries.items()}

    def to_dict(self) -> dict[str, Any]:
        """The whole result, JSON-ready."""
        return self.content

    def table(self) -> Table:
        """The headline numbers, for people: `print(result.table())`."""
        return self.evaluation.tables([self])[0]

    def save(self, folder: Path | str) -> Path:
        """Write the result into a folder under the name that the command line would give it; returns the file."""
        return self.evaluation.write(Path(folder) / self.path.name, self.content)

    def __repr__(self) -> str:
        return f"Result({self.evaluation.name}: {self.label})\n{self.table()}"


class Evaluation(ABC, Generic[StoreT, TargetT]):
    """One evaluation of targets (SAEs, or whole runs) on what the cache holds for it."""

    name: ClassVar[str]
    """`hsae eval NAME`."""
    options_kind: ClassVar[type[Options]] = Options
    config_kind: ClassVar[type[Config] | None] = None
    """Its table of the plan, if it has one."""
    packages: ClassVar[tuple[tuple[str, str, str], ...]] = ()
    """(package, module, extra of hsae that brings it) without which it can't run."""
    headlines: ClassVar[dict[str, str]] = {}
    """Column of the table -> measure; the first measure decides what is said about noise."""
    over: ClassVar[str] = "rows"
    """What intervals are over, in words of the table's title."""
    reads_splits: ClassVar[tuple[Split, ...]] = ()
    """Activation stores that are read: text that they share with the training store is named."""
    shares_passes: ClassVar[bool] = False
    """Whether several targets are measured in one pass."""

    def __init__(
        self,
        store: StoreT,
        options: Options | None = None,
        config: Config | None = None,
        *,
        device: str = "cpu",
        listener: Listener = SILENT,
    ) -> None:
        self.store, self.device, self.listener = store, device, listener
        self.plan: Plan | None = None
        self.options: Any = options or self.options_kind()
        self.config: Any = config if config is not None else (self.config_kind() if self.config_kind else None)

    @classmethod
    def of_plan(
        cls, plan: Plan, options: Options | None = None, *, device: str = "cpu", listener: Listener = SILENT
    ) -> Self:
        """The evaluation as a plan describes it. Raises UserError if what it needs is not there."""
        config = plan.table(cls.config_kind) if cls.config_kind else None
        evaluation = cls(cls.open_store(plan), options, config, device=device, listener=listener)
        evaluation.plan = plan
        return evaluation

    @classmethod
    def folder(cls) -> str:
        """Name of the folder of its results."""
        return cls.name.replace("-", "_")

    # --- what a subclass says ----------------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def open_store(cls, plan: Plan) -> StoreT:
        """Open what it needs from the plan's cache. Raises StoreError, or NotApplicable if it was never built and need not be."""

    @abstractmethod
    def measure(self, target: TargetT) -> dict[str, Any]:
        """The result of one target as JSON."""

    def inputs(self, target: TargetT) -> dict[str, Any]:
        """All that a result depends on."""
        return {**target.inputs, **store_inputs(self.store)}

    def check(self, target: TargetT) -> None:
        """Refuse a target that can't be evaluated. Raises UserError."""
        check_target(target, self.store)

    def measure_all(self, targets: Sequence[TargetT]) -> Iterator[dict[str, Any]]:
        """The results of several targets, in order; one after the other unless a subclass shares passes."""
        for target in targets:
            self.listener.status(f"{self.name}: {target.label}")
            yield self.measure(target)

    def load_language_model(self) -> LanguageModel:
        """The language model that the store was made with, at the same commit."""
        store: Any = self.store
        config = pinned(self.plan.model, self.plan.cache.dir) if self.plan else store.spec.model
        return LanguageModel.load(config, device=self.device)

    @abstractmethod
    def find(self, target: TargetT) -> Found[dict[str, Any]]:
        """Where the target's result belongs, and whether it is there."""

    def write(self, path: Path, content: dict[str, Any]) -> Path:
        """Write a result file, atomically and with its checksum."""
        return write_result(content, path.parent, path.name)

    # --- what people see -----------------------------------------------------------------------------------------------------

    def title(self, results: Sequence[Result[TargetT]]) -> str:
        """Title of the table."""
        return f"{self.name}; ± spans the 95 % interval over {self.over}"

    def tables(self, results: Sequence[Result[TargetT]]) -> list[Table]:
        """Results side by side."""
        table = Table(self.title(results), ("SAE", *self.headlines))
        for result in results:
            table.add(result.label, *(self.cell(result.measures.get(name)) for name in self.headlines.values()))
        return [table]

    def cell(self, measure: Estimate | None) -> Cell:
        """A measure in the table."""
        return "undefined" if measure is None else interval_cell(measure.value, measure.low, measure.high)

    def notes(self, results: Sequence[Result[TargetT]]) -> list[str]:
        """Lines below the table."""
        note = self.noise_note(results)
        return [note] if note else []

    def warnings(self, results: Sequence[Result[TargetT]]) -> list[str]:
        """Lines below the table that people should not overlook."""
        return []

    def finish(self, results: Sequence[Result[TargetT]]) -> None:
        """What is left to do once all results are there."""

    def noise_note(self, results: Sequence[Result[TargetT]]) -> str | None:
        """Which SAEs can't be told from the one with the highest headline measure; None with fewer than two SAEs."""
        name = next(iter(self.headlines.values()))
        values = {result.label: result.measures[name] for result in results if name in result.measures}
        values = {label: measure for label, measure in values.items() if measure.value is not None}
        if len(values) < 2:
            return None
        best = max(values, key=lambda label: float(values[label].value or 0))
        verdicts = {
            label: differ_by_noise_only(values[best], value) for label, value in values.items() if label != best
        }
        text = f"{name}: the highest is {best}"
        if same := [label for label, verdict in verdicts.items() if verdict]:
            text += f"; within noise of it: {', '.join(same)}"
        if apart := [label for label, verdict in verdicts.items() if verdict is False]:
            text += f"; apart from it: {', '.join(apart)}"
        if None in verdicts.values():
            text += "; one draw gives no measure of noise, use --draws 2 or more"
        return text


def check_target(target: Target, store: Any) -> None:
    """Refuse an SAE that does not belong to a store, or was trained on activations of another model. Raises UserError."""
    check_fits(target.view, target.hook, store.header.d_model, store.spec.model.id)
    check_same_model(target.run_dir, store.url, store.header)


def store_inputs(store: Any) -> dict[str, Any]:
    """What results say of the activation store that they were made from."""
    header = store.header
    return {
        "store": store.spec.fingerprint,
        "model": header.model_digest,
        "tokenizer": header.tokenizer_digest,
        "corpus": header.corpus_digest,
    }


def evaluate_targets(
    evaluation: Evaluation[Any, TargetT], targets: Sequence[TargetT], *, force: bool = False
) -> list[Result[TargetT]]:
    """Evaluate targets and write their results; results made of the same inputs are read back unless `force`.

    Every target is checked, and earlier results that give way are named, before anything is computed. Raises UserError for a
    target that can't be evaluated.
    """
    for target in targets:
        evaluation.check(target)
    places = [evaluation.find(target) for target in targets]
    for text in describe_changes(
        [(target.label, place.changed) for target, place in zip(targets, places, strict=True)]
    ):
        evaluation.listener.say(text)
    results: dict[int, Result[TargetT]] = {}

    def reuse(index: int) -> bool:
        content = None if force else evaluation.find(targets[index]).result
        if content is not None:
            results[index] = Result(
                target=targets[index], content=content, path=places[index].path, is_reused=True, evaluation=evaluation
            )
        return content is not None

    missing = [index for index in range(len(targets)) if not reuse(index)]
    for batch in [missing] if evaluation.shares_passes else [[index] for index in missing]:
        left = [index for index in batch if not reuse(index)]  # somebody else may have made it by now
        contents = evaluation.measure_all([targets[index] for index in left])
        for index, content in zip(left, contents, strict=True):
            evaluation.write(places[index].path, content)
            results[index] = Result(
                target=targets[index], content=content, path=places[index].path, evaluation=evaluation
            )
    ordered = [results[index] for index in range(len(targets))]
    evaluation.finish(ordered)
    return ordered


def evaluate_plan(
    kind: type[Evaluation[Any, Any]],
    plan: Plan,
    selection: Selection | None = None,
    options: Options | None = None,
    *,
    force: bool = False,
    device: str = "auto",
    listener: Listener = SILENT,
) -> list[Result[Any]]:
    """Evaluate trained runs of a plan, or SAELens folders, and write the results where the command line does.

    Raises UserError before any compute if something is missing: a package, a store, a run, or an SAE that does not fit.
    """
    check_packages(kind)
    targets = select_targets(plan, selection or Selection(), kind.folder(), listener)
    evaluation = kind.of_plan(plan, options, device=pick_device(device), listener=listener)
    return evaluate_targets(evaluation, targets, force=force)


def check_packages(kind: type[Evaluation[Any, Any]]) -> None:
    """Raise UserError unless the packages of an evaluation are installed."""
    for package, module, extra in kind.packages:
        need(f"the evaluation {kind.name}", package, extra, module)


def evaluate(
    model: TrainedModel | View,
    store: Any,
    evaluation: str = "core",
    *,
    hook: str | None = None,
    device: str = "cpu",
    listener: Listener = SILENT,
    config: Config | None = None,
    **options: Any,
) -> Result[Target]:
    """Evaluate a model in memory; nothing is written until `save` is called on the result.

    `model` is a trained model (all its levels together; of a stack level 1) or one of its views, `store` what the evaluation reads
    (for `core` an evaluation store), `evaluation` a name of `hsae eval`, `options` the options of its command, such as
    `draws=3`. `hook` is needed if the store has several. Raises UserError before any compute if something does not fit.
    """
    if evaluation not in registry.EVALUATIONS:
        raise UserError(f"there is no evaluation {evaluation!r}; there are {', '.join(registry.EVALUATIONS)}")
    kind: type[Evaluation[Any, Any]] = registry.resolve(registry.EVALUATIONS[evaluation].kind)
    check_packages(kind)
    hooks = store.spec.hooks
    if hook is None and len(hooks) != 1:
        raise UserError(f"the store has {len(hooks)} hooks; say hook=..., one of {', '.join(hooks)}")
    view = model if not isinstance(model, TrainedModel) else _whole(model)
    digest = hashlib.sha256()
    for tensor in (view.W_enc, view.W_dec, view.b_enc, view.b_dec):
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    target = Target(
        view=view,
        hook=hook or hooks[0],
        folder=Path("eval_results") / kind.folder(),
        label=view.name,
        release="hsae",
        sae_id=view.name,
        weights_digest=digest.hexdigest(),
    )
    try:
        chosen = kind.options_kind(**options)
    except ValidationError as error:
        first = error.errors()[0]
        given = ".".join(map(str, first["loc"]))
        allowed = ", ".join(kind.options_kind.model_fields) or "none"
        raise UserError(f"{evaluation} has no option {given}: {first['msg']}; its options: {allowed}") from None
    bench = kind(store, chosen, config, device=device, listener=listener)
    bench.check(target)
    return Result(target=target, content=bench.measure(target), path=target.path(), evaluation=bench)


def _whole(model: TrainedModel) -> View:
    """All levels together, or level 1 of a stack."""
    views = model.views()
    return views.get("sae") or views["level1"]
