"""What `hsae eval core` is asked to evaluate, where each result goes, and whether it is there already."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from hsae.cache.errors import UserError
from hsae.cache.language_model.lm import LanguageModel
from hsae.cache.reading.store import ActivationStore
from hsae.eval.core.core import CoreOptions, Listener, check, evaluate
from hsae.eval.harness.envelope import CoreResult, file_name, hsae_version, read_core, write_core
from hsae.eval.harness.fits import doubts, same_hook
from hsae.eval.harness.result_files import changes
from hsae.train.config.plan import Plan
from hsae.train.config.run_config import RunConfig
from hsae.train.model import saelens_folder
from hsae.train.model.trained_model import CONFIG_FILE, WEIGHTS_FILE, load_model
from hsae.train.model.views import View
from hsae.train.runs.run_directory import is_complete
from hsae.train.runs.run_record import check_same_model, command, read_run, run_of

ResultT = TypeVar("ResultT")
ALL_TOKENS = "all-tokens"  # in the names of results with the residual of special tokens replaced too
KEPT_APART = ("store", "exclude_special_tokens")  # inputs whose results lie side by side
RESULTS = Path("eval")  # in a run directory; each evaluation has a folder in it


@dataclass(frozen=True, kw_only=True)
class Target:
    """One SAE to evaluate."""

    view: View
    hook: str
    folder: Path
    """Where the result goes."""
    label: str
    """Short name for people."""
    release: str
    sae_id: str
    weights_digest: str
    """SHA-256 of the files the SAE was read from."""
    doubts: tuple[str, ...] = ()
    """What a person should know of the SAE before its numbers are believed."""
    run_dir: Path | None = None
    """The run that the SAE belongs to, if it is one of hsae's."""

    def path(self, *apart: str) -> Path:
        """The result file; `apart` is what tells it from the standard result."""
        return self.folder / file_name(self.release, self.sae_id, *apart)

    @property
    def inputs(self) -> dict[str, Any]:
        """What every result of this SAE depends on."""
        return {"hsae": hsae_version(), "sae": self.weights_digest, "view": self.view.name, "hook": self.hook}


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """A target and its result."""

    target: Target
    result: CoreResult
    reused: bool
    """Whether the result had been there."""
    path: Path
    """The result file."""


@dataclass(frozen=True, kw_only=True)
class Found(Generic[ResultT]):
    """Where a result belongs, and the result if it lies there."""

    path: Path
    result: ResultT | None
    changed: str = ""
    """In what the inputs differ from those of the result that gives way, if one does."""


def find(
    target: Target,
    inputs: Mapping[str, Any],
    read: Callable[[Path], tuple[ResultT, Mapping[str, Any]]],
    *apart: str,
) -> Found[ResultT]:
    """Look for a result made of these inputs under SAEBench's name, then under one with its store's name in it.

    `read` gives a file's result and inputs, or raises UserError. A result of another store or other settings, or one that hsae did not
    make, keeps the first name if it has it; what is damaged, or of an earlier state of the same store and SAE, gives way.
    """
    first, own = target.path(*apart), target.path(*apart, str(inputs["store"]))
    path, changed = first, {}
    for place in (first, own):
        try:
            result, held = read(place)
        except UserError:
            continue  # missing or damaged: made anew
        if held == inputs:
            return Found(path=place, result=result)
        changed[place] = changes(inputs, held) if held else ""
        if place == first and (not held or any(held.get(key) != inputs.get(key) for key in KEPT_APART)):
            path = own
    return Found(path=path, result=None, changed=changed.get(path, ""))


def is_trained(plan: Plan, run: RunConfig) -> bool:
    """Whether this very run of the plan has been trained to its end."""
    return is_complete(plan, run)


def need_trained(plan: Plan, run: RunConfig) -> None:
    """Raise UserError unless this very run of the plan has been trained to its end."""
    if not is_trained(plan, run):
        run_dir = plan.run_dir(run)
        raise UserError(
            f"run {run.number} ({run.name}) of plan {plan.name} has not been trained to its end in {run_dir}; "
            f"train it with: {command(run_dir)}"
        )


def whole_view(run: RunConfig) -> str:
    """The view that stands for a run: all levels together, or, in a stack, level 1 (what its other levels account for)."""
    return "level1" if run.structure == "stacked" else "sae"


