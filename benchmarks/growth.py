"""What a training step costs as D, F, k, B and the number of runs double, one at a time, on this machine's processor.

    python benchmarks/growth.py [--kinds relu batchtopk] [--rounds 5]

Every setting takes a step in turn, for so many rounds, so that what slows the machine down slows all alike. Prints the
median milliseconds of a step and their ratio to the base, and, last, one JSON document.
"""

import argparse
import json
import statistics
import time
from dataclasses import asdict, replace

import torch
from training_steps import Case, hsae_run, hsae_steps


def settings(kind: str) -> dict[str, tuple[Case, int]]:
    """By name: a case, and how many runs share its batches."""
    base = Case(kind, d_in=320, width=2048, batch=1024, k=32)
    return {
        "base": (base, 1),
        "D x 2": (replace(base, d_in=640), 1),
        "F x 2": (replace(base, width=4096), 1),
        "k x 2": (replace(base, k=64), 1),
        "B x 2": (replace(base, batch=2048), 1),
        "2 runs": (base, 2),
        "4 runs": (base, 4),
    }


def measure(kind: str, rounds: int) -> dict[str, float]:
    """Median seconds of a step of each setting."""
    work = {}
    for name, (case, runs) in settings(kind).items():
        step = hsae_steps([hsae_run(case, number) for number in range(runs)], case)
        work[name] = step, case.batches(2)
        step(work[name][1][0])
    taken: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds):
        for name, (step, batches) in work.items():
            began = time.perf_counter()
            step(batches[number % 2])
            taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["relu", "topk", "batchtopk", "full"])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    found = {kind: measure(kind, options.rounds) for kind in options.kinds}
    print(f"{'':10}", *(f"{name:>16}" for name in settings("relu")))
    for kind, seconds in found.items():
        shown = (f"{1e3 * value:8.0f} ms x{value / seconds['base']:4.2f}" for value in seconds.values())
        print(f"{kind:10}", *(f"{text:>16}" for text in shown))
    sizes = {name: asdict(case) | {"runs": runs} for name, (case, runs) in settings("").items()}
    print(json.dumps({"threads": torch.get_num_threads(), "sizes": sizes, "step_s": found}))


if __name__ == "__main__":
    main()
