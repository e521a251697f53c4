"""Training steps of hsae and its peers, each as its authors take it; what peers.py and gpu.py time.

    python benchmarks/training_steps.py LIBRARY

reads requests from standard input, one JSON object a line, and answers each with one: {"case": {...}} makes a trainer,
in every variant that the library has, and keeps the fastest; {"seconds": 1.0} trains for so long and answers with the
seconds of each step. It runs in hsae's environment and in that of the peers, so it imports neither before it is asked.

Shapes: B vectors of a batch, D width of a vector, F latents.
"""

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Step = Callable[[Tensor], object]
FOREVER = 1_000_000  # steps of a training that is never over here


@dataclass(frozen=True)
class Case:
    """What is trained, and on what. Two-level kinds share out width and k 3 : 1 between a fine and a coarse level."""

    kind: str
    d_in: int = 640
    width: int = 2560
    batch: int = 2048
    k: int = 32
    device: str = "cpu"

    @property
    def levels(self) -> tuple[int, int]:
        """Widths of two levels, the finest first."""
        return self.width - self.width // 4, self.width // 4

    @property
    def level_k(self) -> tuple[int, int]:
        """Active latents of two levels."""
        return self.k - self.k // 4, self.k // 4

    def batches(self, count: int = 4) -> list[Tensor]:
        """Batches [B, D] of vectors that sparse codes explain, E||x||^2 = D."""
        generator = torch.Generator(self.device).manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=self.device)

        directions = torch.nn.functional.normalize(randn(2 * self.width, self.d_in), dim=1)
        batches = []
        for _ in range(count):
            code = randn(self.batch, 2 * self.width)
            code = torch.where(code > 2, code, 0)
            x_BD = code @ directions + 0.05 * randn(self.batch, self.d_in)
            batches.append(x_BD * (self.d_in**0.5 / x_BD.square().sum(1).mean().sqrt()))
        return batches


class NotOffered(Exception):
    """A library has no such kind of SAE."""


def pick(kinds: dict[str, Any], kind: str) -> Any:
    """The entry of a kind. Raises NotOffered."""
    if kind not in kinds:
        raise NotOffered(f"has no {kind}")
    return kinds[kind]


def precisions(device: str) -> list[bool]:
    """Whether to autocast to bfloat16: both ways, but where bfloat16 products are slower, only without."""

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(512, 512, dtype=dtype, device=device)
        began = time.perf_counter()
        (matrix @ matrix).sum().item()
        return time.perf_counter() - began

    types = (torch.float32, torch.bfloat16)
    full, half = (min(seconds(dtype) for _ in range(3)) for dtype in types)
    return [False, True] if half <= full else [False]


def autocast(case: Case, enabled: bool) -> torch.autocast:
    """A context of its own for every step."""
    return torch.autocast(case.device, torch.bfloat16, enabled=enabled)


def variants_of_precision(case: Case, make: Callable[[], Step]) -> Iterator[tuple[str, Step]]:
    """A trainer's steps in float32 and under autocast."""
    for half in precisions(case.device):
        step = make()

        def cast_step(x_BD: Tensor, step: Step = step, half: bool = half) -> None:
            with autocast(case, half):
                step(x_BD)

        yield "bfloat16 autocast" if half else "float32", cast_step


def plain(case: Case) -> Iterator[tuple[str, Step]]:
    """Ceilings: the encoder's product alone, and a dense relu step with PyTorch's fused Adam."""
    if case.kind == "product":
        for half in precisions(case.device):
            dtype = torch.bfloat16 if half else torch.float32
            weight = torch.randn(case.d_in, case.width, device=case.device, dtype=dtype)
            yield str(dtype).removeprefix("torch."), lambda x_BD, weight=weight: x_BD.to(weight.dtype) @ weight
        return
    pick({"relu": None}, case.kind)
    encoder = torch.nn.Linear(case.d_in, case.width, device=case.device)
    decoder = torch.nn.Linear(case.width, case.d_in, device=case.device)
    adam = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], fused=True)
    for half in precisions(case.device):

        def step(x_BD: Tensor, half: bool = half) -> None:
            with autocast(case, half):
                code = encoder(x_BD).relu()
                loss = (decoder(code) - x_BD).square().sum(1).mean() + 1e-3 * code.sum(1).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()

        yield "bfloat16 autocast" if half else "float32", step


