"""Top contexts of latents: where in the evaluation text a latent is most active, with the words around it.

Shapes: R rows, T context length, D residual width, F latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hsae.cache.store import ActivationStore
from hsae.train.views import View

MOST_ROWS = 2048  # rows read, from the front of the store: bounds the time on large stores
BATCH_ROWS = 64
BEFORE, AFTER = 16, 6
SPACE_MARKS = {"▁": " ", "Ġ": " ", "Ċ": "\n", "\n": "↵"}


@dataclass(frozen=True)
class Piece:
    """One token of a context."""

    text: str
    strength: float
    """Activation as a share of the context's largest, 0 to 1."""


@dataclass(frozen=True)
class Context:
    """A stretch of text around a latent's largest activation in one row."""

    activation: float
    row: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Firing:
    """How often and how strongly each latent of a view fires on the rows read."""

    density_F: Tensor
    """[F] share of non-special tokens on which the latent fires."""
    mass_F: Tensor
    """[F] mean activation over non-special tokens."""
    rows: int


def _batches(view: View, store: ActivationStore, hook: str) -> Any:
    """(first row, tokens [R, T], kept [R, T], activations [R, T, F]) of the rows read."""
    for start in range(0, min(store.rows, MOST_ROWS), BATCH_ROWS):
        stop = min(start + BATCH_ROWS, store.rows, MOST_ROWS)
        tokens = store.tokens(start, stop)
        kept = ~store.special_mask(tokens)
        yield start, tokens, kept, view.encode(store.acts(hook, start, stop).float()) * kept[..., None]


@torch.no_grad()
def firing(view: View, store: ActivationStore, hook: str) -> Firing:
    """Density and mass of every latent."""
    fired, mass = torch.zeros(view.d_sae, dtype=torch.float64), torch.zeros(view.d_sae, dtype=torch.float64)
    tokens_read = rows = 0
    for _, tokens, kept, acts in _batches(view, store, hook):
        fired += (acts > 0).sum((0, 1)).double()
        mass += acts.sum((0, 1)).double()
        tokens_read += int(kept.sum())
        rows += len(tokens)
    return Firing(fired / max(1, tokens_read), mass / max(1, tokens_read), rows)


@torch.no_grad()
def top_contexts(
    view: View, store: ActivationStore, hook: str, tokenizer: Any, latents: Sequence[int], count: int
) -> dict[int, list[Context]]:
    """The `count` rows in which each latent is most active, one context a row, strongest first; fewer if it fires in fewer."""
    chosen = torch.tensor(list(latents), dtype=torch.long)
    best: dict[int, list[tuple[float, int, Tensor, Tensor]]] = {int(latent): [] for latent in chosen}
    for start, tokens, _, acts in _batches(view, store, hook):
        picked = acts[..., chosen]
        peaks = picked.amax(1)
        for column, latent in enumerate(best):
            values, places = peaks[:, column].topk(min(count, len(peaks)))
            for value, place in zip(values.tolist(), places.tolist(), strict=True):
                if value > 0:
                    best[latent].append((value, start + place, tokens[place].clone(), picked[place, :, column].clone()))
            best[latent] = sorted(best[latent], key=lambda entry: (-entry[0], entry[1]))[:count]
    return {
        latent: [_context(value, row, ids, acts, tokenizer) for value, row, ids, acts in entries]
        for latent, entries in best.items()
    }


def _context(value: float, row: int, ids_T: Tensor, acts_T: Tensor, tokenizer: Any) -> Context:
    peak = int(acts_T.argmax())
    first, last = max(0, peak - BEFORE), min(len(ids_T), peak + AFTER + 1)
    texts = token_texts(tokenizer, ids_T[first:last].tolist())
    strengths = (acts_T[first:last] / value).clamp(0, 1).tolist()
    return Context(value, row, tuple(Piece(text, strength) for text, strength in zip(texts, strengths, strict=True)))


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Each token as readable text on one line: the spaces its marks stand for, line ends as ↵."""
    texts = []
    for token in tokenizer.convert_ids_to_tokens(list(ids)):
        text = str(token)
        for mark, plain in SPACE_MARKS.items():
            text = text.replace(mark, plain)
        texts.append(text)
    return texts
