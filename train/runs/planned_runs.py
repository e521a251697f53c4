"""Training the runs of a plan into their directories: with checkpoints, seeds and several workers.

The language model is never loaded.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, Literal

import torch

from hsae.cache.device import pick_device
from hsae.cache.errors import UserError
from hsae.cache.launcher import share
from hsae.cache.reading.store import ActivationStore
from hsae.train.config.plan import Plan
from hsae.train.config.run_config import RunConfig
from hsae.train.model.hierarchical_sae import STRUCTURES
from hsae.train.parallel.latent_sharding import UNDIVIDED, Latents
from hsae.train.parallel.workers import ALONE, Workers, worker_group
from hsae.train.runs import run_directory
from hsae.train.runs.metrics_log import MetricsLog, damaged_metrics
from hsae.train.training.checkpoints import FILE as CHECKPOINT
from hsae.train.training.checkpoints import load_checkpoint, save_checkpoint
from hsae.train.training.folding import fold
from hsae.train.training.listener import Listener, Result, SeededRun
from hsae.train.training.loop import Journal, Trainee, check_run, run_steps
from hsae.train.training.sources import StoreSource
from hsae.train.training.training_run import TrainingRun

Divide = Literal["batch", "latents"]
"""What the workers of a training divide among them."""


@contextlib.contextmanager
def stop_on_signals(tell: Callable[[], None] = lambda: None) -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets, calling `tell`; a second interrupts. For the main thread."""
    request = threading.Event()

    def receive(number: int, frame: FrameType | None) -> None:
        if request.is_set():
            raise KeyboardInterrupt
        request.set()
        tell()

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train_runs(
    plan: Plan,
    runs: Sequence[RunConfig],
    listener: Listener | None = None,
    *,
    seeds: int = 1,
    device: str = "auto",
    resume: bool = False,
    restart: bool = False,
    divide: Divide = "batch",
    dry_run: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    workers: Workers | None = None,
) -> list[Result]:
    """Train `runs` of `plan` from its training store; all runs and seeds train in one pass over it.

    >>> plan = hsae.load_plan("gemma-3-270m")  # doctest: +SKIP
    >>> hsae.train.train_runs(plan, plan.select("0-5"), resume=True)  # doctest: +SKIP

    Each result is bit-identical to training that run alone, and a resumed run to an uninterrupted one, on one machine.
    Finished runs are left alone unless `restart`; `resume` goes on from checkpoints. Seed i of `seeds` lies in
    `<train.dir>/seed<i>`; seeds differ in their weights, and all see the tokens in one order. A run whose loss stops
    being finite fails and keeps its last checkpoint; the others go on. When `should_stop` (see `stop_on_signals`) says
    so, runs are saved after the current step.

    Workers that a launcher has started (torchrun, Slurm) join, unless `workers` are given: they divide every batch, or
    the latents of every level; the first of them writes the results and tells the `listener`. A `dry_run` ends after
    the checks. Returns how each run of each seed ended. Raises UserError before any compute if something can't work.
    """
    if resume and restart:
        raise UserError("--resume and --restart exclude each other")
    with contextlib.ExitStack() as stack:
        if workers is None:
            workers = stack.enter_context(worker_group(share(), device))
        listener = listener if listener is not None and workers.is_first else Listener()
        source = check(plan, runs, workers.world, divide)
        device = pick_device(device)
        place = device if workers.world == 1 else f"{workers.world} workers, {device}"
        listener.pass_started(plan, runs, seeds, place)
        if dry_run:
            return []
        seeded = [(plan.seeded(index), config) for index in range(seeds) for config in runs]
        with _Pass(plan, source.store, device, workers, divide, listener) as one_pass:
            results = one_pass.train(seeded, resume, restart, should_stop)
        listener.pass_ended(plan, results)
        return results


def check(plan: Plan, runs: Sequence[RunConfig], world: int = 1, divide: Divide = "batch") -> StoreSource:
    """The source of the plan's batches; refuses what can't work, for `world` workers, with a UserError."""
    for run in runs if divide == "latents" else ():
        _check_latents(run, world)
    if divide == "batch" and (rest := plan.train.batch_tokens % world):
        raise UserError(
            f"train.batch_tokens is {plan.train.batch_tokens}, which {world} workers can't share equally; "
            f"use a multiple of {world}, such as {_nearest(plan.train.batch_tokens, rest, world)}, "
            "or another number of workers"
        )
    store = ActivationStore.of(plan.store("train"), plan.cache.dir)
    source = StoreSource(store, plan.hook.names[0], plan.train)
    for run in runs:
        check_run(run, plan.train, where=f"run {run.number}", tokens="train.tokens")
    return source


def _check_latents(run: RunConfig, world: int) -> None:
    if not STRUCTURES[run.structure].is_nested and world > 1:
        raise UserError(
            f"run {run.number} is {run.structure}: its levels read whole codes, so its latents can't be divided "
            "among workers; use --divide batch"
        )
    for level, width in enumerate(run.widths, 1):
        if rest := width % world:
            raise UserError(
                f"run {run.number}: level {level} has {width} latents, which {world} workers can't divide equally; "
                f"use a multiple of {world}, such as {_nearest(width, rest, world)}, another number of workers, "
                "or --divide batch"
            )


