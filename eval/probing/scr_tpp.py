"""SAEBench's SCR and TPP: what ablating the latents that matter for one class does to the probes of the others.

One encoding of every unique text serves every class and every number of latents: with an affine decoder, ablating the
set A changes a text's vector by -(1/n) sum over A of S_i d_i, where S_i is latent i's activation summed over all
positions of the text.

Shapes: U unique texts, D residual width, F latents, C classes whose probes are scored.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from hsae.cache.language_model.matmul import product
from hsae.eval.probing.sparse_probing import RANDOM_SEED, Outcome
from hsae.eval.probing.text_probes import (
    Probe,
    Sample,
    Task,
    Training,
    balanced,
    ideal_probe,
    mean,
    pick,
    sample,
    seed_estimates,
    train_probe,
)
from hsae.train.model.views import View

Kind = Literal["scr", "tpp"]
N_VALUES = (2, 5, 10, 20, 50, 100, 500)
TRAINING = Training(batch=16, epochs=20, lr=1e-3, patience=20, l1=1e-3)
SMALLEST_GAP = 0.001
FIRST, SECOND, SPURIOUS = "male / female", "professor / nurse", "male_professor / female_nurse"
PARTNERS = {
    FIRST: "female_data_only",
    SECOND: "nurse_data_only",
    SPURIOUS: "female_nurse_data_only",
}
"""SCR's lists by the fixed names SAEBench gives them whatever the data: attribute, class, and both at once; each with
its opposite.
"""
LISTS = tuple(name for pair in PARTNERS.items() for name in pair)

Accuracies = dict[str, float]
Ablated = dict[str, dict[int, Accuracies]]
Probes = dict[str, Probe]
Latents = Callable[[Task], Tensor]


@dataclass(frozen=True)
class Trained:
    """The probes of a task and their accuracies on the residual itself."""

    probes: Probes
    clean: Accuracies


@dataclass(frozen=True, kw_only=True)
class Effects:
    """One SAE on one task: what the scores are made from."""

    clean: Accuracies
    ablated: Ablated
    """Class ablated -> number of latents -> probe -> accuracy."""


def scored(kind: Kind, task: Task) -> list[str]:
    """The classes whose probes are scored."""
    return list(PARTNERS) if kind == "scr" else list(task.train)


def partner_of(kind: Kind, chosen: str) -> str | None:
    """What a class is set against: in SCR its opposite, in TPP all other classes (None)."""
    if kind == "tpp":
        return None
    return PARTNERS.get(chosen) or next(name for name, partner in PARTNERS.items() if partner == chosen)


def probe_on(probe: str, data: str) -> str:
    """SAEBench's name for the accuracy of one class's probe on another's texts."""
    return f"{probe} probe on {data} data"


def train_probes(kind: Kind, tasks: Iterable[Task]) -> dict[str, Trained]:
    """SAEBench's probes for every task, from a random stream of their own, so they belong to no SAE."""
    generator = torch.Generator().manual_seed(RANDOM_SEED)
    return {task.name: _train(kind, task, generator) for task in tasks}


def _train(kind: Kind, task: Task, generator: torch.Generator) -> Trained:
    vectors = task.means(task.sums_UD)
    probes: Probes = {}
    for chosen in task.train:
        partner = partner_of(kind, chosen)
        train, test = (balanced(lists, chosen, generator, partner) for lists in (task.train, task.test))
        probes[chosen], _ = train_probe(pick(vectors, train), pick(vectors, test), TRAINING, generator)
    return Trained(probes, _accuracies(kind, task, probes, vectors.__getitem__, generator))


def _accuracies(
    kind: Kind, task: Task, probes: Probes, vectors: Callable[[Tensor], Tensor], generator: torch.Generator
) -> Accuracies:
    """Every scored probe on its own class's test texts, then in SCR every other probe on them too."""
    accuracies, names = {}, scored(kind, task)
    for name in names:
        rows, labels = balanced(task.test, name, generator, partner_of(kind, name))
        accuracies[name] = probes[name].accuracy(vectors(rows), labels)
    if kind == "scr":
        for data in names:
            rows, labels = balanced(task.test, data, generator, partner_of(kind, data))
            texts = vectors(rows)
            for name in names:
                if name != data:
                    accuracies[probe_on(name, data)] = probes[name].accuracy(texts, labels)
    return accuracies


