"""Train arms on a synthetic tier and score them, seed by seed; what a results file holds already is not computed again.

One file a tier, `<folder>/<tier>.json`, written after every (arm, seed), so that a killed run goes on where it was.
"""

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from filelock import FileLock, Timeout

from hsae.cache.device import pick_device
from hsae.cache.errors import UserError
from hsae.eval.harness.listener import SILENT, Listener
from hsae.eval.harness.result_files import hsae_version, read_result, write_result
from hsae.eval.harness.tables import Cell, PlusMinus, Table
from hsae.eval.synthetic import scores
from hsae.eval.synthetic.compared_runs import Arms
from hsae.eval.synthetic.worlds import Tier, World
from hsae.train.config.run_config import RunConfig, StreamConfig
from hsae.train.training.folding import fold
from hsae.train.training.listener import Listener as TrainingListener
from hsae.train.training.listener import SeededRun
from hsae.train.training.loop import Trainee, run_steps
from hsae.train.training.training_run import TrainingRun

RESULTS = Path("eval_results") / "synthetic"
FORMAT = 1
VECTORS = 65_536
"""Held-out vectors that scores are taken on."""
COLUMNS = {
    "features": {
        "parent F1": "parent_f1",
        "child F1": "child_f1",
        "MMC": "mmc",
        "absorbed": "absorption",
        "EV": "ev",
        "L0": "l0",
    },
    "edges; permuted and random are nulls of F1, firing reads every arm alike": {
        "P": "edge_precision",
        "R": "edge_recall",
        "F1": "edge_f1",
        "permuted": "edge_f1_permuted",
        "random": "edge_f1_random",
        "firing": "firing_edge_f1",
    },
}
"""Title of a table -> heading -> score."""


@dataclass(frozen=True, kw_only=True)
class SyntheticResult:
    """Scores of runs on a tier."""

    tier: Tier
    runs: Sequence[RunConfig]
    content: dict[str, Any]
    """The tier's results file as JSON."""
    path: Path

    @property
    def title(self) -> str:
        """What the tables are of."""
        tier, tokens = self.tier, self.content["settings"]["tokens"]
        size = f"{tier.features:,} features in {tier.width} dimensions, {tokens:,} vectors"
        return f"{tier.name}: {size}; mean ± standard deviation over seeds"

    def tables(self) -> list[Table]:
        """The scores of features, and those of edges."""
        tables = []
        for title, columns in COLUMNS.items():
            table = Table(title, ("arm", *columns), is_dense=True)
            for run in self.runs:
                scored = self.content["arms"][run.name]
                table.add(f"{run.number} {run.name}", *(_cell(scored, name) for name in columns.values()))
            tables.append(table)
        return tables

    def failures(self) -> list[str]:
        """A line for each run that failed on a seed."""
        return [
            f"{run.name}, seed {row['seed']}: {row['failure']}"
            for run in self.runs
            for row in self.content["arms"][run.name]["seeds"]
            if "failure" in row
        ]


def _cell(scored: dict[str, Any], name: str) -> Cell:
    value, spread = scored["mean"].get(name), scored["sd"].get(name)
    if name == "l0":
        return "+".join(f"{level:.1f}" for level in value or ())
    if value is None:
        return "-"
    text = f"{value:.3f}".replace("0.", ".", 1)
    return text if spread is None else PlusMinus(text, f"{spread:.2f}".removeprefix("0"))


def evaluate_synthetic(
    arms: Arms,
    runs: Sequence[RunConfig] | None = None,
    seeds: Sequence[int] = range(3),
    *,
    folder: Path = RESULTS,
    vectors: int = VECTORS,
    force: bool = False,
    device: str = "auto",
    listener: Listener = SILENT,
) -> SyntheticResult:
    """Train runs (default: all arms) on every seed of a tier, and score them against the tier's truth.

    A (run, seed) that the tier's results file has is left alone unless `force`; so is every other run in it. Raises
    UserError if the file is damaged, belongs to other settings (tokens, batch, sample, or a run's configuration), or is
    being written.
    """
    tier, stream, device = arms.tier, arms.train, pick_device(device)
    runs = list(arms.runs.values()) if runs is None else runs
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{tier.name}.json"
    try:
        lock = FileLock(folder / f".{tier.name}.lock").acquire(timeout=0)
    except Timeout:
        raise UserError(f"another process is writing {path}; wait for it, or stop it") from None
    with lock:
        content = _open_results(path, arms, runs, vectors, force)
        for index, seed in enumerate(seeds):
            world = World(tier, seed)
            for run in runs:
                progress = _Progress(listener, index * stream.steps, len(seeds) * stream.steps)
                entry = content["arms"][run.name]
                if seed not in (row["seed"] for row in entry["seeds"]):
                    row = train_and_score(run, world, stream, vectors, device, progress)
                    entry["seeds"] = sorted([*entry["seeds"], row], key=lambda row: int(row["seed"]))
                    entry |= _summarise(entry["seeds"])
                    write_result(path, content, indent=2)
                progress.show(run, stream.steps)
    return SyntheticResult(tier=tier, runs=runs, content=content, path=path)


