"""Entities with attributes, the prompts that ask for them, and when an answer is right.

A local set is a TOML file:

    [[entity]]
    name = "country"
    file = "countries.csv"      # .csv, .jsonl or .parquet, relative to the TOML file, with columns for the entity
                                # and for each attribute
    column = "country"

    [entity.prompts]            # attribute -> questions with {entity} once; the model writes the answer behind
    Capital = ["The capital of {entity} is the city of"]
    Language = ["The official language of {entity} is"]

An empty cell means that the attribute is not asked of that entity; `Dutch, French` accepts both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated

from pydantic import Field

from hsae.cache.config import Config
from hsae.cache.errors import CorpusError
from hsae.cache.files import parse_json
from hsae.cache.suites.specs import EntitiesConfig
from hsae.cache.text.data_sets import reaching, read_tables, records, resolve_revision

HUB = "adamkarvonen/ravel_prompts"
HUB_ATTRIBUTES = {
    "city": ("Country", "Continent", "Language"),
    "nobel_prize_winner": ("Country of Birth", "Field", "Gender"),
}
"""RAVEL's types and the attributes SAEBench takes of each."""
PARTS = ("entity_attributes", "attribute_to_prompts")
MARK = "{entity}"
OTHER_NAMES = {
    "united states": ("the united states", "america"),
    "united kingdom": ("the united kingdom", "england"),
    "south korea": ("korea",),
    "north america": ("america",),
    "mandarin": ("chinese",),
}
"""Answers that are right too where a label has these words in it."""
INSTEAD = (
    "use entities that come with hsae with --set ravel.entities=facts, or your own with --set ravel.entities=FILE.toml"
)


@dataclass(frozen=True, kw_only=True)
class EntityType:
    """Entities of one kind."""

    name: str
    labels: dict[str, dict[str, str]]  # entity -> attribute -> label
    prompts: dict[str, tuple[str, ...]]  # attribute -> questions with {entity} in them
    source: str


class LocalEntities(Config):
    """One [[entity]] table."""

    name: str = Field(min_length=1)
    file: str = Field(min_length=1)
    column: str = "entity"
    prompts: dict[str, Annotated[tuple[str, ...], Field(strict=False, min_length=1)]] = Field(min_length=2)


def read_entities(config: EntitiesConfig) -> list[EntityType]:
    """The entity types that a plan names. Raises CorpusError if they can't be had."""
    kinds = _types(config)
    for kind in kinds:
        _check(kind)
    return kinds


def _types(config: EntitiesConfig) -> list[EntityType]:
    if config.entities == "saebench":
        return _hub(config.revision)
    if config.entities == "facts":
        with resources.as_file(resources.files("hsae.cache.suites")) as folder:
            return _local(folder / "facts.toml")
    path = Path(config.entities).expanduser()
    return _ravel_folder(path, str(path)) if path.is_dir() else _local(path)


def _hub(revision: str | None) -> list[EntityType]:
    from huggingface_hub import hf_hub_download

    commit = resolve_revision(HUB, revision, INSTEAD)
    with reaching(HUB, INSTEAD):
        for kind in HUB_ATTRIBUTES:
            for part in PARTS:
                file = hf_hub_download(HUB, f"ravel_{kind}_{part}.json", repo_type="dataset", revision=commit)
    return _ravel_folder(Path(file).parent, f"{HUB} at {commit}")


def _ravel_folder(folder: Path, source: str) -> list[EntityType]:
    """RAVEL's JSON files, whichever of its two types are there."""
    kinds = []
    for kind, attributes in HUB_ATTRIBUTES.items():
        files = [folder / f"ravel_{kind}_{part}.json" for part in PARTS]
        if not files[0].is_file():
            continue
        try:
            labels, prompts = (parse_json(file.read_bytes()) for file in files)
            labels = {entity: {key: str(answers[key]) for key in attributes} for entity, answers in labels.items()}
            prompts = {key: tuple(text.replace("%s", MARK) for text in prompts[key]) for key in attributes}
            kinds.append(EntityType(name=kind, labels=labels, prompts=prompts, source=source))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorpusError(f"{folder} does not hold RAVEL's files of {kind} ({error!r})") from None
    if not kinds:
        raise CorpusError(f"{folder} holds none of RAVEL's files, such as ravel_city_entity_attributes.json")
    return kinds


def _local(path: Path) -> list[EntityType]:
    if not path.is_file():
        raise CorpusError(
            f"ravel.entities {str(path)!r}: no such file; give saebench, facts, a TOML file with [[entity]] tables, "
            "or a folder with RAVEL's JSON files"
        )
    return [_of_file(table, path.parent) for table in read_tables(path, "entity", LocalEntities)]


def _of_file(table: LocalEntities, folder: Path) -> EntityType:
    attributes = list(table.prompts)
    labels: dict[str, dict[str, str]] = {}
    for entity, *values in records(folder / table.file, [table.column, *attributes]):
        if entity is None:
            raise CorpusError(f"{folder / table.file}: an entity has no name")
        if str(entity) in labels:
            raise CorpusError(f"{folder / table.file}: {entity} is there twice")
        cells = zip(attributes, values, strict=True)
        labels[str(entity)] = {key: str(value).strip() for key, value in cells if str(value or "").strip()}
    return EntityType(name=table.name, labels=labels, prompts=table.prompts, source=table.file)


def _check(kind: EntityType) -> None:
    for attribute, texts in kind.prompts.items():
        if wrong := [text for text in texts if text.count(MARK) != 1 or text.endswith(MARK)]:
            raise CorpusError(
                f"entities {kind.name}, {attribute}: {wrong[0]!r} must have {MARK} once, with text behind it"
            )
        if len({labels[attribute] for labels in kind.labels.values() if attribute in labels}) < 2:
            raise CorpusError(f"entities {kind.name}: all have the same {attribute}, so nothing can be exchanged")


def accepted_answers(label: str) -> tuple[str, ...]:
    """What an answer may begin with, in lower case: the label, each part of a list, other names."""
    lower = label.lower().strip()
    others = [name for words, names in OTHER_NAMES.items() if words in lower for name in names]
    return tuple(dict.fromkeys(form for form in (lower, *map(str.strip, lower.split(",")), *others) if form))


def judge_answer(completion: str, label: str, *, final: bool = False) -> bool | None:
    """Whether a completion says the label (SAEBench's rule): the longer of the two begins with the shorter.

    What follows a quotation mark doesn't count. None as long as more text could decide; with `final` there is no more.
    """
    text, quote, _ = completion.rstrip("\ufffd").partition('"')
    answer = text.strip().lower()
    ended = final or bool(quote)
    if not answer:
        return False if ended else None
    accepted = accepted_answers(label)
    if any(answer.startswith(form) for form in accepted):
        return True
    if any(form.startswith(answer) for form in accepted):
        return True if ended else None
    return False


def token_at(offsets: Sequence[tuple[int, int]], end: int) -> int | None:
    """The token that holds the character before `end`; None if no token does."""
    places = [place for place, (first, last) in enumerate(offsets) if first < end <= last]
    return places[-1] if places else None
