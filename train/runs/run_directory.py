"""A run directory, `runs/<N>/`: what is in it, whose it is, and how its log is kept.

run.json (what was trained on what), metrics.jsonl (one JSON object a line), checkpoint/ (while training), model/
(native), saelens/<view>/ (for other tools), eval/ (results). Nothing in it is pickled.
"""

import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout

from hsae.cache.errors import UserError
from hsae.cache.files import LEFT, PARTIAL, sweep
from hsae.cache.reading.store import ActivationStore
from hsae.train.config.plan import Plan
from hsae.train.config.run_config import RunConfig
from hsae.train.model import saelens_folder
from hsae.train.model.hierarchical_sae import HierarchicalSAE
from hsae.train.model.model_files import load_model, load_provenance
from hsae.train.run_record import (
    FILE,
    MODEL_FILES,
    damage_error,
    damaged_files,
    digests,
    model_files,
    read_run,
    write_run,
)
from hsae.train.training.checkpoints import FILE as CHECKPOINT
from hsae.train.training.checkpoints import read_provenance

TRAINED = ("metrics.jsonl", *MODEL_FILES)
EVALUATED = (
    "eval/*/*_eval_results.json",
    "eval/*/legacy/*_eval_results.json",
    "eval/composition.json",
    "eval/composition.safetensors",
    "eval/stability.json",
    "eval/unlearning.json",
    "eval/unlearning.partial.json",
    "eval/unlearning.png",
    "eval/unlearning_qa.json",
)
"""What evaluations leave; it is a run's own, and all else in its directory is somebody else's."""
State = Literal["complete", "unfinished", "new"]


def identities(plan: Plan, config: RunConfig) -> tuple[str, ...]:
    """Sixteen hex digits over all that determines a run's result: configuration, stream and training store.

    A store's lossless codecs hold the same numbers, and so, but for rounding, do stores made on a processor and on a
    GPU: runs are known by the first identity, and, from before this was so, by the second if they were trained on a
    compact store.
    """
    stream = plan.train.model_dump(mode="json", include={"tokens", "batch_tokens", "seed"})
    if plan.seed_index:
        stream["order"] = plan.stream.seed
    spec = plan.requested("train").plain
    codecs = ("int8",) if spec.codec == "int8" else ("mappable", "compact")
    names = (spec.model_copy(update={"codec": codec}).name for codec in codecs)
    texts = (
        json.dumps([stream, config.model_dump(mode="json"), name, plan.hook.names[0]], sort_keys=True) for name in names
    )
    return tuple(hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts)


def provenance(plan: Plan, config: RunConfig, store: ActivationStore) -> dict[str, Any]:
    """What checkpoints and models say they belong to: a run, and digests of what its store was made from.

    The store's name says only what was asked for.
    """
    content = {name: getattr(store.header, name) for name in ("model_digest", "tokenizer_digest", "corpus_digest")}
    return {"identity": identities(plan, config)[0], "content": content}


