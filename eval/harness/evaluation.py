"""What an evaluation is, and how one is run: what every evaluation shares exists here once.

An evaluation is a subclass of `Evaluation` and a line in `hsae/registry.py`. It says what it needs from the cache
(`open_store`), what a result depends on (`inputs`), and how one target is measured (`measure`). Finding results that
are there already, refusing targets before compute, writing, tables, notes and the command `hsae eval NAME` follow from
that.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

from pydantic import ValidationError

from hsae import registry
from hsae.cache.config import Config, Split, at_commit
from hsae.cache.device import pick_device
from hsae.cache.errors import UserError, need
from hsae.cache.language_model.lm import LanguageModel
from hsae.eval.harness.estimates import Estimate, describe_noise
from hsae.eval.harness.fits import check_fits
from hsae.eval.harness.listener import SILENT, Listener
from hsae.eval.harness.options import OUT, Options
from hsae.eval.harness.result_files import read_result, write_result
from hsae.eval.harness.saebench_file import SaebenchFile, read_measured, write_envelope
from hsae.eval.harness.tables import Cell, Table, interval_cell
from hsae.eval.harness.targets import ResultPlace, RunTarget, Selection, Target, find_result, select_targets
from hsae.train.config.plan import Plan
from hsae.train.model.hierarchical_sae import HierarchicalSAE
from hsae.train.model.views import View
from hsae.train.run_record import check_same_model
from hsae.train.stores import common_texts

StoreT = TypeVar("StoreT")
ValueT = TypeVar("ValueT")
TargetT = TypeVar("TargetT", bound=Target | RunTarget)


def cached_method(method: Callable[..., ValueT]) -> Callable[..., ValueT]:
    """A method whose values are kept by their arguments for as long as the object lives."""

    @wraps(method)
    def cached(self: Any, *arguments: Any) -> ValueT:
        values: dict[Any, ValueT] = self.__dict__.setdefault(f"_values_of_{method.__name__}", {})
        if arguments not in values:
            values[arguments] = method(self, *arguments)
        return values[arguments]

    return cached


@dataclass(frozen=True, kw_only=True)
class Result(Generic[TargetT]):
    """The result of one target."""

    target: TargetT
    content: dict[str, Any]
    """The result file as JSON."""
    path: Path
    """Its file, written or not."""
    is_reused: bool = False
    """Whether an earlier result of the same inputs was read back."""
    evaluation: "Evaluation[Any, Any]"

    @property
    def label(self) -> str:
        """Short name of what was evaluated."""
        return self.target.label

    @property
    def measures(self) -> dict[str, Estimate]:
        """hsae's measures by name."""
        block = self.content.get("hsae")
        entries = (block if isinstance(block, dict) else self.content).get("measures", {})
        return {name: Estimate.of_dict(entry) for name, entry in entries.items()}

    def to_dict(self) -> dict[str, Any]:
        """The whole result, JSON-ready."""
        return self.content

    def tables(self) -> list[Table]:
        """Everything that the command shows; the headline numbers come first."""
        return self.evaluation.tables([self])

    def table(self) -> Table:
        """The headline numbers, for people: `print(result.table())`."""
        return self.tables()[0]

    def save(self, folder: Path | str) -> Path:
        """Write the result into a folder under the name that the command line would give it; returns the file."""
        return self.evaluation.write(Path(folder) / self.path.name, self.content)

    def __repr__(self) -> str:
        return "\n".join([f"Result({self.evaluation.name}: {self.label})", *map(str, self.tables())])