def hsae_run(case: Case, number: int = 0, seed: int = 0, **settings: Any) -> Any:
    """A TrainingRun of a case's kind, with further settings of its RunConfig."""
    from hsae.train.config.run_config import CompositionConfig, RunConfig, Stage
    from hsae.train.training.scaling import Scaling
    from hsae.train.training.training_run import TrainingRun

    all_on = Stage(name="all", until=1.0, levels=(2, 1), composition="on", sparsify=True)
    hierarchy = {"composition": CompositionConfig(mode="normalised"), "curriculum": (all_on,)}
    flat = {"structure": "flat", "widths": (case.width,), "l0": (case.k,)}
    two = {"widths": case.levels, "l0": case.level_k}
    kinds: dict[str, dict[str, Any]] = {
        **{kind: {**flat, "activation": kind} for kind in ("relu", "topk", "batchtopk", "jumprelu")},
        "matryoshka": {**two, "structure": "additive", "selection": "joint"},
        "full": {**two, "structure": "additive", **hierarchy},
        "stacked": {**two, "structure": "stacked", **hierarchy},
    }
    config = RunConfig(number=number, name=case.kind, **pick(kinds, case.kind), **settings)
    scaling = Scaling(scale=1.0, median=torch.zeros(case.d_in), variance=float(case.d_in))
    return TrainingRun(config, scaling, steps=FOREVER, seed=seed, device=case.device)


def hsae(case: Case) -> Iterator[tuple[str, Step]]:
    """What `hsae train` does with a batch, its log included."""
    step = hsae_steps([hsae_run(case)], case)
    yield "auto", step


def hsae_steps(runs: list[Any], case: Case) -> Step:
    """A step of several runs on one batch, as the training loop takes it."""
    from hsae.train.config.run_config import StreamConfig
    from hsae.train.training.listener import Listener
    from hsae.train.training.loop import Trainee, run_steps

    stream = StreamConfig(tokens=FOREVER * case.batch, batch_tokens=case.batch, checkpoint_steps=FOREVER, log_steps=25)
    trainees = [Trainee(run) for run in runs]
    return lambda x_BD: run_steps(trainees, [x_BD], stream, Listener())


def stand_in(*modules: str) -> None:
    """Let a peer's package be imported on a bare machine, without others that its steps don't use."""
    for name in modules:
        if name not in sys.modules and not _is_installed(name):
            sys.modules[name] = module = ModuleType(name)
            module.__file__ = None  # or whoever looks through the modules gets a class for it
            module.__dict__["__getattr__"] = lambda attribute: type(attribute, (), {})


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # its package is a stand-in
        return False


def dictionary_learning(case: Case) -> Iterator[tuple[str, Step]]:
    """`update` of dictionary_learning's trainers, in the order of `trainSAE`."""
    stand_in("nnsight")
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.standard import StandardTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    sizes = {"activation_dim": case.d_in, "dict_size": case.width, "steps": FOREVER, "device": case.device}
    coarse = case.levels[1] / case.width
    kinds: dict[str, tuple[type, dict[str, Any]]] = {
        "relu": (StandardTrainer, {}),
        "topk": (TopKTrainer, {"k": case.k}),
        "batchtopk": (BatchTopKTrainer, {"k": case.k}),
        "matryoshka": (MatryoshkaBatchTopKTrainer, {"k": case.k, "group_fractions": [coarse, 1 - coarse]}),
        "jumprelu": (JumpReluTrainer, {"target_l0": float(case.k)}),
    }
    kind, options = pick(kinds, case.kind)

    def make() -> Step:
        trainer, steps = kind(**sizes, layer=0, lm_name="none", **options), iter(range(FOREVER))
        return lambda x_BD: trainer.update(next(steps), x_BD)

    yield from variants_of_precision(case, make)


