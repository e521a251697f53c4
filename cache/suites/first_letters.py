"""Absorption's words, and the prompts that ask for their first letters."""

import math
import random
from collections.abc import Sequence
from typing import Any

from hsae.cache.errors import CorpusError
from hsae.cache.suites.specs import SuiteConfig


def vocabulary(tokenizer: Any) -> list[str]:
    """Every token that is ASCII letters after at most one leading space, sorted."""
    strings = {tokenizer.convert_tokens_to_string([token]) for token in tokenizer.get_vocab()}
    return sorted(word for word in strings if (bare := word.removeprefix(" ")).isascii() and bare.isalpha())


def word_prompts(tokenizer: Any, config: SuiteConfig) -> dict[str, list[tuple[str, str]]]:
    """(word, prompt) pairs: words split four to one, with prompts; all draws from `seed`.

    The ground-truth probe is trained and tested on `train` and `test`, whose examples are words of the same split.
    `prompts` has one prompt for each test word, with examples from the whole vocabulary.
    """
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

    pools = {"train": (train, train), "test": (test, test), "prompts": (test, words)}
    return {name: [(word, prompt(word, pool)) for word in asked] for name, (asked, pool) in pools.items()}


def after_the_word(tokenizer: Any, config: SuiteConfig) -> int:
    """Tokens of a prompt that follow its word."""
    before, mark, after = config.prompt_template.partition("{word}")
    if not mark or not after.strip() or before:
        raise CorpusError(
            f"suite.prompt_template {config.prompt_template!r}: it must begin with {{word}} and go on after it"
        )
    return len(tokenizer(after, add_special_tokens=False).input_ids)
