"""What tests of several workers share: trainings to compare, workers as threads of one process, and commands under
torchrun.
"""

import os
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file

from hsae.cache.launcher import Share
from hsae.train.parallel.workers import Workers
from hsae.train.runs.metrics_log import read_metrics

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
HSAE = [sys.executable, "-c", "from hsae.cli.main import main; main()"]
# many dead latents, levels above and below the size from which gradients are sparse, steps large enough that a wrong
# one shows
HARD = (
    "train.matched=false",
    "train.widths=[1409, 131]",
    "train.learning_rate=2e-3",
    "train.dead_after_tokens=600",
    "train.tokens=5_000",
    "train.log_steps=1",
    "train.checkpoint_steps=1000",
)
SCRIPT_HEAD = """
import sys
sys.path.insert(0, sys.argv[1])
from many_workers import SETTINGS
from hsae.cache.launcher import share
from hsae.train.config.plan import load_plan
from hsae.train.runs.planned_runs import train_runs
from hsae.train.parallel.workers import worker_group

places = sys.argv[3:]
def plan(folder, *more):
    return load_plan("tiny", [*places, f"train.dir={sys.argv[2] + '/' + folder!r}", *SETTINGS, *more])
"""
"""How a script begins that trains in workers: run with this folder, one for the runs, and overrides of the plan."""
EVEN = (*HARD, "train.widths=[1408, 132]")  # what two and four workers divide equally


def numbers(value):
    if isinstance(value, dict):
        return [number for part in value.values() for number in numbers(part)]
    if isinstance(value, list):
        return [number for part in value for number in numbers(part)]
    return [value] if isinstance(value, int | float) else []


def assert_same_training(one, other, *, tolerance=1e-5):
    """The log's numbers agree to `tolerance`, steps, stages and dead latents exactly; weights to ten times `tolerance`,
    because Adam takes whole steps where a gradient is nothing but rounding.
    """
    lines = [[line for line in read_metrics(place) if line["kind"] != "warning"] for place in (one, other)]
    for mine, theirs in zip(*lines, strict=True):
        for key in mine.keys() - {"time"}:
            if key in ("kind", "step", "stage", "tokens", "dead"):
                assert mine[key] == theirs[key], (mine["step"], key)
            else:
                assert numbers(theirs[key]) == pytest.approx(numbers(mine[key]), rel=tolerance, abs=tolerance), key
    weights = [load_file(place / "model/model.safetensors") for place in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        difference = (weights[1][name].double() - tensor.double()).norm()
        assert difference <= 10 * tolerance * tensor.double().norm(), name


class Threads(Workers):
    """Workers as threads of one process."""

    def __init__(self, rank, world, barrier, box):
        super().__init__(Share(rank, world))
        self.barrier, self.box = barrier, box

    def gather(self, part):
        self.box[self.rank] = part.detach().clone()
        self.barrier.wait()
        whole = torch.cat([self.box[rank] for rank in range(self.world)])
        self.barrier.wait()
        return whole

    def total(self, part):
        return self.gather(part[None]).sum(0)

    def collect(self, part):
        parts = self.gather(part[None])
        return list(parts) if self.is_first else []

    def average_gradients(self, parameters):
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = self.mean(parameter.grad)


def in_threads(world, work):
    barrier, box, results = threading.Barrier(world, timeout=300), {}, {}

    def run(rank):
        try:
            results[rank] = work(Threads(rank, world, barrier, box))
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[rank] for rank in range(world)]


def launched(world, arguments, **options):
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("environment", {})}
    command = [*TORCHRUN, "--nproc-per-node", str(world), "--no-python", "--", *HSAE, *arguments]
    return subprocess.Popen(
        command,
        env=settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def train_arguments(overrides, run="3"):
    sets = [part for override in overrides for part in ("--set", override)]
    return ["train", "--run", run, "--plan", "tiny", "--device", "cpu", *sets]
