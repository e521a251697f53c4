"""The training loop: every selected run in one pass over the stream of cached activations. The language model is never loaded."""

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from hsae.cache.device import pick_device
from hsae.cache.errors import UserError
from hsae.cache.reading.store import ActivationStore
from hsae.cache.reading.token_stream import TokenStream
from hsae.train.config.plan import Plan
from hsae.train.config.run_config import RunConfig
from hsae.train.model import saelens_folder
from hsae.train.model.trained_model import save_model
from hsae.train.runs import run_directory
from hsae.train.training.checkpoints import FILE as CHECKPOINT
from hsae.train.training.checkpoints import State, load_checkpoint, save_checkpoint
from hsae.train.training.curriculum import stages
from hsae.train.training.folding import fold
from hsae.train.training.latent_sharding import UNDIVIDED, Latents
from hsae.train.training.training_run import Scaling, TrainingRun
from hsae.train.training.workers import ALONE, Workers

Divide = Literal["batch", "latents"]
"""What the workers of a training divide among them."""


class Listener(Protocol):
    """Who is told how training goes."""

    def started(self, run: RunConfig, step: int, steps: int) -> None:
        """A run begins, or goes on, at `step` of `steps`."""

    def metrics(self, run: RunConfig, metrics: dict[str, Any]) -> None:
        """A line for metrics.jsonl was made."""

    def warning(self, run: RunConfig, message: str) -> None:
        """Something is wrong with a run."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a run ended."""

    run: RunConfig
    status: str
    """`trained`, `already trained`, `stopped` or `failed`."""
    detail: str = ""


