"""SAEBench's first-letter absorption: do latents that stand for a letter stay silent on words where others speak for
it.

Everything comes from cached word vectors: no language model is run. Steps: a ground-truth probe for each letter on the
residual; a few "split" latents for each letter that a sparse probe picks; for each word the share of the letter's
direction that other latents bring.

Shapes: N words, P evaluation prompts, D residual width, F latents, 26 letters, K columns of a sparse probe.
"""

import math
import statistics
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hsae.cache.errors import UserError
from hsae.eval.harness.estimates import mean_over_seeds
from hsae.eval.probing.sparse_probing import Outcome
from hsae.eval.probing.text_probes import generator_for, logistic, mean
from hsae.train.model.views import View

LETTERS = "abcdefghijklmnopqrstuvwxyz"
GROUND_TRUTH_SEED = 0
ENCODED_AT_ONCE = 4096
KEPT_NUMBERS = 1 << 29  # more latent activations than this are computed again for every batch
FULL_COSINE, PARTIAL_COSINE, SMALLEST_SHARE, LARGEST_PARTS, SILENT = 0.025, 0.1, 0.4, 3, 1e-8


@dataclass(frozen=True, kw_only=True)
class Settings:
    """SAEBench's settings."""

    max_k: int = 10
    f1_jump: float = 0.03
    l1_decay: float = 0.01
    batch: int = 4096
    epochs: int = 50
    min_f1: float = 0.6
    min_letters: int = 20


@dataclass(frozen=True, kw_only=True)
class Words:
    """Cached vectors at words, and the probe of their first letters."""

    train: Tensor
    """[N, D] float32"""
    train_letters: Tensor
    """[N] 0-25"""
    test: Tensor
    test_letters: Tensor
    weight: Tensor
    """[26, D] float32: the ground-truth probe."""
    bias: Tensor
    prompts: Tensor
    """[P, D] in the model's type: vectors at test words in the evaluation prompts."""
    prompt_words: Tensor
    """[P] which test word each is of."""


@dataclass(frozen=True, kw_only=True)
class Sparse:
    """A sparse probe of one letter."""

    latents: list[int]
    weight: list[float]
    bias: float
    f1: float


@dataclass(frozen=True, kw_only=True)
class Letter:
    """What the k-sparse stage says about one letter."""

    letter: int
    split: list[int]


@dataclass(frozen=True, kw_only=True)
class Absorbed:
    """The absorption of the words of one letter, [P_l] each."""

    prompts: Tensor
    fraction: Tensor
    full: Tensor
    projection: Tensor


def train_letters(
    vectors: Tensor,
    letters: Tensor,
    *,
    generator: torch.Generator,
    batch: int,
    epochs: int = 50,
    weight_decay: float,
    l1: float = 0.0,
    view: View | None = None,
) -> tuple[Tensor, Tensor]:
    """SAEBench's 26 linear probes at once, weight [26, .] and bias [26]: Adam, positives weighted, lr falling from 1e-2
    to 1e-5.

    With a view the probes read its latents, in its type. The draws are those of a plain torch DataLoader on one random
    stream.
    """
    width = view.d_sae if view else vectors.shape[1]
    linear = nn.Linear(width, len(LETTERS), device="meta").to_empty(device="cpu")
    nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5), generator=generator)
    nn.init.uniform_(linear.bias, -1 / math.sqrt(width), 1 / math.sqrt(width), generator=generator)
    linear = linear.to(view.W_dec.dtype if view else vectors.dtype)
    codes = _encoded(view, vectors) if view and len(vectors) * width <= KEPT_NUMBERS else None
    targets = nn.functional.one_hot(letters.long(), len(LETTERS)).to(linear.weight.dtype)
    positives = targets.float().sum(0)
    weighting = (len(letters) - positives) / positives.clamp_min(1)  # float32, whatever the probe's type
    optimizer = torch.optim.Adam(linear.parameters(), lr=1e-2, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=(1e-5 / 1e-2) ** (1 / epochs))
    for _ in range(epochs):
        for rows in torch.split(_loader_order(len(vectors), generator), batch):
            inputs = codes[rows] if codes is not None else view.encode(vectors[rows]) if view else vectors[rows]
            loss = nn.functional.binary_cross_entropy_with_logits(linear(inputs), targets[rows], pos_weight=weighting)
            if l1:
                loss = loss + l1 * linear.weight.abs().sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        schedule.step()
    return linear.weight.detach(), linear.bias.detach()


def _loader_order(size: int, generator: torch.Generator) -> Tensor:
    """The order in which a shuffling DataLoader without a generator of its own gives out its rows."""
    torch.empty((), dtype=torch.int64).random_(generator=generator)  # the loader's seed for its workers
    seed = int(torch.empty((), dtype=torch.int64).random_(generator=generator))
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _encoded(view: View, vectors: Tensor, columns: Tensor | None = None) -> Tensor:
    """Latent activations of vectors, of all latents or of some."""
    chunks = (view.encode(part) for part in torch.split(vectors, ENCODED_AT_ONCE))
    return torch.cat([chunk if columns is None else chunk[:, columns] for chunk in chunks])


