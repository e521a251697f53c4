"""Top contexts of latents: where in the evaluation text a latent is most active, with the words around it.

One pass over the store surveys every latent of a view (how often, how strongly, and the places of its highest peaks,
one a document); the few rows that are shown are then encoded again. Memory does not grow with the store: `PEAKS_KEPT`
places a latent.

Shapes: R rows, T context length, D residual width, F latents, P peaks kept, N tokens of a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hsae.cache.language_model.lm import LanguageModel, load_tokenizer
from hsae.cache.reading.provenance import check_tokenizer
from hsae.cache.reading.store import ActivationStore
from hsae.eval.harness.fits import check_fits
from hsae.train.model.hierarchical_sae import HierarchicalSAE, Latent
from hsae.train.model.views import View

MOST_ROWS = 1024  # rows read, from the front of the store: bounds the time on large stores
BATCH_ELEMENTS = 1 << 24  # activations held at once
PEAKS_KEPT = 8  # a latent; more than are shown, because equal texts are shown once
BEFORE, AFTER = 18, 8  # tokens shown around the peak


@dataclass(frozen=True)
class Piece:
    """One token of a context."""

    text: str
    strength: float
    """Activation as a share of the context's largest, 0 to 1."""


@dataclass(frozen=True)
class Context:
    """A stretch of one document around a latent's largest activation in it."""

    activation: float
    row: int
    pieces: tuple[Piece, ...]

    def __str__(self) -> str:
        return "".join(f"«{piece.text}»" if piece.strength == 1 else piece.text for piece in self.pieces)


def top_contexts(
    model: HierarchicalSAE,
    store: ActivationStore,
    *latents: Latent,
    count: int = 5,
    hook: str | None = None,
    lm: LanguageModel | None = None,
) -> dict[Latent, list[Context]]:
    """Where in a store's text latents are most active: `count` contexts of each (level, latent), strongest first.

    Contexts are from different documents, in the store's first 1,024 rows. `hook` is needed if the store has several;
    the tokenizer is that of the store's model, or of `lm`, which is needed where that model was built from memory.
    Raises UserError for an unknown latent, or a model or tokenizer that does not fit the store.

    >>> for context in hsae.top_contexts(model, store, (2, 17))[2, 17]:  # doctest: +SKIP
    ...     print(f"{context.activation:.1f} {context}")
    9.3  a cold front brings «rain» to the coast
    """
    hook = store.only_hook(hook)
    check_fits(model, hook, store.header.d_model, store.spec.model.id)
    for latent in latents:
        model.check_latent(latent)
    tokenizer = lm.tokenizer if lm is not None else load_tokenizer(store.spec.model)
    check_tokenizer(store.root, store.header, tokenizer)
    contexts: dict[Latent, list[Context]] = {}
    for level in dict.fromkeys(level for level, _ in latents):
        view = model.view(model.level_name(level)).copy_to("cpu", torch.float32)
        numbers = [number for at, number in latents if at == level]
        best = find_contexts(view, store, hook, tokenizer, survey(view, store, hook), numbers, count)
        norms_F = getattr(view, "norms", torch.ones(view.d_sae))  # a view of a stack scales the model's code by these
        for number in numbers:
            norm = float(norms_F[number])
            contexts[level, number] = [replace(one, activation=one.activation / norm) for one in best[number]]
    return contexts


@dataclass(frozen=True)
class Survey:
    """What one pass over the store's first rows says of every latent of a view."""

    density_F: Tensor
    """[F] share of non-special tokens on which the latent fires."""
    mass_F: Tensor
    """[F] mean activation over non-special tokens."""
    peaks_PF: Tensor
    """[P, F] highest activations in different documents, falling; 0 where there are fewer."""
    places_PF: Tensor
    """[P, F] where they are: row * T + position."""
    rows: int
    """Rows read."""


def documents(tokens_RT: Tensor, bos_id: int) -> list[tuple[int, int, bool]]:
    """Stretches (begin, end, whether it goes on from the rows before) of the flattened rows, each of one document.

    A BOS inside a row begins a document; the one at a row's front stands in every row. Rows packed without BOS count as
    documents.
    """
    stretches: list[tuple[int, int, bool]] = []
    for row, tokens in enumerate(tokens_RT.tolist()):
        front, continued = row * len(tokens), tokens[0] == bos_id
        starts = [0, *(place for place, token in enumerate(tokens) if place and token == bos_id)]
        for begin, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            if begin == 0 and continued and stretches:
                stretches[-1] = (stretches[-1][0], front + end, stretches[-1][2])
            else:
                stretches.append((front + begin, front + end, begin == 0 and continued))
    return stretches


@torch.no_grad()
def survey(view: View, store: ActivationStore, hook: str) -> Survey:
    """Density, mass and highest peaks of every latent, over non-special tokens of the first `MOST_ROWS` rows."""
    width, rows, context = view.d_sae, min(store.rows, MOST_ROWS), store.context
    fired_F, mass_F = torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    peaks = _Peaks(width)
    batch, tokens_read = _batch_rows(view, store), 0
    for start in range(0, rows, batch):
        stop = min(start + batch, rows)
        tokens_RT = store.tokens(start, stop)
        acts_NF = _masked(view, store, hook, start, stop).flatten(0, 1)
        fired_F += (acts_NF > 0).sum(0)
        mass_F += acts_NF.sum(0, dtype=torch.float64)
        tokens_read += int((~store.special_mask(tokens_RT)).sum())
        for begin, end, continued in documents(tokens_RT, store.header.bos_id):
            values_F, offsets_F = acts_NF[begin:end].max(0)
            peaks.add(values_F, offsets_F + (start * context + begin), continued)
    peaks.end_document()
    counted = max(1, tokens_read)
    return Survey(fired_F / counted, mass_F / counted, peaks.values_PF, peaks.places_PF, rows)


