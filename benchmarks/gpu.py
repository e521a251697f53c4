"""hsae on one GPU: ceilings, harvest, training and core, beside peers and the targets of docs/performance.md.

    python benchmarks/gpu.py [PART ...] [--wheels FOLDER] [--into docs/results/gpu.json]
    python benchmarks/gpu.py checks

Needs torch, transformers and hsae, and nothing from the net: Gemma-2-2B gets random weights, the tokenizer and the text
are made on the spot. --wheels installs what lies in a folder (hsae and its peers, as wheels) for the run alone. Every
part runs in a process of its own within its seconds; what it has measured until then stands in the result, and a part
that fails is reported with its error. All parts but `checks` take less than nine minutes. Prints, last, one JSON
document. `--tiny` does the same in seconds with tiny sizes on a processor, which shows that the script works.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from training_steps import Bench, Case, NotOffered, hsae_run, hsae_steps

HERE = Path(__file__).resolve().parent
PEERS = ("dictionary_learning", "saelens", "sparsify")
K_SPARSE = ("topk", "batchtopk", "matryoshka")
KINDS = ("relu", *K_SPARSE, "jumprelu", "full", "stacked")
FLAT = (0, 11, 14, 15, 16)
"""Flat runs of the plan gemma-2-2b; run 12 is its Matryoshka."""
PACKAGES = ("hsae", "torch", "triton", "transformers", "dictionary-learning", "sae-lens", "eai-sparsify")
GEMMA_2_2B = {
    "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256,
    "sliding_window": 4096, "max_position_embeddings": 8192,
}  # fmt: skip
TINY = GEMMA_2_2B | {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64,
}  # fmt: skip


@dataclass
class Setup:
    """Where a part works and how large; what it has found is written down at once."""

    folder: Path
    tiny: bool
    found: dict[str, Any] = field(default_factory=dict)
    file: Path | None = None

    @property
    def device(self) -> str:
        """A GPU, except where all is tiny."""
        return "cpu" if self.tiny else "cuda"

    def put(self, **values: Any) -> None:
        """Note what was found."""
        self.found |= values
        if self.file is not None:
            self.file.write_text(json.dumps(self.found))

    def pick(self, real: Any, tiny: Any) -> Any:
        """One of two sizes."""
        return tiny if self.tiny else real

    @property
    def hook(self) -> str:
        """The layer of the plan; a tiny model's second."""
        return f"blocks.{self.pick(19, 1)}.hook_resid_post"

    def settings(self) -> list[str]:
        """`--set` for the plan gemma-2-2b, on the model and the text of this benchmark."""
        context, rows = self.pick(128, 32), self.pick(8192, 64)
        batches, split = self.pick((20, 200), (2, 6)), self.pick(4000, 30)
        values = [
            f"model.id={self.folder / 'model'}", f"cache.dir={self.folder / 'stores'}", f"train.dir={self.folder}/runs",
            f"hook.names=['{self.hook}']", f"cache.context={context}", f"cache.eval.corpus={self.folder / 'text'}",
            f"cache.train.corpus={self.folder / 'text'}", f"cache.eval.batches_reconstruction={batches[0]}",
            f"cache.eval.batches_variance={batches[1]}", f"cache.train.rows={rows}",
            f"cache.eval.last_document={split}",
            f"cache.train.first_document={split}", f"train.tokens={self.pick(409600, 640)}",
            f"train.batch_tokens={self.pick(4096, 64)}",
        ]  # fmt: skip
        if self.tiny:
            values += ["cache.batch_rows=4", "train.widths=[48, 16]", "train.l0=[6, 2]"]
            values += [f"runs.{run}.{key}=[{size}]" for run in FLAT for key, size in {"widths": 64, "l0": 8}.items()]
        return [part for value in values for part in ("--set", value)]

    def plan(self) -> Any:
        """The plan gemma-2-2b on the model and the text of this benchmark."""
        import hsae

        return hsae.load_plan("gemma-2-2b", self.settings()[1::2])


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(device: str, work: Callable[[], object], times: int = 5) -> float:
    """Median seconds of a call, after one that warms up."""
    taken = []
    for _ in range(times + 1):
        synchronise(device)
        began = time.perf_counter()
        work()
        synchronise(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def hsae_command(setup: Setup, *arguments: str) -> float:
    """Seconds of a command of hsae, its start included. Raises RuntimeError with what it says if it fails."""
    began = time.perf_counter()
    code = "from hsae.cli.main import main; main()"
    if setup.tiny:  # in this process, which saves the start
        from typer.testing import CliRunner

        from hsae.cli.main import app

        result = CliRunner().invoke(app, [*arguments, "--device", "cpu"])
        if result.exit_code:
            raise RuntimeError(f"hsae {arguments[0]}: {result.output[-500:]} {result.exception!r}")
    else:
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"hsae {arguments[0]}: {(done.stderr or done.stdout)[-500:]}")
    return time.perf_counter() - began


