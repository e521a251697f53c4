"""Which tokens a latent speaks for: its direction, read through the language model's final norm and unembedding."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from hsae.cache.errors import UserError
from hsae.cache.language_model.lm import LanguageModel
from hsae.eval.contexts import token_texts
from hsae.train.model.hierarchical_sae import HierarchicalSAE, Latent


class TokenEffect(NamedTuple):
    """What a direction does to a token's logit."""

    token: str
    id: int
    logit: float


@dataclass(frozen=True)
class LogitEffects:
    """The tokens whose logits a direction moves most, strongest first."""

    promoted: tuple[TokenEffect, ...]
    suppressed: tuple[TokenEffect, ...]

    def __str__(self) -> str:
        rows = {"promotes": self.promoted, "suppresses": self.suppressed}
        return "\n".join(
            f"{name}: {', '.join(f'{effect.token!r} {effect.logit:+.2f}' for effect in effects)}"
            for name, effects in rows.items()
        )


@torch.no_grad()
def logit_effects(model: HierarchicalSAE, lm: LanguageModel, latent: Latent, count: int = 10) -> LogitEffects:
    """The `count` tokens that a latent, (level, latent), promotes and suppresses most by itself.

    A logit here is what the latent's direction alone gives after the final norm, less what a residual of zeros gives
    (nostalgebraist 2020, "the logit lens"): layers between the hook and the end are left out. Raises UserError for an
    unknown latent, or a language model of another width.

    >>> print(hsae.logit_effects(model, lm, (2, 17), count=3))  # doctest: +SKIP
    promotes: ' rain' +9.21, ' storm' +8.80, ' weather' +8.12
    suppresses: ' desk' -4.02, ' lawyer' -3.95, ' chess' -3.71
    """
    if model.d_in != lm.d_model:
        raise UserError(f"the SAE reads residuals of width {model.d_in}; the language model's have {lm.d_model}")
    direction_D = model.direction(latent)
    rows = torch.stack([direction_D, torch.zeros_like(direction_D)])[:, None]
    given_V, none_V = lm.unembed(lm.suffix(f"blocks.{lm.layers - 1}.hook_resid_post", rows))[:, 0].float().cpu()
    effects_V = (given_V - none_V)[: len(lm.tokenizer)]  # a padded vocabulary has rows that no token stands for

    def strongest(largest: bool) -> tuple[TokenEffect, ...]:
        values, ids = torch.topk(effects_V, min(count, len(effects_V)), largest=largest)
        texts = token_texts(lm.tokenizer, ids.tolist())
        return tuple(map(TokenEffect, texts, ids.tolist(), values.tolist()))

    return LogitEffects(promoted=strongest(True), suppressed=strongest(False))