def lock(plan: Plan, config: RunConfig) -> AbstractContextManager[object]:
    """The lock on a run directory, taken. Raises UserError if another process trains the run."""
    folder = Path(plan.train.dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(folder / f".{config.number}.lock").acquire(timeout=0)
    except Timeout:
        raise UserError(f"another process is training {plan.run_dir(config)}; wait for it, or stop it") from None


def is_complete(plan: Plan, config: RunConfig) -> bool:
    """Whether this very run has been trained to its end."""
    record = read_run(plan.run_dir(config)) or {}
    return record.get("identity") in identities(plan, config) and record.get("complete") is True


def describe(plan: Plan, config: RunConfig) -> str:
    """What its directory holds of a run, in words: `trained`, `begun`, `new`, or what stands in the way."""
    run_dir = plan.run_dir(config)
    try:
        record = read_run(run_dir)
    except UserError:
        return "damaged"
    checkpoint = read_provenance(run_dir) or {}
    here = [identity for part in (record, checkpoint) if part and (identity := part.get("identity"))]
    if not here:
        return "new"
    if here[0] not in identities(plan, config):
        return "another configuration's"
    return "trained" if record and record.get("complete") is True else "begun"


def prepare(
    plan: Plan,
    config: RunConfig,
    store: ActivationStore,
    device: str,
    *,
    resume: bool,
    restart: bool,
    world: int = 1,
    say: Callable[[str], None] = lambda text: None,
) -> State:
    """Make the run directory ready for `world` workers; `unfinished` means that there is a checkpoint to go on from.

    What can be repaired of a finished run is repaired, and said. Raises UserError if the directory holds what hsae did
    not write, another configuration's run, a damaged one, or an unfinished one and neither `resume` nor `restart`.
    """
    run_dir = plan.run_dir(config)
    new_record = _new_record(plan, config, store, hardware(device, world))
    if restart:
        _check_replaceable(run_dir, restart=True)
    elif (record := _read_or_restore(run_dir, new_record, say)) is not None:
        if record.get("identity") not in identities(plan, config):
            raise UserError(
                f"{run_dir} holds a run of another configuration or store (plan {record.get('plan')}); "
                "--restart replaces it, --set train.dir=FOLDER trains beside it"
            )
        if record.get("content") != new_record["content"]:
            raise UserError(
                f"{run_dir} was trained on a store of the same name made from another model or text; "
                "--restart trains it again"
            )
        _sweep(run_dir)
        if record.get("complete") is True:
            if _repair(run_dir, record, say):
                _remove(run_dir, [CHECKPOINT])
                return "complete"
        elif (run_dir / CHECKPOINT).is_file():
            if not resume:
                raise UserError(
                    f"{run_dir} was not finished; --resume goes on from its checkpoint, --restart begins again"
                )
            return "unfinished"
    run_dir.mkdir(parents=True, exist_ok=True)
    _remove(run_dir, [CHECKPOINT])
    write_run(run_dir, new_record)
    _sweep(run_dir)
    _remove(run_dir, TRAINED)
    if restart:  # else the folders for other tools may be all that is left of a model, until it is made again
        _remove(run_dir, [*model_files(run_dir), *EVALUATED])
    return "new"


def finish(run_dir: Path) -> None:
    """Say that a run is complete, with the digests of the files of its model."""
    content = read_run(run_dir)
    assert content is not None
    write_run(run_dir, {**content, "files": digests(run_dir), "complete": True})
    _remove(run_dir, [CHECKPOINT])


def _check_replaceable(run_dir: Path, *, restart: bool) -> None:
    """Raise UserError if there is what `prepare` may not replace: no run of hsae's, or one without `restart`."""
    names = (
        sorted(path.name for path in run_dir.iterdir() if not LEFT.fullmatch(path.name))
        if run_dir.is_dir()
        else ["it is a file"] * run_dir.exists()
    )
    signs = (FILE, b'"identity"'), (MODEL_FILES[0], b'"structure"'), (CHECKPOINT, b'\\"identity\\"')
    is_ours = any(sign in _first_bytes(run_dir / name) for name, sign in signs)
    if not names or (is_ours and restart):
        return
    listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    if is_ours:
        raise UserError(
            f"{run_dir} holds a run ({listed}), but no {FILE} that says which; put {FILE} back, or --restart replaces "
            "the run, or --set train.dir=FOLDER trains beside it"
        )
    raise UserError(
        f"{run_dir} is not empty ({listed}), and not a run of hsae's, which --restart could replace; move it away, or "
        "--set train.dir=FOLDER trains beside it"
    )


def _first_bytes(path: Path) -> bytes:
    """The first bytes of a file; none if there is no such file."""
    try:
        with path.open("rb") as file:
            return file.read(1 << 22)
    except OSError:
        return b""


def _read_or_restore(run_dir: Path, new_record: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any] | None:
    """The content of run.json, if need be from the model or the checkpoint beside it; None in an empty directory."""
    try:
        if (record := read_run(run_dir)) is not None and "identity" in record:
            return record
    except UserError as error:
        say(str(error))
    of_model = load_provenance(run_dir / "model")
    origin = of_model or read_provenance(run_dir)
    if origin is None or "content" not in origin:
        _check_replaceable(run_dir, restart=False)
        return None
    own = {name: origin[name] for name in ("identity", "content")}
    record = {**new_record, **own, "versions": {"hsae": "not recorded"}, "hardware": "not recorded"}
    if any(own[name] != new_record[name] for name in own):
        return record
    write_run(run_dir, record | {"complete": of_model is not None})
    if of_model is not None:
        _write_saelens(load_model(run_dir / "model"), run_dir)
        finish(run_dir)
    origin_name = "model" if of_model is not None else "checkpoint"
    say(f"{run_dir / FILE} was lost, and is written again from the {origin_name} beside it")
    return read_run(run_dir)


def _repair(run_dir: Path, record: dict[str, Any], say: Callable[[str], None]) -> bool:
    """Make the folders for other tools of a finished run again where they are damaged; False if its model is missing.

    Raises UserError if one of the model's files is damaged.
    """
    missing = [name for name in MODEL_FILES if not (run_dir / name).is_file()]
    if missing:
        say(f"{run_dir / missing[0]} is missing: the run is trained again; evaluations stay until they are made anew")
        return False
    problems = damaged_files(run_dir, record)
    for name in MODEL_FILES:
        if name in problems:
            raise damage_error(run_dir / name, run_dir, problems[name])
    if problems or not (run_dir / "saelens").is_dir():
        _write_saelens(load_model(run_dir / "model"), run_dir)
        if "files" in record:
            write_run(run_dir, {**record, "files": digests(run_dir)})
        name, problem = next(iter(problems.items()), ("saelens", "is missing"))
        say(f"{run_dir / name} {problem}: made again from the model")
    elif "files" not in record:
        load_model(run_dir / "model")  # made before there were digests: what can be seen of damage is seen here
    return True


def write_model(model: HierarchicalSAE, run_dir: Path, provenance: Mapping[str, Any] | None = None) -> None:
    """Write a trained model and its folders for other tools; `provenance` says what it belongs to."""
    model.save(run_dir / "model", provenance)
    _write_saelens(model, run_dir)


def _write_saelens(model: HierarchicalSAE, run_dir: Path) -> None:
    """Make the folders for other tools."""
    for name, sae in model.one_layer().items():
        saelens_folder.save(sae, run_dir / "saelens" / name)


def _remove(run_dir: Path, patterns: Sequence[str]) -> None:
    """Delete hsae's own files, and the folders that are empty without them."""
    for path in [path for pattern in patterns for path in run_dir.glob(pattern) if path.is_file()]:
        if path.name.endswith("_eval_results.json") and b'"hsae"' not in _first_bytes(path):
            continue  # SAEBench's own
        path.unlink(missing_ok=True)
        folder = path.parent
        while folder != run_dir and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent


def _sweep(run_dir: Path) -> None:
    """Delete what a killed training left half-written; evaluations, which may be under way, have their own."""
    for name in ("checkpoint", "model", "saelens"):
        sweep(run_dir / name)
    for path in run_dir.glob(f".{FILE}.*{PARTIAL}"):
        path.unlink(missing_ok=True)


def _new_record(plan: Plan, config: RunConfig, store: ActivationStore, hardware: str) -> dict[str, Any]:
    """What run.json says of a run that begins."""
    try:
        own = version("hsae")
    except PackageNotFoundError:
        own = "not installed"
    return {
        "format": 1,
        **provenance(plan, config, store),
        "number": config.number,
        "name": config.name,
        "plan": plan.name,
        "model": plan.model.id,
        "hook": plan.hook.names[0],
        "d_in": store.header.d_model,
        "train_store": store.spec.name,
        "eval_store": plan.store("eval").name,
        "config": {**plan.train.model_dump(mode="json"), **config.model_dump(mode="json")},
        "versions": {"hsae": own, "torch": torch.__version__, "python": platform.python_version()},
        "hardware": hardware,
        "complete": False,
    }


def hardware(device: str, world: int = 1) -> str:
    """What a run is trained on, in words."""
    if device.startswith("cuda"):
        one = torch.cuda.get_device_name(device)
    else:
        one = f"{platform.machine()} processor, {torch.get_num_threads()} threads"
    return one if world == 1 else f"{world} workers, each: {one}"
