"""RAVEL's store: prompts about entities that the model answers right, with the residuals of all their tokens.

    <cache.dir>/probe/ravel/<model>-<fingerprint>.json     the prompts, and how many were asked and answered
    <cache.dir>/probe/texts/<model>-<key>/part-*.safetensors     residuals of every prompt asked, each token of it
    <cache.dir>/probe/answers/<key>/part-*.json     what the model wrote after each prompt

A build that is interrupted goes on where it was. Checksums: see `suite_files`. Shapes: T tokens of a prompt, D
residual width.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from hsae.cache.config import Config
from hsae.cache.errors import CorpusError
from hsae.cache.language_model.generation import PassCounts, PendingPrompt, complete
from hsae.cache.storage.paths import Place, publish
from hsae.cache.suites.entities import MARK, EntityType, judge_answer, token_at
from hsae.cache.suites.residual_sets import ResidualSet, SetBuilder, TokenSet, sets_folder
from hsae.cache.suites.specs import EntitiesConfig, RavelSpec, content_key, suites_folder
from hsae.cache.suites.suite_files import PART_TEXTS, ZEROS, SuiteHeader, SuiteStore, read_whole, seal


class Prompt(Config):
    """A question that the model answers right."""

    row: int = Field(ge=0)  # which text of the set of residuals it is
    kind: str  # the entity's type
    attribute: str
    entity: str
    label: str
    ids: tuple[int, ...] = Field(strict=False)
    position: int = Field(ge=0)  # the entity's last token
    first_token: int  # the first token of the model's answer


class RavelHeader(SuiteHeader):
    """The store's file."""

    spec: RavelSpec
    sources: dict[str, str]  # entity type -> where it is from
    texts: str  # name of the set of residuals
    count: int = Field(ge=1)  # prompts in the set
    asked: dict[str, dict[str, int]]  # entity type -> attribute -> prompts asked
    right: dict[str, dict[str, int]]  # entity type -> attribute -> prompts answered right
    prompts: list[Prompt]
    """Those answered right that are used: of the attributes with enough of them, and of the entities with the most."""

    @property
    def sets(self) -> dict[str, int]:
        """Set of residuals -> its texts."""
        return {self.texts: self.count}


@dataclass(frozen=True, kw_only=True)
class CandidatePrompt:
    """A question that is put to the model, before it is known what the model answers."""

    kind: str
    attribute: str
    entity: str
    label: str
    text: str
    end: int  # where the entity ends, in characters


def candidate_prompts(kinds: Sequence[EntityType]) -> list[CandidatePrompt]:
    """Every question about every entity that has the attribute."""
    return [
        CandidatePrompt(
            kind=kind.name,
            attribute=attribute,
            entity=entity,
            label=labels[attribute],
            text=template.replace(MARK, entity),
            end=template.index(MARK) + len(entity),
        )
        for kind in kinds
        for attribute, templates in kind.prompts.items()
        for template in templates
        for entity, labels in kind.labels.items()
        if attribute in labels
    ]


def make_ravel_header(spec: RavelSpec, kinds: Sequence[EntityType], builder: SetBuilder) -> RavelHeader:
    """Ask everything and keep what is answered right. Raises CorpusError for too little; parts stay."""
    model, candidates = builder.model, candidate_prompts(kinds)
    encoded = model.tokenizer([one.text for one in candidates], return_offsets_mapping=True, verbose=False)
    ids = [list(row) for row in encoded.input_ids]
    ends = [token_at(list(offsets), one.end) for offsets, one in zip(encoded.offset_mapping, candidates, strict=True)]
    texts, parts = builder.build(TokenSet(ids=ids, positions=[list(range(len(row))) for row in ids]), "residuals")
    residuals = ResidualSet(sets_folder(builder.root) / texts, parts, spec.suite)
    answers = _answers(spec, texts, candidates, ids, residuals, builder)
    right = [
        Prompt(
            row=row, kind=one.kind, attribute=one.attribute, entity=one.entity, label=one.label, ids=tuple(ids[row]),
            position=position, first_token=answers[row][1],
        )
        for row, (one, position) in enumerate(zip(candidates, ends, strict=True))
        if position is not None and judge_answer(answers[row][0], one.label, final=True)
    ]  # fmt: skip
    return RavelHeader(
        spec=spec,
        **builder.made_with(),
        parts={texts: parts},
        sources={kind.name: kind.source for kind in kinds},
        texts=texts,
        count=len(ids),
        asked=count_prompts(candidates),
        right=count_prompts(right),
        prompts=select_prompts(right, candidates, spec.data),
        passes=len(ids),
    )