def model(setup: Setup) -> None:
    """Random weights of Gemma-2-2B's shape, a tokenizer of words, and text of such words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoModelForCausalLM, Gemma2Config, PreTrainedTokenizerFast

    place = setup.folder / "model"
    config = Gemma2Config(**setup.pick(GEMMA_2_2B, TINY), dtype=torch.bfloat16)
    torch.manual_seed(0)
    with torch.device(setup.device):
        language = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    language.save_pretrained(place, max_shard_size="20GB")
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    words = [f"w{number}" for number in range(config.vocab_size - len(special))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(place)
    text = setup.folder / "text"
    text.mkdir()
    generator = torch.Generator().manual_seed(0)
    each, documents = setup.pick((320, 12_000), (60, 90))
    with (text / "text.jsonl").open("w") as file:
        for _ in range(documents):
            numbers = torch.randint(len(words), (each,), generator=generator)
            file.write(json.dumps({"text": " ".join(words[number] for number in numbers)}) + "\n")
    setup.put(parameters=sum(weight.numel() for weight in language.parameters()))


def ceilings(setup: Setup) -> None:
    """What the GPU could do: products, memory, and copies to pinned memory."""
    device, side = setup.device, setup.pick(8192, 64)
    matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    setup.put(matmul_tflop_per_s=2 * side**3 / seconds(device, lambda: matrix @ matrix, 20) / 1e12)
    memory = torch.empty(setup.pick(2**31, 2**16), dtype=torch.uint8, device=device)
    setup.put(memory_gb_per_s=2 * memory.numel() / seconds(device, memory.clone) / 1e9)
    pinned = torch.empty(setup.pick(2**28, 2**12), dtype=torch.uint8, pin_memory=device == "cuda")
    there = torch.empty_like(pinned, device=device)
    setup.put(to_pinned_memory_gb_per_s=pinned.numel() / seconds(device, lambda: pinned.copy_(there)) / 1e9)


def layers(setup: Setup) -> None:
    """Tokens/s of bare transformers by rows a batch: the whole model, and its layers up to the hook, also compiled."""
    from transformers import AutoModelForCausalLM

    language = AutoModelForCausalLM.from_pretrained(
        setup.folder / "model", dtype=torch.bfloat16, device_map=None, attn_implementation="eager"
    ).to(setup.device)
    decoder, context = language.model, setup.pick(128, 32)
    whole = {rows: _prefix_speed(setup, decoder, rows, context) for rows in setup.pick((16,), (4,))}
    decoder.layers = decoder.layers[: int(setup.hook.split(".")[1]) + 1]
    eager = {rows: _prefix_speed(setup, decoder, rows, context) for rows in setup.pick((16, 64, 256), (4,))}
    setup.put(whole_eager_tokens_per_s=whole, prefix_eager_tokens_per_s=eager)
    compiled: dict[int, float] = {}
    for layer in setup.pick(decoder.layers, ()):
        layer.compile(dynamic=False)
    for rows in setup.pick((64, 128), (4,)):
        compiled[rows] = _prefix_speed(setup, decoder, rows, context)
        setup.put(prefix_compiled_tokens_per_s=compiled, best_tokens_per_s=max(*compiled.values(), *eager.values()))


def _prefix_speed(setup: Setup, decoder: Any, rows: int, context: int) -> float:
    tokens = torch.randint(4, 500, (rows, context), device=setup.device)
    with torch.inference_mode():
        return rows * context / seconds(setup.device, lambda: decoder(input_ids=tokens, use_cache=False))


class Speed:
    """Progress of a build: tokens/s of its activations once the first tenth is done, which compiles and warms up."""

    def __init__(self) -> None:
        self.readings: list[tuple[float, int]] = []

    def __call__(self, step: Any) -> None:
        """Called with every step of every task."""
        if "activations" in step.task:
            self.readings.append((time.perf_counter(), step.done * step.tokens))

    def tokens_per_s(self) -> float:
        """The speed."""
        last = self.readings[-1]
        first = next(reading for reading in self.readings if reading[1] >= last[1] / 10)
        return (last[1] - first[1]) / max(last[0] - first[0], 1e-9)


def harvest(setup: Setup) -> None:
    """Tokens/s of building the training store and the evaluation store."""
    import hsae

    for split in ("train", "eval"):
        speed, began = Speed(), time.perf_counter()
        store = hsae.build(setup.plan(), split=split, device=setup.device, progress=speed)
        tokens = store.rows * store.spec.context
        setup.put(
            **{
                f"{split}_tokens_per_s": speed.tokens_per_s(),
                f"{split}_seconds": time.perf_counter() - began,
                f"{split}_tokens": tokens,
                f"{split}_batch_rows": store.spec.batch_rows,
            }
        )


@contextlib.contextmanager
def benches(case: Case, libraries: tuple[str, ...], found: dict[str, Any]) -> Iterator[dict[str, Bench]]:
    """A trainer of each library; in `found` why there is none."""
    made: dict[str, Bench] = {}
    for library in libraries:
        try:
            made[library] = Bench(library, case)
        except (NotOffered, ImportError) as error:
            found[library] = {"absent": str(error)}
        except Exception as error:  # the others go on
            found[library] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    yield made
    made.clear()
    if case.device == "cuda":
        torch.cuda.empty_cache()


def side_by_side(setup: Setup, case: Case, libraries: tuple[str, ...]) -> dict[str, Any]:
    """Tokens/s of each library, in turns."""
    found: dict[str, Any] = {}
    rounds, length = setup.pick((3, 0.4), (1, 0.0))
    with benches(case, libraries, found) as made:
        taken: dict[str, list[float]] = {library: [] for library in made}
        for _ in range(rounds):
            for library, bench in made.items():
                taken[library].append(statistics.median(bench.run(length)))
        for library, times in taken.items():
            step = statistics.median(times)
            found[library] = {"variant": made[library].variant, "step_s": step, "tokens_per_s": case.batch / step}
    return found


def case_of(setup: Setup, kind: str, width: int) -> Case:
    """A case of the issue's sizes."""
    if setup.tiny:
        return Case(kind, d_in=16, width=64, batch=32, k=8)
    return Case(kind, d_in=2304, width=width, batch=4096, k=64, device="cuda")


