"""Opening an activation store for reading.

Shapes: R rows, T context length, D residual width.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hsae.cache.errors import StoreError
from hsae.cache.format.layout import (
    ITEM_BYTES,
    ArraySpec,
    Header,
    build_command,
    check_array,
    checks_array,
    chunk_rows,
    every_array,
    held_by,
    read_documents,
    read_header,
)
from hsae.cache.format.spec import StoreSpec
from hsae.cache.language_model import sources
from hsae.cache.reading.mapped_chunks import MappedArray, count_kept, read_checks
from hsae.cache.reading.scratch import Prefetcher
from hsae.cache.storage.paths import Place, many, place
from hsae.cache.suites.store_files import SuiteHeader

if TYPE_CHECKING:
    from hsae.cache.language_model.lm import LanguageModel

DIGESTS = {"model": sources.weights_digest, "tokenizer": sources.tokenizer_digest}


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
    """A finished store (or, where asked for, an unfinished one), read through memory maps."""

    def __init__(self, root: Place, *, spec: StoreSpec | None = None, require_complete: bool = True) -> None:
        self.root, self.url = root, str(root)
        self.header = read_header(root) if spec is None else held_by(root, spec)
        self.spec = self.header.spec
        if require_complete and not self.header.complete:
            raise StoreError(f"{root} is not finished; go on with `{build_command(root)}`")
        self._specs: dict[str, ArraySpec] = {spec.path: spec for spec in every_array(self.header)}
        lists = [] if self.header.checks is None else [checks_array(list(self._specs.values()))]
        for _ in many(lambda spec: check_array(root, spec), [*self._specs.values(), *lists]):
            pass
        checks = read_checks(root, self.header)
        self._arrays = {path: MappedArray(root, spec, checks.get(path)) for path, spec in self._specs.items()}
        self._prefetcher = Prefetcher()
        self.rows, self.context, self.clean_rows = self.spec.rows, self.spec.context, self.spec.clean_rows
        self.chunk_rows = chunk_rows(self.spec, self.header.d_model)
        self.chunks = self._specs["tokens"].count
        self.token_bytes = self.header.d_model * ITEM_BYTES[self.spec.model.dtype]

    @classmethod
    def open(cls, url: str | Place, *, require_complete: bool = True) -> "ActivationStore":
        """Open the store at a local path or a URL. Raises StoreError if it is missing, unfinished or not to be trusted."""
        return cls(place(url), require_complete=require_complete)

    @classmethod
    def of(cls, spec: StoreSpec, folder: str | Place) -> "ActivationStore":
        """Open the finished store that `spec` describes in a folder or at a URL of stores.

        Raises StoreError if it is missing or not to be trusted, or if what lies under its name was made for another configuration.
        """
        return cls(place(folder) / spec.name, spec=spec)

    def tokens(self, start: int, stop: int) -> Tensor:
        """Token ids [stop - start, T], int32."""
        return self._arrays["tokens"].rows(start, stop)

    def acts(self, hook: str, start: int, stop: int) -> Tensor:
        """Residuals [stop - start, T, D] at a hook, in the store's type; a view of mapped pages where one chunk holds them."""
        return self._hooked(hook).rows(start, stop)

    def acts_chunk(self, hook: str, index: int) -> Tensor:
        """Residuals of chunk `index`, [rows, T, D], mapped."""
        return self._hooked(hook).chunk(index)

    def mapped_in_place(self, hook: str) -> bool:
        """Whether chunks are mapped where they lie; others are fetched into the scratch folder first."""
        return self._hooked(hook).in_place

    @cached_property
    def kept(self) -> NDArray[np.int64]:
        """Non-special tokens of each chunk [chunks]. Stores made before they were written down are counted, once, by reading their tokens."""
        if self.header.kept_tokens is None:
            tokens = self._arrays["tokens"]
            return count_kept(self.root, tokens.spec, self.header.special_ids, tokens.checks)
        found = self._arrays["stats/kept"].chunk(0).numpy().astype(np.int64)
        if found.sum() != self.header.kept_tokens:
            raise StoreError(
                f"{self.url}: the header tells of {self.header.kept_tokens} kept tokens, the chunks of {found.sum()}; build it again"
            )
        return found

    def prefetch(self, wanted: Iterable[tuple[str, int]]) -> None:
        """Fetch these chunks, (array, number), in the background, in this order, instead of what is left of the last such request."""
        self._prefetcher.order(
            partial(self._arrays[path].fetch, index) for path, index in wanted if not self._arrays[path].in_place
        )

    def documents(self) -> list[tuple[int, str | None]]:
        """For each row, the number of its document and its topic. Raises StoreError if the store's rows mix documents."""
        return read_documents(self.root, self.header)

    def special_mask(self, tokens: Tensor) -> Tensor:
        """True where a token is pad, EOS or BOS."""
        return torch.isin(tokens, torch.tensor(self.header.special_ids, dtype=tokens.dtype, device=tokens.device))

    def statistics(self, hook: str) -> HookStatistics:
        """Mean, mean square norm and geometric median of the residual at a hook."""
        self._hooked(hook)
        if (summary := self.header.statistics.get(hook)) is None:
            raise StoreError(f"{self.url} has no statistics of {hook}; finish it with `{build_command(self.root)}`")
        return HookStatistics(
            mean_D=self._arrays[f"stats/{hook}/mean"].chunk(0).clone(),
            mean_square_norm=summary.mean_square_norm,
            geometric_median_D=self._arrays[f"stats/{hook}/geometric_median"].chunk(0).clone(),
            tokens=summary.tokens,
        )

    def clean(self, name: Literal["loss", "final"], start: int, stop: int) -> Tensor:
        """The clean model's next-token loss [.., T] (nats, last column 0) or final vector [.., T, D], for clean rows."""
        return self._kept(f"clean/{name}").rows(start, stop)

    def ablation(self, hook: str, name: Literal["loss", "kl"], start: int, stop: int) -> Tensor:
        """Next-token loss or KL(clean || ablated) [.., T], nats, with the residual at `hook` zeroed, for clean rows."""
        self._hooked(hook)
        return self._kept(f"ablation/{hook}/{name}").rows(start, stop)

    def _hooked(self, hook: str) -> MappedArray:
        if hook not in self.spec.hooks:
            raise StoreError(f"{self.url} holds {', '.join(self.spec.hooks)}, not {hook}")
        return self._arrays[f"acts/{hook}"]

    def _kept(self, path: str) -> MappedArray:
        if path not in self._arrays:
            raise StoreError(
                f"{self.url} keeps no clean losses (it is a {self.spec.split} store); use the evaluation store"
            )
        return self._arrays[path]


