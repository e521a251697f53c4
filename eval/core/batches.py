"""Batches of an evaluation store on the device, read ahead: on a GPU several of SAEBench's at once.

How many go together depends on the device and the store alone, so that an SAE's numbers don't depend on the others'.
Which tokens are kept is decided on the processor: the device is never asked for a size, and never waited for.

Shapes: B rows of a group of batches, T context, D residual width, N kept tokens of the group.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from hsae.cache.format.spec import gpu_rows
from hsae.cache.reading.store import ActivationStore

READ_AHEAD = 2

BatchesT = TypeVar("BatchesT", bound="Batches")


@dataclass(frozen=True, kw_only=True)
class Batches:
    """The residuals of consecutive batches, and what all SAEs need to know of them."""

    start: int
    """Row of the store at which they begin."""
    x_BTD: Tensor
    mask_BT: Tensor
    """True for kept tokens: those that are not special (pad, EOS, BOS)."""
    kept_N: Tensor
    """Where the kept tokens lie among all B * T."""
    counts: tuple[int, ...]
    """Kept tokens of each batch."""

    @classmethod
    def of(cls, x_BTD: Tensor, mask_BT: Tensor, start: int) -> "Batches":
        """A single batch."""
        kept_N = mask_BT.flatten().nonzero()[:, 0]
        return cls(start=start, x_BTD=x_BTD, mask_BT=mask_BT, kept_N=kept_N, counts=(len(kept_N),))

    def kept(self, values_BT: Tensor) -> Tensor:
        """[N, ...] values of the kept tokens, of [B, T, ...]."""
        return values_BT.flatten(0, 1).index_select(0, self.kept_N)

    def each(self, values_N: Tensor) -> tuple[Tensor, ...]:
        """The values of the kept tokens of each batch."""
        return torch.split(values_N, list(self.counts))

    @cached_property
    def x_ND(self) -> Tensor:
        """Kept residuals, in their own type."""
        return self.kept(self.x_BTD)

    @cached_property
    def norm_N(self) -> Tensor:
        """Their norms."""
        norm_N: Tensor = torch.linalg.vector_norm(self.x_ND, dim=-1)
        return norm_N

    @cached_property
    def unit_ND(self) -> Tensor:
        """Their directions."""
        return self.x_ND / self.norm_N[:, None]

    @cached_property
    def spread_N(self) -> Tensor:
        """Their squared distances from the mean of their batch."""
        return torch.cat([(x_ND - x_ND.mean(dim=0)).pow(2).sum(-1) for x_ND in self.each(self.x_ND)])


@dataclass(frozen=True, kw_only=True)
class CleanBatches(Batches):
    """Batches with what the clean language model made of them, and what the ablated one lost."""

    targets_N: Tensor
    """[B * T] the next token of every token; of a row's last one the row's first."""
    loss_mask_BT: Tensor
    """True for kept tokens that have a next one."""
    with_loss_N: Tensor
    """Where these lie among all B * T."""
    final_BTD: Tensor
    """Final vectors of the clean model."""
    ce_clean_BT: Tensor
    ce_ablation_BT: Tensor
    kl_ablation_BT: Tensor


def rows_together(store: ActivationStore, device: torch.device) -> int:
    """Rows that are computed together: on a GPU those of a harvest's pass; a processor gains nothing from more."""
    rows = store.spec.batch_rows
    return (gpu_rows(store.context, rows) or rows) if device.type == "cuda" else rows


class BatchReader:
    """Reads the batches of an evaluation store for one hook."""

    def __init__(self, store: ActivationStore, hook: str, device: str) -> None:
        self.store, self.hook, self.device = store, hook, torch.device(device)
        self.batch_rows = store.spec.batch_rows
        self._group_rows = rows_together(store, self.device)

    def count(self, first: int, last: int) -> int:
        """Number of batches of rows `first` to `last`."""
        return -(-(last - first) // self.batch_rows)

    def variance(self, first: int, last: int) -> Iterator[Batches]:
        """The batches of rows `first` to `last`, in groups."""
        return self._ahead(self._read, first, last)

    def reconstruction(self, first: int, last: int) -> Iterator[CleanBatches]:
        """The batches of clean rows `first` to `last`, in groups."""
        return self._ahead(self._read_clean, first, last)

    def _ahead(self, read: Callable[[int, int], BatchesT], first: int, last: int) -> Iterator[BatchesT]:
        """A thread reads the next groups; for a GPU into pinned memory, from where they are copied as it computes."""
        pinned = self.device.type == "cuda"

        def job(start: int) -> BatchesT:
            batches = read(start, min(start + self._group_rows, last))
            return _each_tensor(batches, Tensor.pin_memory) if pinned else batches

        pending: deque[Future[BatchesT]] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="hsae-read") as pool:
            starts = iter(range(first, last, self._group_rows))
            pending.extend(pool.submit(job, start) for start in islice(starts, READ_AHEAD))
            while pending:
                batches = pending.popleft().result()
                pending.extend(pool.submit(job, start) for start in islice(starts, 1))
                yield _each_tensor(batches, self._placed) if pinned else batches

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _read(self, start: int, stop: int) -> Batches:
        return Batches(**self._fields(start, stop, self.store.tokens(start, stop)))

    def _read_clean(self, start: int, stop: int) -> CleanBatches:
        store, tokens_BT = self.store, self.store.tokens(start, stop)
        values = self._fields(start, stop, tokens_BT)
        loss_mask_BT = values["mask_BT"].clone()
        loss_mask_BT[:, -1] = False
        return CleanBatches(
            **values,
            targets_N=tokens_BT.roll(-1, dims=1).flatten().long(),
            loss_mask_BT=loss_mask_BT,
            with_loss_N=loss_mask_BT.flatten().nonzero()[:, 0],
            final_BTD=store.clean("final", start, stop),
            ce_clean_BT=store.clean("loss", start, stop),
            ce_ablation_BT=store.ablation(self.hook, "loss", start, stop),
            kl_ablation_BT=store.ablation(self.hook, "kl", start, stop),
        )

    def _fields(self, start: int, stop: int, tokens_BT: Tensor) -> dict[str, Any]:
        mask_BT = ~self.store.special_mask(tokens_BT)
        return {
            "start": start,
            "x_BTD": self.store.acts(self.hook, start, stop),
            "mask_BT": mask_BT,
            "kept_N": mask_BT.flatten().nonzero()[:, 0],
            "counts": tuple(int(part.sum()) for part in torch.split(mask_BT, self.batch_rows)),
        }


def _each_tensor(batches: BatchesT, change: Callable[[Tensor], Tensor]) -> BatchesT:
    values = {field.name: getattr(batches, field.name) for field in fields(batches)}
    changed: dict[str, Any] = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
    return replace(batches, **changed)