class Evaluation(ABC, Generic[StoreT, TargetT]):
    """One evaluation of targets (SAEs, or whole runs) on what the cache holds for it."""

    name: ClassVar[str]
    """`hsae eval NAME`."""
    options_kind: ClassVar[type[Options]] = Options
    file_kind: ClassVar[type[SaebenchFile] | None] = None
    """SAEBench's file of its results; None for one of hsae's own: an object with `measures` and `inputs`."""
    config_kind: ClassVar[type[Config] | None] = None
    """Its table of the plan, if it has one."""
    headlines: ClassVar[dict[str, str]] = {}
    """Column of the table -> measure; the first measure decides what is said about noise."""
    over: ClassVar[str] = "rows"
    """What intervals are over, as the table's title says it."""
    reads_splits: ClassVar[tuple[Split, ...]] = ()
    """Activation stores that are read: text that they share with the training store is named."""
    shares_passes: ClassVar[bool] = False
    """Whether several targets are measured together, by one call of `measure_all`."""
    without: ClassVar[frozenset[str]] = frozenset()
    """Options that evaluations share and this one lacks; without `sae` it is of trained runs only."""

    def __init__(
        self,
        store: StoreT,
        options: Options | None = None,
        config: Config | None = None,
        *,
        device: str = "cpu",
        listener: Listener = SILENT,
        lm: LanguageModel | None = None,
    ) -> None:
        self.store, self.device, self.listener, self.lm = store, device, listener, lm
        self.options: Any = options or self.options_kind()
        self.config: Any = config if config is not None else (self.config_kind() if self.config_kind else None)

    @classmethod
    def of_plan(
        cls, plan: Plan, options: Options | None = None, *, device: str = "cpu", listener: Listener = SILENT
    ) -> Self:
        """The evaluation as a plan describes it. Raises UserError if what it needs is not there."""
        config = plan.table(cls.config_kind) if cls.config_kind else None
        return cls(cls.open_store(plan), options, config, device=device, listener=listener)

    @classmethod
    def packages(cls, options: Any) -> tuple[tuple[str, str, str], ...]:
        """(package, module, extra of hsae that brings it) without which it can't run."""
        return ()

    @classmethod
    def for_options(cls, options: Any) -> "type[Evaluation[Any, Any]]":
        """The evaluation that options ask for, where several go by one name."""
        return cls

    @classmethod
    def folder(cls) -> str:
        """Name of the folder of its results."""
        return cls.name.replace("-", "_")

    @classmethod
    def select(cls, plan: Plan, selection: Selection, listener: Listener) -> Sequence[Any]:
        """The targets that are selected. Raises UserError if one is not there."""
        return select_targets(plan, selection, cls.folder(), listener)

    # --- what a subclass says --------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def open_store(cls, plan: Plan) -> StoreT:
        """Open what it needs from the plan's cache. Raises StoreError, or NotApplicable if it need not be there."""

    @abstractmethod
    def measure(self, target: TargetT) -> dict[str, Any]:
        """The result of one target as JSON."""

    def inputs(self, target: TargetT) -> dict[str, Any]:
        """All that a result depends on."""
        return {**target.inputs, **store_inputs(self.store)}

    def check(self, target: TargetT) -> None:
        """Refuse a target that can't be evaluated. Raises UserError."""
        check_target(target, self.store)

    def begin(self, targets: Sequence[TargetT]) -> bool:
        """Called once with all that will be measured, before anything is; nothing is evaluated if it returns False."""
        return True

    def measure_all(self, targets: Sequence[TargetT]) -> Iterator[dict[str, Any]]:
        """The results of several targets, in order; one after the other unless a subclass shares passes."""
        for target in targets:
            self.listener.status(f"{self.name}: {target.label}")
            yield self.measure(target)

    def discard(self, target: TargetT) -> None:
        """Throw away what an interrupted measurement left; done with `force`."""

    def complete(self, target: TargetT, content: dict[str, Any]) -> dict[str, Any]:
        """Add to a result what it says of other results; called once all are there, for reused ones too."""
        return content

    def load_language_model(self) -> LanguageModel:
        """The caller's language model, or the one that the store was made with, at the same commit."""
        if self.lm is not None:
            return self.lm
        store: Any = self.store
        config = at_commit(store.spec.model, store.header.model_commit)
        return LanguageModel.load(config, device=self.device, late_tokenizer=True)

    @property
    def variant(self) -> tuple[str, ...]:
        """Parts of a result's file name that the options call for; none for the standard ones."""
        return ()

    def find(self, target: TargetT) -> ResultPlace:
        """Where the target's result belongs, and whether it is there."""
        one: Any = target
        return find_result(one, self.inputs(target), self.read, *self.variant)

    def read(self, path: Path) -> tuple[dict[str, Any], Mapping[str, Any]]:
        """A result file's content, and what it was made of. Raises UserError if it is missing or damaged."""
        if self.file_kind is not None:
            return read_measured(path, self.file_kind, self.name)
        content = read_result(path, f"hsae eval {self.name}")
        return content, content.get("inputs", {})

    def write(self, path: Path, content: dict[str, Any]) -> Path:
        """Write a result file, atomically and with its checksum."""
        return write_result(path, content) if self.file_kind is None else write_envelope(path, content)

    # --- what people see -------------------------------------------------------------------------------------------

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
        """Lines below the table: which SAEs can't be told from the one with the highest headline measure."""
        name = next(iter(self.headlines.values()), "")
        note = describe_noise(name, {item.label: item.measures[name] for item in results if name in item.measures})
        return [note] if note else []

    def warnings(self, results: Sequence[Result[TargetT]]) -> list[str]:
        """Lines below the table that people should not overlook."""
        return []

    def finish(self, results: Sequence[Result[TargetT]]) -> None:
        """Called last, with all results."""