def saelens(case: Case) -> Iterator[tuple[str, Step]]:
    """SAELens's `SAETrainer.step`; sparse activations, where there are, with float32."""
    from sae_lens import saes
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    coarse = case.levels[1]
    kinds: dict[str, tuple[type, type, dict[str, Any]]] = {
        "relu": (saes.StandardTrainingSAE, saes.StandardTrainingSAEConfig, {}),
        "topk": (saes.TopKTrainingSAE, saes.TopKTrainingSAEConfig, {"k": case.k}),
        "batchtopk": (saes.BatchTopKTrainingSAE, saes.BatchTopKTrainingSAEConfig, {"k": case.k}),
        "matryoshka": (
            saes.MatryoshkaBatchTopKTrainingSAE,
            saes.MatryoshkaBatchTopKTrainingSAEConfig,
            {"k": case.k, "matryoshka_widths": [coarse, case.width]},
        ),
        "jumprelu": (saes.JumpReLUTrainingSAE, saes.JumpReLUTrainingSAEConfig, {}),
    }
    model, config, options = pick(kinds, case.kind)

    def make(half: bool, **further: Any) -> Step:
        sae = model(config(d_in=case.d_in, d_sae=case.width, device=case.device, **options, **further))
        settings = SAETrainerConfig(
            total_training_samples=FOREVER * case.batch,
            train_batch_size_samples=case.batch,
            lr_end=3e-5,  # a tenth of its learning rate, as its runner sets it
            device=case.device,
            autocast=half,
        )
        trainer: Any = SAETrainer(settings, sae, iter(()))

        def step(x_BD: Tensor) -> None:
            trainer.step(x_BD)
            trainer.n_training_steps += 1

        return step

    for half in precisions(case.device):
        yield "bfloat16 autocast" if half else "float32", make(half)
    if case.kind == "topk":
        yield "float32, sparse activations", make(False, use_sparse_activations=True)


def sparsify(case: Case) -> Iterator[tuple[str, Step]]:
    """What the forward hook and the loop of sparsify's `Trainer.fit` do with a batch, with its default optimiser."""
    stand_in("natsort", "datasets", "accelerate", "accelerate.utils")
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.sign_sgd import SignSGD

    pick({"topk": None}, case.kind)

    def make() -> Step:
        coder = SparseCoder(case.d_in, SparseCoderConfig(num_latents=case.width, k=case.k), case.device, torch.float32)
        rate = 5e-3 / (case.width / 2**14) ** 0.5
        optimiser = ScheduleFreeWrapper(SignSGD(coder.parameters(), lr=rate), momentum=0.95)
        optimiser.train()
        since_fired = torch.zeros(case.width, dtype=torch.long, device=case.device)

        def step(x_BD: Tensor) -> None:
            coder.set_decoder_norm_to_unit_norm()
            output = coder(x_BD, total_variance=(x_BD - x_BD.mean(0)).pow(2).sum())
            fired = torch.zeros_like(since_fired, dtype=torch.bool)
            fired[output.latent_indices.flatten()] = True
            float(output.fvu.detach())
            output.fvu.backward()
            coder.remove_gradient_parallel_to_decoder_directions()
            optimiser.step()
            optimiser.zero_grad()
            with torch.no_grad():
                since_fired.add_(len(x_BD))
                since_fired[fired] = 0

        return step

    yield from variants_of_precision(case, make)


LIBRARIES = {maker.__name__: maker for maker in (plain, hsae, dictionary_learning, saelens, sparsify)}


class Bench:
    """The fastest variant of a library for a case, and its batches."""

    def __init__(self, library: str, case: Case) -> None:
        self.case, self.batches, self.taken = case, case.batches(), 0
        self.tried: dict[str, float] = {}
        variants = dict(LIBRARIES[library](case))
        for variant, step in variants.items():
            self.step = step
            try:
                self.take(1)
                self.tried[variant] = min(self.take(2)) if len(variants) > 1 else 0.0
            except RuntimeError as error:  # such as an operation that a processor has no bfloat16 for
                print(f"{library}, {variant}: {str(error).splitlines()[0]}", file=sys.stderr)
        if not self.tried:
            raise NotOffered("none of its variants runs here")
        self.variant = min(self.tried, key=self.tried.__getitem__)
        self.step = variants[self.variant]

    def take(self, steps: int) -> list[float]:
        """Seconds of each of some steps."""
        seconds = []
        for _ in range(steps):
            x_BD = self.batches[self.taken % len(self.batches)]
            self.taken += 1
            began = time.perf_counter()
            self.step(x_BD)
            if self.case.device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        return seconds

    def run(self, seconds: float) -> list[float]:
        """Seconds of each step over about so many seconds; the first step after a pause does not count."""
        once = self.take(1)[0]
        return self.take(max(2, round(seconds / once)))


def main() -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    bench: Bench | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "case" in request:
                bench = None  # before the next one takes memory
                bench = Bench(sys.argv[1], Case(**request["case"]))
                answer: dict[str, Any] = {"variant": bench.variant, "tried": bench.tried}
            else:
                assert bench is not None
                answer = {"seconds": bench.run(request["seconds"])}
        except (NotOffered, ImportError) as error:
            answer = {"absent": str(error)}
        except Exception as error:  # one library's failure is told, the others go on
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
