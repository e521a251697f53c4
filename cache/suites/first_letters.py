"""Absorption's words, and the prompts that ask for their first letters."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hsae.cache.errors import CorpusError
from hsae.cache.suites.specs import SuiteConfig


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
    """Every token that is ASCII letters after at most one leading space, sorted."""
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
