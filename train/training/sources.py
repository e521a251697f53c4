"""Where batches of vectors come from: a store, an array in memory, or an iterable of batches.

Shapes: N vectors, B vectors of a batch, D width.
"""

import itertools
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hsae.cache.building.statistics import MEDIAN_SAMPLE
from hsae.cache.errors import UserError
from hsae.cache.launcher import ALONE, Share
from hsae.cache.reading.store import ActivationStore
from hsae.cache.reading.token_stream import TokenStream
from hsae.train.config.run_config import StreamConfig
from hsae.train.training.scaling import Scaling


class Source(Protocol):
    """Batches of vectors, and what is known of the vectors before the first batch."""

    scaling: Scaling
    metadata: dict[str, Any]
    """What SAELens folders say of the vectors: `model_name`, `hook_name`, ..."""

    def batches(self, first: int, *, pinned: bool = False) -> Iterator[Tensor]:
        """Batches `first` (from 0) to the last step's, each [B, D] in the vectors' own units and type.

        `pinned` asks for memory that a GPU copies from fast.
        """


class StoreSource:
    """Shuffled tokens of one hook of an activation store; of several workers, this one's `share` of every batch."""

    def __init__(
        self,
        store: ActivationStore,
        hook: str,
        stream: StreamConfig,
        share: Share = ALONE,
        *,
        batch_key: str = "train.batch_tokens",
    ) -> None:
        if hook not in store.spec.hooks:
            raise UserError(f"{store.url} holds {', '.join(store.spec.hooks)}, not {hook}; run `hsae cache build`")
        available = int(store.tokens_per_chunk.sum())
        if stream.batch_tokens > available:
            raise UserError(f"{batch_key} is {stream.batch_tokens}, but the store has only {available} tokens in all")
        statistics = store.statistics(hook)
        self.store, self.hook, self.stream, self.share = store, hook, stream, share
        self.scaling = Scaling.of_moments(
            statistics.mean_D,
            statistics.mean_square_norm,
            statistics.geometric_median_D,
            f"{store.url}: the activations at {hook}",
        )
        self.metadata = {
            "model_name": store.spec.model.id,
            "hook_name": hook,
            "hook_head_index": None,
            "context_size": store.context,
            "prepend_bos": store.spec.prepend_bos,
            "dataset_path": store.spec.corpus.corpus,
            "exclude_special_tokens": True,
        }

    def batches(self, first: int, *, pinned: bool = False) -> Iterator[Tensor]:
        """Batches `first` to the last step's, read ahead by a thread."""
        tokens = TokenStream(
            self.store, self.hook, batch_tokens=self.stream.batch_tokens, seed=self.stream.seed, share=self.share
        )
        return tokens.batches(first, self.stream.steps, pinned=pinned)


class ArraySource:
    """Vectors [N, D] in memory, shuffled anew every epoch by the stream's seed; epochs follow without gaps."""

    def __init__(self, vectors_ND: Tensor, stream: StreamConfig) -> None:
        if len(vectors_ND) < stream.batch_tokens:
            raise UserError(
                f"x has {len(vectors_ND):,} vectors, fewer than batch_tokens = {stream.batch_tokens:,}; "
                "give more vectors, or a smaller batch_tokens"
            )
        self.vectors_ND, self.stream = vectors_ND, stream
        self.scaling = Scaling.of_vectors(vectors_ND, "the vectors of x")
        self.metadata: dict[str, Any] = {}

    def batches(self, first: int, *, pinned: bool = False) -> Iterator[Tensor]:
        """Batches `first` to the last step's."""
        generator = torch.Generator().manual_seed(self.stream.seed)
        size = self.stream.batch_tokens
        order_M = torch.empty(0, dtype=torch.int64)
        for step in range(self.stream.steps):
            if len(order_M) < size:
                order_M = torch.cat([order_M, torch.randperm(len(self.vectors_ND), generator=generator)])
            if step >= first:
                yield self.vectors_ND[order_M[:size].to(self.vectors_ND.device)]
            order_M = order_M[size:]


class IterableSource:
    """Batches [., D] of any sizes from an iterable, regrouped into batches of the stream's, in the order they come.

    The scaling is measured on the first batches, about 8,192 vectors, which are then trained on. What can be iterated
    again (a list, a DataLoader) is, until all steps are taken; an iterator has to last that long.
    """

    def __init__(self, batches: Iterable[Any], stream: StreamConfig) -> None:
        regrouped = _regrouped(batches, stream)
        first = list(itertools.islice(regrouped, -(-MEDIAN_SAMPLE // stream.batch_tokens)))
        self.scaling = Scaling.of_vectors(torch.cat(first), "the first batches of x")
        self.metadata: dict[str, Any] = {}
        self._batches = itertools.chain(first, regrouped)

    def batches(self, first: int, *, pinned: bool = False) -> Iterator[Tensor]:
        """Batches `first` to the last step's; they can be read once."""
        return itertools.islice(self._batches, first, None)


def _regrouped(batches: Iterable[Any], stream: StreamConfig) -> Iterator[Tensor]:
    """The batches [B, D] of all steps. Raises UserError if a batch can't be used, or they end too early."""
    numbered, waiting, size = enumerate(_repeated(batches), 1), torch.empty(0), stream.batch_tokens
    for step in range(stream.steps):
        while len(waiting) < size:
            number, batch = next(numbered, (0, None))
            if not number:
                raise UserError(
                    f"x ended after {step:,} of {stream.steps:,} steps of {size:,} vectors; "
                    "give an iterator that lasts longer, or fewer tokens (or steps)"
                )
            vectors = as_vectors(batch, f"batch {number} of x")
            if len(waiting) and waiting.shape[1] != vectors.shape[1]:
                raise UserError(f"batch {number} of x has width {vectors.shape[1]}, those before {waiting.shape[1]}")
            if not vectors.isfinite().all():
                raise UserError(f"batch {number} of x has NaN or infinite values")
            waiting = torch.cat([waiting, vectors]) if len(waiting) else vectors
        yield waiting[:size]
        waiting = waiting[size:]


def _repeated(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, again and again if they can be iterated again."""
    is_empty = False
    while not is_empty:
        is_empty = True
        for batch in batches:
            is_empty = isinstance(batches, Iterator)
            yield batch


def as_vectors(x: Any, what: str) -> Tensor:
    """`x`, a tensor or an array, as floating-point vectors [N, D] without gradient. Raises UserError, naming `what`."""
    if isinstance(x, np.ndarray):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a read-only array must not be written to, which nobody does here
            try:
                x = torch.from_numpy(x)
            except TypeError:
                raise UserError(f"{what} has type {x.dtype}; give floating-point vectors") from None
    if not isinstance(x, Tensor):
        raise UserError(f"{what} is a {type(x).__name__}; give a tensor or an array of vectors [N, D]")
    if x.ndim != 2:
        flat = ", for example x.reshape(-1, x.shape[-1])" if x.ndim > 2 else ""
        raise UserError(f"{what} has shape {tuple(x.shape)}; give vectors [N, D]{flat}")
    if not x.is_floating_point():
        raise UserError(f"{what} has type {str(x.dtype).removeprefix('torch.')}; give floating-point vectors")
    return x.detach()
