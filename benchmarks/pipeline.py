"""Speed of the three stages on this machine: harvest, stream, train. For each the ceiling first, then hsae.

    python benchmarks/pipeline.py [--plan gemma-3-270m]

Needs the plan's training store (`hsae cache build`). Prints a line a measurement and, last, one JSON document.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable

import torch

from hsae.cache.device import pick_device
from hsae.cache.language_model.lm import LanguageModel
from hsae.cache.reading.store import ActivationStore
from hsae.cache.reading.token_stream import TokenStream
from hsae.train.config.plan import Plan, load_plan
from hsae.train.training.sources import StoreSource
from hsae.train.training.training_run import TrainingRun


def seconds(work: Callable[[], object], times: int) -> float:
    """Median seconds of `times` calls, after one that warms up."""
    work()
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return sorted(taken)[len(taken) // 2]


def harvest(plan: Plan, device: str) -> dict[str, float]:
    """Tokens/s of the whole forward pass, of the bare layers up to the hook, and of hsae's prefix."""
    model = LanguageModel.load(plan.model, device=device)
    tokens = torch.randint(5, 1000, (plan.cache.batch_rows, plan.cache.context))
    count, hook = tokens.numel(), plan.hook.names[0]
    deepest = int(hook.split(".")[1]) + 1
    decoder = seconds(lambda: model.model.get_decoder()(input_ids=tokens.to(device), use_cache=False), 3)
    return {
        "ceiling_tokens_per_s": count / (decoder * deepest / model.layers),
        "hsae_tokens_per_s": count / seconds(lambda: model.prefix(tokens, [hook]), 5),
    }


def stream(plan: Plan, store: ActivationStore) -> dict[str, float]:
    """GB/s of copying whole chunks from mapped pages, and of gathering shuffled single tokens."""
    hook = plan.hook.names[0]
    chunk = store.acts_chunk(hook, 0)
    size = chunk.numel() * chunk.element_size()
    batches = TokenStream(store, hook, batch_tokens=plan.train.batch_tokens, seed=0)
    batch = batches.batch(0)
    steps = iter(range(1, 1000))
    gathered = seconds(lambda: batches.batch(next(steps)), 30)
    return {
        "ceiling_copy_gb_per_s": size / seconds(chunk.clone, 10) / 1e9,
        "hsae_gather_gb_per_s": batch.numel() * batch.element_size() / gathered / 1e9,
        "hsae_gather_tokens_per_s": len(batch) / gathered,
    }


def train(plan: Plan, store: ActivationStore, device: str) -> dict[str, float]:
    """Tokens/s of the five dense matrix products of a step alone, and of each run's step."""
    hook = plan.hook.names[0]
    scaling = StoreSource(store, hook, plan.train).scaling
    x = (
        TokenStream(store, hook, batch_tokens=plan.train.batch_tokens, seed=0).batch(0).to(device).float()
        * scaling.scale
    )
    width = sum(plan.runs[0].widths)
    left, right = x.bfloat16(), torch.randn(x.shape[1], width, device=device, dtype=torch.bfloat16)
    results = {"ceiling_dense_tokens_per_s": len(x) / (5 * seconds(lambda: left @ right, 20))}
    for run in plan.runs.values():
        state = TrainingRun(run, scaling, steps=1_000_000, seed=0, device=device)
        results[f"hsae_run{run.number}_{run.name}_tokens_per_s"] = len(x) / seconds(
            lambda state=state: state.step(x), 20
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", default="gemma-3-270m")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    plan, device = load_plan(arguments.plan, arguments.overrides), pick_device("auto")
    store = ActivationStore.of(plan.store("train"), plan.cache.dir)
    results = {
        "harvest": harvest(plan, device),
        "stream": stream(plan, store),
        "train": train(plan, store, device),
    }
    for stage, numbers in results.items():
        for name, value in numbers.items():
            print(f"{stage:8} {name:45} {value:12,.2f}")
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "device": device,
        "torch": torch.__version__,
    }
    print(json.dumps({"plan": plan.name, "machine": machine, **results}))


if __name__ == "__main__":
    main()