class _Peaks:
    """The highest activation of each latent in each of the P documents where that is highest."""

    def __init__(self, width: int) -> None:
        self.values_PF = torch.zeros(PEAKS_KEPT, width)
        self.places_PF = torch.zeros(PEAKS_KEPT, width, dtype=torch.long)
        self.value_F, self.place_F = torch.zeros(width), torch.zeros(width, dtype=torch.long)  # of this document so far

    def add(self, value_F: Tensor, place_F: Tensor, continued: bool) -> None:
        """Take in the peaks of a document, or of a further part of the one before."""
        if not continued:
            self.end_document()
        higher_F = value_F > self.value_F
        self.value_F = torch.where(higher_F, value_F, self.value_F)
        self.place_F = torch.where(higher_F, place_F, self.place_F)

    def end_document(self) -> None:
        """Put the document's peaks among the P highest, behind equal ones of earlier documents."""
        better = (self.value_F > self.values_PF[-1]).nonzero().squeeze(1)
        values = torch.cat([self.values_PF[:, better], self.value_F[None, better]])
        places = torch.cat([self.places_PF[:, better], self.place_F[None, better]])
        order = torch.sort(values, dim=0, descending=True, stable=True).indices[:PEAKS_KEPT]
        self.values_PF[:, better] = values.gather(0, order)
        self.places_PF[:, better] = places.gather(0, order)
        self.value_F = torch.zeros_like(self.value_F)


def _batch_rows(view: View, store: ActivationStore) -> int:
    return max(1, BATCH_ELEMENTS // (store.context * view.d_sae))


def _masked(view: View, store: ActivationStore, hook: str, start: int, stop: int) -> Tensor:
    """Activations [R, T, F] of some rows, zero on special tokens."""
    mask_RT = ~store.special_mask(store.tokens(start, stop))
    return view.encode(store.acts(hook, start, stop).float()).mul_(mask_RT[..., None])


def _rows_encoded(
    view: View, store: ActivationStore, hook: str, rows: Sequence[int], latents: Sequence[int]
) -> dict[int, Tensor]:
    """Activations [T, len(latents)] of single rows; special tokens are not masked."""
    encoded: dict[int, Tensor] = {}
    batch = _batch_rows(view, store)
    for first in range(0, len(rows), batch):
        part = rows[first : first + batch]
        acts_RTF = view.encode(torch.cat([store.acts(hook, row, row + 1) for row in part]).float())
        encoded |= dict(zip(part, acts_RTF[..., list(latents)], strict=True))
    return encoded


def heaviest(seen: Survey, count: int, *, common: float) -> list[int]:
    """Alive latents by falling mass; those that fire on more than a share `common` of the tokens come last."""
    mass, density = seen.mass_F.tolist(), seen.density_F.tolist()
    alive = [latent for latent, value in enumerate(mass) if value > 0]
    return sorted(alive, key=lambda latent: (density[latent] > common, -mass[latent], latent))[:count]


@torch.no_grad()
def find_contexts(
    view: View, store: ActivationStore, hook: str, tokenizer: Any, seen: Survey, latents: Sequence[int], count: int
) -> dict[int, list[Context]]:
    """For each latent up to `count` contexts from different documents, strongest first; equal texts are given once."""
    wanted = {latent: seen.places_PF[seen.peaks_PF[:, latent] > 0, latent].tolist() for latent in latents}
    rows = sorted({place // store.context for places in wanted.values() for place in places})
    encoded = _rows_encoded(view, store, hook, rows, latents)
    contexts: dict[int, list[Context]] = {}
    for column, (latent, places) in enumerate(wanted.items()):
        texts: dict[tuple[str, ...], Context] = {}
        for place in places:
            row, peak = divmod(place, store.context)
            context = _context(store, tokenizer, row, peak, encoded[row][:, column])
            texts.setdefault(tuple(piece.text for piece in context.pieces), context)
            if len(texts) == count:
                break
        contexts[latent] = list(texts.values())
    return contexts


def _context(store: ActivationStore, tokenizer: Any, row: int, peak: int, acts_T: Tensor) -> Context:
    """The words around a peak, cut at special tokens, because those end documents."""
    tokens_T = store.tokens(row, row + 1)[0]
    special = store.special_mask(tokens_T).nonzero().squeeze(1).tolist()
    first = max([0, peak - BEFORE, *(place + 1 for place in special if place < peak)])
    last = min([len(tokens_T), peak + AFTER + 1, *(place for place in special if place > peak)])
    value = float(acts_T[peak])
    strengths = (acts_T[first:last] / value).clamp(0, 1).tolist()
    texts = token_texts(tokenizer, tokens_T[first:last].tolist())
    return Context(value, row, tuple(Piece(text, strength) for text, strength in zip(texts, strengths, strict=True)))


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Each token as readable text on one line: line ends as ↵, tabs as ⇥, runs of three or more spaces as ␣×n."""
    texts = []
    for token in tokenizer.convert_ids_to_tokens(list(ids)):
        mark = "▁" in token  # sentencepiece: turning such a token into a string would drop the space
        texts.append(_readable(token.replace("▁", " ") if mark else tokenizer.convert_tokens_to_string([token])))
    return texts


def _readable(text: str) -> str:
    text = text.replace("\r\n", "↵").replace("\n", "↵").replace("\t", "⇥")
    if len(text) > 2 and text.isspace():
        return f"␣×{len(text)}"
    return "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in text)
