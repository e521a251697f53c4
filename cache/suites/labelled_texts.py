"""Labelled texts for the evaluation suite: SAEBench's data sets on the hub, local files, or what ships with Python.

A task is a set of unique texts and lists of them by class, once for training and once for testing. For SCR the lists are SAEBench's six,
made of the four combinations of two attributes.
"""

import functools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from hsae.cache.errors import CorpusError
from hsae.cache.format.spec import Config
from hsae.cache.suites.specs import Suite, SuiteConfig
from hsae.cache.text.data_sets import described, open_data_set, records, resolved_revision

Splits = tuple[str, str]
SPLITS: Splits = ("train", "test")
SCR_LISTS = (
    "male / female",
    "female_data_only",
    "professor / nurse",
    "nurse_data_only",
    "male_professor / female_nurse",
    "female_nurse_data_only",
)


class LocalTask(Config):
    """One data set of a local tasks file."""

    name: str = Field(min_length=1)
    train: str
    """A .jsonl, .csv, .tsv or .parquet file, relative to the tasks file; rows without text, label or attribute are left out."""
    test: str
    text: str = "text"
    label: str = "label"
    classes: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Labels to use, in order; none named uses all."""
    attribute: str | None = None
    """A second column, for SCR."""
    attribute_values: Annotated[tuple[str, ...], Field(strict=False, min_length=2, max_length=2)] | None = None
    """Its two values; the first plays the part of SAEBench's "male"."""
    pairs: Annotated[tuple[Annotated[tuple[str, str], Field(strict=False)], ...], Field(strict=False)] = ()
    """Pairs of labels for SCR."""


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
    source: str
    """What the texts are, for the record."""
    pair: tuple[str, str] | None = None
    """SCR: the two labels."""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Where a task's records come from and which classes are made of them."""

    name: str
    read: Callable[[], dict[str, list[Record]]]
    """Records by split."""
    source: str
    classes: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()
    pair_names: tuple[str, ...] = ()
    attribute_values: tuple[str, str] | None = None
    by_attribute: bool = False
    """Whether a class takes as many texts of each attribute value."""


def text_tasks(suite: Suite, config: SuiteConfig) -> list[TextTask]:
    """The tasks of a suite. Raises CorpusError if a data set can't be had or is too small."""
    sets = _sets(config)
    if suite == "scr":
        found = [
            quadrants(data, data.read(), index, config)
            for data in sets
            if data.attribute_values
            for index in range(len(data.pairs))
        ]
    else:
        wanted = sets if suite == "sparse-probing" else [data for data in sets if suite_has_tpp(data, config)]
        found = [classes(data, data.read(), config) for data in wanted]
    if not found:
        raise CorpusError(
            f"suite.tasks {config.tasks!r} has no data for {suite}; SCR needs two attributes and pairs of labels"
        )
    return found


def suite_has_tpp(data: DataSet, config: SuiteConfig) -> bool:
    """SAEBench takes two of its data sets for TPP; elsewhere every data set of at least three classes serves."""
    return data.name in TPP_NAMES if config.tasks == "saebench" else len(data.classes) != 2


def _sets(config: SuiteConfig) -> list[DataSet]:
    if config.tasks == "saebench":
        return saebench(config)
    if config.tasks == "python":
        from hsae.cache.suites.python_tasks import python_sets

        return python_sets(config)
    return _local(Path(config.tasks).expanduser())


# ---- lists --------------------------------------------------------------------------------------------------------------


def classes(data: DataSet, held: dict[str, list[Record]], config: SuiteConfig) -> TextTask:
    """As many texts of each class for both splits, drawn as SAEBench draws them."""
    texts: dict[str, int] = {}
    lists: dict[str, dict[str, list[int]]] = {}
    names = data.classes or tuple(sorted({record.label for record in held["train"]}))
    for split, wanted in zip(SPLITS, (config.train_per_class, config.test_per_class), strict=True):
        lists[split] = {}
        for name in names:
            mine = [record for record in held[split] if record.label == name]
            groups = sorted({record.attribute for record in mine}) if data.by_attribute else [None]
            chosen = []
            for group in groups:
                members = [record.text for record in mine if group is None or record.attribute == group]
                share = wanted // len(groups)
                if len(members) < share:
                    what = name if group is None else f"{name} with {group}"
                    raise CorpusError(
                        f"data set {data.name}: {len(members)} {split} texts of class {what}; {share} are needed. "
                        f"Lower suite.{split}_per_class"
                    )
                # what pandas' sample(n, random_state=seed) gives
                chosen += [members[i] for i in np.random.RandomState(config.seed).choice(len(members), share, False)]
            lists[split][name] = [texts.setdefault(text, len(texts)) for text in chosen]
    return TextTask(name=data.name, texts=tuple(texts), train=lists["train"], test=lists["test"], source=data.source)


