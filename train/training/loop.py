"""The training loop: runs take their steps on one stream of batches. It knows neither plans nor folders.

Shapes: B vectors of a batch (of several workers, this one's share of it), D width.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hsae.cache.errors import UserError
from hsae.cache.profiling import labelled, step_done
from hsae.train.config.run_config import RunConfig, StreamConfig
from hsae.train.training.curriculum import stages
from hsae.train.training.listener import Listener, SeededRun
from hsae.train.training.training_run import TrainingRun


class Journal:
    """Where a run's log and checkpoints go; this one keeps nothing."""

    def write(self, line: dict[str, Any]) -> None:
        """Append a line to the log."""

    def save(self, run: TrainingRun) -> None:
        """Write a checkpoint."""

    def last_save(self) -> str:
        """What a message about a failed run says of its last checkpoint."""
        return ""


@dataclass(frozen=True)
class Trainee:
    """A run in training, its journal, and which of the plan's seeds it has."""

    run: TrainingRun
    journal: Journal = field(default_factory=Journal)
    seed_index: int = 0

    @property
    def named(self) -> SeededRun:
        """What listeners know it by."""
        return SeededRun(config=self.run.config, seed_index=self.seed_index)


def check_run(config: RunConfig, stream: StreamConfig, *, where: str, tokens: str) -> None:
    """Refuse a run that can't work on a stream; messages begin with `where` and call the number of tokens `tokens`."""
    if round(min(config.l0) * stream.batch_tokens) < 1:
        raise UserError(f"{where}: l0 {config.l0} keeps no latent in a batch of {stream.batch_tokens}")
    if len(stages(config)) > stream.steps:
        raise UserError(
            f"{where}: its curriculum has {len(stages(config))} stages, but {tokens} makes only "
            f"{stream.steps} steps of {stream.batch_tokens} tokens"
        )


def run_steps(
    trainees: Sequence[Trainee],
    batches: Iterable[Tensor],
    stream: StreamConfig,
    listener: Listener,
    *,
    should_stop: Callable[[], bool] = lambda: False,
) -> Tensor:
    """Take all steps that are left of every run, and return the last batch [B, D], scaled.

    `batches` [B, D], in the vectors' own units, begin where the run that is least far stands; a run that is further
    waits. All runs share one device, one scaling and the stream's number of steps. Whether losses are finite is asked
    where the device is waited for anyway: at lines of the log, checkpoints and the end. A run whose loss or weights
    stopped being finite then gets a `failure` and takes no more steps. When `should_stop` says so, the others are saved
    after the current step.
    """
    first = min(trainee.run.step_number for trainee in trainees)
    device, scale = trainees[0].run.device, trainees[0].run.scaling.scale
    clock = _Clock(stream.batch_tokens)
    x_BD = torch.empty(0)
    for step, vectors in enumerate(labelled("data", batches), first):
        clock.loaded()
        x_BD = vectors.to(device, non_blocking=True).float() * scale
        for trainee in trainees:
            if trainee.run.failure is None and trainee.run.step_number == step:
                _step(trainee, x_BD, stream, clock, listener)
        clock.computed()
        step_done("steps")
        sound = [trainee for trainee in trainees if trainee.run.failure is None]
        if not sound:
            break
        if should_stop() and step + 1 < stream.steps:
            for trainee in sound:
                if _is_sound(trainee, listener, saved=True):
                    trainee.journal.save(trainee.run)
            break
    return x_BD


def _step(trainee: Trainee, x_BD: Tensor, stream: StreamConfig, clock: "_Clock", listener: Listener) -> None:
    run = trainee.run
    moment = run.curriculum.at(run.step_number)
    if moment.starts:
        trainee.journal.write({"kind": "stage", "step": run.step_number, "stage": moment.stage.name})
    losses = run.step(x_BD)
    run.watch(losses["loss"])
    is_last = run.is_done
    is_saved = run.step_number % stream.checkpoint_steps == 0 and not is_last
    is_logged = run.step_number % stream.log_steps == 0 or is_last
    if (is_saved or is_logged) and not _is_sound(trainee, listener, saved=is_saved or is_last):
        return
    if is_logged:
        metrics = {**run.metrics(x_BD, losses), "time": clock.reading()}
        trainee.journal.write(metrics)
        listener.metrics(trainee.named, metrics)
        for message in run.complaints(metrics):
            _warn(trainee, listener, message)
    if is_saved:
        trainee.journal.save(run)


def _is_sound(trainee: Trainee, listener: Listener, *, saved: bool) -> bool:
    """Whether all losses of a run were finite, and, before it is `saved`, its weights are; if not, it is said."""
    run = trainee.run
    if run.check_loss() and (not saved or run.check_weights()):
        return True
    _warn(trainee, listener, f"{run.failure}; stopped{trainee.journal.last_save()}")
    return False


def _warn(trainee: Trainee, listener: Listener, message: str) -> None:
    trainee.journal.write({"kind": "warning", "step": trainee.run.step_number, "message": message})
    listener.warning(trainee.named, message)


class _Clock:
    """Tokens per second of the whole pass, and the share of its time spent waiting for data."""

    def __init__(self, batch_tokens: int) -> None:
        self.batch_tokens = batch_tokens
        self.last = time.perf_counter()
        self.waiting = self.working = 0.0
        self.batches = 0

    def loaded(self) -> None:
        now = time.perf_counter()
        self.waiting, self.last = self.waiting + now - self.last, now

    def computed(self) -> None:
        now = time.perf_counter()
        self.working, self.last = self.working + now - self.last, now
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
