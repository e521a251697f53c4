"""Shuffled batches of single tokens from a store: a pure function of (seed, step).

Shapes: B tokens of a batch, T context length, D residual width.

The tokens of each epoch are laid out in one order, epoch after epoch, without gaps: batch s is positions s*B to
(s+1)*B. Within an epoch the chunks are permuted and cut into windows of at most `window_tokens` tokens; within a
window every token is permuted. A store that fits into one window is shuffled completely. Only the order of the
current window is in memory (8 bytes a token).

Where chunks are fetched into the scratch folder, a window is also at most `WINDOW_BYTES`, whatever the folder's budget
is, so that the order depends on the store alone. Its chunks and the next window's are fetched ahead, in the order in
which they will be needed. Of W workers that share a batch, worker r reads positions s*B + r*B/W to s*B + (r+1)*B/W:
together the same batch, whatever W is.
"""

import itertools
import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hsae.cache.errors import StoreError
from hsae.cache.launcher import ALONE, Share

if TYPE_CHECKING:
    from hsae.cache.reading.store import ActivationStore

PREFETCHED = 2
WINDOW_BYTES = 16 << 30


@dataclass(frozen=True)
class _Window:
    epoch: int
    index: int
    start: int  # position of its first token within the epoch
    order: NDArray[np.int64]  # shuffled token addresses: chunk * chunk_rows * T + position within the chunk


class TokenStream:
    """Batches of the non-special tokens of one hook of one store."""

    def __init__(
        self,
        store: "ActivationStore",
        hook: str,
        *,
        batch_tokens: int,
        seed: int,
        window_tokens: int = 1 << 25,
        share: Share = ALONE,
    ) -> None:
        self.store, self.hook, self.batch_tokens, self.seed = store, hook, batch_tokens, seed
        self.share_tokens, self.share_first = batch_tokens // share.world, batch_tokens // share.world * share.rank
        fetched = not store.mapped_in_place(hook)
        self.window_tokens = min(window_tokens, max(1, WINDOW_BYTES // store.token_bytes)) if fetched else window_tokens
        self._counts = store.tokens_per_chunk
        self.tokens_per_epoch = int(self._counts.sum())
        if self.tokens_per_epoch == 0:
            raise StoreError(f"{store.url} holds special tokens only; use another corpus")
        self._chunk_tokens = store.chunk_rows * store.context
        self._window: _Window | None = None
        self._bounds: tuple[int, list[NDArray[np.int64]], NDArray[np.int64]] | None = None

    def batch(self, step: int) -> Tensor:
        """Batch `step`, [B, D] in the store's type; of several workers, this one's share of it."""
        first = step * self.batch_tokens + self.share_first
        addresses = np.concatenate(list(self._addresses(first, first + self.share_tokens)))
        order = np.argsort(addresses)  # whole rows are copied chunk by chunk, then put in their places
        chunks, places = np.divmod(addresses[order], self._chunk_tokens)
        edges = [0, *(np.flatnonzero(np.diff(chunks)) + 1), len(chunks)]
        first_chunk = self.store.acts_chunk(self.hook, int(chunks[0]))
        gathered = torch.empty(len(chunks), first_chunk.shape[-1], dtype=first_chunk.dtype)
        for start, stop in itertools.pairwise(edges):
            flat = self.store.acts_chunk(self.hook, int(chunks[start])).flatten(0, 1)
            torch.index_select(flat, 0, torch.from_numpy(places[start:stop]), out=gathered[start:stop])
        return gathered.index_select(0, torch.from_numpy(np.argsort(order)))

    def batches(
        self, first_step: int, last_step: int | None, prefetch: int = PREFETCHED, *, pinned: bool = False
    ) -> Iterator[Tensor]:
        """Batches first_step to last_step - 1 (None: no end), made ahead by a thread; `pinned` for a GPU."""

        def steps() -> Iterable[int]:
            return itertools.count(first_step) if last_step is None else range(first_step, last_step)

        ready: queue.Queue[Tensor | BaseException] = queue.Queue(maxsize=prefetch)
        done = threading.Event()

        def put(item: Tensor | BaseException) -> None:
            while not done.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def produce() -> None:
            try:
                for step in steps():
                    if done.is_set():
                        return
                    batch = self.batch(step)
                    put(batch.pin_memory() if pinned else batch)
            except BaseException as error:
                put(error)

        thread = threading.Thread(target=produce, name="hsae-stream", daemon=True)
        thread.start()
        try:
            for _ in steps():
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            done.set()
            thread.join()

    def _positions(self, chunk: int) -> NDArray[np.int64]:
        """Positions of a chunk's non-special tokens, within the chunk."""
        step = self.store.chunk_rows
        tokens = self.store.tokens(chunk * step, min((chunk + 1) * step, self.store.rows))
        return np.flatnonzero(~self.store.special_mask(tokens).flatten().numpy()).astype(np.int64, copy=False)

    def _addresses(self, first: int, last: int) -> Iterator[NDArray[np.int64]]:
        """Token addresses at positions first to last - 1 of the endless sequence of epochs."""
        while first < last:
            epoch, place = divmod(first, self.tokens_per_epoch)
            window = self._window_at(epoch, place)
            start = place - window.start
            part = window.order[start : start + last - first]
            yield part
            first += len(part)

    def _window_at(self, epoch: int, place: int) -> _Window:
        if self._bounds is None or self._bounds[0] != epoch:
            self._bounds = (epoch, *self._windows_of(epoch))
        _, groups, starts = self._bounds
        index = int(np.searchsorted(starts, place, side="right")) - 1
        if self._window is None or (self._window.epoch, self._window.index) != (epoch, index):
            self.store.prefetch(self._needed(epoch, index))
            self._window = None  # let the old order go before the new one is made
            chunks = groups[index].tolist()
            order = np.concatenate([self._positions(chunk) + chunk * self._chunk_tokens for chunk in chunks])
            if len(order) != self._counts[groups[index]].sum():
                raise StoreError(f"{self.store.url} has other tokens than it says; run `hsae cache verify`")
            np.random.Generator(np.random.Philox(key=[self.seed, (epoch << 32) + index + 1])).shuffle(order)
            self._window = _Window(epoch, index, int(starts[index]), order)
        return self._window

    def _needed(self, epoch: int, index: int) -> list[tuple[str, int]]:
        """The tokens and chunks of a window, in the order in which they are needed, and of the next window."""
        assert self._bounds is not None
        groups = self._bounds[1]
        following = groups[index + 1] if index + 1 < len(groups) else self._windows_of(epoch + 1)[0][0]
        needed = (
            (path, chunk)
            for group in (groups[index], following)
            for path, chunks in (("tokens", group), (f"acts/{self.hook}", sorted(group.tolist())))
            for chunk in map(int, chunks)
        )
        return list(dict.fromkeys(needed))

    def _windows_of(self, epoch: int) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
        """The epoch's permuted chunks cut into windows, and the position at which each window starts."""
        chunks = np.random.Generator(np.random.Philox(key=[self.seed, epoch << 32])).permutation(len(self._counts))
        sizes = self._counts[chunks]
        group = np.maximum(np.cumsum(sizes) - 1, 0) // self.window_tokens
        groups = [part for part in np.split(chunks, np.flatnonzero(np.diff(group)) + 1) if self._counts[part].sum()]
        starts = np.cumsum([0, *(self._counts[part].sum() for part in groups[:-1])])
        return groups, starts
