"""Single latents in the report: where they are most active, and the fine latents that a coarse one is composed of.

Which latents are shown is not a choice of taste: the alive ones with the largest mean activation.

Shapes: F coarse latents, G fine latents.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from hsae.cache.reading.store import ActivationStore
from hsae.eval import contexts
from hsae.eval.hierarchy import maps
from hsae.train.model.hierarchical_sae import CompositionMap, HierarchicalSAE
from hsae.train.model.views import View

COARSE_SHOWN, CHILDREN_SHOWN, LATENTS_SHOWN = 4, 3, 4
CONTEXTS_SHOWN, CHILD_CONTEXTS_SHOWN = 3, 2
COMMON = 0.05  # latents that fire on a larger share of the tokens say little in a list of contexts


@dataclass(frozen=True, kw_only=True)
class LatentCard:
    """A latent and where it is most active; `children` are the fine latents it is composed of."""

    title: str
    facts: str
    contexts: list[contexts.Context]
    share: float | None = None
    """Of a child: its contribution, w rms(child) / rms(parent)."""
    children: "list[LatentCard]" = field(default_factory=list)


def cards_of(model: HierarchicalSAE, store: ActivationStore, hook: str, tokenizer: Any) -> list[LatentCard]:
    """Coarse latents with the fine ones they are composed of; without composition maps, a few latents of each level."""
    views = model.views()
    if model.compositions:
        return _families(model.compositions[-1], views, store, hook, tokenizer)
    cards = []
    for name in [name for name in views if name != "sae"] or list(views):
        seen = contexts.survey(views[name], store, hook)
        latents = contexts.heaviest(seen, LATENTS_SHOWN, common=COMMON)
        by_latent = contexts.find_contexts(views[name], store, hook, tokenizer, seen, latents, CONTEXTS_SHOWN)
        cards += [_card(name, latent, seen, by_latent) for latent in latents]
    return cards


def _families(
    part: CompositionMap, views: dict[str, View], store: ActivationStore, hook: str, tokenizer: Any
) -> list[LatentCard]:
    coarse, fine = f"level{part.level}", f"level{part.level - 1}"
    shares_FG = part.contributions
    seen, below = contexts.survey(views[coarse], store, hook), contexts.survey(views[fine], store, hook)
    composed = [latent for latent in contexts.heaviest(seen, len(shares_FG), common=COMMON) if shares_FG[latent].any()]
    parents = composed[:COARSE_SHOWN]
    children = {parent: _children(shares_FG[parent]) for parent in parents}
    every = sorted({child for numbers in children.values() for child in numbers})
    shown = contexts.find_contexts(views[coarse], store, hook, tokenizer, seen, parents, CONTEXTS_SHOWN)
    under = contexts.find_contexts(views[fine], store, hook, tokenizer, below, every, CHILD_CONTEXTS_SHOWN)
    ratios = maps.participation_ratio(shares_FG)
    cards = []
    for parent in parents:
        nested = []
        for child in children[parent]:
            share, weight = float(shares_FG[parent, child]), float(part.weight[parent, child])
            nested.append(_card(fine, child, below, under, share=share, also=f"w = {weight:.3g}"))
        about = f"made of {float(ratios[parent]):.1f} fine latents"
        cards.append(_card(coarse, parent, seen, shown, also=about, children=nested))
    return cards


def _children(shares_G: torch.Tensor) -> list[int]:
    """The fine latents that bring most, either sign, those that bring nothing left out."""
    values, indices = shares_G.abs().topk(min(CHILDREN_SHOWN, len(shares_G)))
    return [int(index) for value, index in zip(values, indices, strict=True) if value > 0]


def _card(
    view: str,
    latent: int,
    seen: contexts.Survey,
    by_latent: dict[int, list[contexts.Context]],
    *,
    also: str = "",
    share: float | None = None,
    children: list[LatentCard] | None = None,
) -> LatentCard:
    title = f"{'latent' if view == 'sae' else view.replace('level', 'level ') + ' latent'} {latent}"
    fires = f"fires on {100 * float(seen.density_F[latent]):.2f} % of tokens"
    return LatentCard(
        title=title,
        facts=f"{also}; {fires}" if also else fires,
        contexts=by_latent[latent],
        share=share,
        children=children or [],
    )
