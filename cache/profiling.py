"""Profiles: where the time of a training, a harvest or an evaluation goes, from a trace of a few of its steps.

Loops say when a step is done, and may label parts of it; while nothing is profiled both cost next to nothing. A trace
is PyTorch's (torch.profiler), in Chrome's format: https://ui.perfetto.dev shows it.
"""

import contextlib
import gzip
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from hsae.cache.errors import UserError
from hsae.cache.files import write_atomically

Item = TypeVar("Item")
Event = Mapping[str, Any]
"""Of a trace: its `name`, `cat`egory and thread (`tid`), when it began (`ts`) and how long it took (`dur`), in
microseconds."""
WARM_UP = 3
"""Steps of a phase before those that are traced."""
STEPS = 20
"""Steps of a phase that are traced, which keeps a trace small."""
STEP = "step"
OTHER, DATA, IDLE = "other operations", "data", "Python"
LABELS = {"data": DATA, "write": DATA, "selection": "selection", "update": "optimiser"}
"""What time under a label counts as, whatever is done there; other labels only show in the trace."""
KINDS = {
    "products": r"(?:^|::)_?(?:mm|addmm|bmm|baddbmm|matmul|linear|linear_pointwise|einsum|scaled_dot_product\w*)$"
    r"|gemm|cutlass|nvjet|xmma|flash|fmha",
    "selection": r"topk|TopK|kthvalue|(?:^|::)sort|nonzero|masked_select|[rR]adix|[bB]itonic|gatherTopK",
    "optimiser": r"^Optimizer\.|_fused_adam|_foreach_|multi_tensor_apply",
    "copies": r"(?:^|::)(?:copy_|_to_copy|to|clone|contiguous|pin_memory)$|^Mem(?:cpy|set)|direct_copy_kernel",
}
"""What an operation or a kernel counts as, by its name."""
ROWS = (*KINDS, OTHER, DATA, IDLE)
HOST = ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of a trace's events."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Where the time of some steps went, each moment counted once.

    Without a GPU that is the time of the thread that takes the steps. With one, what the GPU does comes first, and only
    while it does nothing the moment counts as data or as Python.
    """

    phase: str
    steps: int
    on_gpu: bool
    ms: Mapping[str, float]
    """Milliseconds a step of each of `ROWS`."""
    trace: Path | None = None
    """The trace's file."""

    @property
    def step_ms(self) -> float:
        """Milliseconds of a whole step."""
        return sum(self.ms.values())


def label(name: str) -> AbstractContextManager[object]:
    """A part of a step; see `LABELS`. Not for functions that are compiled."""
    return contextlib.nullcontext() if _active is None else torch.profiler.record_function(name)


def labelled(name: str, items: Iterable[Item]) -> Iterator[Item]:
    """The same items; waiting for each is a part of a step."""
    iterator = iter(items)
    while True:
        with label(name):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


def step_done(phase: str) -> None:
    """A step of a phase has ended, and the next begins."""
    if _active is not None:
        _active.step_done(phase)


@contextlib.contextmanager
def profiled(folder: Path, name: str) -> Iterator[list[Summary]]:
    """Trace `STEPS` steps of each phase, after `WARM_UP`, into `<folder>/<name>-<phase>.json.gz`.

    The summaries are in the list as phases end. A phase with too few steps has none, and one that fails leaves no file.
    Raises UserError if the folder can't be made.
    """
    global _active
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--profile {folder}: {error.strerror}") from None
    tracer = _Tracer(folder, name)
    _active = tracer
    try:
        yield tracer.summaries
        tracer.end_phase()
    finally:
        _active = None
        tracer.drop()


