"""The tasks of a suite: of SAEBench's data sets on the hub, of local files, or of what ships with Python."""

import functools
import itertools
import random
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from hsae.cache.config import Config
from hsae.cache.errors import CorpusError
from hsae.cache.suites.labelled_texts import SPLITS, DataSet, Record, TextTask, classes, quadrants
from hsae.cache.suites.python_tasks import python_sets
from hsae.cache.suites.specs import Suite, SuiteConfig
from hsae.cache.text.data_sets import open_data_set, read_tables, records, resolve_revision, stream_rows

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
Pair = Annotated[tuple[str, str], Field(strict=False)]


class LocalTask(Config):
    """One data set of a local tasks file."""

    name: str = Field(min_length=1)
    train: str
    """A data file, relative to the tasks file; rows without text, label or attribute are left out."""
    test: str
    text: str = "text"
    label: str = "label"
    classes: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Labels to use, in order; none named uses all."""
    attribute: str | None = None
    """A second column, for SCR."""
    attribute_values: Pair | None = None
    """Its two values; the first plays the part of SAEBench's "male"."""
    pairs: Annotated[tuple[Pair, ...], Field(strict=False)] = ()
    """Pairs of labels for SCR."""


def text_tasks(suite: Suite, config: SuiteConfig) -> list[TextTask]:
    """The tasks of a suite. Raises CorpusError if a data set can't be had or is too small."""
    sets = {"saebench": saebench_sets, "python": python_sets}.get(config.tasks, _local_sets)(config)
    if suite == "scr":
        tasks = [
            quadrants(data, data.read(), name, config) for data in sets if data.attribute_values for name in data.pairs
        ]
    else:
        if suite == "tpp":
            sets = [data for data in sets if _has_tpp(data, config)]
        tasks = [classes(data, data.read(), config) for data in sets]
    if not tasks:
        raise CorpusError(
            f"suite.tasks {config.tasks!r} has no data for {suite}; SCR needs two attributes and pairs of labels"
        )
    return tasks


def _has_tpp(data: DataSet, config: SuiteConfig) -> bool:
    """SAEBench takes two of its data sets for TPP; elsewhere every data set of at least three classes serves."""
    return data.name in TPP_NAMES if config.tasks == "saebench" else len(data.classes) != 2


def _local_sets(config: SuiteConfig) -> list[DataSet]:
    path = Path(config.tasks).expanduser()
    if not path.is_file():
        raise CorpusError(
            f"suite.tasks {str(path)!r}: no such file; give saebench, python, or a TOML file with [[task]] tables"
        )
    return [_local_set(task, path.parent) for task in read_tables(path, "task", LocalTask)]


def _local_set(task: LocalTask, folder: Path) -> DataSet:
    def read() -> dict[str, list[Record]]:
        columns = [task.text, task.label, *([task.attribute] if task.attribute else [])]
        rows = {}
        for split, file in zip(SPLITS, (task.train, task.test), strict=True):
            cells = (values for values in records(folder / file, columns) if None not in values)
            rows[split] = [Record(*map(str, values)) for values in cells if str(values[0]).strip()]
        train, test = ({record.text for record in rows[split]} for split in SPLITS)
        if test and test <= train:
            raise CorpusError(
                f"task {task.name}: every test text is a training text; give {task.test} texts of its own"
            )
        return rows

    if task.pairs and task.attribute_values is None:
        raise CorpusError(f"task {task.name}: pairs are given, so SCR needs attribute and attribute_values too")
    return DataSet(
        name=task.name,
        read=read,
        source=f"{task.train}, {task.test}",
        classes=task.classes,
        pairs={"_".join(pair): pair for pair in task.pairs},
        attribute_values=task.attribute_values,
    )


# ---- SAEBench's data sets ------------------------------------------------------------------------------------------


def saebench_sets(config: SuiteConfig) -> list[DataSet]:
    """SAEBench's data sets, but for its code data set, which can only be read by running code from the hub."""
    revisions = {name: resolve_revision(name, config.revisions.get(name)) for name in (BIOS, AMAZON, NEWS, EUROPARL)}

    @functools.cache
    def read(name: str, *columns: str) -> dict[str, list[Record]]:
        return {split: _hub(revisions[name], name, split, *columns) for split in SPLITS}

    def one(name: str, columns: tuple[str, ...], classes: tuple[str, ...], suffix: str = "", **more: Any) -> DataSet:
        source = f"{name} at {revisions[name]}"
        return DataSet(name=name + suffix, read=partial(read, name, *columns), source=source, classes=classes, **more)

    bios, amazon = ("hard_text", "profession", "gender"), ("text", "category", "rating")
    genders: dict[str, Any] = {"by_attribute": True, "attribute_values": ("0", "1")}
    ratings: dict[str, Any] = {"by_attribute": True, "attribute_values": ("1.0", "5.0")}
    return [
        one(BIOS, bios, BIOS_SETS[0], "_class_set1", **genders, pairs=BIOS_PAIRS),
        one(BIOS, bios, BIOS_SETS[1], "_class_set2", **genders),
        one(BIOS, bios, BIOS_SETS[2], "_class_set3", **genders),
        one(AMAZON, amazon, ("1", "2", "3", "5", "6"), **ratings, pairs=AMAZON_PAIRS),
        one(AMAZON, ("text", "rating"), ("1.0", "5.0"), "_sentiment"),
        one(NEWS, ("text", "label"), ("0", "1", "2", "3")),
        DataSet(
            name=EUROPARL,
            read=lambda: _europarl(config, revisions[EUROPARL]),
            source=f"{EUROPARL} at {revisions[EUROPARL]}",
            classes=tuple(LANGUAGES),
        ),
    ]


def _hub(revision: str, name: str, split: str, text: str, label: str, attribute: str | None = None) -> list[Record]:
    rows = stream_rows(open_data_set(name, revision, None, split), name)
    return [
        Record(str(row[text]), str(row[label]), "" if attribute is None else str(row[attribute]))
        for row in rows
        if str(row[text]).strip()
    ]


def _europarl(config: SuiteConfig, revision: str) -> dict[str, list[Record]]:
    generator = random.Random(config.seed)
    records: dict[str, list[Record]] = {split: [] for split in SPLITS}
    for language, subset in LANGUAGES.items():
        rows = stream_rows(open_data_set(EUROPARL, revision, subset, "train"), EUROPARL)
        sentences = [row["translation"][language] for row in itertools.islice(rows, EUROPARL_READ)]
        generator.shuffle(sentences)
        parts = sentences[: config.train_per_class], sentences[config.train_per_class :]
        for split, part in zip(SPLITS, parts, strict=True):
            records[split] += [Record(sentence, language) for sentence in part if sentence.strip()]
    return records
