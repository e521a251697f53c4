"""What a language model writes after a prompt, greedily, from cached residuals of the prompt, as they are or changed.

A changed residual acts on every later token through attention, as a hook on the prompt's forward pass does. Each
further token takes one prefix pass (the residuals of what was written) and one suffix pass; most answers are decided
by the first.

Shapes: B prompts of a batch, T tokens, D residual width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hsae.cache.language_model.lm import LanguageModel


@dataclass
class PassCounts:
    """Prompts sent through the model's parts, and those for which that was not needed."""

    prefix: int = 0
    suffix: int = 0
    backward: int = 0
    spared: int = 0


@dataclass(kw_only=True)
class PendingPrompt:
    """A prompt that is to be completed."""

    ids: Sequence[int]
    resid_TD: Tensor  # residuals at the hook
    is_decided: Callable[[str], bool]  # whether what has been written so far is enough
    written: list[int] = field(default_factory=list)


def complete(
    model: LanguageModel,
    hook: str,
    prompts: Sequence[PendingPrompt],
    max_new_tokens: int,
    batch_rows: int,
    passes: PassCounts,
) -> list[str]:
    """The text written after each prompt, of at most `max_new_tokens`, until it is decided or has ended."""
    pending = list(prompts)
    for step in range(max_new_tokens):
        for start in range(0, len(pending), batch_rows):
            batch = pending[start : start + batch_rows]
            x_BTD = pad_sequence([item.resid_TD for item in batch], batch_first=True)
            if step:
                whole_BTD = model.prefix(model.padded([[*item.ids, *item.written] for item in batch]), [hook])[hook]
                x_BTD = torch.cat([x_BTD, whole_BTD.cpu()[:, x_BTD.shape[1] :]], 1)
                for row, item in enumerate(batch):
                    x_BTD[row, len(item.ids) :] = whole_BTD[row, len(item.ids) :].cpu()
                passes.prefix += len(batch)
            final_BTD = model.suffix(hook, x_BTD)
            passes.suffix += len(batch)
            ends = [len(item.ids) + len(item.written) - 1 for item in batch]
            tokens = model.unembed(final_BTD[range(len(batch)), ends]).argmax(-1).tolist()
            for item, token in zip(batch, tokens, strict=True):
                item.written.append(token)
        end = model.tokenizer.eos_token_id
        pending = [item for item in pending if item.written[-1] != end and not item.is_decided(_text(model, item))]
    return [_text(model, item) for item in prompts]


def _text(model: LanguageModel, item: PendingPrompt) -> str:
    text: str = model.tokenizer.decode(item.written, skip_special_tokens=True)
    return text