@dataclass
class Trainee:
    """A run with its place on disk and its log."""

    run: TrainingRun
    log: run_directory.MetricsLog | None
    """None for all workers but the first."""
    mark: dict[str, Any]
    """What its checkpoints and its model say they belong to."""

    def write(self, line: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        if self.log is not None:
            self.log.write(line)


def scaling_of(store: ActivationStore, hook: str) -> Scaling:
    """Scale, starting bias and variance from the store's statistics. Raises UserError if they are not finite."""
    statistics = store.statistics(hook)
    d_in = len(statistics.mean_D)
    if not statistics.mean_square_norm > 0:
        raise UserError(f"{store.url}: the activations at {hook} are all zero")
    scale = (d_in / statistics.mean_square_norm) ** 0.5
    mean = statistics.mean_D * scale
    variance = d_in - float(mean.square().sum())
    if not (torch.isfinite(mean).all() and variance > 1e-6 * d_in):
        raise UserError(f"{store.url}: the activations at {hook} do not vary (variance {variance:g} after scaling)")
    return Scaling(scale=scale, median=(statistics.geometric_median_D * scale).float(), variance=variance)


def check(
    plan: Plan, runs: Sequence[RunConfig], store: ActivationStore, world: int = 1, divide: Divide = "batch"
) -> None:
    """Refuse what can't work, for `world` workers, before anything is computed. Raises UserError."""
    for run in runs if divide == "latents" else ():
        _check_latents(run, world)
    if divide == "batch" and (rest := plan.train.batch_tokens % world):
        near = [size for size in (plan.train.batch_tokens - rest, plan.train.batch_tokens - rest + world) if size]
        raise UserError(
            f"train.batch_tokens is {plan.train.batch_tokens}, which {world} workers can't share equally; "
            f"use a multiple of {world}, such as {' or '.join(map(str, near))}, or another number of workers"
        )
    hook = plan.hook.names[0]
    if hook not in store.spec.hooks:
        raise UserError(f"{store.url} holds {', '.join(store.spec.hooks)}, not {hook}; run `hsae cache build`")
    available = int(store.tokens_per_chunk.sum())
    if plan.train.batch_tokens > available:
        raise UserError(
            f"train.batch_tokens is {plan.train.batch_tokens}, but the store has only {available} tokens in all"
        )
    for run in runs:
        if round(min(run.l0) * plan.train.batch_tokens) < 1:
            raise UserError(f"run {run.number}: l0 {run.l0} keeps no latent in a batch of {plan.train.batch_tokens}")
        if len(stages(run)) > plan.train.steps:
            raise UserError(
                f"run {run.number}: its curriculum has {len(stages(run))} stages, but train.tokens makes only "
                f"{plan.train.steps} steps of {plan.train.batch_tokens} tokens"
            )


def _check_latents(run: RunConfig, world: int) -> None:
    if run.structure == "stacked" and world > 1:
        raise UserError(
            f"run {run.number} is stacked: its levels read whole codes, so its latents can't be divided among workers; "
            "use --divide batch"
        )
    for level, width in enumerate(run.widths, 1):
        if rest := width % world:
            near = [size for size in (width - rest, width - rest + world) if size]
            raise UserError(
                f"run {run.number}: level {level} has {width} latents, which {world} workers can't divide equally; "
                f"use a multiple of {world}, such as {' or '.join(map(str, near))}, another number of workers, or --divide batch"
            )


def train(
    plan: Plan,
    runs: Sequence[RunConfig],
    listener: Listener,
    *,
    device: str = "auto",
    resume: bool = False,
    restart: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    workers: Workers = ALONE,
    divide: Divide = "batch",
) -> list[Result]:
    """Train `runs` of `plan` in one pass over its training store; finished ones are left alone unless `restart`.

    Each result is bit-identical to training that run alone, and a resumed run to an uninterrupted one, on one machine. Several
    `workers` call this alike, divide every batch or the latents of every level among them, and the first writes the results.
    Raises UserError before any compute if something can't work; a run whose loss stops being finite is stopped, keeps its
    last checkpoint, and the others go on.
    """
    with contextlib.ExitStack() as locks:
        return _train(plan, runs, listener, pick_device(device), resume, restart, should_stop, workers, divide, locks)


def _train(
    plan: Plan,
    runs: Sequence[RunConfig],
    listener: Listener,
    device: str,
    resume: bool,
    restart: bool,
    should_stop: Callable[[], bool],
    workers: Workers,
    divide: Divide,
    locks: contextlib.ExitStack,
) -> list[Result]:
    store = ActivationStore.of(plan.store("train"), plan.cache.dir)
    check(plan, runs, store, workers.world, divide)
    batch, latents = (workers, UNDIVIDED) if divide == "batch" else (ALONE, Latents(workers))
    scaling, hook = scaling_of(store, plan.hook.names[0]), plan.hook.names[0]

    # --- which runs are there to train, and where do they begin -------------------------------------------------
    results: dict[int, Result] = {}
    trainees: list[Trainee] = []
    for config in runs:
        say = functools.partial(listener.warning, config)
        place = functools.partial(_place, plan, config, store, device, resume, restart, workers.world, say, locks)
        state = workers.lead(place)
        if state == "complete":
            results[config.number] = Result(run=config, status="already trained")
            continue
        steps, seed = plan.train.steps, plan.train.seed
        run = TrainingRun(config, scaling, steps=steps, seed=seed, device=device, workers=batch, latents=latents)
        if state == "unfinished":
            tensors, rest = _checkpoint(plan, config) if workers.leads else ({}, {})
            run.restore(workers.copies(tensors, latents.along), workers.lead(functools.partial(dict, rest)))
        else:
            run.share_state()
        log = run_directory.MetricsLog(plan.run_dir(config), run.step_number) if workers.leads else None
        for number in run_directory.damaged_metrics(plan.run_dir(config)) if workers.leads else ():
            say(
                f"line {number} of {plan.run_dir(config) / 'metrics.jsonl'} is damaged; what is left of it stays, as text in a line of the kind damaged"
            )
        trainees.append(Trainee(run, log, run_directory.mark(plan, config, store)))
        listener.started(config, run.step_number, run.steps)

    # --- one pass over the stream ------------------------------------------------------------------------------
    batch_tokens = plan.train.batch_tokens
    stream = TokenStream(store, hook, batch_tokens=batch_tokens, seed=plan.train.seed, share=batch.share)
    first = min((trainee.run.step_number for trainee in trainees), default=plan.train.steps)
    batches = stream.batches(first, plan.train.steps, pinned=torch.device(device).type == "cuda")
    clock = _Clock(batch_tokens)
    x_BD: Tensor | None = None
    for step, vectors in enumerate(batches, first):
        clock.loaded()
        x_BD = vectors.to(device, non_blocking=True).float() * scaling.scale
        for trainee in trainees:
            if trainee.run.failure is None and trainee.run.step_number == step:
                _step(plan, trainee, x_BD, clock, listener)
        clock.computed()
        if all(trainee.run.failure is not None for trainee in trainees):
            break
        if workers.any(should_stop()) and step + 1 < plan.train.steps:
            _stop(plan, trainees, results)
            break

    # --- save what was trained ---------------------------------------------------------------------------------
    for trainee in trainees:
        config = trainee.run.config
        if trainee.run.failure is not None:
            results[config.number] = Result(run=config, status="failed", detail=trainee.run.failure)
        elif config.number not in results:
            assert x_BD is not None  # a checkpoint is never of the last step, so there was a step to take
            sample_BD, whole = batch.gather(x_BD), trainee.run.undivided()
            if workers.leads:
                _finish(plan, store, whole, sample_BD, trainee.mark)
            results[config.number] = Result(run=config, status="trained")
    return [results[config.number] for config in runs]


def _place(
    plan: Plan,
    config: RunConfig,
    store: ActivationStore,
    device: str,
    resume: bool,
    restart: bool,
    world: int,
    say: Callable[[str], None],
    locks: contextlib.ExitStack,
) -> run_directory.State:
    """Lock a run's directory and make it ready."""
    locks.enter_context(run_directory.lock(plan, config))
    return run_directory.prepare(plan, config, store, device, resume=resume, restart=restart, world=world, say=say)


def _checkpoint(plan: Plan, config: RunConfig) -> State:
    return load_checkpoint(plan.run_dir(config), run_directory.identities(plan, config))


class _Clock:
    """Tokens per second of the whole pass, and the share of its time spent waiting for data."""

    def __init__(self, batch_tokens: int) -> None:
        self.batch_tokens = batch_tokens
        self.mark = time.perf_counter()
        self.waiting = self.working = 0.0
        self.batches = 0

    def loaded(self) -> None:
        now = time.perf_counter()
        self.waiting, self.mark = self.waiting + now - self.mark, now

    def computed(self) -> None:
        now = time.perf_counter()
        self.working, self.mark = self.working + now - self.mark, now
        self.batches += 1
        if self.batches == 1:  # the first batch warms up and is not counted
            self.waiting = self.working = 0.0

    def reading(self) -> dict[str, float] | None:
        """Over the pass so far without its first batch; None until there is something to tell."""
        total = self.waiting + self.working
        if not total:
            return None
        return {
            "tokens_per_s": (self.batches - 1) * self.batch_tokens / total,
            "data_loading_share": self.waiting / total,
        }


def _step(plan: Plan, trainee: Trainee, x_BD: Tensor, clock: _Clock, listener: Listener) -> None:
    run, config, settings = trainee.run, trainee.run.config, plan.train
    moment = run.curriculum.at(run.step_number)
    if run.step_number == 0 or moment.index != run.curriculum.at(run.step_number - 1).index:
        trainee.write({"kind": "stage", "step": run.step_number, "stage": moment.stage.name})
    parts = run.step(x_BD)
    logs = run.step_number % settings.log_steps == 0 or run.last_step_done()
    saves = run.step_number % settings.checkpoint_steps == 0 and not run.last_step_done()
    if run.diverged(parts["loss"]) or ((saves or run.last_step_done()) and not run.finite()):
        run.failure = run.failure or f"a weight became NaN or infinite by step {run.step_number}"
        kept = plan.run_dir(config) / CHECKPOINT
        message = f"{run.failure}; stopped" + (f", the last good state is in {kept}" if kept.is_file() else "")
        _warn(trainee, listener, message)
        return
    if logs:
        metrics = {**run.metrics(x_BD, parts), "time": clock.reading()}
        trainee.write(metrics)
        listener.metrics(config, metrics)
        for message in run.complaints(metrics):
            _warn(trainee, listener, message)
    if saves:
        _save(plan, trainee)


def _warn(trainee: Trainee, listener: Listener, message: str) -> None:
    trainee.write({"kind": "warning", "step": trainee.run.step_number, "message": message})
    listener.warning(trainee.run.config, message)


def _stop(plan: Plan, trainees: list[Trainee], results: dict[int, Result]) -> None:
    for trainee in trainees:
        config = trainee.run.config
        if trainee.run.failure is None and not trainee.run.finite():
            trainee.run.failure = f"a weight became NaN or infinite by step {trainee.run.step_number}"
        if trainee.run.failure is None:
            _save(plan, trainee)
            detail = f"at step {trainee.run.step_number} of {trainee.run.steps}; go on with --resume"
            results[config.number] = Result(run=config, status="stopped", detail=detail)


def _save(plan: Plan, trainee: Trainee) -> None:
    """Write a checkpoint, which is the same whoever and however many train."""
    trainee.run.check_same()
    state = trainee.run.state()
    if trainee.log is not None:
        save_checkpoint(state, plan.run_dir(trainee.run.config), trainee.mark)


def _finish(plan: Plan, store: ActivationStore, run: TrainingRun, x_BD: Tensor, mark: dict[str, Any]) -> None:
    """Write the folded model, the SAELens folders and, last, that the run is complete."""
    run_dir = plan.run_dir(run.config)
    metadata = {
        "model_name": plan.model.id,
        "hook_name": plan.hook.names[0],
        "hook_head_index": None,
        "context_size": store.context,
        "prepend_bos": store.spec.prepend_bos,
        "dataset_path": store.spec.corpus.corpus,
        "exclude_special_tokens": True,
    }
    model = fold(run, metadata, x_BD)
    save_model(model, run_dir / "model", mark)
    for name, sae in model.one_layer().items():
        saelens_folder.save(sae, run_dir / "saelens" / name)
    run_directory.finish(run_dir)