def training(setup: Setup) -> None:
    """Steps at F = 16,384, beside the encoder's product, a plain relu step, and peers."""
    setup.put(product=side_by_side(setup, case_of(setup, "product", 16384), ("plain",)))
    for kind in KINDS:
        plain = ("plain",) if kind == "relu" else ()
        setup.put(**{kind: side_by_side(setup, case_of(setup, kind, 16384), (*plain, "hsae", *PEERS))})


def small(setup: Setup) -> None:
    """Six runs of F = 2,304 in one pass: six kinds, and six seeds of one kind."""
    kinds = ("relu", *K_SPARSE, "full", "stacked")
    for kind in kinds[:4]:
        setup.put(**{kind: side_by_side(setup, case_of(setup, kind, 2304), PEERS)})
    case = case_of(setup, "batchtopk", 2304)
    batches, length = case.batches(), setup.pick(2.0, 0.0)
    passes = {
        "six kinds": [hsae_run(case_of(setup, kind, 2304), number) for number, kind in enumerate(kinds)],
        "six seeds": [hsae_run(case, seed=seed) for seed in range(6)],
    }
    for name, runs in passes.items():
        step = hsae_steps(runs, case)
        warm = seconds(setup.device, lambda step=step: step(batches[0]), 3)
        taken = seconds(setup.device, lambda step=step: step(batches[1]), max(2, round(length / warm)))
        setup.put(**{name: {"step_s": taken, "tokens_per_s_of_each_run": case.batch / (taken / 6)}})


