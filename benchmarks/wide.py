"""What a wide dictionary costs each of several workers that divide its latents (or, for comparison, every batch).

    torchrun --nproc-per-node 2 benchmarks/wide.py [--widths 65536 8192] [--divide batch]

Random vectors on processors: bytes and seconds don't depend on what they say. Prints, of the worker with most, the
bytes of weights, maps and Adam's moments, how much memory it took over all at the peak, and seconds a step; last, one
JSON document.
"""

import argparse
import json
import resource
import statistics
import time

import torch

from hsae.cache.launcher import share
from hsae.train.config.run_config import CompositionConfig, RunConfig, Stage
from hsae.train.parallel.latent_sharding import UNDIVIDED, Latents
from hsae.train.parallel.workers import ALONE, Workers, worker_group
from hsae.train.training.scaling import Scaling
from hsae.train.training.training_run import TrainingRun


def peak_bytes() -> int:
    """Most memory this process has held so far (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(options: argparse.Namespace, workers: Workers) -> dict[str, float]:
    """Bytes and seconds of the worker with most."""
    levels = tuple(range(1, len(options.widths) + 1))
    whole = Stage(name="all", until=1.0, levels=levels, composition="on")
    config = RunConfig(
        number=0,
        name="wide",
        structure="additive" if len(options.widths) > 1 else "flat",
        widths=tuple(options.widths),
        l0=(32,) * len(options.widths),
        composition=CompositionConfig(mode=options.composition),
        curriculum="none" if options.composition == "none" else (whole,),
    )
    width, batch_tokens, steps = options.d_in, options.batch_tokens, options.steps
    batch, latents = (workers, UNDIVIDED) if options.divide == "batch" else (ALONE, Latents(workers))
    x_BD = torch.randn(batch_tokens, width, generator=torch.Generator().manual_seed(0)).chunk(batch.world)[batch.rank]
    scaling = Scaling(scale=1.0, median=torch.zeros(width), variance=float(width))
    before = peak_bytes()
    run = TrainingRun(config, scaling, steps=1000, seed=0, device="cpu", workers=batch, latents=latents)
    taken = []
    for _ in range(steps):
        began = time.perf_counter()
        run.step(x_BD)
        taken.append(time.perf_counter() - began)
    weights = [*run.model.parameters(), *run.compositions.parameters()]
    moments = [tensor for state in run.optimiser.state.values() for tensor in state.values()]
    held = sum(tensor.numel() * tensor.element_size() for tensor in (*weights, *moments))
    mine = torch.tensor([held, peak_bytes() - before, statistics.median(taken[1:])], dtype=torch.float64)
    most = workers.gather(mine[None]).amax(0)
    return dict(zip(("weights_and_moments_bytes", "peak_growth_bytes", "step_s"), most.tolist(), strict=True))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[65536, 8192])
    parser.add_argument("--d-in", type=int, default=640)
    parser.add_argument("--batch-tokens", type=int, default=512)
    parser.add_argument("--composition", choices=["none", "normalised", "literal"], default="none")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--divide", choices=["batch", "latents"], default="latents")
    options = parser.parse_args()
    with worker_group(share(), "cpu") as workers:
        found = measure(options, workers)
        if workers.is_first:
            print(
                f"{workers.world} worker(s) dividing {options.divide}: "
                f"{found['weights_and_moments_bytes'] / 2**20:,.0f} MiB of weights and moments, "
                f"peak {found['peak_growth_bytes'] / 2**20:,.0f} MiB, {found['step_s']:.2f} s a step"
            )
            print(json.dumps({"workers": workers.world, **vars(options), **found}))


if __name__ == "__main__":
    main()
