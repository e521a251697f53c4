"""`hsae.fit`: one model trained on vectors at hand, without a plan."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hsae.cache.device import pick_device
from hsae.cache.errors import UserError
from hsae.cache.reading.store import ActivationStore
from hsae.train.config.checked import checked
from hsae.train.config.run_config import CompositionConfig, RunConfig, Stage, StreamConfig
from hsae.train.model.hierarchical_sae import HierarchicalSAE
from hsae.train.runs.metrics_log import MetricsLog
from hsae.train.runs.run_directory import write_model
from hsae.train.training.folding import fold
from hsae.train.training.listener import Listener, ProgressBars, SeededRun
from hsae.train.training.loop import Journal, Trainee, check_run, run_steps
from hsae.train.training.sources import ArraySource, IterableSource, Source, StoreSource, as_vectors
from hsae.train.training.training_run import TrainingRun

LEAST_STEPS = 1000
"""Steps of a training on few vectors, if neither tokens nor steps are given."""


def fit(
    x: Tensor | NDArray[Any] | ActivationStore | Iterable[Any],
    *,
    widths: Sequence[int],
    l0: Sequence[float],
    structure: Literal["flat", "stacked", "additive"] | None = None,
    activation: str = "batchtopk",
    composition: str | dict[str, Any] | CompositionConfig = "none",
    curriculum: Literal["none", "coarse-first", "fine-first"] | Sequence[Stage | dict[str, Any]] = "none",
    tokens: int | None = None,
    steps: int | None = None,
    batch_tokens: int = 2048,
    seed: int = 0,
    hook: str | None = None,
    device: str = "auto",
    progress: bool | Callable[[dict[str, Any]], object] = True,
    log_steps: int = 10,
    folder: Path | str | None = None,
    **settings: Any,
) -> HierarchicalSAE:
    """Train one sparse autoencoder, flat or hierarchical, on vectors at hand.

    >>> import torch, hsae
    >>> x = torch.randn(4000, 16)
    >>> model = hsae.fit(x, widths=[48, 12], l0=[6, 2], steps=30, batch_tokens=256, progress=False)
    >>> model.level_widths
    (48, 12)

    Args:
        x: vectors [N, D], a tensor or a numpy array, shuffled anew every epoch; or an activation store; or an iterable
            of batches [., D] of any sizes, taken in the order they come (one that can be iterated again, a list or a
            DataLoader, is read again until all steps are taken). Vectors are scaled so that E||x||^2 = D, by what all
            of x says, or the store's statistics, or the first 8,192 vectors of an iterable; the model that is returned
            takes vectors in their own units.
        widths: latents of each level, finest first.
        l0: active latents per vector of each level.
        structure: default flat for one level, additive for more.
        activation: of every level.
        composition: a mode (`none`, `normalised`, `literal`, `probe`, `frozen`), or all keys of CompositionConfig.
        curriculum: a packaged one, or stages.
        tokens: vectors to train on; more than x has means several epochs. Default: as many as x has, but at least
            1,000 steps. `steps` says the same in steps; one of the two is needed for an iterable.
        batch_tokens: vectors of one step.
        seed: order of the vectors and initial weights. A store is read in the order in which `hsae train` reads it, and
            with the same settings (`number`, the run's, among them) and seed gives the same bits.
        hook: which hook of a store that has several.
        device: auto, cpu, cuda or cuda:N.
        progress: True shows a bar, a function is called with the metrics every `log_steps` steps.
        folder: a folder for model/, saelens/ and metrics.jsonl, as in a run directory; it must be new or empty.
        **settings: any other setting of a run in a plan: `learning_rate`, `precision`, `dead_after_tokens`, ...
            (all of them in RunConfig).

    Raises:
        UserError: what is asked is impossible; or the loss or a weight became NaN or infinite.
    """
    place = pick_device(device)
    if steps is not None and tokens is not None:
        raise UserError(f"fit: tokens={tokens} and steps={steps} exclude each other; give one")
    if isinstance(x, Tensor | np.ndarray):
        x = as_vectors(x, "x")
    size = _size(x)
    if steps is None and tokens is None and size is None:
        raise UserError("fit: give steps, or tokens, for an iterable of batches")
    if tokens is None:
        tokens = max(size or 0, LEAST_STEPS * batch_tokens) if steps is None else steps * batch_tokens
    stream_settings = {"tokens": tokens, "batch_tokens": batch_tokens, "seed": seed, "log_steps": log_steps}
    stream = checked("fit", "", StreamConfig, stream_settings)
    run_settings = {
        "number": 0,
        "name": "fit",
        "structure": structure or ("flat" if len(tuple(widths)) == 1 else "additive"),
        "widths": tuple(widths),
        "l0": tuple(l0),
        "activation": activation,
        "composition": {"mode": composition} if isinstance(composition, str) else composition,
        "curriculum": curriculum if isinstance(curriculum, str) else tuple(curriculum),
        **settings,
    }
    config = checked("fit", "", RunConfig, run_settings)
    check_run(config, stream, where="fit", tokens="tokens")
    journal = Journal() if folder is None else _FolderJournal(Path(folder))
    source = _source(x, stream, hook)
    with ExitStack() as stack:
        listener: Listener = _Caller(progress) if callable(progress) else Listener()
        if progress is True:
            listener = stack.enter_context(ProgressBars())
        run = TrainingRun(config, source.scaling, steps=stream.steps, seed=stream.seed, device=place)
        listener.started(SeededRun(config=config), 0, stream.steps)
        batches = source.batches(0, pinned=torch.device(place).type == "cuda")
        x_BD = run_steps([Trainee(run, journal)], batches, stream, listener)
    if run.failure is not None:
        raise UserError(f"fit: {run.failure}; a lower learning_rate than {config.rate:.2g} may help")
    model = fold(run, source.metadata, x_BD)
    if folder is not None:
        write_model(model, Path(folder))
    return model


def _size(x: object) -> int | None:
    """How many vectors there are, where that is known before they are read."""
    if isinstance(x, Tensor):
        return len(x)
    return int(x.tokens_per_chunk.sum()) if isinstance(x, ActivationStore) else None


def _source(x: Any, stream: StreamConfig, hook: str | None) -> Source:
    if isinstance(x, ActivationStore):
        return StoreSource(x, x.only_hook(hook), stream, batch_key="batch_tokens")
    if hook is not None:
        raise UserError(f"fit: hook={hook!r} is for an activation store, not for a {type(x).__name__}")
    if isinstance(x, Tensor):
        return ArraySource(x, stream)
    if not isinstance(x, Iterable):
        kind = type(x).__name__
        raise UserError(f"fit: x is a {kind}; give vectors [N, D], an activation store, or an iterable of batches")
    return IterableSource(x, stream)


class _Caller(Listener):
    """Calls a function with every line of metrics."""

    def __init__(self, call: Callable[[dict[str, Any]], object]) -> None:
        self.call = call

    def metrics(self, run: SeededRun, metrics: dict[str, Any]) -> None:
        """Pass them on."""
        self.call(metrics)


class _FolderJournal(Journal):
    """Keeps the log in a new folder, and no checkpoints."""

    def __init__(self, folder: Path) -> None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"fit: folder {folder} is not empty; name a new one")
        folder.mkdir(parents=True, exist_ok=True)
        self.log = MetricsLog(folder, 0)

    def write(self, line: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        self.log.write(line)
