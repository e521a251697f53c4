"""Train arms on a synthetic tier and score them, seed by seed; what a results file holds already is not computed again.

One file a tier, `<folder>/<tier>.json`, written after every (arm, seed), so that a killed run goes on where it was.
"""

import hashlib
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Protocol

import torch
from filelock import FileLock, Timeout

from hsae.cache.device import pick_device
from hsae.cache.errors import UserError
from hsae.eval.harness.result_files import hsae_version, read_result, write_result
from hsae.eval.synthetic import scores as synthetic
from hsae.eval.synthetic.worlds import Tier, World
from hsae.train.config.run_config import RunConfig, StreamConfig
from hsae.train.model.hierarchical_sae import HierarchicalSAE
from hsae.train.training.folding import fold
from hsae.train.training.training_run import TrainingRun

RESULTS = Path("eval_results") / "synthetic"
FORMAT = 1
VECTORS = 65_536
"""Held-out vectors that scores are taken on."""


class Listener(Protocol):
    """Who is told how it goes."""

    def progress(self, arm: str, seed: int, step: int, steps: int) -> None:
        """An arm has taken `step` of its `steps` steps on a seed: from 0, when it begins, unless its scores were there already."""


class Silent:
    """Tells nobody."""

    def progress(self, arm: str, seed: int, step: int, steps: int) -> None:
        """Nothing."""


def run_tier(
    tier: Tier,
    arms: Sequence[RunConfig],
    seeds: Sequence[int],
    *,
    stream: StreamConfig,
    folder: Path = RESULTS,
    vectors: int = VECTORS,
    force: bool = False,
    device: str = "auto",
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Train every arm on every seed of a tier, score it, and return what the tier's results file then holds.

    An (arm, seed) that the file has is left alone unless `force`. Arms that the file holds besides are kept. Raises UserError if
    the file is damaged, belongs to other settings (tokens, batch, sample, or an arm's configuration), or is being written.
    """
    place, listener = pick_device(device), listener or Silent()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{tier.name}.json"
    try:
        lock = FileLock(folder / f".{tier.name}.lock").acquire(timeout=0)
    except Timeout:
        raise UserError(f"another process is writing {path}; wait for it, or stop it") from None
    with lock:
        content = _begun(path, tier, arms, stream, vectors, force)
        for seed in seeds:
            world = World(tier, seed)
            for arm in arms:
                entry = content["arms"][arm.name]
                if seed in (row["seed"] for row in entry["seeds"]):
                    listener.progress(arm.name, seed, stream.steps, stream.steps)
                    continue
                row = train_and_score(arm, world, stream, vectors, place, listener)
                entry["seeds"] = sorted([*entry["seeds"], row], key=lambda row: int(row["seed"]))
                entry |= _summary(entry["seeds"])
                write_result(path, content, indent=2)
    return content


def train_and_score(
    arm: RunConfig, world: World, stream: StreamConfig, vectors: int, device: str, listener: Listener
) -> dict[str, Any]:
    """One arm on one seed: its scores, or why it failed."""
    model = train_on(
        arm, world, stream, device, lambda step: listener.progress(arm.name, world.seed, step, stream.steps)
    )
    if isinstance(model, str):
        return {"seed": world.seed, "failure": model}
    return {"seed": world.seed, **synthetic.score(model, world, vectors=vectors)}


def train_on(
    arm: RunConfig, world: World, stream: StreamConfig, device: str, progress: Callable[[int], None]
) -> HierarchicalSAE | str:
    """Train one arm on a world's batches; returns the model in the world's own units, or why training stopped."""
    scaling = world.scaling()
    run = TrainingRun(arm, scaling, steps=stream.steps, seed=world.seed, device=device)
    x = torch.empty(0)
    for step, batch in zip(range(stream.steps), world.batches(stream.batch_tokens), strict=False):
        progress(step)
        x = batch.x.to(device) * scaling.scale
        parts = run.step(x)
        if not run.check_loss(parts["loss"]):
            return run.failure or ""
    progress(stream.steps)
    if not run.check_weights():
        return run.failure or ""
    return fold(run, {"model_name": f"synthetic {world.tier.name}", "hook_name": "x"}, x)


def _settings(tier: Tier, stream: StreamConfig, vectors: int) -> dict[str, Any]:
    return {
        "tokens": stream.tokens,
        "batch_tokens": stream.batch_tokens,
        "held_out_vectors": vectors,
        "mapped_f1": synthetic.MAPPED_F1,
        "edge_cut": [synthetic.RELATIVE_CUT, synthetic.ABSOLUTE_CUT],
        "firing_edge_cut": [synthetic.FIRING_CUT, synthetic.FIRING_LIFT],
        "world": json.loads(json.dumps(asdict(tier))),
    }


def fingerprint(arm: RunConfig, settings: dict[str, Any]) -> str:
    """Sixteen hex digits over all that determines an arm's scores, the seed apart."""
    text = json.dumps([FORMAT, settings, arm.model_dump(mode="json")], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _begun(
    path: Path, tier: Tier, arms: Sequence[RunConfig], stream: StreamConfig, vectors: int, force: bool
) -> dict[str, Any]:
    """The file's content with a place for every arm; rows to compute anew are taken out."""
    settings = _settings(tier, stream, vectors)
    content = read_results(path) if path.exists() else None
    if content is None or (force and content["settings"] != settings):
        content = {"format": FORMAT, "tier": tier.name, "settings": settings, "versions": _versions(), "arms": {}}
    if content["settings"] != settings:
        names = [name for name, value in settings.items() if content["settings"].get(name) != value]
        held = ", ".join(f"{name} {content['settings'].get(name)!r}, now {settings[name]!r}" for name in names)
        raise UserError(f"{path} holds results of other settings ({held}); --force replaces them, --out keeps both")
    for arm in arms:
        mark = fingerprint(arm, settings)
        held = content["arms"].get(arm.name)
        if held is not None and held["fingerprint"] != mark and not force:
            raise UserError(
                f"{path} holds results of another configuration of {arm.name}; --force replaces them, --out keeps both"
            )
        if held is None or force:
            content["arms"][arm.name] = {"fingerprint": mark, "config": arm.model_dump(mode="json"), "seeds": []}
    return content


def read_results(path: Path) -> dict[str, Any]:
    """A results file. Raises UserError if it is damaged."""
    try:
        content = read_result(path, "hsae eval synthetic (remove the file first, or give another folder with --out)")
        if content["format"] != FORMAT:
            raise UserError(f"{path}: format {content['format']!r}; this hsae reads format {FORMAT}")
        content["settings"], [(arm["fingerprint"], arm["seeds"]) for arm in content["arms"].values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged ({error!r}); remove it, or give another folder with --out") from None
    return dict(content)


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation (n - 1) of every score over the seeds that didn't fail; sd is null for a single one."""
    done = [row for row in rows if "failure" not in row]
    means: dict[str, Any] = {}
    spreads: dict[str, Any] = {}
    for name in done[0] if done else ():
        values = [row[name] for row in done]
        if name == "l0":
            means[name] = [mean(level) for level in zip(*values, strict=True)]
            spreads[name] = [stdev(level) if len(done) > 1 else None for level in zip(*values, strict=True)]
        elif name != "seed" and all(isinstance(value, (int, float)) for value in values):
            means[name] = mean(values)
            spreads[name] = stdev(values) if len(done) > 1 else None
    return {"mean": means, "sd": spreads}


def _versions() -> dict[str, str]:
    return {"hsae": hsae_version(), "torch": torch.__version__, "python": platform.python_version()}