def count_prompts(items: Sequence[CandidatePrompt] | Sequence[Prompt]) -> dict[str, dict[str, int]]:
    """Type -> attribute -> number."""
    counts: dict[str, dict[str, int]] = {}
    for (kind, attribute), count in Counter((item.kind, item.attribute) for item in items).items():
        counts.setdefault(kind, {})[attribute] = count
    return counts


def describe_counts(right: dict[str, dict[str, int]], asked: dict[str, dict[str, int]]) -> str:
    """`country: Capital 90 of 168, ...` for people."""
    return "; ".join(
        f"{kind}: " + ", ".join(f"{key} {right.get(kind, {}).get(key, 0)} of {total}" for key, total in totals.items())
        for kind, totals in asked.items()
    )


def select_prompts(
    right: Sequence[Prompt], candidates: Sequence[CandidatePrompt], config: EntitiesConfig
) -> list[Prompt]:
    """Entities most often answered right, and attributes with enough left. Raises CorpusError without any."""
    selected: list[Prompt] = []
    for kind in dict.fromkeys(one.kind for one in candidates):
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
            selected += [prompt for prompt in mine if prompt.attribute in enough]
    if not selected:
        counts = describe_counts(count_prompts(right), count_prompts(candidates))
        raise CorpusError(
            "the model answers too little right for RAVEL: no type of entity has two attributes with "
            f"{config.min_prompts} right answers each and more than one label ({counts}); use a stronger model or "
            "easier entities, or lower ravel.min_prompts"
        )
    return selected


def _answers(
    spec: RavelSpec,
    texts: str,
    candidates: Sequence[CandidatePrompt],
    ids: list[list[int]],
    residuals: ResidualSet,
    builder: SetBuilder,
) -> list[tuple[str, int]]:
    """What the model writes after each prompt until it is decided, and its first token."""
    hook, new_tokens = spec.hooks[-1], spec.data.new_tokens
    labels = [one.label for one in candidates]
    key = content_key({"texts": texts, "hook": hook, "labels": labels, "tokens": new_tokens, "rows": spec.batch_rows})
    answers: list[tuple[str, int]] = []
    for number, first in enumerate(range(0, len(candidates), PART_TEXTS)):
        rows = range(first, min(first + PART_TEXTS, len(candidates)))
        name = f"{key}/part-{number:05}.json"
        file = suites_folder(builder.root) / "answers" / name
        data = read_whole(file, name)
        part = [(str(answer), int(token)) for answer, token in json.loads(data)["answers"]] if data else []
        if len(part) != len(rows):
            pending = [
                PendingPrompt(ids=ids[row], resid_TD=residuals.of_text(row, hook), is_decided=is_decided(labels[row]))
                for row in rows
            ]
            written = complete(builder.model, hook, pending, new_tokens, spec.batch_rows, PassCounts())
            part = [(answer, item.written[0]) for answer, item in zip(written, pending, strict=True)]
            text = json.dumps({"crc32c": ZEROS, "answers": part}, separators=(",", ":"))
            publish(file, seal(text.encode(), name))
        answers += part
        builder.report("answers", rows.stop, len(candidates))
    return answers


def is_decided(label: str) -> Callable[[str], bool]:
    """Whether an answer so far is right or wrong whatever follows."""
    return lambda text: judge_answer(text, label) is not None


# ---- reading ---------------------------------------------------------------------


class RavelStore(SuiteStore[RavelHeader]):
    """A finished store of prompts that the model answers right."""

    header_kind = RavelHeader

    def __init__(self, spec: RavelSpec, root: str | Place) -> None:
        super().__init__(spec, root)
        self.spec, texts = spec, self.header.texts
        self._residuals = ResidualSet(sets_folder(root) / texts, self.header.parts[texts], spec.suite)

    @property
    def prompts(self) -> dict[str, dict[str, list[Prompt]]]:
        """Type -> attribute -> prompts."""
        by_type: dict[str, dict[str, list[Prompt]]] = {}
        for prompt in self.header.prompts:
            by_type.setdefault(prompt.kind, {}).setdefault(prompt.attribute, []).append(prompt)
        return by_type

    def resid(self, prompt: Prompt, hook: str) -> Tensor:
        """[T, D] residuals of a prompt's tokens."""
        self.check_hook(hook)
        return self._residuals.of_text(prompt.row, hook)

    def entity(self, prompts: Sequence[Prompt], hook: str) -> Tensor:
        """[prompts, D] residuals at the entities' last tokens."""
        return torch.stack([self.resid(prompt, hook)[prompt.position] for prompt in prompts])