def wide(setup: Setup) -> None:
    """Steps at F = 65,536, beside the encoder's product and peers."""
    setup.put(product=side_by_side(setup, case_of(setup, "product", 65536), ("plain",)))
    for kind in ("topk", "batchtopk", "relu"):
        setup.put(**{kind: side_by_side(setup, case_of(setup, kind, 65536), ("hsae", *PEERS))})


def core(setup: Setup) -> None:
    """Whole processes of core for one SAE and for six, and how busy the GPU is meanwhile."""
    import hsae
    from hsae import registry
    from hsae.cache.profiling import DATA, IDLE, profiled
    from hsae.eval.harness.evaluation import evaluate_plan
    from hsae.eval.harness.listener import Listener
    from hsae.eval.harness.targets import Selection

    hsae.build(setup.plan(), split="train", device=setup.device, progress=False)
    hsae.build(setup.plan(), split="eval", device=setup.device, progress=False)
    plan = ("--plan", "gemma-2-2b", *setup.settings())
    six = ",".join(map(str, (*FLAT, 12)))
    hsae_command(setup, "train", "--run", six, "--resume", *plan)
    for name, runs in {"one": "11", "six": six}.items():
        setup.put(**{f"{name}_seconds": hsae_command(setup, "eval", "core", "--run", runs, "--force", *plan)})

    class Steps(Listener):
        """Tells the profile of every batch."""

        def progress(self, phase: str, done: int, total: int) -> None:
            from hsae.cache.profiling import step_done

            step_done(phase)

    kind = registry.resolve(registry.EVALUATIONS["core"].kind)
    for name, runs in {"one": "11", "six": six}.items():
        selection = Selection(run=runs)
        began = time.perf_counter()
        evaluate_plan(kind, setup.plan(), selection, force=True, device=setup.device)
        setup.put(**{f"{name}_evaluation_seconds": time.perf_counter() - began})
        with profiled(setup.folder / "traces", f"core-{name}") as summaries:
            evaluate_plan(kind, setup.plan(), selection, force=True, device=setup.device, listener=Steps())
        busy = {one.phase: 1 - (one.ms[DATA] + one.ms[IDLE]) / one.step_ms for one in summaries}
        setup.put(**{f"{name}_gpu_busy": busy})


def checks(setup: Setup) -> None:
    """On the GPU, what the tests hold on the processor: every check says True, or what is wrong."""
    for kind in KINDS:
        for name, check in CHECKS.items():
            try:
                verdict: Any = check(setup, case_of(setup, kind, 16384))
            except Exception as error:  # the others go on
                verdict = f"{type(error).__name__}: {str(error)[:300]}"
            setup.put(**{f"{kind}: {name}": verdict})
            if setup.device == "cuda":
                torch.cuda.empty_cache()
    for kind in ("topk", "batchtopk"):
        setup.put(**{f"{kind}, F = 65,536: as on the processor": like_processor(setup, case_of(setup, kind, 65536))})
    setup.put(**{"prefix and suffix give the model's own logits": cut_is_exact(setup)})


