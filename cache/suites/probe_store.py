"""The stores of labelled texts and of words: what sparse probing, SCR, TPP and absorption read.

<cache.dir>/probe/<suite>/<model>-<fingerprint>.json    what a suite is made of: its tasks, the set of residuals each
uses, and sums

The suite's file is written after its sets of residuals (see `residual_sets`). Shapes: D residual width, N tokens of a
part.
"""

from collections.abc import Iterator
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from hsae.cache.config import Config
from hsae.cache.errors import CorpusError
from hsae.cache.language_model.lm import LanguageModel
from hsae.cache.storage.paths import Place
from hsae.cache.suites.first_letters import after_the_word, word_task
from hsae.cache.suites.residual_sets import ResidualSet, SetBuilder, TokenSet, sets_folder
from hsae.cache.suites.specs import ProbeSpec
from hsae.cache.suites.suite_files import Part, SuiteHeader, SuiteStore
from hsae.cache.suites.text_tasks import text_tasks


class TaskEntry(Config):
    """One task of a suite."""

    name: str
    source: str
    texts: str
    """Name of the set of residuals."""
    count: int = Field(ge=1)
    """Texts in the set."""
    pair: Annotated[tuple[str, str], Field(strict=False)] | None = None
    """SCR: the two labels."""
    lists: dict[str, dict[str, list[int]]]
    """Split -> class -> rows of the set; for absorption `letters` -> letter (0-25) of each word."""


class ProbeHeader(SuiteHeader):
    """The suite's file."""

    spec: ProbeSpec
    tasks: list[TaskEntry]
    prompt_token_pos: int | None = None
    """absorption: where the word is, counted from the end of a prompt."""

    @property
    def sets(self) -> dict[str, int]:
        """Set of residuals -> its texts."""
        return {task.texts: task.count for task in self.tasks}


def make_probe_header(spec: ProbeSpec, builder: SetBuilder) -> ProbeHeader:
    """Compute the sets of a suite's tasks and describe them. Raises UserError if they can't be made; parts stay."""
    model = builder.model
    described, token_sets, position = _described(spec, model)
    entries: list[TaskEntry] = []
    parts: dict[str, list[Part]] = {}
    for entry, tokens in zip(described, token_sets, strict=True):
        key, set_parts = builder.build(tokens, entry.name)
        parts[key] = set_parts
        entries.append(entry.model_copy(update={"texts": key}))
    return ProbeHeader(
        spec=spec,
        **builder.made_with(),
        parts=parts,
        tasks=entries,
        prompt_token_pos=position,
        passes=sum(len(tokens.ids) for tokens in token_sets),
    )


def _described(spec: ProbeSpec, model: LanguageModel) -> tuple[list[TaskEntry], list[TokenSet], int | None]:
    config, tokenizer = spec.tasks, model.tokenizer
    if spec.suite == "absorption":
        words = word_task(tokenizer, config)
        after = after_the_word(tokenizer, config)
        letters = {
            name: [ord(word.strip()[0].lower()) - ord("a") for word in split]
            for name, split in (("train", words.train_words), ("test", words.test_words), ("prompts", words.test_words))
        }
        prompts = {"train": words.train_prompts, "test": words.test_prompts, "prompts": words.evaluation_prompts}
        entries, sets = [], []
        for name, texts in prompts.items():
            ids = [list(row) for row in tokenizer(texts, verbose=False).input_ids]
            sets.append(TokenSet(ids=ids, positions=[[len(row) - after - 1] for row in ids]))
            entries.append(_entry(name, "the tokenizer's vocabulary", len(texts), {name: {"letters": letters[name]}}))
        return entries, sets, -after - 1
    entries, sets = [], []
    for task in text_tasks(spec.suite, config):
        rows = tokenizer(list(task.texts), truncation=True, max_length=config.context, verbose=False).input_ids
        positions = [[at for at, token in enumerate(row) if token not in model.special_ids] for row in rows]
        if empty := [index for index, ordinary in enumerate(positions) if not ordinary]:
            raise CorpusError(f"task {task.name}: text {task.texts[empty[0]][:40]!r} has no token but special ones")
        sets.append(TokenSet(ids=[list(row) for row in rows], positions=positions))
        entry = _entry(task.name, task.source, len(rows), {"train": task.train, "test": task.test})
        entries.append(entry.model_copy(update={"pair": task.pair}))
    return entries, sets, None


def _entry(name: str, source: str, count: int, lists: dict[str, dict[str, list[int]]]) -> TaskEntry:
    return TaskEntry(name=name, source=source, texts="", count=count, lists=lists)


# ---- reading ---------------------------------------------------------------------


class ProbeStore(SuiteStore[ProbeHeader]):
    """A finished store of labelled texts or of words."""

    header_kind = ProbeHeader

    def __init__(self, spec: ProbeSpec, root: str | Place) -> None:
        super().__init__(spec, root)
        self.spec = spec
        sets = self.header.parts.items()
        self._parts = {name: ResidualSet(sets_folder(root) / name, parts, spec.suite) for name, parts in sets}

    def lengths(self, task: TaskEntry) -> Tensor:
        """Kept tokens of each text, int64."""
        return torch.cat([part["lengths"] for part in self._opened(task)])

    def ragged(self, task: TaskEntry, hook: str) -> Iterator[tuple[Tensor, list[int]]]:
        """Part by part the vectors [N, D] of the kept tokens, and how many each text has."""
        self.check_hook(hook)
        for part in self._opened(task):
            yield part[hook], part["lengths"].tolist()

    def _opened(self, task: TaskEntry) -> Iterator[dict[str, Tensor]]:
        parts = self._parts[task.texts]
        return (parts.open(number) for number in range(len(parts)))