def ground_truth(train: Tensor, letters: Tensor) -> tuple[Tensor, Tensor]:
    """SAEBench's ground-truth probe on the residual, from a seed of its own: weight [26, D], bias [26]."""
    generator = torch.Generator().manual_seed(GROUND_TRUTH_SEED)
    return train_letters(train, letters, generator=generator, batch=64, weight_decay=1e-4)


def l1_probe(view: View, words: Words, settings: Settings, generator: torch.Generator) -> Tensor:
    """[26, F] weights of the sparse multi-letter probe on the latents of the training words."""
    return train_letters(
        words.train,
        words.train_letters,
        generator=generator,
        batch=settings.batch,
        epochs=settings.epochs,
        weight_decay=1e-6,
        l1=settings.l1_decay,
        view=view,
    )[0]


def f1(predicted: Tensor, actual: Tensor) -> float:
    """F1 of boolean predictions; 0 where there is nothing right."""
    right = int((predicted & actual).sum())
    return 2 * right / int(predicted.sum() + actual.sum()) if right else 0.0


def letter_f1(words: Words) -> list[float]:
    """F1 of the ground-truth probe on the test words, by letter."""
    predicted = words.test @ words.weight.T + words.bias > 0
    return [f1(predicted[:, number], words.test_letters == number) for number in range(len(LETTERS))]


def k_sparse(
    view: View,
    words: Words,
    weight: Tensor,
    settings: Settings,
    letters: Sequence[int] = range(len(LETTERS)),
) -> list[Letter]:
    """The split latents of some letters."""
    probes = sparse_probes(view, words, weight, settings)
    return [Letter(letter=number, split=split_latents(probes(number), settings.f1_jump)) for number in letters]


def sparse_probes(
    view: View, words: Words, weight: Tensor, settings: Settings
) -> Callable[[int], Generator[Sparse, None, None]]:
    """For a letter its sparse probes of 1 to max_k latents, judged on the test words: each is fitted when it is its
    turn, and most letters need no more than two or three.
    """
    numbers = range(1, min(settings.max_k, view.d_sae) + 1)
    # each k anew, because which of several tied latents wins depends on k
    top = {k: torch.topk(weight.float(), k, dim=1).indices for k in numbers}
    columns = torch.unique(torch.cat(list(top.values()), 1))
    fit, check = (_encoded(view, vectors, columns).float() for vectors in (words.train, words.test))

    def of_letter(number: int) -> Generator[Sparse, None, None]:
        checked = words.test_letters == number
        labels = (words.train_letters == number).int()
        if not 0 < int(labels.sum()) < len(labels):
            return
        for k in numbers:
            picked = torch.searchsorted(columns, top[k][number])
            model = logistic(fit[:, picked], labels, max_iter=500, class_weight="balanced")
            coefficients, bias = torch.from_numpy(model.coef_[0]).float(), float(model.intercept_[0])
            right = f1(check[:, picked] @ coefficients + bias > 0, checked)
            yield Sparse(latents=top[k][number].tolist(), weight=coefficients.tolist(), bias=bias, f1=right)

    return of_letter


def split_latents(per_k: Iterable[Sparse], jump: float) -> list[int]:
    """The latents of the last k up to which each step raised F1 by more than `jump`; no further probe is asked for."""
    accepted = None
    for probe in per_k:
        if accepted is not None and probe.f1 <= accepted.f1 + jump:
            break
        accepted = probe
    return accepted.latents if accepted else []


def check_letters(scores: Sequence[float], settings: Settings) -> list[int]:
    """The letters that the ground-truth probe recognizes well enough.

    Raises UserError if they are too few to mean anything.
    """
    good = [number for number, score in enumerate(scores) if score > settings.min_f1]
    if len(good) < settings.min_letters:
        raise UserError(
            f"absorption: the ground-truth probe reaches F1 > {settings.min_f1:g} for {len(good)} letters; "
            f"{settings.min_letters} are needed. Use more words (suite.words), another hook, or lower suite.min_letters"
        )
    return good


