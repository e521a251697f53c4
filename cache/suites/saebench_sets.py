"""SAEBench's data sets of labelled texts, from the hub."""

import functools
import random
from functools import partial
from typing import Any

from hsae.cache.suites.labelled_texts import SPLITS, DataSet, Record
from hsae.cache.suites.specs import SuiteConfig
from hsae.cache.text.data_sets import open_data_set, resolve_revision

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
        one(BIOS, bios, BIOS_SETS[0], "_class_set1", **genders, **_pairs(BIOS_PAIRS)),
        one(BIOS, bios, BIOS_SETS[1], "_class_set2", **genders),
        one(BIOS, bios, BIOS_SETS[2], "_class_set3", **genders),
        one(AMAZON, amazon, ("1", "2", "3", "5", "6"), **ratings, **_pairs(AMAZON_PAIRS)),
        one(AMAZON, ("text", "rating"), ("1.0", "5.0"), "_sentiment"),
        one(NEWS, ("text", "label"), ("0", "1", "2", "3")),
        DataSet(
            name=EUROPARL,
            read=lambda: _europarl(config, revisions[EUROPARL]),
            source=f"{EUROPARL} at {revisions[EUROPARL]}",
            classes=tuple(LANGUAGES),
        ),
    ]


def _pairs(pairs: dict[str, tuple[str, str]]) -> dict[str, Any]:
    return {"pairs": tuple(pairs.values()), "pair_names": tuple(pairs)}


def _hub(revision: str, name: str, split: str, text: str, label: str, attribute: str | None = None) -> list[Record]:
    return [
        Record(str(row[text]), str(row[label]), "" if attribute is None else str(row[attribute]))
        for row in open_data_set(name, revision, None, split)
        if str(row[text]).strip()
    ]


def _europarl(config: SuiteConfig, revision: str) -> dict[str, list[Record]]:
    mixed = random.Random(config.seed)
    records: dict[str, list[Record]] = {split: [] for split in SPLITS}
    for language, subset in LANGUAGES.items():
        sentences = []
        for row in open_data_set(EUROPARL, revision, subset, "train"):
            sentences.append(row["translation"][language])
            if len(sentences) == EUROPARL_READ:
                break
        mixed.shuffle(sentences)
        parts = sentences[: config.train_per_class], sentences[config.train_per_class :]
        for split, part in zip(SPLITS, parts, strict=True):
            records[split] += [Record(sentence, language) for sentence in part if sentence.strip()]
    return records