@torch.no_grad()
def faithful(
    kind: Kind,
    tasks: Sequence[Task],
    view: View,
    latents: Latents,
    trained: dict[str, Trained] | None,
    n_values: Sequence[int] = N_VALUES,
) -> tuple[Outcome, dict[str, Effects]]:
    """SAEBench's numbers and the accuracies behind them.

    With `trained` (its "cached" run) only samples are drawn; without, each task's probes are trained first in the same
    stream.
    """
    generator = torch.Generator().manual_seed(RANDOM_SEED)
    silent_F = view.encode(torch.zeros(1, view.d_in, dtype=view.W_dec.dtype, device=view.W_dec.device))[0]
    effects = {}
    for task in tasks:
        if trained is None:
            with torch.enable_grad():
                probes = _train(kind, task, generator)
        else:
            probes = trained[task.name]
        sums_UF = latents(task)
        ranked = {
            name: _effect(kind, task, name, probes.probes[name], view, sums_UF, generator)
            for name in scored(kind, task)
        }
        ablated: Ablated = {}
        for name, effect_F in ranked.items():
            ablated[name] = {}
            for n in n_values:
                chosen = selected(effect_F, n)
                vectors = _ablation(task, view, sums_UF, silent_F, chosen)
                ablated[name][n] = _accuracies(kind, task, probes.probes, vectors, generator)
        effects[task.name] = Effects(clean=probes.clean, ablated=ablated)
    return outcome(kind, effects), effects


def _effect(
    kind: Kind, task: Task, chosen: str, probe: Probe, view: View, sums_UF: Tensor, generator: torch.Generator
) -> Tensor:
    rows, labels = balanced(task.train, chosen, generator, partner_of(kind, chosen))
    means_SF = sums_UF[rows].float() / task.lengths_U[rows, None]
    change_F = (means_SF[labels == 1].mean(0) - means_SF[labels == 0].mean(0)).to(view.W_dec.dtype)
    return _signed(kind, change_F, product(view.W_dec, probe.weight[0].to(view.W_dec.dtype)))


def _signed(kind: Kind, change_F: Tensor, gain_F: Tensor) -> Tensor:
    """A latent's effect on a class's probe: in SCR its size; in TPP only of latents that fire more in the class."""
    if kind == "tpp":
        return (change_F.clamp_min(0) * gain_F).float()
    return (change_F * gain_F).float().abs()


def selected(effect_F: Tensor, n: int, *, positive: bool = False) -> Tensor:
    """The n latents of the largest effect, fewer if fewer have one; SAEBench lets zeros and negatives fill up the
    number.
    """
    having = int((effect_F > 0).sum()) if positive else int((effect_F != 0).sum())
    return torch.topk(effect_F, min(n, having)).indices


def _ablation(
    task: Task, view: View, sums_UF: Tensor, silent_F: Tensor | None, chosen: Tensor
) -> Callable[[Tensor], Tensor]:
    """Vectors of texts without the chosen latents; `silent_F`, if given, is what latents do on masked positions."""

    def vectors(rows: Tensor) -> Tensor:
        lengths = task.lengths_U[rows, None].to(torch.promote_types(sums_UF.dtype, torch.float32))
        sums = sums_UF[rows][:, chosen].to(lengths.dtype)
        if silent_F is not None:
            sums = sums + (task.context - lengths) * silent_F[chosen].to(lengths.dtype)
        moved = task.sums_UD[rows].to(lengths.dtype) - sums @ view.W_dec[chosen].to(lengths.dtype)
        return (moved / lengths).to(sums_UF.dtype)

    return vectors


def scores(kind: Kind, effects: Effects) -> dict[str, float]:
    """The scores of one task, by SAEBench's keys."""
    return _scr_scores(effects) if kind == "scr" else _means(tpp_scores(effects).values())


def _scr_scores(effects: Effects) -> dict[str, float]:
    clean, values = effects.clean, {}
    for n in effects.ablated[FIRST]:
        original = {}
        for direction, (ablated, data) in {"dir1": (FIRST, SECOND), "dir2": (SECOND, FIRST)}.items():
            key = probe_on(SPURIOUS, data)
            original[direction], gap = clean[key], clean[data] - clean[key]
            changed = effects.ablated[ablated][n][key]
            values[f"scr_{direction}_threshold_{n}"] = (
                0.0 if gap < SMALLEST_GAP else (changed - original[direction]) / gap
            )
        if original["dir1"] != original["dir2"]:
            worse = min(original, key=original.__getitem__)
            values[f"scr_metric_threshold_{n}"] = values[f"scr_{worse}_threshold_{n}"]
    return values


def tpp_scores(effects: Effects) -> dict[str, dict[str, float]]:
    """TPP's scores of each class of a task."""
    by_class: dict[str, dict[str, float]] = {}
    for chosen, by_number in effects.ablated.items():
        by_class[chosen] = {}
        for n, accuracies in by_number.items():
            falls = {name: effects.clean[name] - accuracy for name, accuracy in accuracies.items()}
            intended, unintended = falls[chosen], mean(fall for name, fall in falls.items() if name != chosen)
            by_class[chosen] |= {
                f"tpp_threshold_{n}_total_metric": intended - unintended,
                f"tpp_threshold_{n}_intended_diff_only": intended,
                f"tpp_threshold_{n}_unintended_diff_only": unintended,
            }
    return by_class