@dataclass(frozen=True)
class _Progress(TrainingListener):
    """Shows how far a run is: one phase a run, over all its seeds."""

    listener: Listener
    first: int
    total: int

    def show(self, run: RunConfig, step: int) -> None:
        """The run has taken `step` steps on this seed."""
        self.listener.progress(f"{run.number} {run.name}", self.first + step, self.total)

    def metrics(self, run: SeededRun, metrics: dict[str, Any]) -> None:
        """A line of metrics was made."""
        self.show(run.config, metrics["step"])


def train_and_score(
    config: RunConfig, world: World, stream: StreamConfig, vectors: int, device: str, progress: _Progress
) -> dict[str, Any]:
    """A run on one seed: its scores, or why it failed."""
    run = TrainingRun(config, world.scaling(), steps=stream.steps, seed=world.seed, device=device)
    progress.show(config, 0)
    batches = (batch.x for batch in islice(world.batches(stream.batch_tokens), stream.steps))
    x_BD = run_steps([Trainee(run)], batches, stream, progress)
    if run.failure is not None:
        return {"seed": world.seed, "failure": run.failure}
    model = fold(run, {"model_name": f"synthetic {world.tier.name}", "hook_name": "x"}, x_BD)
    return {"seed": world.seed, **scores.score(model, world, vectors=vectors)}


def fingerprint(arm: RunConfig, settings: dict[str, Any]) -> str:
    """Sixteen hex digits over all that determines an arm's scores, the seed apart."""
    text = json.dumps([FORMAT, settings, arm.model_dump(mode="json")], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _open_results(path: Path, arms: Arms, runs: Sequence[RunConfig], vectors: int, force: bool) -> dict[str, Any]:
    """The file's content with a place for every run; rows to compute anew are taken out."""
    settings = {
        "tokens": arms.train.tokens,
        "batch_tokens": arms.train.batch_tokens,
        "held_out_vectors": vectors,
        "mapped_f1": scores.MAPPED_F1,
        "edge_cut": [scores.RELATIVE_CUT, scores.ABSOLUTE_CUT],
        "firing_edge_cut": [scores.FIRING_CUT, scores.FIRING_LIFT],
        "world": json.loads(json.dumps(asdict(arms.tier))),
    }
    content = read_results(path) if path.exists() else None
    if content is None or (force and content["settings"] != settings):
        versions = {"hsae": hsae_version(), "torch": torch.__version__, "python": platform.python_version()}
        content = {
            "format": FORMAT, "tier": arms.tier.name, "settings": settings, "versions": versions, "arms": {},
        }  # fmt: skip
    other = "--force replaces them, --out keeps both"
    if (earlier := content["settings"]) != settings:
        names = [name for name, value in settings.items() if earlier.get(name) != value]
        changes = ", ".join(f"{name} {earlier.get(name)!r}, now {settings[name]!r}" for name in names)
        raise UserError(f"{path} holds results of other settings ({changes}); {other}")
    for run in runs:
        mark = fingerprint(run, settings)
        if run.name not in content["arms"] or force:
            content["arms"][run.name] = {"fingerprint": mark, "config": run.model_dump(mode="json"), "seeds": []}
        elif content["arms"][run.name]["fingerprint"] != mark:
            raise UserError(f"{path} holds results of another configuration of {run.name}; {other}")
    return content


def read_results(path: Path) -> dict[str, Any]:
    """A results file. Raises UserError if it is damaged."""
    content = read_result(path, "hsae eval synthetic (remove the file first, or give another folder with --out)")
    try:
        if content["format"] != FORMAT:
            raise UserError(f"{path}: format {content['format']!r}; this hsae reads format {FORMAT}")
        content["settings"], [(arm["fingerprint"], arm["seeds"]) for arm in content["arms"].values()]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); remove it, or give another folder with --out") from None
    return content


def _summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation (n - 1; null for one seed) of every score over the seeds that didn't fail."""
    done = [row for row in rows if "failure" not in row]
    means: dict[str, Any] = {}
    spreads: dict[str, Any] = {}
    for name in done[0] if done else ():
        values = [row[name] for row in done]
        if name == "l0":
            levels = list(zip(*values, strict=True))
            means[name], spreads[name] = [mean(level) for level in levels], [_spread(level) for level in levels]
        elif name != "seed" and all(isinstance(value, (int, float)) for value in values):
            means[name], spreads[name] = mean(values), _spread(values)
    return {"mean": means, "sd": spreads}


def _spread(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None
