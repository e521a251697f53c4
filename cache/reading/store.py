"""An activation store, opened for reading.

Shapes: R rows, T context length, D residual width.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hsae.cache.errors import StoreError, UserError
from hsae.cache.format import layout
from hsae.cache.format.arrays import ITEM_BYTES
from hsae.cache.format.spec import StoreSpec
from hsae.cache.progress import format_bytes
from hsae.cache.reading.mapped_chunks import MappedArray, count_kept, read_checks
from hsae.cache.reading.scratch import Prefetcher
from hsae.cache.reading.token_stream import TokenStream
from hsae.cache.storage.paths import Place, map_parallel, place


@dataclass(frozen=True, kw_only=True)
class HookStatistics:
    """Moments of the residual at one hook over a sample of non-special tokens."""

    mean_D: Tensor
    """[D] float64"""
    mean_square_norm: float
    """E||x||^2"""
    geometric_median_D: Tensor
    """[D] float64: the point with the least summed distance to the sample."""
    tokens: int
    """Tokens the mean was taken over."""


class ActivationStore:
    """An activation store: the residual stream of a language model at some hooks, row by row of a text.

    Opened with `ActivationStore.open(path or URL)`. Chunks are read through memory maps, and checked when they are
    first read. `batches` shuffles single tokens for training; `tokens`, `acts` and others read rows, of which there
    are `len(store)`.

    >>> store = ActivationStore.open("activations/gemma-3-270m-train-0123456789abcdef.zarr")  # doctest: +SKIP
    >>> for x in store.batches(batch_tokens=4096, seed=0):  # doctest: +SKIP
    ...     train_on(x.float())
    """

    def __init__(self, root: Place, *, spec: StoreSpec | None = None, require_complete: bool = True) -> None:
        self.root, self.url = root, str(root)
        self.header = layout.read_header(root, spec)
        self.spec = self.header.spec
        if require_complete and not self.header.complete:
            raise StoreError(f"{root} is not finished; go on with `{layout.build_command(root)}`")
        specs = layout.every_array(self.header)
        lists = [] if self.header.checks is None else [layout.checks_array(specs)]
        for _ in map_parallel(partial(layout.check_array, root), [*specs, *lists]):
            pass
        checks = read_checks(root, self.header)
        self._arrays = {spec.path: MappedArray(root, spec, checks.get(spec.path)) for spec in specs}
        self._prefetcher = Prefetcher()
        self.hooks, self.d_model = self.spec.hooks, self.header.d_model
        self.rows, self.context, self.clean_rows = self.spec.rows, self.spec.context, self.spec.clean_rows
        self.chunk_rows = layout.chunk_rows(self.spec, self.d_model)
        self.chunks = self._arrays["tokens"].spec.count
        self.token_bytes = self.d_model * ITEM_BYTES[self.spec.model.dtype]

    def __len__(self) -> int:
        return self.rows

    def __repr__(self) -> str:
        spec = self.spec
        state = "" if self.header.complete else ", not finished"
        return (
            f"ActivationStore({self.url!r}: {spec.split} store of {spec.model.id} at {', '.join(spec.hooks)}; "
            f"{self.rows:,} rows of {self.context} tokens, width {self.d_model}, {spec.model.dtype}{state})"
        )

    def describe(self) -> dict[str, str]:
        """What the store holds and what it was made from, in words."""
        header, spec, corpus = self.header, self.spec, self.spec.corpus
        last = "the last" if corpus.last_document is None else str(corpus.last_document - 1)
        text = f"{corpus.corpus}, documents {corpus.first_document} to {last}, digest {header.corpus_digest[:12]}"
        revision = spec.model.revision or "default revision"
        norms = {
            f"norm at {hook}": f"root mean square {item.mean_square_norm**0.5:,.4g} over {item.tokens:,} tokens"
            for hook, item in header.statistics.items()
        }
        return {
            "state": "complete" if header.complete else f"not finished; go on with `{layout.build_command(self.root)}`",
            "model": f"{spec.model.id} ({revision}), {spec.model.dtype}, digest {header.model_digest[:12]}",
            "hooks": ", ".join(spec.hooks),
            "text": text,
            "rows": f"{spec.rows:,} of {spec.context} tokens, width {self.d_model}; "
            f"clean losses for {spec.clean_rows:,}",
            "chunks": f"{self.chunks:,} of {self.chunk_rows} rows, {spec.codec}",
            "passes": f"{spec.pass_rows} rows each, layers {'compiled' if spec.compiled else 'not compiled'}",
            "size": format_bytes(layout.total_bytes(spec, self.d_model)),
            "versions": ", ".join(f"{name} {number}" for name, number in header.versions.items()),
            **norms,
        }

    @classmethod
    def open(cls, url: str | Place, *, require_complete: bool = True) -> "ActivationStore":
        """Open the store at a local path or a URL. Raises StoreError if it is missing, unfinished or damaged."""
        return cls(place(url), require_complete=require_complete)

    @classmethod
    def of(cls, spec: StoreSpec, folder: str | Place) -> "ActivationStore":
        """Open the finished store of `spec` in a folder or at a URL. Raises StoreError if it is missing or another."""
        return cls(place(folder) / spec.name, spec=spec)

    def batches(
        self, hook: str | None = None, *, batch_tokens: int = 4096, seed: int = 0, epochs: int | None = 1
    ) -> Iterator[Tensor]:
        """Shuffled batches [batch_tokens, D] of the residual at `hook`, in the store's type, on the CPU.

        Special tokens (pad, EOS, BOS) are left out. Every other token comes once an epoch, in an order that depends
        on the store and `seed` alone. `epochs` passes are made, None for endlessly many; an epoch begins within a
        batch where the one before it ends, and a last batch that is not full is left out. `hook` may be left out
        where the store has one. The next batches are read in the background. `TokenStream` gives any one batch by its
        number.

        Raises StoreError if the store has no such hook, or fewer tokens than one batch.
        """
        if batch_tokens < 1 or (epochs is not None and epochs < 1):
            raise UserError(f"batch_tokens={batch_tokens}, epochs={epochs}: give numbers from 1 on")
        stream = TokenStream(self, self.only_hook(hook), batch_tokens=batch_tokens, seed=seed)
        steps = None if epochs is None else stream.tokens_per_epoch * epochs // batch_tokens
        if steps == 0:
            tokens = f"{stream.tokens_per_epoch:,} tokens without special ones"
            raise StoreError(f"{self.url} has {tokens}, less than a batch of {batch_tokens:,}; lower batch_tokens")
        return stream.batches(0, steps)

    def only_hook(self, hook: str | None = None) -> str:
        """`hook`, or the store's hook where it has one. Raises StoreError for one that the store does not have."""
        if hook is None:
            if len(self.hooks) > 1:
                raise StoreError(f"{self.url} has several hooks: name one of {', '.join(self.hooks)}")
            return self.hooks[0]
        self._acts(hook)
        return hook

    def tokens(self, start: int, stop: int) -> Tensor:
        """Token ids [stop - start, T], int32."""
        return self._arrays["tokens"].rows(start, stop)

    def acts(self, hook: str, start: int, stop: int) -> Tensor:
        """Residuals [stop - start, T, D] at a hook, in the store's type; a view of mapped pages if in one chunk."""
        return self._acts(hook).rows(start, stop)

    def acts_chunk(self, hook: str, index: int) -> Tensor:
        """Residuals of chunk `index`, [rows, T, D], mapped."""
        return self._acts(hook).chunk(index)

    def mapped_in_place(self, hook: str) -> bool:
        """Whether chunks are mapped where they lie; others are fetched into the scratch folder first."""
        return self._acts(hook).in_place

    @cached_property
    def tokens_per_chunk(self) -> NDArray[np.int64]:
        """Non-special tokens of each chunk [chunks], of an older store by reading all tokens."""
        if self.header.kept_tokens is None:
            tokens = self._arrays["tokens"]
            return count_kept(self.root, tokens.spec, self.header.special_ids, tokens.checks)
        counts = self._arrays["stats/kept"].chunk(0).numpy().astype(np.int64)
        if counts.sum() != self.header.kept_tokens:
            problem = f"the header tells of {self.header.kept_tokens} kept tokens, the chunks of {counts.sum()}"
            raise StoreError(f"{self.url}: {problem}; build it again")
        return counts

    def prefetch(self, wanted: Iterable[tuple[str, int]]) -> None:
        """Fetch these chunks, (array, number), in the background, in this order, instead of the last call's."""
        self._prefetcher.order(
            partial(self._arrays[path].fetch, index) for path, index in wanted if not self._arrays[path].in_place
        )

    def documents(self) -> list[tuple[int, str | None]]:
        """For each row, the number of its document and its topic. Raises StoreError if rows mix documents."""
        return layout.read_documents(self.root, self.header)

    def special_mask(self, tokens: Tensor) -> Tensor:
        """True where a token is pad, EOS or BOS."""
        return torch.isin(tokens, torch.tensor(self.header.special_ids, dtype=tokens.dtype, device=tokens.device))

    def statistics(self, hook: str) -> HookStatistics:
        """Mean, mean square norm and geometric median of the residual at a hook."""
        self._acts(hook)
        if (summary := self.header.statistics.get(hook)) is None:
            command = layout.build_command(self.root)
            raise StoreError(f"{self.url} has no statistics of {hook}; finish it with `{command}`")
        return HookStatistics(
            mean_D=self._arrays[f"stats/{hook}/mean"].chunk(0).clone(),
            mean_square_norm=summary.mean_square_norm,
            geometric_median_D=self._arrays[f"stats/{hook}/geometric_median"].chunk(0).clone(),
            tokens=summary.tokens,
        )

    def clean(self, name: Literal["loss", "final"], start: int, stop: int) -> Tensor:
        """The clean model's next-token loss [.., T] (nats, last column 0) or final vector [.., T, D], of clean rows."""
        return self._clean(f"clean/{name}").rows(start, stop)

    def ablation(self, hook: str, name: Literal["loss", "kl"], start: int, stop: int) -> Tensor:
        """Next-token loss or KL(clean || ablated) [.., T], nats, with the residual at `hook` zeroed, of clean rows."""
        self._acts(hook)
        return self._clean(f"ablation/{hook}/{name}").rows(start, stop)

    def _acts(self, hook: str) -> MappedArray:
        if hook not in self.spec.hooks:
            raise StoreError(f"{self.url} holds {', '.join(self.spec.hooks)}, not {hook}")
        return self._arrays[f"acts/{hook}"]

    def _clean(self, path: str) -> MappedArray:
        if path not in self._arrays:
            raise StoreError(
                f"{self.url} keeps no clean losses (it is a {self.spec.split} store); use the evaluation store"
            )
        return self._arrays[path]
