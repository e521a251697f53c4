"""What an evaluation is asked to evaluate, where each result goes, and whether it is there already."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from hsae.cache.errors import UserError
from hsae.eval.harness.fits import doubts, same_hook
from hsae.eval.harness.listener import SILENT, Listener
from hsae.eval.harness.options import OUT
from hsae.eval.harness.result_files import changes, hsae_version
from hsae.eval.harness.saebench_file import file_name
from hsae.train.config.plan import Plan
from hsae.train.config.run_config import RunConfig
from hsae.train.model import saelens_folder
from hsae.train.model.hierarchical_sae import CONFIG_FILE, STRUCTURES, WEIGHTS_FILE, HierarchicalSAE
from hsae.train.model.model_files import load_model
from hsae.train.model.views import View
from hsae.train.run_record import read_run, run_of, train_command
from hsae.train.runs.run_directory import is_complete

SIDE_BY_SIDE = ("store", "exclude_special_tokens")  # inputs whose results lie beside each other
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

    def path(self, *variant: str) -> Path:
        """The result file; `variant` is what tells it from the standard result."""
        return self.folder / file_name(self.release, self.sae_id, *variant)

    @property
    def inputs(self) -> dict[str, Any]:
        """What every result of this SAE depends on."""
        return {"hsae": hsae_version(), "sae": self.weights_digest, "view": self.view.name, "hook": self.hook}


@dataclass(frozen=True, kw_only=True)
class RunTarget:
    """A whole trained run of one seed to evaluate."""

    plan: Plan
    """The plan of the seed."""
    config: RunConfig

    @classmethod
    def of(cls, plan: Plan, config: RunConfig) -> Self:
        """Raises UserError unless the run has been trained to its end."""
        need_trained(plan, config)
        return cls(plan=plan, config=config)

    @property
    def run_dir(self) -> Path:
        """Where the run lies."""
        return self.plan.run_dir(self.config)

    @property
    def folder(self) -> Path:
        """Where the result goes."""
        return self.run_dir / RESULTS

    @property
    def label(self) -> str:
        """Short name for people."""
        return self.plan.label(self.config)

    @property
    def hook(self) -> str:
        """Where the residuals it was trained on were taken."""
        return self.plan.hook.names[0]

    @property
    def inputs(self) -> dict[str, Any]:
        """What every result of this run depends on."""
        return {"hsae": hsae_version(), "sae": model_digest(self.run_dir / "model"), "hook": self.hook}

    def load(self) -> HierarchicalSAE:
        """The trained model."""
        return load_model(self.run_dir / "model")


@dataclass(frozen=True)
class ResultPlace:
    """Where a result belongs, and its content if it lies there."""

    path: Path
    content: dict[str, Any] | None = None
    changed: str = ""
    """In what the inputs differ from those of the result that gives way, if one does."""


def find_result(
    target: Target,
    inputs: Mapping[str, Any],
    read: Callable[[Path], tuple[dict[str, Any], Mapping[str, Any]]],
    *variant: str,
) -> ResultPlace:
    """Look for a result made of these inputs under SAEBench's name, then under one with its store's name in it.

    `read` gives a file's content and inputs, or raises UserError. A result of another store or other settings, or one
    that hsae did not make, keeps the first name if it has it; what is damaged, or of an earlier state of the same store
    and SAE, gives way.
    """
    first, own = target.path(*variant), target.path(*variant, str(inputs["store"]))
    path, changed = first, {}
    for place in (first, own):
        try:
            content, before = read(place)
        except UserError:
            continue  # missing or damaged: made anew
        if before == inputs:
            return ResultPlace(place, content)
        changed[place] = changes(inputs, before) if before else ""
        if place == first and (not before or any(before.get(key) != inputs.get(key) for key in SIDE_BY_SIDE)):
            path = own
    return ResultPlace(path, changed=changed.get(path, ""))


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which SAEs are to be evaluated: runs of the plan, or SAELens folders."""

    run: str | None = None
    """Runs as a plan names them, such as `0-5` or `baseline`; None stands for all that are trained."""
    seeds: int = 1
    """Seeds of each run."""
    folders: Sequence[Path] = ()
    """SAELens folders in place of runs."""
    out: Path = OUT
    """Where the results of SAELens folders go; each evaluation has a folder in it."""
    whole: bool = False
    """Of a run only all levels together, not each level too."""


def select_targets(plan: Plan, selection: Selection, evaluation: str, listener: Listener = SILENT) -> list[Target]:
    """The SAEs that are selected; results lie in folders called `evaluation`. Doubts of a folder are warned of."""
    if selection.folders:
        targets = folder_targets(plan, selection.folders, selection.out / evaluation)
        for target in targets:
            for doubt in target.doubts:
                listener.warn(f"{target.label}: {doubt}")
        return targets
    return [
        target
        for seeded, config in trained_runs(plan, selection.run, selection.seeds, listener.say)
        for target in run_targets(seeded, config, evaluation, whole=selection.whole)
    ]


def trained_runs(plan: Plan, run: str | None, seeds: int, say: Callable[[str], None]) -> list[tuple[Plan, RunConfig]]:
    """The named runs, or all that are trained (`say` hears which are not), of each seed. Raises UserError if none."""
    every = [plan.seeded(index) for index in range(seeds)]
    if run is not None:
        return [(seeded, config) for seeded in every for config in plan.select(run)]
    chosen = [(seeded, config) for seeded in every for config in plan.runs.values() if is_complete(seeded, config)]
    if not chosen:
        raise UserError(
            f"no run of plan {plan.name} has been trained in {plan.train.dir}; train them with: hsae train --all"
        )
    for seeded in every:
        if left_out := [str(config.number) for config in plan.runs.values() if (seeded, config) not in chosen]:
            say(f"not trained yet, left out: run {', '.join(left_out)} in {seeded.train.dir}")
    return chosen


def need_trained(plan: Plan, run: RunConfig) -> None:
    """Raise UserError unless this very run of the plan has been trained to its end."""
    if not is_complete(plan, run):
        run_dir = plan.run_dir(run)
        raise UserError(
            f"run {run.number} ({run.name}) of plan {plan.name} has not been trained to its end in {run_dir}; "
            f"train it with: {train_command(run_dir)}"
        )


def run_targets(plan: Plan, run: RunConfig, evaluation: str = "core", *, whole: bool = False) -> list[Target]:
    """Every view of a trained run, or with `whole` the one that stands for it, for one evaluation.

    Raises UserError if it has not been trained, or with another configuration.
    """
    need_trained(plan, run)
    run_dir = plan.run_dir(run)
    record, model_dir = read_run(run_dir), run_dir / "model"
    assert record is not None  # it is trained
    return [
        Target(
            view=view,
            hook=plan.hook.names[0],
            folder=run_dir / RESULTS / evaluation,
            label=f"{plan.label(run)} {name}",
            release=f"hsae_{record['plan']}_{run.number}-{run.name}",
            sae_id=name,
            weights_digest=model_digest(model_dir),
            run_dir=run_dir,
        )
        for name, view in load_model(model_dir).views().items()
        if not whole or name == STRUCTURES[run.structure].whole_view
    ]


def model_digest(model_dir: Path) -> str:
    """SHA-256 of a trained model's files. Raises UserError if one is missing."""
    try:
        return _digest(model_dir / CONFIG_FILE, model_dir / WEIGHTS_FILE)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing; make it again with: {train_command(model_dir.parent)}") from None


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


def _digest(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
