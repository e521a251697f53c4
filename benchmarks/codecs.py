"""What each codec costs and what it does to a trained SAE: bytes a token, speed, and explained variance, on a plan's
own stores.

    python benchmarks/codecs.py --plan study --dir codecs [--runs 3,11] [--tokens 262144] [--out
    docs/results/codecs.json]

Needs the plan's stores (`hsae cache build --plan study`); copies of them in each codec and the runs are written below
--dir. Runs are trained on the exact store and on the int8 one, and each is evaluated on both evaluation stores:
explained variance over all non-special tokens. Prints a line a measure and, last, one JSON document.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import torch

from hsae.cache.building.copying import copy
from hsae.cache.config import Codec
from hsae.cache.format.chunk_codec import decode_chunk, encode_chunk
from hsae.cache.format.layout import arrays
from hsae.cache.reading.store import ActivationStore
from hsae.cache.storage.paths import sizes
from hsae.train.config.plan import Plan, load_plan
from hsae.train.config.run_config import RunConfig
from hsae.train.model.model_files import load_model
from hsae.train.runs.planned_runs import train_runs
from hsae.train.training.listener import Listener

CODECS: tuple[Codec, ...] = ("mappable", "compact", "int8")


class Warnings(Listener):
    """Prints warnings alone."""

    def warning(self, run: RunConfig, message: str) -> None:
        """Something is wrong with a run."""
        print(f"run {run.number}: {message}")


def cost(folder: Path, hook: str) -> dict[str, float]:
    """Bytes of the activations a token, and MB/s of encoding and decoding a chunk on one thread."""
    store = ActivationStore.open(folder)
    spec = arrays(store.spec, store.header.d_model)[f"acts/{hook}"]
    chunk, mean = store.acts_chunk(hook, 0).clone(), store.statistics(hook).mean_D
    data = encode_chunk(spec, chunk, mean)
    taken = []
    for work in (lambda: encode_chunk(spec, chunk, mean), lambda: decode_chunk(folder, folder, data, spec)):
        times = []
        for _ in range(5):
            began = time.thread_time()
            work()
            times.append(time.thread_time() - began)
        taken.append(spec.chunk_bytes / min(times) / 1e6)
    total = sum(sizes(folder / spec.path / "c").values())
    error = store.header.codec_error.get(hook, 0.0)
    speed = {"encode_mb_per_s": taken[0], "decode_mb_per_s": taken[1]}
    return {"bytes_per_token": total / (spec.count * spec.chunks[0] * spec.chunks[1]), **speed, "codec_error": error}


def explained_variance(model_dir: Path, folder: Path, hook: str) -> float:
    """1 - E||x - x'||^2 / E||x - mean||^2 over the non-special tokens of a store."""
    view, store = load_model(model_dir).views()["sae"], ActivationStore.open(folder)
    total, squares, lost, count = torch.zeros(store.header.d_model, dtype=torch.float64), 0.0, 0.0, 0
    for start in range(0, store.rows, 16):
        stop = min(start + 16, store.rows)
        x = store.acts(hook, start, stop)[~store.special_mask(store.tokens(start, stop))].float()
        with torch.no_grad():
            lost += float((x - view.decode(view.encode(x))).double().square().sum())
        total, squares, count = total + x.double().sum(0), squares + float(x.double().square().sum()), count + len(x)
    return 1 - lost / (squares - float(total.square().sum()) / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", default="study")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--runs", default="3,11")
    parser.add_argument("--tokens", type=int, default=262_144)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    source = load_plan(arguments.plan, arguments.overrides)
    hook = source.hook.names[0]
    plans: dict[str, Plan] = {}
    costs = {}
    for codec in CODECS:
        changes = [
            f"cache.dir={arguments.dir / codec}",
            f"cache.codec={codec}",
            f"train.dir={arguments.dir / codec / 'runs'}",
        ]
        changes.append(f"train.tokens={arguments.tokens}")
        plans[codec] = plan = load_plan(arguments.plan, [*arguments.overrides, *changes])
        for split in ("train", "eval"):
            if not (plan.store_path(split) / "zarr.json").is_file():
                copy(source.store_path(split), arguments.dir / codec, codec=codec)
        costs[codec] = cost(Path(str(plan.store_path("train"))), hook)
        print(codec, " ".join(f"{name} {value:,.4f}" for name, value in costs[codec].items()), flush=True)
    exact, compact = (ActivationStore.open(plans[codec].store_path("eval")) for codec in ("mappable", "compact"))
    assert torch.equal(exact.acts(hook, 0, exact.rows), compact.acts(hook, 0, exact.rows))
    scores = []
    for trained in ("mappable", "int8"):
        plan = plans[trained]
        runs = plan.select(arguments.runs)
        train_runs(plan, runs, Warnings(), resume=True)
        for run in runs:
            for evaluated in ("mappable", "int8"):
                folder = Path(str(plans[evaluated].store_path("eval")))
                value = explained_variance(plan.run_dir(run) / "model", folder, hook)
                scores.append(
                    {"run": f"{run.number} {run.name}", "trained_on": trained, "evaluated_on": evaluated, "ev": value}
                )
                print(
                    f"run {run.number} {run.name}: trained on {trained}, evaluated on {evaluated}: EV {value:.5f}",
                    flush=True,
                )
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    settings = {
        "plan": source.name,
        "train_tokens": arguments.tokens,
        "train_rows": source.cache.train.rows,
        "eval_rows": exact.rows,
    }
    document = json.dumps({"machine": machine, **settings, "codecs": costs, "explained_variance": scores})
    if arguments.out:
        arguments.out.write_text(document + "\n")
    print(document)


if __name__ == "__main__":
    main()