def run_targets(plan: Plan, run: RunConfig, evaluation: str = "core", *, whole: bool = False) -> list[Target]:
    """Every view of a trained run, or with `whole` the one that stands for it, for one evaluation.

    Raises UserError if it has not been trained, or with another configuration.
    """
    need_trained(plan, run)
    run_dir = plan.run_dir(run)
    held = read_run(run_dir)
    assert held is not None  # it is trained
    model_dir = run_dir / "model"
    return [
        Target(
            view=view,
            hook=plan.hook.names[0],
            folder=run_dir / RESULTS / evaluation,
            label=f"{plan.label(run)} {name}",
            release=f"hsae_{held['plan']}_{run.number}-{run.name}",
            sae_id=name,
            weights_digest=model_digest(model_dir),
            run_dir=run_dir,
        )
        for name, view in load_model(model_dir).views().items()
        if not whole or name == whole_view(run)
    ]


def model_digest(model_dir: Path) -> str:
    """SHA-256 of a trained model's files. Raises UserError if one is missing."""
    try:
        return _digest(model_dir / CONFIG_FILE, model_dir / WEIGHTS_FILE)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing; make it again with: {command(model_dir.parent)}") from None


def folder_targets(plan: Plan, folders: Sequence[Path], out: Path) -> list[Target]:
    """SAEs in SAELens folders; the results go to `out`. Raises UserError if a folder can't be read."""
    targets = []
    short = ["/".join(folder.resolve().parts[-2:]) for folder in folders]
    for folder, label in zip(folders, short, strict=True):
        view = saelens_folder.load(folder)
        made_for = view.metadata.get("hook_name")
        hook = next((hook for hook in plan.hook.names if made_for and same_hook(made_for, hook)), plan.hook.names[0])
        named = folder.resolve() if ".." in folder.parts else folder
        targets.append(
            Target(
                view=view,
                hook=hook,
                folder=out,
                label=label if short.count(label) == 1 else folder.as_posix(),
                release=named.as_posix().strip("./") or folder.resolve().name,
                sae_id="custom_sae",
                weights_digest=_digest(folder / saelens_folder.CONFIG_FILE, folder / saelens_folder.WEIGHTS_FILE),
                doubts=(*view.remarks, *doubts(view, hook, plan.model.id)),
                run_dir=run_of(folder),
            )
        )
    paths = [target.path() for target in targets]
    if doubled := [str(path) for path in paths if paths.count(path) > 1]:
        raise UserError(f"two SAEs would write the same file {doubled[0]}; evaluate them with different --out folders")
    return targets


def evaluate_targets(
    targets: Sequence[Target],
    store: ActivationStore,
    load: Callable[[], LanguageModel],
    *,
    options: CoreOptions,
    force: bool = False,
    listener: Listener | None = None,
    device: str = "cpu",
) -> list[Evaluated]:
    """Evaluate the targets and write their results; results made of the same inputs are read back unless `force`.

    The language model is loaded only if something has to be computed. Raises UserError before any compute.
    """
    for target in targets:
        check([target.view], store, None, target.hook)
        check_same_model(target.run_dir, store.url, store.header)
    apart = () if options.exclude_special_tokens else (ALL_TOKENS,)
    found = [find(target, _inputs(target, store, options), _read, *apart) for target in targets]
    missing = [i for i, held in enumerate(found) if force or held.result is None]
    for i in missing:
        if listener is not None and found[i].changed:
            listener.warning(targets[i].label, f"evaluated anew, with {found[i].changed}")
    computed: dict[int, CoreResult] = {}
    model = load() if missing else None
    for hook in dict.fromkeys(targets[i].hook for i in missing):
        assert model is not None
        group = [i for i in missing if targets[i].hook == hook]
        views = [targets[i].view for i in group]
        results = evaluate(views, store, model, hook=hook, options=options, listener=listener, device=device)
        for i, result in zip(group, results, strict=True):
            target = targets[i]
            result = replace(result, hsae={**(result.hsae or {}), "inputs": _inputs(target, store, options)})
            write_core(result, target.folder, release=target.release, sae_id=target.sae_id, name=found[i].path.name)
            computed[i] = result
    evaluated = []
    for i, target in enumerate(targets):
        held = computed.get(i) or found[i].result
        assert held is not None
        evaluated.append(Evaluated(target=target, result=held, reused=i not in computed, path=found[i].path))
    return evaluated


def _inputs(target: Target, store: ActivationStore, options: CoreOptions) -> dict[str, Any]:
    """All that a result depends on."""
    return {
        **target.inputs,
        "store": store.spec.fingerprint,
        "model": store.header.model_digest,
        "tokenizer": store.header.tokenizer_digest,
        "corpus": store.header.corpus_digest,
        "exclude_special_tokens": options.exclude_special_tokens,
    }


def _read(path: Path) -> tuple[CoreResult, dict[str, Any]]:
    result = read_core(path)
    inputs = (result.hsae or {}).get("inputs")
    return result, inputs if isinstance(inputs, dict) else {}


def _digest(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
