"""Labelled texts for the evaluation suite: unique texts, and lists of them by class, for training and for testing.

For SCR the lists are SAEBench's six, made of the four combinations of two attributes.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from hsae.cache.errors import CorpusError
from hsae.cache.suites.specs import SuiteConfig

SPLITS = ("train", "test")
SCR_LISTS = (
    "male / female",
    "female_data_only",
    "professor / nurse",
    "nurse_data_only",
    "male_professor / female_nurse",
    "female_nurse_data_only",
)


@dataclass(frozen=True)
class Record:
    """A text, its label, and where there is one a second attribute."""

    text: str
    label: str
    attribute: str = ""


@dataclass(frozen=True, kw_only=True)
class TextTask:
    """Unique texts and lists of them."""

    name: str
    texts: tuple[str, ...]
    train: dict[str, list[int]]
    test: dict[str, list[int]]
    source: str  # what the texts are, for the record
    pair: tuple[str, str] | None = None  # SCR: the two labels


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Where a task's records come from and which classes are made of them."""

    name: str
    read: Callable[[], dict[str, list[Record]]]  # records by split
    source: str
    classes: tuple[str, ...] = ()
    pairs: dict[str, tuple[str, str]] = field(default_factory=dict)  # SCR: pairs of labels by name
    attribute_values: tuple[str, str] | None = None
    by_attribute: bool = False  # whether a class takes as many texts of each attribute value


def classes(data: DataSet, records: dict[str, list[Record]], config: SuiteConfig) -> TextTask:
    """As many texts of each class for both splits, drawn as SAEBench draws them."""
    texts: dict[str, int] = {}
    lists: dict[str, dict[str, list[int]]] = {}
    names = data.classes or tuple(sorted({record.label for record in records["train"]}))
    for split, wanted in zip(SPLITS, (config.train_per_class, config.test_per_class), strict=True):
        lists[split] = {}
        for name in names:
            mine = [record for record in records[split] if record.label == name]
            groups = sorted({record.attribute for record in mine}) if data.by_attribute else [None]
            sample = []
            for group in groups:
                members = [record.text for record in mine if group is None or record.attribute == group]
                share = wanted // len(groups)
                what = f"class {name}" if group is None else f"class {name} with {group}"
                _check_enough(data, split, members, what, share, "class")
                # what pandas' sample(n, random_state=seed) gives
                sample += [members[i] for i in np.random.RandomState(config.seed).choice(len(members), share, False)]
            lists[split][name] = [texts.setdefault(text, len(texts)) for text in sample]
    return TextTask(name=data.name, texts=tuple(texts), train=lists["train"], test=lists["test"], source=data.source)


def quadrants(data: DataSet, records: dict[str, list[Record]], pair_name: str, config: SuiteConfig) -> TextTask:
    """SAEBench's six SCR lists for one pair of labels: first texts in the data's order, mixed by one numpy stream."""
    assert data.attribute_values is not None
    pair, texts = data.pairs[pair_name], dict[str, int]()
    lists: dict[str, dict[str, list[int]]] = {}
    for split, wanted in zip(SPLITS, (config.train_per_quadrant, config.test_per_quadrant), strict=True):
        quarters = []
        needed = (2 * wanted, wanted, wanted, 2 * wanted)
        for corner, least in zip(itertools.product(pair, data.attribute_values), needed, strict=True):
            members = [record.text for record in records[split] if (record.label, record.attribute) == corner]
            _check_enough(data, split, members, " with ".join(corner), least, "quadrant")
            quarters.append(members)
        pp, pn, qp, qn = quarters
        six = (
            pp[:wanted] + qp[:wanted],
            pn[:wanted] + qn[:wanted],
            pp[:wanted] + pn[:wanted],
            qp[:wanted] + qn[:wanted],
            pp[: 2 * wanted],
            qn[: 2 * wanted],
        )
        generator = np.random.default_rng(config.seed)
        lists[split] = {}
        for key, members in zip(SCR_LISTS, six, strict=True):
            generator.shuffle(members)
            lists[split][key] = [texts.setdefault(text, len(texts)) for text in members]
    name = f"{data.name}_scr_{pair_name}"
    return TextTask(
        name=name, texts=tuple(texts), train=lists["train"], test=lists["test"], source=data.source, pair=pair
    )


def _check_enough(data: DataSet, split: str, texts: list[str], what: str, needed: int, group: str) -> None:
    if len(texts) < needed:
        raise CorpusError(
            f"data set {data.name}: {len(texts)} {split} texts of {what}; {needed} are needed. "
            f"Lower suite.{split}_per_{group}"
        )