def _nearest(size: int, rest: int, world: int) -> str:
    """The multiples of `world` nearest to a size, in words."""
    return " or ".join(str(near) for near in (size - rest, size - rest + world) if near)


class _Pass(contextlib.ExitStack):
    """Runs on their way through the stream of a plan; their directories are locked while it is entered."""

    def __init__(
        self, plan: Plan, store: ActivationStore, device: str, workers: Workers, divide: Divide, listener: Listener
    ) -> None:
        super().__init__()
        self.store, self.device, self.workers, self.listener = store, device, workers, listener
        self.batch_workers, self.latents = (workers, UNDIVIDED) if divide == "batch" else (ALONE, Latents(workers))
        self.stream = plan.stream
        self.source = StoreSource(store, plan.hook.names[0], self.stream, self.batch_workers.share)

    def train(
        self,
        seeded: Sequence[tuple[Plan, RunConfig]],
        resume: bool,
        restart: bool,
        should_stop: Callable[[], bool],
    ) -> list[Result]:
        """Take runs, each with the plan of its seed, to their ends, and say how each ended."""
        trainees = [self._begin(plan, config, resume, restart) for plan, config in seeded]
        pending = [trainee for trainee in trainees if trainee is not None]
        if pending:
            first = min(trainee.run.step_number for trainee in pending)
            batches = self.source.batches(first, pinned=torch.device(self.device).type == "cuda")
            x_BD = run_steps(
                pending, batches, self.stream, self.listener, should_stop=lambda: self.workers.any(should_stop())
            )
        return [
            Result(run=SeededRun(config=config, seed_index=plan.seed_index), status="already trained")
            if trainee is None
            else self._end(plan, trainee, x_BD)
            for (plan, config), trainee in zip(seeded, trainees, strict=True)
        ]

    def _begin(self, plan: Plan, config: RunConfig, resume: bool, restart: bool) -> Trainee | None:
        """The run, at its first step or its checkpoint; None if it is trained."""
        workers, run_dir = self.workers, plan.run_dir(config)
        named = SeededRun(config=config, seed_index=plan.seed_index)

        def warn(message: str) -> None:
            self.listener.warning(named, message)

        def prepare() -> run_directory.State:
            self.enter_context(run_directory.lock(plan, config))
            options: dict[str, Any] = {"resume": resume, "restart": restart, "world": workers.world, "say": warn}
            return run_directory.prepare(plan, config, self.store, self.device, **options)

        state = workers.from_first(prepare)
        if state == "complete":
            return None
        run = TrainingRun(
            config,
            self.source.scaling,
            steps=self.stream.steps,
            seed=plan.train.seed,
            device=self.device,
            workers=self.batch_workers,
            latents=self.latents,
        )
        if state == "unfinished":
            identities = run_directory.identities(plan, config)
            tensors, rest = load_checkpoint(run_dir, identities) if workers.is_first else ({}, {})
            run.restore(workers.copies(tensors, self.latents.along), workers.from_first(lambda: rest))
        else:
            run.share_state()
        log = MetricsLog(run_dir, run.step_number) if workers.is_first else None
        journal = _RunJournal(plan, config, self.store, log)
        for number in damaged_metrics(run_dir) if workers.is_first else ():
            warn(
                f"line {number} of {run_dir / 'metrics.jsonl'} is damaged; what is left of it stays, as text in a line "
                "of the kind damaged"
            )
        self.listener.started(named, run.step_number, run.steps)
        return Trainee(run, journal, plan.seed_index)

    def _end(self, plan: Plan, trainee: Trainee, x_BD: torch.Tensor) -> Result:
        """Write the model of a run that took all its steps; `x_BD` is the last batch."""
        run, config, named = trainee.run, trainee.run.config, trainee.named
        if run.failure is not None:
            return Result(run=named, status="failed", detail=run.failure)
        if not run.is_done:
            detail = f"at step {run.step_number} of {run.steps}; go on with --resume"
            return Result(run=named, status="stopped", detail=detail)
        sample_BD, whole = self.batch_workers.gather(x_BD), run.undivided()
        if self.workers.is_first:
            provenance = run_directory.provenance(plan, config, self.store)
            run_dir = plan.run_dir(config)
            run_directory.write_model(fold(whole, self.source.metadata, sample_BD), run_dir, provenance)
            run_directory.finish(run_dir)
        return Result(run=named, status="trained")


class _RunJournal(Journal):
    """The log and the checkpoint of a run directory; `log` is None for all workers but the first."""

    def __init__(self, plan: Plan, config: RunConfig, store: ActivationStore, log: MetricsLog | None) -> None:
        self.log, self.run_dir = log, plan.run_dir(config)
        self.provenance = run_directory.provenance(plan, config, store)

    def write(self, line: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        if self.log is not None:
            self.log.write(line)

    def save(self, run: TrainingRun) -> None:
        """Write a checkpoint, which is the same whoever and however many train."""
        run.check_same()
        state = run.state()
        if self.log is not None:
            save_checkpoint(state, self.run_dir, self.provenance)

    def last_save(self) -> str:
        """Where the last checkpoint is, if there is one."""
        path = self.run_dir / CHECKPOINT
        return f", the last good state is in {path}" if path.is_file() else ""
