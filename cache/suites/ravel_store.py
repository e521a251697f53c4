"""RAVEL's store: prompts about entities that the model answers right, with the residuals of all their tokens.

    <cache.dir>/probe/ravel/<model>-<fingerprint>.json     the prompts, and how many were asked and answered
    <cache.dir>/probe/texts/<model>-<key>/part-*.safetensors     residuals of every prompt asked, each token of it
    <cache.dir>/probe/answers/<key>/part-*.json     what the model wrote after each prompt

A build that is interrupted goes on where it was. Checksums: see `parts`. Shapes: T tokens of a prompt, D residual width.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from pydantic import Field
from torch import Tensor

from hsae.cache.errors import CorpusError, StoreError
from hsae.cache.format.spec import Config
from hsae.cache.language_model.generation import Opened, Passes, complete
from hsae.cache.language_model.lm import LanguageModel, pinned
from hsae.cache.storage.paths import Place, check_writable, locked, publish
from hsae.cache.suites.entities import EntityType, counted, covering, entity_span, read_entities, verdict
from hsae.cache.suites.probe_store import Wanted, build_set, sets_folder, sweep_probes, versions
from hsae.cache.suites.ravel_spec import EntitiesConfig, RavelSpec
from hsae.cache.suites.store_files import PART_TEXTS, ZEROS, Parts, SuiteHeader, kept, read_header, seal, write_header
from hsae.cache.suites.suite_spec import content_key, probe_folder

MOST_OPEN = 64  # parts that stay mapped
Progress = Callable[[str, int, int], None]
"""Told what is being done, how many prompts are done, and how many there are."""


class Prompt(Config):
    """A question that the model answers right."""

    row: int = Field(ge=0)
    """Which text of the set of residuals it is."""
    kind: str
    """The entity's type."""
    attribute: str
    entity: str
    label: str
    ids: tuple[int, ...] = Field(strict=False)
    position: int = Field(ge=0)
    """The entity's last token."""
    first_token: int
    """The first token of the model's answer."""


