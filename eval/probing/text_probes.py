"""What sparse probing, SCR and TPP share: texts as sums over tokens, balanced samples of them, linear probes, intervals
over seeds.

A text's vector is a sum over its unmasked tokens divided by their number, so one encoding of every token serves every
list the text is in. Faithful draws come from one generator in SAEBench's order; ideal draws each have a generator of
their own.

Shapes: U texts of a task, N tokens of some texts, D width of the vectors, F latents, P texts of a class, S samples, K
columns.
"""

import hashlib
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hsae.eval.harness.estimates import mean_over_seeds
from hsae.train.model.views import View

Lists = dict[str, Tensor]
Labelled = tuple[Tensor, Tensor]
"""Rows [S] or vectors [S, D] of texts, and their labels [S]."""
Ragged = Iterable[tuple[Tensor, list[int]]]
"""Vectors [N, D] of a few texts' unmasked tokens, one text after the other, and how many tokens each text has."""

PENALTIES = (0.001, 0.01, 0.1, 1.0)  # strengths C that an ideal probe chooses from on its validation texts
VALIDATION_SHARE = 0.2


@dataclass(frozen=True, kw_only=True)
class Task:
    """The unique texts of a task and the lists of rows that make up its classes."""

    name: str
    sums_UD: Tensor
    """Sums of the residuals of each text's unmasked tokens."""
    lengths_U: Tensor
    """Unmasked tokens of each text, int64."""
    context: int
    """Tokens a text is padded to in SAEBench; the rest of them are masked."""
    train: Lists
    test: Lists

    def means(self, sums: Tensor) -> Tensor:
        """Vectors of the texts from their sums, in the sums' type."""
        return sums / self.lengths_U[:, None].to(sums.dtype)


def sum_texts(parts: Ragged, dtype: torch.dtype | None = None) -> Tensor:
    """[U, D]: the sum of each text's vectors."""
    return torch.cat([_sums(vectors_ND.to(dtype) if dtype else vectors_ND, lengths) for vectors_ND, lengths in parts])


@torch.no_grad()
def sum_latents(view: View, parts: Ragged) -> Tensor:
    """[U, F]: the sum of each text's latent activations, in the type of the view."""
    return torch.cat([_sums(view.encode(vectors_ND), lengths) for vectors_ND, lengths in parts])


def _sums(vectors: Tensor, lengths: list[int]) -> Tensor:
    return torch.stack([part.sum(0) for part in torch.split(vectors, lengths)])


def balanced(lists: Lists, chosen: str, generator: torch.Generator, partner: str | None = None) -> Labelled:
    """Rows [S] and labels [S] of a class against the others (or against `partner` alone), as many of each, mixed.

    SAEBench's draws in its order: for each other class a permutation, one over all negatives, one over the result.
    """
    positives = lists[chosen]
    if partner is None:
        others = [rows for name, rows in lists.items() if name != chosen]
        share = math.ceil(len(positives) / len(others))
        negatives = torch.cat([rows[torch.randperm(len(rows), generator=generator)[:share]] for rows in others])
    else:
        negatives = lists[partner]
    negatives = negatives[torch.randperm(len(negatives), generator=generator)[: len(positives)]]
    rows = torch.cat([positives, negatives])
    labels = torch.cat([torch.ones(len(positives)), torch.zeros(len(negatives))]).int()
    order = torch.randperm(len(rows), generator=generator)
    return rows[order], labels[order]


def pick(vectors_UD: Tensor, texts: Labelled) -> Labelled:
    """Vectors [S, D] and labels [S] of texts given as rows and labels."""
    rows, labels = texts
    return vectors_UD[rows], labels


def generator_for(*parts: object) -> torch.Generator:
    """A generator of its own for whatever `parts` name: the same for every SAE, and whatever was drawn before."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One seed's fixed texts of a class and its negatives."""

    train: Labelled
    """Rows and labels; the first `fitted` of them are fitted on when something is chosen, the rest are for choosing."""
    fitted: int
    test: Labelled
    """Drawn with replacement, so that the spread over seeds has the noise of a finite test set in it."""


def sample(task: Task, chosen: str, seed: int, partner: str | None = None) -> Sample:
    """The sample of a class for one seed: negatives, validation texts and test texts."""
    generator = generator_for("sample", task.name, chosen, seed)
    train = balanced(task.train, chosen, generator, partner)
    rows, labels = balanced(task.test, chosen, generator, partner)
    again = torch.randint(len(rows), (len(rows),), generator=generator)
    fitted = len(train[0]) - max(1, round(VALIDATION_SHARE * len(train[0])))
    return Sample(train=train, fitted=fitted, test=(rows[again], labels[again]))


@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of SAEBench's probe trainer."""

    batch: int
    epochs: int
    lr: float
    patience: int
    l1: float | None = None