def score_keys(kind: Kind, n_values: Sequence[int] = N_VALUES) -> list[str]:
    """SAEBench's keys in its order."""
    if kind == "scr":
        return [f"scr_{part}_threshold_{n}" for n in n_values for part in ("dir1", "metric", "dir2")]
    parts = ("total_metric", "intended_diff_only", "unintended_diff_only")
    return [f"tpp_threshold_{n}_{part}" for n in n_values for part in parts]


def _means(rows: Iterable[dict[str, float]]) -> dict[str, float]:
    """For each key the mean over the rows that have it."""
    table = list(rows)
    keys = dict.fromkeys(key for row in table for key in row)
    return {key: mean(row[key] for row in table if key in row) for key in keys}


def outcome(kind: Kind, effects: dict[str, Effects]) -> Outcome:
    """SAEBench's result fields."""
    by_task = {name: scores(kind, effect) for name, effect in effects.items()}
    keys, overall = score_keys(kind), _means(by_task.values())
    return Outcome(
        metrics={f"{kind}_metrics": {key: overall.get(key) for key in keys}},
        details=[
            {"dataset_name": f"{name}{'_tpp' * (kind == 'tpp')}_results", **{key: effect.get(key) for key in keys}}
            for name, effect in by_task.items()
        ],
        unstructured={name: tpp_scores(effect) for name, effect in effects.items()} if kind == "tpp" else None,
    )


@dataclass(frozen=True)
class Seeded(Trained):
    """Probes of a task under one seed, and the texts that are drawn for them."""

    texts: dict[str, Sample]


def ideal_probes(kind: Kind, tasks: Iterable[Task], seeds: Sequence[int]) -> dict[tuple[str, int], Seeded]:
    """Probes for every task and seed; they are the same for every SAE."""
    seeded = {}
    for task in tasks:
        vectors = task.means(task.sums_UD.float()).double()
        for seed in seeds:
            texts = {name: sample(task, name, seed, partner_of(kind, name)) for name in scored(kind, task)}
            probes = {name: ideal_probe(vectors, sampled) for name, sampled in texts.items()}
            clean = _fixed_accuracies(kind, probes, texts, vectors.__getitem__)
            seeded[task.name, seed] = Seeded(probes, clean, texts)
    return seeded


def _fixed_accuracies(
    kind: Kind, probes: Probes, texts: dict[str, Sample], vectors: Callable[[Tensor], Tensor]
) -> Accuracies:
    accuracies = {}
    for data, sampled in texts.items():
        rows, labels = sampled.test
        residuals = vectors(rows)
        for name, probe in probes.items():
            if name == data or kind == "scr":
                accuracies[name if name == data else probe_on(name, data)] = probe.accuracy(residuals, labels)
    return accuracies


@torch.no_grad()
def ideal(
    kind: Kind,
    tasks: Sequence[Task],
    view: View,
    latents: Latents,
    probes: dict[tuple[str, int], Seeded],
    n_values: Sequence[int] = N_VALUES,
) -> dict[str, Any]:
    """Scores with intervals over seeds: float32, fixed texts, masked positions left out, TPP only with latents that
    help the class.

    `view` and the sums of `latents` are float32.
    """
    values: dict[str, dict[str, list[float | None]]] = {}
    for task in tasks:
        sums_UF = latents(task)
        means_UF = sums_UF / task.lengths_U[:, None]
        exact = replace(task, sums_UD=task.sums_UD.double())
        columns = values[task.name] = {key: [] for key in score_keys(kind, n_values)}
        for seed in sorted(seed for name, seed in probes if name == task.name):
            seeded = probes[task.name, seed]
            ablated: Ablated = {}
            for name, sampled in seeded.texts.items():
                rows, labels = sampled.train
                change_F = means_UF[rows][labels == 1].mean(0) - means_UF[rows][labels == 0].mean(0)
                effect_F = _signed(kind, change_F, view.W_dec @ seeded.probes[name].weight[0].float())
                ablated[name] = {}
                for n in n_values:
                    chosen = selected(effect_F, n, positive=True)
                    vectors = _ablation(exact, view, sums_UF.double(), None, chosen)
                    ablated[name][n] = _fixed_accuracies(kind, seeded.probes, seeded.texts, vectors)
            result = scores(kind, Effects(clean=seeded.clean, ablated=ablated))
            for key, column in columns.items():
                column.append(result.get(key))
    return seed_estimates(values)