def quadrants(data: DataSet, held: dict[str, list[Record]], index: int, config: SuiteConfig) -> TextTask:
    """SAEBench's six SCR lists for one pair of labels: first texts in the data's order, mixed by one numpy stream."""
    assert data.attribute_values is not None
    pair, texts = data.pairs[index], dict[str, int]()
    name = f"{data.name}_scr_{data.pair_names[index] if data.pair_names else '_'.join(pair)}"
    lists: dict[str, dict[str, list[int]]] = {}
    for split, wanted in zip(SPLITS, (config.train_per_quadrant, config.test_per_quadrant), strict=True):
        quarters = {}
        for corner, (label, attribute) in enumerate((p, g) for p in pair for g in data.attribute_values):
            quarters[corner] = [r.text for r in held[split] if (r.label, r.attribute) == (label, attribute)]
            needed = 2 * wanted if corner in (0, 3) else wanted
            if len(quarters[corner]) < needed:
                raise CorpusError(
                    f"data set {data.name}: {len(quarters[corner])} {split} texts of {label} with {attribute}; {needed} are "
                    f"needed. Lower suite.{split}_per_quadrant"
                )
        pp, pn, qp, qn = (quarters[corner] for corner in range(4))
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
    return TextTask(
        name=name, texts=tuple(texts), train=lists["train"], test=lists["test"], source=data.source, pair=pair
    )


# ---- SAEBench's data sets -----------------------------------------------------------------------------------------------

BIOS, AMAZON = "LabHC/bias_in_bios", "canrager/amazon_reviews_mcauley_1and5"
NEWS, EUROPARL = "fancyzhx/ag_news", "Helsinki-NLP/europarl"
TPP_NAMES = (f"{BIOS}_class_set1", AMAZON)
BIOS_SETS = (("0", "1", "2", "6", "9"), ("11", "13", "14", "18", "19"), ("20", "21", "22", "25", "26"))
BIOS_PAIRS = {
    "professor_nurse": ("21", "13"),
    "architect_journalist": ("1", "11"),
    "surgeon_psychologist": ("25", "22"),
    "attorney_teacher": ("2", "26"),
}
AMAZON_PAIRS = {
    "Books_CDs_and_Vinyl": ("24", "26"),
    "Software_Electronics": ("30", "6"),
    "Pet_Supplies_Office_Products": ("18", "11"),
    "Industrial_and_Scientific_Toys_and_Games": ("3", "1"),
}
LANGUAGES = {"en": "en-fr", "fr": "fr-it", "de": "de-en", "es": "es-fr", "nl": "nl-pt"}
EUROPARL_READ = 2501


def saebench(config: SuiteConfig) -> list[DataSet]:
    """SAEBench's data sets, but for its code data set, which can only be read by running code from the hub."""

    def hub(name: str, text: str, label: str, attribute: str | None = None) -> Callable[[], dict[str, list[Record]]]:
        return functools.cache(
            lambda: {split: _hub(revisions[name], name, split, text, label, attribute) for split in SPLITS}
        )

    revisions = {name: resolved_revision(name, config.revisions.get(name)) for name in (BIOS, AMAZON, NEWS, EUROPARL)}
    source = {name: f"{name} at {revision}" for name, revision in revisions.items()}

    bios, amazon = hub(BIOS, "hard_text", "profession", "gender"), hub(AMAZON, "text", "category", "rating")
    sets = [
        DataSet(
            name=f"{BIOS}_class_set{number}",
            read=bios,
            source=source[BIOS],
            classes=names,
            by_attribute=True,
            pairs=tuple(BIOS_PAIRS.values()) if number == 1 else (),
            pair_names=tuple(BIOS_PAIRS) if number == 1 else (),
            attribute_values=("0", "1"),
        )
        for number, names in enumerate(BIOS_SETS, 1)
    ]
    sets.append(
        DataSet(
            name=AMAZON,
            read=amazon,
            source=source[AMAZON],
            classes=("1", "2", "3", "5", "6"),
            by_attribute=True,
            pairs=tuple(AMAZON_PAIRS.values()),
            pair_names=tuple(AMAZON_PAIRS),
            attribute_values=("1.0", "5.0"),
        )
    )
    sets.append(
        DataSet(
            name=f"{AMAZON}_sentiment",
            read=hub(AMAZON, "text", "rating"),
            source=source[AMAZON],
            classes=("1.0", "5.0"),
        )
    )
    sets.append(DataSet(name=NEWS, read=hub(NEWS, "text", "label"), source=source[NEWS], classes=("0", "1", "2", "3")))
    sets.append(
        DataSet(
            name=EUROPARL,
            read=lambda: _europarl(config, revisions[EUROPARL]),
            source=source[EUROPARL],
            classes=tuple(LANGUAGES),
        )
    )
    return sets