@dataclass(frozen=True)
class Probe:
    """A linear probe: weight [1, D] and bias [1]."""

    weight: Tensor
    bias: Tensor

    def accuracy(self, vectors_SD: Tensor, labels_S: Tensor) -> float:
        """Share of samples whose logit has the sign of their label."""
        logits_S = nn.functional.linear(vectors_SD, self.weight, self.bias)[:, 0]
        return ((logits_S > 0) == (labels_S > 0)).float().mean().item()


def train_probe(train: Labelled, test: Labelled, how: Training, generator: torch.Generator) -> tuple[Probe, float]:
    """SAEBench's trainer, AdamW in the vectors' own type: the probe of the epoch with the best test accuracy, and that
    accuracy.
    """
    vectors_SD, labels = train[0], train[1].to(train[0].dtype)
    linear = nn.Linear(vectors_SD.shape[1], 1, dtype=vectors_SD.dtype, device="meta").to_empty(device="cpu")
    nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5), generator=generator)
    bound = 1 / math.sqrt(vectors_SD.shape[1])
    nn.init.uniform_(linear.bias, -bound, bound, generator=generator)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=how.lr)
    best, best_probe, waited = -math.inf, _copy(linear), 0
    for _ in range(how.epochs):
        order = torch.randperm(len(vectors_SD), generator=generator)
        for rows in torch.split(order, how.batch):
            loss = nn.functional.binary_cross_entropy_with_logits(linear(vectors_SD[rows])[:, 0], labels[rows])
            if how.l1 is not None:
                loss = loss + how.l1 * linear.weight.abs().sum()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        probe = _copy(linear)
        accuracy = probe.accuracy(*test)
        waited += 1
        if accuracy > best:
            best, best_probe, waited = accuracy, probe, 0
        if waited >= how.patience:
            break
    return best_probe, best


def _copy(linear: nn.Linear) -> Probe:
    return Probe(linear.weight.detach().clone(), linear.bias.detach().clone())


def logistic(vectors_SK: Tensor, labels_S: Tensor, **settings: Any) -> Any:
    """scikit-learn's L2 logistic regression (lbfgs), fitted; not reaching the tolerance is no error."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(**settings).fit(vectors_SK.numpy(), labels_S.numpy())


def top_k_accuracy(train: Labelled, test: Labelled, k: int, *, stable: bool = False) -> float:
    """Test accuracy of a logistic regression on the k columns whose class means differ most on the training vectors."""
    vectors_SD, labels_S = train
    difference_D = (vectors_SD[labels_S == 1].mean(0) - vectors_SD[labels_S == 0].mean(0)).abs()
    chosen = torch.argsort(difference_D, descending=True, stable=stable)[:k].sort().values
    model = logistic(vectors_SD[:, chosen].float(), labels_S, C=1.0, max_iter=1000)
    return float((model.predict(test[0][:, chosen].float().numpy()) == test[1].numpy()).mean())


def ideal_probe(vectors: Tensor, texts: Sample) -> Probe:
    """A logistic regression in float64 on standardised columns; its penalty is chosen on the validation texts."""
    rows, labels = texts.train
    vectors_SD = vectors[rows].double()
    mean_D, scale_D = vectors_SD.mean(0), vectors_SD.std(0)
    scale_D = torch.where(scale_D > 1e-12, scale_D, 1.0)
    columns = (vectors_SD - mean_D) / scale_D
    fit, rest = slice(None, texts.fitted), slice(texts.fitted, None)

    def score(penalty: float) -> float:
        model = logistic(columns[fit], labels[fit], C=penalty, max_iter=300)
        return float((model.predict(columns[rest].numpy()) == labels[rest].numpy()).mean())

    best = max(PENALTIES, key=score)  # the first, that is the strongest penalty, of equally good ones
    model = logistic(columns, labels, C=best, max_iter=300)
    weight = torch.from_numpy(model.coef_) / scale_D
    bias = torch.from_numpy(model.intercept_) - weight @ mean_D
    return Probe(weight, bias)


def mean(values: Iterable[float]) -> float:
    """The plain mean."""
    numbers = list(values)
    return sum(numbers) / len(numbers)


def mean_or_none(values: Iterable[float | None]) -> float | None:
    """The mean of the values that exist; None if none does."""
    numbers = [value for value in values if value is not None]
    return mean(numbers) if numbers else None


def seed_estimates(by_task: Mapping[str, Mapping[str, Sequence[float | None]]]) -> dict[str, Any]:
    """Measures with intervals, overall (of the mean over tasks) and by task, from task -> measure -> value per seed."""
    names = dict.fromkeys(name for columns in by_task.values() for name in columns)
    overall = {
        name: [mean_or_none(values) for values in zip(*(columns[name] for columns in by_task.values()), strict=True)]
        for name in names
    }
    return {
        "measures": {name: mean_over_seeds(column).to_dict() for name, column in overall.items()},
        "tasks": {
            task: {name: mean_over_seeds(column).to_dict() for name, column in columns.items()}
            for task, columns in by_task.items()
        },
    }