def check_target(target: Target | RunTarget, store: Any) -> None:
    """Refuse an SAE that does not belong to a store, and a run of activations of another model. Raises UserError."""
    if isinstance(target, Target):
        check_fits(target.view, target.hook, store.header.d_model, store.spec.model.id)
    check_same_model(target.run_dir, store)


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

    Every target is checked, and earlier results that give way are named, before anything is computed. Raises UserError
    for a target that can't be evaluated. Returns nothing if the evaluation was not to begin, as in a dry run.
    """
    for target in targets:
        evaluation.check(target)
    places = [evaluation.find(target) for target in targets]
    for change in dict.fromkeys(place.changed for place in places if place.changed):
        labels = (target.label for target, place in zip(targets, places, strict=True) if place.changed == change)
        evaluation.listener.say(f"evaluated anew, with {change}: {', '.join(labels)}")
    contents = {index: place.content for index, place in enumerate(places) if place.content is not None and not force}
    missing = [index for index in range(len(targets)) if index not in contents]
    if not evaluation.begin([targets[index] for index in missing]):
        return []
    measured: set[int] = set()
    for target in targets if force else ():
        evaluation.discard(target)
    for batch in [missing] if evaluation.shares_passes else [[index] for index in missing]:
        if not evaluation.shares_passes and not force:  # somebody else may have made it by now
            (index,) = batch
            if (earlier := evaluation.find(targets[index]).content) is not None:
                contents[index] = earlier
                continue
        for index, content in zip(batch, evaluation.measure_all([targets[index] for index in batch]), strict=True):
            evaluation.write(places[index].path, content)
            contents[index] = content
            measured.add(index)
    for index, target in enumerate(targets):
        content = evaluation.complete(target, contents[index])
        if content is not contents[index]:
            evaluation.write(places[index].path, content)
            contents[index] = content
    results = [
        Result(
            target=target,
            content=contents[index],
            path=places[index].path,
            is_reused=index not in measured,
            evaluation=evaluation,
        )
        for index, target in enumerate(targets)
    ]
    evaluation.finish(results)
    return results


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
    options, selection = options or kind.options_kind(), selection or Selection()
    kind = kind.for_options(options)
    check_packages(kind, options)
    targets = kind.select(plan, selection, listener)
    evaluation = kind.of_plan(plan, options, device=pick_device(device), listener=listener)
    for text in common_texts(plan, kind.reads_splits if not selection.folders else ()):
        listener.warn(text)
    return evaluate_targets(evaluation, targets, force=force)


def check_packages(kind: type[Evaluation[Any, Any]], options: Options) -> None:
    """Raise UserError unless the packages of an evaluation are installed."""
    for package, module, extra in kind.packages(options):
        need(f"the evaluation {kind.name}", package, extra, module)


def choose_options(kind: type[Evaluation[Any, Any]], values: Mapping[str, Any]) -> Options:
    """The options of an evaluation. Raises UserError for one that it lacks, and for values that are impossible."""
    try:
        return kind.options_kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # several options together
            raise UserError(first["msg"].removeprefix("Value error, ")) from None
        name = ".".join(map(str, first["loc"]))
        allowed = ", ".join(kind.options_kind.model_fields) or "none"
        wrong = f"has no option {name}" if first["type"] == "extra_forbidden" else f"option {name}: {first['msg']}"
        raise UserError(f"{kind.name} {wrong}; its options: {allowed}") from None


def evaluate(
    model: View,
    store: Any,
    evaluation: str = "core",
    *,
    hook: str | None = None,
    device: str = "auto",
    listener: Listener = SILENT,
    config: Config | None = None,
    lm: LanguageModel | None = None,
    **options: Any,
) -> Result[Target]:
    """Evaluate a model in memory; nothing is written until `save` is called on the result.

    `model` is a trained model (all its levels together; of a stack level 1) or one of its views, `store` what the
    evaluation reads (for `core` an evaluation store), `evaluation` a name of `hsae eval`, `options` the options of its
    command, such as `draws=3`. `hook` is needed if the store has several. `lm` is the store's language model, which is
    otherwise loaded where it is needed. Raises UserError before any compute if something does not fit.
    """
    if evaluation not in registry.EVALUATIONS:
        raise UserError(f"there is no evaluation {evaluation!r}; there are {', '.join(registry.EVALUATIONS)}")
    kind: type[Evaluation[Any, Any]] = registry.resolve(registry.EVALUATIONS[evaluation].kind)
    chosen = choose_options(kind, options)
    if "sae" in kind.without:
        raise UserError(f"{evaluation} is of trained runs of a plan; run: hsae eval {evaluation} --run N")
    check_packages(kind, chosen)
    hooks = store.spec.hooks
    if (hook is None and len(hooks) != 1) or (hook is not None and hook not in hooks):
        raise UserError(f"the store has {len(hooks)} hooks; say hook=..., one of {', '.join(hooks)}")
    view = model.view(model.whole_view) if isinstance(model, HierarchicalSAE) else model
    digest = hashlib.sha256()
    for name, tensor in sorted(view.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    digest.update(json.dumps(view.config, sort_keys=True, default=str).encode())
    target = Target(
        view=view,
        hook=hook or hooks[0],
        folder=OUT / kind.folder(),
        label=view.name,
        release="hsae",
        sae_id=view.name,
        weights_digest=digest.hexdigest(),
    )
    place = pick_device(device) if lm is None else str(lm.device)
    runner = kind(store, chosen, config, device=place, listener=listener, lm=lm)
    runner.check(target)
    if not runner.begin([target]):
        raise UserError(f"{evaluation} was not to begin (a dry run), so there is no result")
    (content,) = runner.measure_all([target])
    return Result(target=target, content=content, path=target.path(), evaluation=runner)