def _hub(revision: str, name: str, split: str, text: str, label: str, attribute: str | None) -> list[Record]:
    return [
        Record(str(row[text]), str(row[label]), "" if attribute is None else str(row[attribute]))
        for row in open_data_set(name, revision, None, split)
        if str(row[text]).strip()
    ]


def _europarl(config: SuiteConfig, revision: str) -> dict[str, list[Record]]:
    mixed = random.Random(config.seed)
    held: dict[str, list[Record]] = {split: [] for split in SPLITS}
    for language, subset in LANGUAGES.items():
        sentences = []
        for row in open_data_set(EUROPARL, revision, subset, "train"):
            sentences.append(row["translation"][language])
            if len(sentences) == EUROPARL_READ:
                break
        mixed.shuffle(sentences)
        parts = sentences[: config.train_per_class], sentences[config.train_per_class :]
        for split, part in zip(SPLITS, parts, strict=True):
            held[split] += [Record(sentence, language) for sentence in part if sentence.strip()]
    return held


# ---- local files --------------------------------------------------------------------------------------------------------


def _local(path: Path) -> list[DataSet]:
    if not path.is_file():
        raise CorpusError(
            f"suite.tasks {str(path)!r}: no such file; give saebench, python, or a TOML file with [[task]] tables"
        )
    return [_local_set(task, path.parent) for task in described(path, "task", LocalTask)]


def _local_set(task: LocalTask, folder: Path) -> DataSet:
    def read() -> dict[str, list[Record]]:
        columns = [task.text, task.label, *([task.attribute] if task.attribute else [])]
        held = {
            split: [
                Record(*map(str, values))
                for values in records(folder / file, columns)
                if None not in values and str(values[0]).strip()
            ]
            for split, file in zip(SPLITS, (task.train, task.test), strict=True)
        }
        texts = [{record.text for record in held[split]} for split in SPLITS]
        if texts[1] and texts[1] <= texts[0]:
            raise CorpusError(
                f"task {task.name}: every test text is a training text; give {task.test} texts of its own"
            )
        return held

    if task.pairs and task.attribute_values is None:
        raise CorpusError(f"task {task.name}: pairs are given, so SCR needs attribute and attribute_values too")
    return DataSet(
        name=task.name,
        read=read,
        source=f"{task.train}, {task.test}",
        classes=task.classes,
        pairs=task.pairs,
        attribute_values=None
        if task.attribute_values is None
        else (task.attribute_values[0], task.attribute_values[1]),
    )


# ---- words --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class WordTask:
    """Absorption's words and the prompts that ask for their first letters."""

    train_words: list[str]
    test_words: list[str]
    train_prompts: list[str]
    test_prompts: list[str]
    """In these two the examples are words of the same split: the ground-truth probe is trained and tested on them."""
    evaluation_prompts: list[str]
    """One for each test word, with examples from the whole vocabulary."""


def vocabulary(tokenizer: Any) -> list[str]:
    """Every token that is ASCII letters after at most one leading space, sorted: the order of a tokenizer's own table is no order."""
    strings = {tokenizer.convert_tokens_to_string([token]) for token in tokenizer.get_vocab()}
    return sorted(word for word in strings if (bare := word.removeprefix(" ")).isascii() and bare.isalpha())


def word_task(tokenizer: Any, config: SuiteConfig) -> WordTask:
    """Words split four to one, with prompts; all draws from `seed`."""
    mixed = random.Random(config.seed)
    words = vocabulary(tokenizer)
    mixed.shuffle(words)
    words = words[: config.words]
    if len(words) < config.icl_examples + 2:
        raise CorpusError(f"the tokenizer's vocabulary has {len(words)} words of plain letters; absorption needs more")
    cut = math.floor(0.8 * len(words))
    train, test = words[:cut], words[cut:]

    def prompt(word: str, pool: Sequence[str]) -> str:
        shown = min(config.icl_examples, len(pool) - 1)
        examples = mixed.sample(pool, shown)
        while word in examples:
            examples = mixed.sample(pool, shown)
        lines = [config.prompt_template.format(word=one) + f" {one.strip()[0].upper()}" for one in examples]
        return "".join(f"\n{line}" for line in [*lines, config.prompt_template.format(word=word)])

    return WordTask(
        train_words=train,
        test_words=test,
        train_prompts=[prompt(word, train) for word in train],
        test_prompts=[prompt(word, test) for word in test],
        evaluation_prompts=[prompt(word, words) for word in test],
    )


def after_the_word(tokenizer: Any, config: SuiteConfig) -> int:
    """Tokens of a prompt that follow its word."""
    before, mark, after = config.prompt_template.partition("{word}")
    if not mark or not after.strip() or before:
        raise CorpusError(
            f"suite.prompt_template {config.prompt_template!r}: it must begin with {{word}} and go on after it"
        )
    return len(tokenizer(after, add_special_tokens=False).input_ids)