@torch.no_grad()
def absorbed(view: View, words: Words, letter: Letter, *, assume_unit_norm: bool = True) -> Absorbed:
    """The absorption of every prompt of one letter whose word the ground-truth probe recognizes.

    With `assume_unit_norm`, as SAEBench does it, a latent's share of the direction is its activation times a cosine.
    """
    said = words.test[words.prompt_words] @ words.weight[letter.letter] + words.bias[letter.letter] > 0
    prompts = ((words.test_letters[words.prompt_words] == letter.letter) & said).nonzero()[:, 0]
    row = words.weight[letter.letter]
    direction = (row / row.norm()).to(view.W_dec.dtype)
    cosine = nn.functional.cosine_similarity(view.W_dec, direction[None], dim=-1).float()
    share = cosine if assume_unit_norm else (view.W_dec @ direction).float()
    vectors = words.prompts[prompts].to(view.W_dec.dtype)
    fractions, full, projections = [], [], []
    split = torch.tensor(letter.split, dtype=torch.int64)
    others = cosine >= PARTIAL_COSINE
    others[split] = False
    for part in torch.split(vectors, ENCODED_AT_ONCE):
        latents = view.encode(part).float()
        shares = latents * share
        total = (part @ direction).float()
        main = shares[:, split].sum(1)
        largest = torch.where(others, shares, 0.0).clamp_min(0).topk(min(LARGEST_PARTS, shares.shape[1]), dim=1).values
        absorbing = largest.sum(1)
        part_of = torch.minimum(absorbing, total - main)
        fraction = (part_of / (part_of + main)).clamp(0, 1)
        fraction = torch.where(main <= 0, 1.0, fraction)
        fractions.append(torch.where((main >= total) | (absorbing / total < SMALLEST_SHARE), 0.0, fraction))
        best, which = shares.max(1)
        alone = (cosine[which] >= FULL_COSINE) & (total >= 0) & (best / total >= SMALLEST_SHARE)
        full.append((latents[:, split] < SILENT).all(1) & alone)
        projections.append(total)
    return Absorbed(
        prompts=prompts, fraction=torch.cat(fractions), full=torch.cat(full), projection=torch.cat(projections)
    )


def outcome(letters: Sequence[Letter], absorptions: Sequence[Absorbed]) -> Outcome:
    """SAEBench's result fields; letters without a word are left out."""
    details: list[dict[str, Any]] = [
        {
            "first_letter": LETTERS[letter.letter],
            "mean_absorption_fraction": mean(one.fraction.tolist()),
            "full_absorption_rate": int(one.full.sum()) / len(one.full),
            "num_full_absorption": int(one.full.sum()),
            "num_probe_true_positives": len(one.prompts),
            "num_split_features": len(letter.split),
        }
        for letter, one in zip(letters, absorptions, strict=True)
        if len(one.prompts)
    ]
    columns = {
        "absorption_fraction_score": "mean_absorption_fraction",
        "full_absorption_score": "full_absorption_rate",
        "num_split_features": "num_split_features",
    }
    means: dict[str, float | None] = {}
    deviations: dict[str, float | None] = {}
    for name, key in columns.items():
        values = [entry[key] for entry in details]
        means[f"mean_{name}"] = mean(values) if values else None
        deviations[f"std_dev_{name}"] = statistics.stdev(values) if len(values) > 1 else None
    return Outcome(metrics={"mean": {**means, **deviations}}, details=details, unstructured=None)


def faithful(view: View, words: Words, settings: Settings, seed: int = 42) -> Outcome:
    """SAEBench's numbers; it seeds nothing, so `seed` decides the sparse probe's draws.

    Raises UserError if the probe recognizes too few letters.
    """
    good = check_letters(letter_f1(words), settings)
    weight = l1_probe(view, words, settings, torch.Generator().manual_seed(seed))
    letters = k_sparse(view, words, weight, settings, good)
    return outcome(letters, [absorbed(view, words, letter) for letter in letters])


def ideal(view: View, words: Words, settings: Settings, seeds: Sequence[int]) -> dict[str, Any]:
    """Means over letters with intervals over seeds: split latents are chosen on validation words, and decoder norms
    count.

    A seed decides the validation words, the sparse probe's draws, and which evaluation words are drawn (with
    replacement). `view` is float32.
    """
    good = check_letters(letter_f1(words), settings)
    columns: dict[str, list[float | None]] = {}
    for seed in seeds:
        generator = generator_for("absorption", seed)
        order = torch.randperm(len(words.train), generator=generator)
        check, fit = order[: len(order) // 5], order[len(order) // 5 :]
        train = replace(
            words,
            train=words.train[fit],
            train_letters=words.train_letters[fit],
            test=words.train[check],
            test_letters=words.train_letters[check],
        )
        letters = k_sparse(view, train, l1_probe(view, train, settings, generator), settings, good)
        resampled = []
        for letter in letters:
            absorption = absorbed(view, words, letter, assume_unit_norm=False)
            count = len(absorption.prompts)
            rows = torch.randint(max(1, count), (count,), generator=generator)
            resampled.append(Absorbed(**{name: values[rows] for name, values in vars(absorption).items()}))
        for name, value in outcome(letters, resampled).metrics["mean"].items():
            if name.startswith("mean"):
                columns.setdefault(name, []).append(value)
    return {"measures": {name: mean_over_seeds(values).to_dict() for name, values in columns.items()}, "tasks": {}}