class _Tracer:
    """Traces steps of one phase after the other."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.summaries: list[Summary] = []
        self.phase, self.done = "", 0
        self.profiler: torch.profiler.profile | None = None
        self.step: torch.profiler.record_function | None = None

    def step_done(self, phase: str) -> None:
        """Count a step, and begin or end the trace of its phase where that is due."""
        if phase != self.phase:
            self.end_phase()
            self.phase, self.done = phase, 0
        self.done += 1
        if self.done == WARM_UP:
            _synchronise()
            self.profiler = torch.profiler.profile()
            self.profiler.start()
            self._begin_step()
        elif self.profiler is not None:
            if self.done == WARM_UP + STEPS:
                self.end_phase()
            else:
                self._end_step()
                self._begin_step()

    def _begin_step(self) -> None:
        self.step = torch.profiler.record_function(STEP)
        self.step.__enter__()  # type: ignore[no-untyped-call]

    def _end_step(self) -> None:
        if self.step is not None:
            self.step.__exit__(None, None, None)
        self.step = None

    def end_phase(self) -> None:
        """Write the trace of the phase, if steps of it were traced."""
        steps = min(self.done - WARM_UP, STEPS)
        if self.profiler is None or steps < 1:
            return self.drop()
        _synchronise()
        self._end_step()
        profiler, self.profiler = self.profiler, None
        profiler.stop()
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "trace.json"
            profiler.export_chrome_trace(str(file))
            content = file.read_bytes()
        phase = re.sub(r"[^\w.-]+", "-", self.phase)
        path = self.folder / f"{self.name}-{phase}.json.gz"
        summary = summarise(json.loads(content), self.phase, steps, path)
        write_atomically(path, lambda partial: partial.write_bytes(gzip.compress(content, 6)))
        self.summaries.append(summary)

    def drop(self) -> None:
        """End without a trace."""
        self._end_step()
        if self.profiler is not None:
            self.profiler.stop()
        self.profiler = None


_active: _Tracer | None = None


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summarise(trace: Mapping[str, Any], phase: str, steps: int, path: Path | None = None) -> Summary:
    """The summary of a trace's first `steps` steps."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    spans = sorted((e for e in events if e["name"] == STEP and e["cat"] == "user_annotation"), key=_start)[:steps]
    begin, end = _start(spans[0]), _end(spans[-1])
    threads: defaultdict[Any, list[Event]] = defaultdict(list)
    kernels = []
    for event in events:
        if begin <= event["ts"] < end and event["name"] != STEP:
            if event.get("cat") in HOST:
                threads[event["tid"]].append(event)
            elif event.get("cat") in DEVICE:
                kernels.append(event)
    done = {thread: _Thread(inside) for thread, inside in threads.items()}
    main = done.get(spans[0]["tid"]) or _Thread([])
    if kernels:
        launched = {number: kind for thread in done.values() for number, kind in thread.launched.items()}
        spent = _spent_on_gpu(kernels, launched, main.waiting, begin, end)
    else:
        spent = main.spent
    idle = end - begin - sum(spent.values())
    ms = {kind: (spent.get(kind, 0.0) + (idle if kind == IDLE else 0)) / 1000 / len(spans) for kind in ROWS}
    return Summary(phase=phase, steps=len(spans), on_gpu=bool(kernels), ms=ms, trace=path)


def _spent_on_gpu(
    kernels: Iterable[Event],
    launched: Mapping[Any, str],
    waiting: Sequence[tuple[float, float]],
    begin: float,
    end: float,
) -> dict[str, float]:
    """Microseconds of each kind, of kernels as their launch says or else their names, and of waiting for data while
    there was no kernel."""
    spent: defaultdict[str, float] = defaultdict(float)
    busy_until = begin

    def idle(until: float) -> None:
        for start, stop in waiting:
            spent[DATA] += max(0.0, min(until, stop) - max(busy_until, start))

    for kernel in sorted(kernels, key=_start):
        kind = launched.get(kernel["args"].get("correlation")) or _named(kernel["name"]) or OTHER
        stop = min(_end(kernel), end)
        idle(_start(kernel))
        spent[kind] += max(0.0, stop - max(busy_until, _start(kernel)))
        busy_until = max(busy_until, stop)
    idle(end)
    return spent


class _Thread:
    """What one thread did."""

    def __init__(self, events: Iterable[Event]) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)
        """Microseconds of each kind."""
        self.launched: dict[Any, str] = {}
        """Kinds of the kernels that it launched, by their numbers, where operations and labels tell."""
        self.waiting: list[tuple[float, float]] = []
        """Stretches of time spent on data."""
        stack: list[tuple[Event, str]] = []
        for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
            while stack and _end(stack[-1][0]) <= event["ts"]:
                stack.pop()
            outer = stack[-1][1] if stack else IDLE
            if outer in (IDLE, OTHER):
                kind = _named(event["name"]) or (IDLE if event["cat"] == "user_annotation" else OTHER)
            else:
                kind = outer
            self.spent[kind] += event["dur"]
            if stack:
                self.spent[outer] -= event["dur"]
            if kind == DATA != outer:
                self.waiting.append((_start(event), _end(event)))
            if event["cat"].startswith("cuda") and kind != OTHER:
                self.launched[event["args"].get("correlation")] = kind
            stack.append((event, kind))


def _named(name: str) -> str | None:
    """What an operation, a kernel or a label counts as, if its name tells."""
    if name in LABELS:
        return LABELS[name]
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), None)


def _start(event: Event) -> float:
    return float(event["ts"])


def _end(event: Event) -> float:
    return float(event["ts"] + event["dur"])