def _trained(runs: list[Any], case: Case, steps: int) -> list[dict[str, torch.Tensor]]:
    step, batches = hsae_steps(runs, case), case.batches()
    for number in range(steps):
        step(batches[number % len(batches)])
    return [{name: tensor.clone() for name, tensor in run.state()[0].items()} for run in runs]


def _same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool | str:
    exactly = {"rtol": 0.0, "atol": 0.0, "equal_nan": True}
    differing = [name for name in left if not torch.allclose(left[name], right[name], **exactly)]
    return not differing or f"differ: {', '.join(differing)}"


def same_bits_twice(setup: Setup, case: Case) -> bool | str:
    return _same(*(_trained([hsae_run(case)], case, 10)[0] for _ in range(2)))


def alone_as_with_others(setup: Setup, case: Case) -> bool | str:
    alone = _trained([hsae_run(case, 1, seed=1)], case, 10)[0]
    return _same(alone, _trained([hsae_run(case, number, seed=number) for number in range(3)], case, 10)[1])


def resumed_as_uninterrupted(setup: Setup, case: Case) -> bool | str:
    whole, first, second = (hsae_run(case) for _ in range(3))
    expected = _trained([whole], case, 8)[0]
    _trained([first], case, 4)
    tensors, rest = first.state()
    second.restore(tensors, rest)
    return _same(expected, _trained([second], case, 4)[0])


def like_processor(setup: Setup, case: Case) -> bool | str:
    """What three steps in float32 change on the GPU, selection and kernels included, and on the processor."""
    changes, batches = [], replace(case, batch=256).batches(3)
    for device in (case.device, "cpu"):
        there = replace(case, batch=256, device=device)
        run = hsae_run(there, precision="float32")
        step, before = hsae_steps([run], there), _weights(run)
        for x_BD in batches:
            step(x_BD.to(device))
        changes.append({name: tensor - before[name] for name, tensor in _weights(run).items()})
    left, right = changes
    worst = {name: ((left[name] - right[name]).norm() / (right[name].norm() + 1e-12)).item() for name in left}
    name = max(worst, key=worst.__getitem__)
    return worst[name] < 0.02 or f"the change of {name} differs by {worst[name]:.2g} of its norm"


def _weights(run: Any) -> dict[str, torch.Tensor]:
    tensors = run.state(moments=False)[0]
    return {name: tensor.cpu().clone() for name, tensor in tensors.items() if tensor.is_floating_point()}


CHECKS: dict[str, Callable[[Setup, Case], bool | str]] = {
    "same bits twice": same_bits_twice,
    "alone as with others": alone_as_with_others,
    "resumed as uninterrupted": resumed_as_uninterrupted,
    "as on the processor": like_processor,
}


def cut_is_exact(setup: Setup) -> bool:
    """Whether the model's own logits come out of prefix, suffix and unembedding, to the bit."""
    from hsae.cache.language_model.lm import LanguageModel

    language = LanguageModel.load(setup.plan().model, device=setup.device)
    tokens = torch.randint(4, 500, (4, 32))
    residual = language.prefix(tokens, [setup.hook])[setup.hook]
    with torch.inference_mode():
        return torch.equal(language.unembed(language.suffix(setup.hook, residual)), language.logits(tokens))


BUDGETS = {
    "model": 50,
    "ceilings": 20,
    "layers": 65,
    "harvest": 100,
    "training": 140,
    "small": 50,
    "wide": 45,
    "core": 65,
}
"""Seconds of each part: together less than nine minutes."""
OTHERS = {"checks": 400}
PARTS = {part.__name__: part for part in (model, ceilings, layers, harvest, training, small, wide, core, checks)}


