"""SAEBench's sparse probing: how much of a labelled class a few latents predict, from sums over each text's tokens.

`faithful` gives SAEBench's numbers; `ideal` the same question with fixed negatives, a validation split and float32,
under several seeds.

Shapes: U texts of a task, D residual width, F latents.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hsae.eval.probing.text_probes import (
    Labelled,
    Task,
    Training,
    balanced,
    ideal_probe,
    mean,
    mean_or_none,
    pick,
    sample,
    seed_estimates,
    top_k_accuracy,
    train_probe,
)

K_VALUES = (1, 2, 5)
SCHEMA_K = (1, 2, 5, 10, 20, 50, 100)
TRAINING = Training(batch=250, epochs=100, lr=1e-2, patience=10)
RANDOM_SEED = 42

Latents = Callable[[Task], Tensor]
"""Gives the sums [U, F] of latent activations of a task's texts."""
Accuracies = dict[str, dict[str, float]]
"""Kind of probe (`llm_test_accuracy`, `sae_top_5_test_accuracy`, ...) -> class -> accuracy."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """SAEBench's three result fields."""

    metrics: dict[str, dict[str, float | None]]
    details: list[dict[str, Any]]
    unstructured: Any


def baselines(tasks: Sequence[Task], k_values: Sequence[int] = K_VALUES) -> dict[str, Accuracies]:
    """What probes on the residual itself reach, by task; their random stream is their own, so they suit any SAE."""
    generator = torch.Generator().manual_seed(RANDOM_SEED)
    return {task.name: dict(_probes("llm", task, task.sums_UD, k_values, generator)) for task in tasks}


@torch.no_grad()
def faithful(
    tasks: Sequence[Task], latents: Latents, llm: dict[str, Accuracies] | None, k_values: Sequence[int] = K_VALUES
) -> Outcome:
    """SAEBench's numbers. With `llm` (its "cached" run) only the SAE's probes draw; without, the residual's draw before
    them.
    """
    generator = torch.Generator().manual_seed(RANDOM_SEED)
    results: dict[str, Accuracies] = {}
    for task in tasks:
        scores = dict(_probes("llm", task, task.sums_UD, k_values, generator)) if llm is None else dict(llm[task.name])
        scores |= dict(_probes("sae", task, latents(task), k_values, generator))
        results[task.name] = scores
    return _outcome(results)


def _probes(
    kind: str, task: Task, sums: Tensor, k_values: Sequence[int], generator: torch.Generator
) -> Iterator[tuple[str, dict[str, float]]]:
    """The probe on all columns, then those on the best k: accuracy by class."""
    vectors = task.means(sums)

    def draw(chosen: str) -> tuple[Labelled, Labelled]:
        train, test = (balanced(lists, chosen, generator) for lists in (task.train, task.test))
        return pick(vectors, train), pick(vectors, test)

    accuracies = {}
    for chosen in task.train:
        train, test = draw(chosen)
        with torch.enable_grad():
            accuracies[chosen] = train_probe(train, test, TRAINING, generator)[1]
    yield f"{kind}_test_accuracy", accuracies
    for k in k_values:
        yield f"{kind}_top_{k}_test_accuracy", {chosen: top_k_accuracy(*draw(chosen), k) for chosen in task.train}


def _outcome(results: dict[str, Accuracies]) -> Outcome:
    means = {name: {key: mean(values.values()) for key, values in entries.items()} for name, entries in results.items()}
    keys = [*accuracy_keys("llm"), *accuracy_keys("sae")]
    details: list[dict[str, Any]] = [
        {"dataset_name": f"{name}_results", **{key: entries.get(key) for key in keys}}
        for name, entries in means.items()
    ]
    overall = {key: mean_or_none([entry[key] for entry in details]) for key in keys}
    metrics = {kind: {key: overall[key] for key in keys if key.startswith(kind)} for kind in ("llm", "sae")}
    unstructured = {
        f"{name}_results": {
            key: entries[key]
            for key in sorted(entries, key=lambda key: not key.endswith(("sae_test_accuracy", "llm_test_accuracy")))
        }
        for name, entries in results.items()
    }
    return Outcome(metrics=metrics, details=details, unstructured=unstructured)


def accuracy_keys(kind: str) -> list[str]:
    """SAEBench's keys in its order, of probes on the residual (`llm`) or on latents (`sae`)."""
    return [f"{kind}_test_accuracy", *(f"{kind}_top_{k}_test_accuracy" for k in SCHEMA_K)]


def ideal(
    tasks: Sequence[Task], vectors: Latents, seeds: Sequence[int], k_values: Sequence[int] = K_VALUES
) -> dict[str, Any]:
    """Measures with intervals over seeds, overall and by task: `test_accuracy` and `top_k_test_accuracy`.

    `vectors` gives float32 sums of latents, or of the residual for what the residual itself reaches. Under one seed the
    negatives, the validation texts and the test texts of a class are the same for every k and every SAE.
    """
    by_task: dict[str, dict[str, list[float]]] = {}
    for task in tasks:
        means = task.means(vectors(task).float())
        measures: dict[str, list[float]] = {}
        for seed in seeds:
            samples = [sample(task, chosen, seed) for chosen in task.train]
            full = [
                ideal_probe(means, texts).accuracy(means[texts.test[0]].double(), texts.test[1]) for texts in samples
            ]
            measures.setdefault("test_accuracy", []).append(mean(full))
            for k in k_values:
                accuracies = [
                    top_k_accuracy(pick(means, texts.train), pick(means, texts.test), k, stable=True)
                    for texts in samples
                ]
                measures.setdefault(f"top_{k}_test_accuracy", []).append(mean(accuracies))
        by_task[task.name] = measures
    return seed_estimates(by_task)