class RavelHeader(SuiteHeader):
    """The store's file."""

    spec: RavelSpec
    sources: dict[str, str]
    """Entity type -> where it is from."""
    texts: str
    """Name of the set of residuals."""
    count: int = Field(ge=1)
    """Prompts in the set."""
    asked: dict[str, dict[str, int]]
    """Entity type -> attribute -> prompts asked."""
    right: dict[str, dict[str, int]]
    """Entity type -> attribute -> prompts answered right."""
    prompts: list[Prompt]
    """Those answered right that are used: of the attributes with enough of them, and of the entities with the most."""

    @property
    def sets(self) -> dict[str, int]:
        """Set of residuals -> its texts."""
        return {self.texts: self.count}


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt before it is known what the model says."""

    kind: str
    attribute: str
    entity: str
    label: str
    text: str
    end: int
    """Where the entity ends, in characters."""


def questions(kinds: Sequence[EntityType]) -> list[Question]:
    """Every question about every entity that has the attribute."""
    found = []
    for kind in kinds:
        for attribute, templates in kind.prompts.items():
            for template in templates:
                for entity, labels in kind.labels.items():
                    if attribute in labels:
                        text, end = entity_span(template, entity)
                        held = {"kind": kind.name, "attribute": attribute, "entity": entity, "label": labels[attribute]}
                        found.append(Question(**held, text=text, end=end))
    return found


def build_ravel(
    spec: RavelSpec,
    root: str | Place,
    *,
    device: str = "cpu",
    progress: Progress = lambda name, done, total: None,
    say: Callable[[str], None] = lambda text: None,
    model: LanguageModel | None = None,
) -> Place:
    """Ask everything, keep what is answered right, and return the store's file.

    Raises UserError if the entities can't be had (before any compute) or too little is answered right; what was computed stays.
    """
    path = spec.path(root)
    check_writable(probe_folder(root) / "ravel")
    kinds = read_entities(spec.data)
    asked = questions(kinds)
    with locked(path):
        sweep_probes(root)
        if model is None:
            say(f"loading {spec.model.id}")
            model = LanguageModel.load(pinned(spec.model, root), device=device, say=say)
        model.check_hooks(spec.hooks)
        coded = model.tokenizer([one.text for one in asked], return_offsets_mapping=True, verbose=False)
        ids = [list(row) for row in coded.input_ids]
        places = [covering(list(offsets), one.end) for offsets, one in zip(coded.offset_mapping, asked, strict=True)]
        wanted = Wanted(ids=ids, kept=[list(range(len(row))) for row in ids])
        texts, parts = build_set(root, wanted, spec, spec.data.batch_rows, model, partial(progress, "residuals"))
        held = Residuals(Parts(sets_folder(root) / texts, parts, "ravel"))
        answers = _answers(root, texts, asked, ids, held, spec, model, partial(progress, "answers"))
        right = [
            Prompt(
                row=row, kind=one.kind, attribute=one.attribute, entity=one.entity, label=one.label, ids=tuple(ids[row]),
                position=place, first_token=answers[row][1],
            )
            for row, (one, place) in enumerate(zip(asked, places, strict=True))
            if place is not None and verdict(answers[row][0], one.label, final=True)
        ]  # fmt: skip
        chosen = usable(right, asked, spec.data)
        header = RavelHeader(
            spec=spec,
            d_model=model.d_model,
            model_digest=model.model_digest,
            tokenizer_digest=model.tokenizer_digest,
            versions=versions(model),
            parts={texts: parts},
            sources={kind.name: kind.source for kind in kinds},
            texts=texts,
            count=len(ids),
            asked=tally(asked),
            right=tally(right),
            prompts=chosen,
            passes=len(ids),
        )
        write_header(path, header)
    return path


def tally(items: Sequence[Question] | Sequence[Prompt]) -> dict[str, dict[str, int]]:
    """Type -> attribute -> number."""
    found: dict[str, dict[str, int]] = {}
    for (kind, attribute), count in Counter((item.kind, item.attribute) for item in items).items():
        found.setdefault(kind, {})[attribute] = count
    return found


def usable(right: Sequence[Prompt], asked: Sequence[Question], config: EntitiesConfig) -> list[Prompt]:
    """Of each type the entities most often answered right, and the attributes with enough left. Raises CorpusError if nothing is."""
    kept: list[Prompt] = []
    for kind in dict.fromkeys(one.kind for one in asked):
        mine = [prompt for prompt in right if prompt.kind == kind]
        best = {entity for entity, _ in Counter(prompt.entity for prompt in mine).most_common(config.top_entities)}
        mine = [prompt for prompt in mine if prompt.entity in best]
        enough = [
            attribute
            for attribute, count in Counter(prompt.attribute for prompt in mine).items()
            if count >= config.min_prompts
            and len({prompt.label for prompt in mine if prompt.attribute == attribute}) > 1
        ]
        if len(enough) > 1:
            kept += [prompt for prompt in mine if prompt.attribute in enough]
    if not kept:
        found, total = tally(right), tally(asked)
        told = counted({kind: found.get(kind, {}) for kind in total}, total)
        raise CorpusError(
            f"the model answers too little right for RAVEL: no type of entity has two attributes with {config.min_prompts} right answers "
            f"each and more than one label ({told}); use a stronger model or easier entities, or lower ravel.min_prompts"
        )
    return kept


def _answers(
    root: str | Place,
    texts: str,
    asked: Sequence[Question],
    ids: list[list[int]],
    held: "Residuals",
    spec: RavelSpec,
    model: LanguageModel,
    progress: Callable[[int, int], None],
) -> list[tuple[str, int]]:
    """What the model writes after each prompt until that is right or wrong, and its first token; parts that are there are read back."""
    hook, most = spec.hooks[-1], spec.data.new_tokens
    labels = [one.label for one in asked]
    key = content_key({"texts": texts, "hook": hook, "labels": labels, "tokens": most, "rows": spec.data.batch_rows})
    found: list[tuple[str, int]] = []
    for number, first in enumerate(range(0, len(asked), PART_TEXTS)):
        rows = range(first, min(first + PART_TEXTS, len(asked)))
        name = f"part-{number:05}.json"
        file = probe_folder(root) / "answers" / key / name
        answers = _answered(kept(file, f"{key}/{name}"), len(rows))
        if answers is None:
            opened = [
                Opened(ids=ids[row], resid_TD=held.of(row, hook), decided=decided_for(labels[row])) for row in rows
            ]
            written = complete(model, hook, opened, most, spec.data.batch_rows, Passes())
            answers = [(said, item.written[0]) for said, item in zip(written, opened, strict=True)]
            text = json.dumps({"crc32c": ZEROS, "answers": answers}, separators=(",", ":"))
            publish(file, seal(text.encode(), f"{key}/{name}"))
        found += answers
        progress(rows.stop, len(asked))
    return found


def _answered(data: bytes | None, count: int) -> list[tuple[str, int]] | None:
    """The answers in a part, if it is there and has so many."""
    if data is None:
        return None
    answers = [(str(said), int(token)) for said, token in json.loads(data)["answers"]]
    return answers if len(answers) == count else None


def decided_for(label: str) -> Callable[[str], bool]:
    """Whether an answer so far is right or wrong whatever follows."""
    return lambda text: verdict(text, label) is not None


# ---- reading ------------------------------------------------------------------------------------------------------------


class Residuals:
    """A set's residuals, text by text."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._opened = lru_cache(MOST_OPEN)(self._open)

    def of(self, row: int, hook: str) -> Tensor:
        """[T, D] of one text."""
        part, place = divmod(row, PART_TEXTS)
        tensors, ends = self._opened(part)
        return tensors[hook][ends[place - 1] if place else 0 : ends[place]].clone()

    def _open(self, part: int) -> tuple[dict[str, Tensor], list[int]]:
        tensors = self._parts.open(part)
        return tensors, tensors["lengths"].cumsum(0).tolist()