def speeds(found: dict[str, Any], kind: str) -> tuple[float | None, float | None]:
    """Tokens/s of hsae and of the best peer, of the best k-sparse one for kinds that no peer has."""

    def of(which: str) -> dict[str, float]:
        return {name: r["tokens_per_s"] for name, r in found.get(which, {}).items() if "tokens_per_s" in r}

    peers = [speed for name, speed in of(kind).items() if name in PEERS]
    if not peers and kind in KINDS:
        peers = [speed for other in K_SPARSE for name, speed in of(other).items() if name in PEERS]
    return of(kind).get("hsae"), max(peers, default=None)


def targets(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What is to be reached, what was, and whether: None where it was not measured."""
    rows: list[dict[str, Any]] = []

    def row(name: str, value: float | None, wanted: float) -> None:
        reached = None if value is None else value >= wanted
        rows.append({"target": name, "measured": value, "wanted": wanted, "reached": reached})

    def ratio(above: float | None, below: float | None) -> float | None:
        return None if above is None or not below else above / below

    built, best = found.get("harvest", {}), found.get("layers", {}).get("best_tokens_per_s")
    train = built.get("train_tokens_per_s")
    row("harvest, tokens/s", train, 150_000)
    row("harvest / best prefix", ratio(train, best), 0.9)
    row("evaluation store / training store", ratio(built.get("eval_tokens_per_s"), train), 0.5)
    steps = found.get("training", {})
    for kind in ("relu", *K_SPARSE, "full"):
        row(f"training, {kind} / best peer", ratio(*speeds(steps, kind)), 2)
    row("training, batchtopk, tokens/s", speeds(steps, "batchtopk")[0], 1_000_000)
    row("training, full, tokens/s", speeds(steps, "full")[0], 800_000)
    few = found.get("small", {})
    six = ("relu", *K_SPARSE, "full", "stacked")
    peers = [speeds(few, kind)[1] for kind in six]
    if "six kinds" in few and all(peers):
        mean = statistics.harmonic_mean([speed for speed in peers if speed])
        row("six runs, a run / best peers", few["six kinds"]["tokens_per_s_of_each_run"] / mean, 2)
    many = found.get("wide", {})
    product = many.get("product", {}).get("plain", {}).get("step_s")
    for kind in ("topk", "batchtopk"):
        ours, peer = speeds(many, kind)
        row(f"wide, {kind} / best peer", ratio(ours, peer), 3)
        step = many.get(kind, {}).get("hsae", {}).get("step_s")
        row(f"wide, {kind}: 1.5 encoder products / step", ratio(product and 1.5 * product, step), 1)
    measured = found.get("core", {})
    for name, wanted in {"one": 8, "six": 20}.items():
        row(
            f"core, {name}: SAEBench's passes / hsae",
            ratio(saebench_seconds(found, name), core_seconds(measured, name)),
            wanted,
        )
        busy = measured.get(f"{name}_gpu_busy") or {}
        row(f"core, {name}: GPU busy", min(busy.values(), default=None), 0.8)
    return rows


def saebench_seconds(found: dict[str, dict[str, Any]], name: str) -> float | None:
    """What the forward passes alone that SAEBench makes would take bare transformers at its 16 rows: three whole ones a
    reconstruction batch and one up to the hook a variance batch, for every SAE, at its 200 and 2,000 batches."""
    bare, batch = found.get("layers", {}), 16 * 128
    if "prefix_eager_tokens_per_s" not in bare:
        return None
    whole = next(iter(bare["whole_eager_tokens_per_s"].values()))
    prefix = next(iter(bare["prefix_eager_tokens_per_s"].values()))
    return {"one": 1, "six": 6}[name] * batch * (3 * 200 / whole + 2000 / prefix)


def core_seconds(measured: dict[str, Any], name: str) -> float | None:
    """What the whole process would take at SAEBench's sizes, of which a tenth was measured."""
    whole, part = measured.get(f"{name}_seconds"), measured.get(f"{name}_evaluation_seconds")
    return None if whole is None or part is None else whole + 9 * part


def run_part(name: str, setup: Setup, environment: dict[str, str]) -> dict[str, Any]:
    """What a part finds in a process of its own, within its seconds."""
    file = setup.folder / f"{name}.json"
    command = [sys.executable, str(Path(__file__).resolve()), "--part", name, "--folder", str(setup.folder)]
    command += ["--tiny"] if setup.tiny else []
    began, limit = time.perf_counter(), (BUDGETS | OTHERS)[name]
    error: str | None = None
    with (setup.folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            if status := process.wait(limit):
                error = f"status {status}: {(setup.folder / f'{name}.log').read_text()[-1500:]}"
        except subprocess.TimeoutExpired:
            error = f"not done in {limit} s"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found = json.loads(file.read_text()) if file.exists() else {}
    return found | {"seconds": time.perf_counter() - began} | ({"error": error} if error else {})


def run_here(name: str, setup: Setup) -> dict[str, Any]:
    """What a part finds in this process."""
    began, mine = time.perf_counter(), Setup(setup.folder, setup.tiny)
    error: dict[str, str] = {}
    try:
        PARTS[name](mine)
    except Exception as wrong:  # the others go on
        error = {"error": f"{type(wrong).__name__}: {str(wrong)[:1500]}"}
    return mine.found | {"seconds": time.perf_counter() - began} | error


def with_wheels(wheels: Path | None, folder: Path) -> dict[str, str]:
    """The environment of parts, in which what lies in a folder of wheels is installed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "true"}
    if wheels is None:
        return environment
    target = folder / "wheels"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(target)]
    subprocess.run([*pip, *map(str, wheels.glob("*.whl"))], check=True)
    path = os.pathsep.join(filter(None, (str(target), environment.get("PYTHONPATH"))))
    sys.path.insert(0, str(target))
    return environment | {"PYTHONPATH": path}


def machine() -> dict[str, Any]:
    """What figures depend on besides the code."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    card, driver = None, None
    if torch.cuda.is_available():
        card = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError):
            driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return {
        "card": card,
        "driver": driver,
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "cuda": torch.version.cuda,
        "versions": versions,
    }


def show(document: dict[str, Any]) -> None:
    """Print the targets, and which parts failed."""
    for row in document["targets"]:
        value = "-" if row["measured"] is None else f"{row['measured']:,.2f}"
        verdict = {True: "reached", False: "NOT reached", None: "not measured"}[row["reached"]]
        print(f"{row['target']:45} {value:>14} of {row['wanted']:>12,}  {verdict}")
    for name, found in document["parts"].items():
        print(f"{name}: {found['seconds']:.0f} s" + (f", FAILED: {found['error']}" if "error" in found else ""))


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run parts and print; the document is returned too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="default: all but checks")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on a processor")
    parser.add_argument("--here", action="store_true", help="parts in this process, without limits of time")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install for the run")
    parser.add_argument("--into", type=Path, help="file for the JSON document")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.part:
        file = options.folder / f"{options.part}.json"
        PARTS[options.part](Setup(options.folder, options.tiny, file=file))
        return {}
    if not options.tiny and not torch.cuda.is_available():
        parser.error("this torch sees no GPU; --tiny shows on a processor that the script works")
    with tempfile.TemporaryDirectory(prefix="hsae-gpu-") as scratch:
        setup = Setup(Path(scratch), options.tiny)
        environment = with_wheels(options.wheels, setup.folder)
        names = options.parts or [*BUDGETS]
        needed = ["model"] if "model" not in names and {"layers", "harvest", "core", "checks"} & set(names) else []
        parts = {
            name: run_here(name, setup) if options.here else run_part(name, setup, environment)
            for name in (*needed, *names)
        }
    date = datetime.now(UTC).isoformat(timespec="seconds")
    document = {"date": date, "tiny": options.tiny, "machine": machine(), "parts": parts, "targets": targets(parts)}
    show(document)
    if options.into:
        options.into.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))
    return document


if __name__ == "__main__":
    main()
