"""The stores of labelled texts and of words: what sparse probing, SCR, TPP and absorption read.

<cache.dir>/probe/<suite>/<model>-<fingerprint>.json    what a suite is made of: its tasks, the set of residuals each
uses, and sums

The suite's file is written after its sets of residuals (see `residual_sets`). Shapes: D residual width, N tokens of a
part.
"""

import math
import random
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from hsae.cache.config import Config
from hsae.cache.errors import CorpusError
from hsae.cache.language_model.lm import LanguageModel
from hsae.cache.storage.paths import Place
from hsae.cache.suites.residual_sets import ResidualSet, SetBuilder, TokenSet, sets_folder
from hsae.cache.suites.specs import ProbeSpec, SuiteConfig
from hsae.cache.suites.suite_files import Part, SuiteHeader, SuiteStore
from hsae.cache.suites.text_tasks import text_tasks


class TaskEntry(Config):
    """One task of a suite."""

    name: str
    source: str
    texts: str  # name of the set of residuals
    count: int = Field(ge=1)  # texts in the set
    pair: Annotated[tuple[str, str], Field(strict=False)] | None = None  # SCR: the two labels
    lists: dict[str, dict[str, list[int]]]
    """Split -> class -> rows of the set; for absorption `letters` -> letter (0-25) of each word."""


class ProbeHeader(SuiteHeader):
    """The suite's file."""

    spec: ProbeSpec
    tasks: list[TaskEntry]
    prompt_token_pos: int | None = None  # absorption: where the word is, counted from the end of a prompt

    @property
    def sets(self) -> dict[str, int]:
        """Set of residuals -> its texts."""
        return {task.texts: task.count for task in self.tasks}


def make_probe_header(spec: ProbeSpec, builder: SetBuilder) -> ProbeHeader:
    """Compute the sets of a suite's tasks and describe them. Raises UserError if they can't be made; parts stay."""
    if spec.suite == "absorption":
        position = -after_the_word(builder.model.tokenizer, spec.tasks) - 1
        tasks = list(_words(spec.tasks, builder.model.tokenizer, position))
    else:
        position = None
        tasks = list(_texts(spec, builder.model))
    entries: list[TaskEntry] = []
    parts: dict[str, list[Part]] = {}
    for fields, tokens in tasks:
        key, set_parts = builder.build(tokens, fields["name"])
        parts[key] = set_parts
        entries.append(TaskEntry(texts=key, count=len(tokens.ids), **fields))
    return ProbeHeader(
        spec=spec,
        **builder.made_with(),
        parts=parts,
        tasks=entries,
        prompt_token_pos=position,
        passes=sum(entry.count for entry in entries),
    )


def _words(config: SuiteConfig, tokenizer: Any, position: int) -> Iterator[tuple[dict[str, Any], TokenSet]]:
    for name, pairs in word_prompts(tokenizer, config).items():
        letters = [ord(word.strip()[0].lower()) - ord("a") for word, _ in pairs]
        ids = [list(row) for row in tokenizer([prompt for _, prompt in pairs], verbose=False).input_ids]
        fields = {"name": name, "source": "the tokenizer's vocabulary", "lists": {name: {"letters": letters}}}
        yield fields, TokenSet(ids=ids, positions=[[len(row) + position] for row in ids])


def _texts(spec: ProbeSpec, model: LanguageModel) -> Iterator[tuple[dict[str, Any], TokenSet]]:
    for task in text_tasks(spec.suite, spec.tasks):
        encoded = model.tokenizer(list(task.texts), truncation=True, max_length=spec.tasks.context, verbose=False)
        ids = [list(row) for row in encoded.input_ids]
        positions = [[at for at, token in enumerate(row) if token not in model.special_ids] for row in ids]
        if empty := [index for index, ordinary in enumerate(positions) if not ordinary]:
            raise CorpusError(f"task {task.name}: text {task.texts[empty[0]][:40]!r} has no token but special ones")
        lists = {"train": task.train, "test": task.test}
        fields = {"name": task.name, "source": task.source, "pair": task.pair, "lists": lists}
        yield fields, TokenSet(ids=ids, positions=positions)


# ---- first letters of words ----------------------------------------------------------------------------------------


def vocabulary(tokenizer: Any) -> list[str]:
    """Every token that is ASCII letters after at most one leading space, sorted."""
    strings = {tokenizer.convert_tokens_to_string([token]) for token in tokenizer.get_vocab()}
    return sorted(word for word in strings if (bare := word.removeprefix(" ")).isascii() and bare.isalpha())


def word_prompts(tokenizer: Any, config: SuiteConfig) -> dict[str, list[tuple[str, str]]]:
    """(word, prompt) pairs: words split four to one, with prompts; all draws from `seed`.

    The ground-truth probe is trained and tested on `train` and `test`, whose examples are words of the same split.
    `prompts` has one prompt for each test word, with examples from the whole vocabulary.
    """
    generator = random.Random(config.seed)
    words = vocabulary(tokenizer)
    generator.shuffle(words)
    words = words[: config.words]
    if len(words) < config.icl_examples + 2:
        raise CorpusError(f"the tokenizer's vocabulary has {len(words)} words of plain letters; absorption needs more")
    cut = math.floor(0.8 * len(words))
    train, test = words[:cut], words[cut:]

    def prompt(word: str, pool: Sequence[str]) -> str:
        count = min(config.icl_examples, len(pool) - 1)
        examples = generator.sample(pool, count)
        while word in examples:
            examples = generator.sample(pool, count)
        lines = [config.prompt_template.format(word=one) + f" {one.strip()[0].upper()}" for one in examples]
        return "".join(f"\n{line}" for line in [*lines, config.prompt_template.format(word=word)])

    pools = {"train": (train, train), "test": (test, test), "prompts": (test, words)}
    return {name: [(word, prompt(word, pool)) for word in split] for name, (split, pool) in pools.items()}


def after_the_word(tokenizer: Any, config: SuiteConfig) -> int:
    """Tokens of a prompt that follow its word."""
    before, mark, after = config.prompt_template.partition("{word}")
    if not mark or not after.strip() or before:
        raise CorpusError(
            f"suite.prompt_template {config.prompt_template!r}: it must begin with {{word}} and go on after it"
        )
    return len(tokenizer(after, add_special_tokens=False).input_ids)


# ---- reading -------------------------------------------------------------------------------------------------------


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