def check_model(store: Place, made: Header | SuiteHeader, model: "LanguageModel", suite: str | None = None) -> None:
    """Raise StoreError unless a store was made with the weights and the tokenizer of a model that was loaded for it."""
    for what, noun in (("model", "weights"), ("tokenizer", "tokenizer files")):
        if not is_made_of(what, made, model.folder, getattr(model, f"{what}_digest")):
            raise _other(store, noun, suite)


def check_tokenizer(store: Place, made: Header, tokenizer: Any) -> None:
    """Raise StoreError unless a store was made with a tokenizer that was loaded for it."""
    if not is_made_of("tokenizer", made, Path(tokenizer.name_or_path)):
        raise _other(store, "tokenizer files")


def is_made_of(what: str, made: Header | SuiteHeader, folder: Path, now: str | None = None) -> bool:
    """Whether a store was made with the `model` or the `tokenizer` of a folder; an older one by the rule of its time.

    `now` is the digest, where it is known.
    """
    held = getattr(made, f"{what}_digest")
    now = DIGESTS[what](folder) if now is None else now
    return held == now or (made.older and held == DIGESTS[what](folder, anew=True, older=True))


def _other(store: Place, what: str, suite: str | None = None) -> StoreError:
    command = build_command(store) if suite is None else f"hsae cache build --suite {suite}"
    return StoreError(
        f"{store} was made with other {what} than the model has now; move it away and make it again with `{command}`"
    )
