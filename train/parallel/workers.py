"""Workers that train together: each takes its share of every batch; what is of the whole batch is computed here.

Every worker holds the whole model (unless they divide its latents: `hsae.train.parallel.latent_sharding`). Replicas
start from worker 0's state and take the same steps, because gradients and whatever else a step computes from its batch
are added up over all workers first. Alone, every method gives back what it was given, untouched.

Shapes: B vectors of the whole batch, b = B / world of a worker's share: worker r's are rows r*b to (r+1)*b.
"""

import contextlib
import functools
import importlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from hsae.cache.device import pick_device
from hsae.cache.errors import UserError
from hsae.cache.launcher import Share

TIMEOUT = timedelta(minutes=15)  # for a worker that comes late or is silent


class WorkerLost(OSError):
    """Another worker ended, or can't be reached."""


class Workers:
    """All workers of one training, seen from one of them."""

    def __init__(self, share: Share, store: Store | None = None) -> None:
        self.share, self.rank, self.world, self.store = share, share.rank, share.world, store

    @property
    def is_first(self) -> bool:
        """Whether this is worker 0, which writes and prints."""
        return self.rank == 0

    def total(self, part: Tensor) -> Tensor:
        """The sum of what every worker gives, without gradient; half precision is added up in float32."""
        if self.world == 1:
            return part
        wide = torch.promote_types(part.dtype, torch.float32) if part.is_floating_point() else part.dtype
        whole = part.detach().to(wide, copy=True).contiguous()
        _exchange(lambda: dist.all_reduce(whole))
        return whole.to(part.dtype)

    def mean(self, part: Tensor) -> Tensor:
        """The mean of what every worker gives, without gradient: of the batch if each gives that of its share."""
        return part if self.world == 1 else self.total(part) / self.world

    def means(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`mean` of several scalars at once, as float32 if there are other workers."""
        if self.world == 1:
            return {name: part.detach() for name, part in parts.items()}
        whole = self.mean(torch.stack([part.detach().float() for part in parts.values()]))
        return dict(zip(parts, whole, strict=True))

    def either(self, mask: Tensor) -> Tensor:
        """Where any worker's mask is true."""
        return mask if self.world == 1 else self.total(mask.int()) > 0

    def gather(self, part: Tensor) -> Tensor:
        """[B, ...] of the whole batch from [b, ...] of every share, without gradient."""
        if self.world == 1:
            return part
        whole = part.new_empty((self.world * len(part), *part.shape[1:]))
        _exchange(lambda: dist.all_gather(list(whole.chunk(self.world)), part.detach().contiguous()))
        return whole

    def rows(self, part_bI: Tensor, index_N: Tensor) -> Tensor:
        """[N, I] the rows of the whole batch with these numbers, given this worker's share of it."""
        if self.world == 1:
            return part_bI[index_N]
        own = index_N // len(part_bI) == self.rank
        rows = part_bI.new_zeros((len(index_N), part_bI.shape[1]))
        rows[own] = part_bI[index_N[own] - self.rank * len(part_bI)]
        return self.total(rows)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace gradients of the mean over a share by those of the mean over the batch."""
        if self.world == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for gradient in gradients:
            gradient /= self.world
        works = _exchange(lambda: [dist.all_reduce(gradient, async_op=True) for gradient in gradients])
        _exchange(lambda: [work.wait() for work in works])

    def any(self, wish: bool) -> bool:
        """Whether any worker says so."""
        return bool(self.either(torch.tensor(wish)))

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What worker 0 made, JSON-ready, for all; the others wait for it."""
        if self.world == 1:
            return make()
        text = json.dumps(make()).encode() if self.is_first else b""
        length = torch.tensor([len(text)])
        _exchange(lambda: dist.broadcast(length, 0))
        data = torch.tensor(list(text) or [0] * int(length), dtype=torch.uint8)
        _exchange(lambda: dist.broadcast(data, 0))
        return json.loads(bytes(data.tolist()))

    def copies(
        self, tensors: Mapping[str, Tensor], along: Callable[[str], int | None] = lambda name: None
    ) -> dict[str, Tensor]:
        """Worker 0's tensors, on the processor, for all; where `along` names a dimension, each worker gets its part."""
        if self.world == 1:
            return dict(tensors)
        described = {name: [str(tensor.dtype), *tensor.shape] for name, tensor in tensors.items()}
        copied = {}
        for name, (dtype, *shape) in self.from_first(lambda: described).items():
            dimension = along(name)
            if dimension is not None:
                shape[dimension] //= self.world
            own = torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
            if dimension is not None:
                chunks = tensors[name].chunk(self.world, dimension) if self.is_first else ()
                parts = [part.contiguous() for part in chunks] or None
                _exchange(functools.partial(dist.scatter, own, parts, 0))
            else:
                own = tensors[name].cpu().contiguous() if self.is_first else own
                _exchange(functools.partial(dist.broadcast, own, 0))
            copied[name] = own
        return copied

    def collect(self, part: Tensor) -> list[Tensor]:
        """Every worker's part, of equal shapes and on the processor, for worker 0; nothing elsewhere."""
        count = self.world if self.is_first else 0
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(count)]
        _exchange(lambda: dist.gather(part.contiguous(), parts or None, 0))
        return parts

    def check_same(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise UserError if the workers' tensors (4 or 8 bytes a number) are not equal, by a sum of their bits."""
        if self.world == 1:
            return
        views = [tensor.detach().contiguous().flatten() for tensor in tensors.values()]
        sums = torch.stack([view.view(torch.int32).sum(dtype=torch.int64) for view in views])
        every = self.gather(sums.cpu()).view(self.world, -1)
        for name, different in zip(tensors, (every != every[0]).any(0).tolist(), strict=True):
            if different:
                raise UserError(
                    f"the workers' copies of {name} have come to differ; "
                    "use machines of one kind, and go on with --resume"
                )

    def first_to_end(self) -> bool:
        """Whether no other worker has said why it ends; if none can be asked, worker 0 is gone and worker 1 says it."""
        try:
            return self.store is None or self.store.add("ended", 1) == 1
        except RuntimeError:
            return self.rank == 1


ALONE = Workers(Share())


def _exchange(collective: Callable[[], Any]) -> Any:
    """What a collective operation of torch returns. Raises WorkerLost if it fails."""
    try:
        return collective()
    except RuntimeError as error:
        raise WorkerLost(
            f"a worker of this training ended, or can't be reached ({_reason(error)}); "
            "start all again with --resume to go on from the last checkpoint"
        ) from None


def _reason(error: Exception) -> str:
    """The first sentence of what torch says, without its source file."""
    first = str(error).partition("\n")[0].partition(". ")[0]
    return re.sub(r"^\[\S+\] ", "", first)


@contextlib.contextmanager
def worker_group(share: Share, device: str) -> Iterator[Workers]:
    """The group of all workers, while it is entered. On cuda each takes a GPU of its own.

    Whatever ends one worker ends all: the first to fail tells why, the others end without a word, with status 2.
    Raises UserError if the launcher left out where worker 0 is, WorkerLost if not all come.
    """
    if share.world == 1:
        yield ALONE
        return
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise UserError(
            f"{share.world} workers, but {' and '.join(missing)} not set: "
            "give the host of worker 0 and a free port there"
        )
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, _, _ = next(rendezvous("env://", share.rank, share.world, timeout=TIMEOUT))
    except (RuntimeError, ValueError) as error:
        raise WorkerLost(
            f"worker {share.rank} of {share.world}: no meeting with the others at {where} ({_reason(error)})"
        ) from None
    importlib.import_module("torch.distributed.nn.functional")  # if later, its defaults would keep the group alive
    workers = Workers(share, PrefixStore("hsae", store))
    try:
        backend = _backend(share, pick_device(device))
        options = {"store": store, "rank": share.rank, "world_size": share.world, "timeout": TIMEOUT}
        _exchange(lambda: dist.init_process_group(backend, **options))
        yield workers
        workers.from_first(lambda: None)  # nobody leaves before worker 0 has written everything
    except (Exception, KeyboardInterrupt):
        if workers.first_to_end():
            raise
        raise SystemExit(2) from None
    dist.destroy_process_group()


def _backend(share: Share, device: str) -> str:
    if device == "cpu":
        return "gloo"
    if device != "cuda":
        raise UserError(
            f"device {device!r} for {share.world} workers: use --device cuda, and each takes a GPU of its own"
        )
    gpus, here = torch.cuda.device_count(), os.environ.get("LOCAL_WORLD_SIZE", "")
    if here.isdecimal() and int(here) > gpus:
        raise UserError(f"{here} workers on this host, which has {gpus} GPU(s): start one a GPU, or use --device cpu")
    torch.cuda.set_device(share.local_rank % gpus)
    return "cpu:gloo,cuda:nccl"  # small numbers that the processor needs anyway don't wait for the GPU