class RavelStore:
    """A finished store. Raises StoreError if it is missing, unfinished or not to be trusted."""

    def __init__(self, spec: RavelSpec, root: str | Place) -> None:
        self.root, self.path, self.spec = root, spec.path(root), spec
        self.url = str(self.path)
        self.header = read_header(self.path, RavelHeader, "ravel")
        if self.header.spec != spec:
            raise StoreError(f"{self.path} was made for another configuration; delete it and build it again")
        texts = self.header.texts
        self._residuals = Residuals(Parts(sets_folder(root) / texts, self.header.parts[texts], "ravel"))

    @property
    def digest(self) -> str:
        """Sixteen hex digits of all that the store's numbers depend on."""
        return content_key(self.header.model_dump(mode="json"))

    @property
    def kept(self) -> dict[str, dict[str, list[Prompt]]]:
        """Type -> attribute -> prompts."""
        found: dict[str, dict[str, list[Prompt]]] = {}
        for prompt in self.header.prompts:
            found.setdefault(prompt.kind, {}).setdefault(prompt.attribute, []).append(prompt)
        return found

    def resid(self, prompt: Prompt, hook: str) -> Tensor:
        """[T, D] residuals of a prompt's tokens."""
        if hook not in self.spec.hooks:
            raise StoreError(f"{self.path} holds {', '.join(self.spec.hooks)}, not {hook}")
        return self._residuals.of(prompt.row, hook)

    def entity(self, prompts: Sequence[Prompt], hook: str) -> Tensor:
        """[prompts, D] residuals at the entities' last tokens."""
        return torch.stack([self.resid(prompt, hook)[prompt.position] for prompt in prompts])
