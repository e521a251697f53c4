"""SAEBench's sampling of windows of text in which a latent is active, a little or not at all: what a judge is shown.

Two sweeps over the first rows of a store encode its residuals: the first counts on how many tokens each latent fires,
the second keeps every activation of the chosen latents, as places and values. The counts say beforehand what that
takes, so latents are swept in groups of at most `ENTRIES_KEPT` entries (some 40 bytes each while they are sorted).

Shapes: R rows, T context length, F latents, C chosen latents, M tokens on which a latent fires, N tokens of some rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hsae.cache.reading.store import ActivationStore
from hsae.eval.autointerp.config import AutointerpConfig
from hsae.eval.contexts import BATCH_ELEMENTS, token_texts
from hsae.eval.probing.text_probes import generator_for
from hsae.train.model.views import View

ENTRIES_KEPT = 1 << 24
OPEN, CLOSE = "«", "»"  # around active tokens; in the text itself they become ‹ and ›
ESCAPES = str.maketrans({OPEN: "‹", CLOSE: "›"})
Kind = Literal["top", "weighted", "random"]


@dataclass(frozen=True, kw_only=True)
class Window:
    """The text around one token, on one line and within one document."""

    kind: Kind
    """top: around one of the highest activations; weighted: drawn among lower ones; random: drawn among all tokens."""
    row: int
    first: int
    last: int
    """Positions first to last - 1 of the row."""
    peak: float
    """The latent's highest activation in it."""
    active: bool
    """Whether an activation in it exceeds the threshold."""
    text: str
    marked: str
    """The text with every run of active tokens between « and »."""

    def shares(self, other: "Window") -> bool:
        """Whether the two have tokens in common, or the same text."""
        same_row = self.row == other.row and self.first < other.last and other.first < self.last
        return same_row or self.text == other.text


@dataclass(frozen=True, kw_only=True)
class Case:
    """A latent and its windows: those an explanation is made from, strongest first, and those it is tried on, mixed."""

    latent: int
    shown: tuple[Window, ...]
    tried: tuple[Window, ...]


class Sampler:
    """The first rows of a store at one hook, from which windows are drawn."""

    def __init__(
        self, store: ActivationStore, hook: str, tokenizer: Any, config: AutointerpConfig, device: str = "cpu"
    ) -> None:
        self.store, self.hook, self.tokenizer, self.config, self.device = store, hook, tokenizer, config, device
        self.context = store.context
        self.rows = min(store.rows, -(-config.total_tokens // self.context))
        self.tokens_RT = store.tokens(0, self.rows)
        self.kept_RT = ~store.special_mask(self.tokens_RT)
        inside_RT = torch.zeros_like(self.kept_RT)
        inside_RT[:, config.buffer : self.context - config.buffer] = True
        self.centres = (self.kept_RT & inside_RT).flatten().nonzero()[:, 0]
        """Addresses (row * T + position) that a window may lie around."""

    def _encoded(self, view: View) -> Iterator[tuple[int, Tensor]]:
        """(first row, activations [R, T, F] float32, zero on special tokens), batch by batch."""
        placed = view.copy_to(dtype=torch.float32, device=self.device)
        batch = max(1, BATCH_ELEMENTS // (self.context * view.d_sae))
        for start in range(0, self.rows, batch):
            stop = min(start + batch, self.rows)
            x_RTD = self.store.acts(self.hook, start, stop).to(self.device, torch.float32)
            yield start, placed.encode(x_RTD) * self.kept_RT[start:stop, :, None].to(self.device)

    @torch.no_grad()
    def count_fired(self, view: View) -> Tensor:
        """[F] int64: on how many tokens each latent fires."""
        total_F = torch.zeros(view.d_sae, dtype=torch.int64, device=self.device)
        for _, acts_RTF in self._encoded(view):
            total_F += (acts_RTF > 0).sum((0, 1))
        return total_F.cpu()

    def cases(self, view: View, latents: Sequence[int], fired_F: Tensor) -> Iterator[tuple[int, Case | None]]:
        """Each latent with its windows; None where it fires in too few places for them."""
        for group in _groups(latents, fired_F):
            for latent, (places_M, values_M) in zip(group, self._activations(view, group), strict=True):
                yield latent, self._case(latent, places_M, values_M)

    @torch.no_grad()
    def _activations(self, view: View, latents: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """For each latent the addresses [M] of the tokens it fires on, rising, and its activations [M] there."""
        columns, places, values = [], [], []
        chosen = torch.tensor(latents, device=self.device)
        for start, acts_RTF in self._encoded(view):
            acts_NC = acts_RTF.flatten(0, 1)[:, chosen]
            place_N, column_N = (acts_NC > 0).nonzero(as_tuple=True)
            values.append(acts_NC[place_N, column_N].cpu())
            places.append((place_N + start * self.context).int().cpu())
            columns.append(column_N.int().cpu())
        column_N, order = torch.cat(columns).sort(stable=True)
        sizes = column_N.bincount(minlength=len(latents)).tolist()
        every = torch.cat(places)[order].long(), torch.cat(values)[order]
        return list(zip(*(torch.split(part, sizes) for part in every), strict=True))

    def _case(self, latent: int, places_M: Tensor, values_M: Tensor) -> Case | None:
        """SAEBench's draws: highest activations, lower ones with probability as their square, random tokens."""
        config = self.config
        column_M = places_M % self.context
        inside_M = (column_M >= config.buffer) & (column_M < self.context - config.buffer)
        centres_M, heights_M = places_M[inside_M], values_M[inside_M]
        tops = self._highest(centres_M, heights_M, config.n_top_ex_for_generation + config.n_top_ex_for_scoring)
        if tops is None:
            return None
        weights = torch.where(heights_M < heights_M[tops[-1]], heights_M.double().square(), 0.0)
        lower = config.n_iw_sampled_ex_for_generation + config.n_iw_sampled_ex_for_scoring
        if int((weights > 0).sum()) < lower or len(self.centres) < config.n_random_ex_for_scoring:
            return None
        top = centres_M[torch.tensor(tops)]
        generator = generator_for("autointerp", config.seed, top.tolist())  # of equal latents of two views the same
        weighted = (
            torch.multinomial(weights, lower, generator=generator) if lower else torch.empty(0, dtype=torch.int64)
        )
        random = self._random(generator)
        threshold = config.act_threshold_frac * float(heights_M[tops[0]])

        def windows(kind: Kind, chosen: Tensor) -> list[Window]:
            return [self._window(kind, place, places_M, values_M, threshold) for place in chosen.tolist()]

        def split(kind: Kind, chosen: Tensor, shown: int) -> tuple[list[Window], list[Window]]:
            every = windows(kind, chosen[torch.randperm(len(chosen), generator=generator)])
            return every[:shown], every[shown:]

        shown_top, tried_top = split("top", top, config.n_top_ex_for_generation)
        shown_low, tried_low = split("weighted", centres_M[weighted], config.n_iw_sampled_ex_for_generation)
        tried = [*tried_top, *tried_low, *windows("random", random)]
        order = torch.randperm(len(tried), generator=generator).tolist()
        return Case(
            latent=latent,
            shown=tuple(sorted([*shown_top, *shown_low], key=lambda window: -window.peak)),
            tried=tuple(tried[index] for index in order),
        )

    def _highest(self, centres_M: Tensor, heights_M: Tensor, count: int) -> list[int] | None:
        """Indices of the highest activations, none within reach of another's window; None if there are too few."""
        highest: list[int] = []
        taken: dict[int, list[int]] = {}
        for index in torch.argsort(heights_M, descending=True, stable=True).tolist():
            row, column = divmod(int(centres_M[index]), self.context)
            if all(abs(column - other) > self.config.buffer for other in taken.get(row, ())):
                taken.setdefault(row, []).append(column)
                highest.append(index)
                if len(highest) == count:
                    return highest
        return None

    def _random(self, generator: torch.Generator) -> Tensor:
        chosen: list[int] = []
        while len(chosen) < self.config.n_random_ex_for_scoring:
            place = int(self.centres[torch.randint(len(self.centres), (1,), generator=generator)])
            if place not in chosen:
                chosen.append(place)
        return torch.tensor(chosen, dtype=torch.int64)

    def _window(self, kind: Kind, place: int, places_M: Tensor, values_M: Tensor, threshold: float) -> Window:
        row, centre = divmod(place, self.context)
        special = (~self.kept_RT[row]).nonzero()[:, 0].tolist()
        buffer = self.config.buffer
        first = max([centre - buffer, *(at + 1 for at in special if at < centre)])
        last = min([centre + buffer + 1, *(at for at in special if at > centre)])
        front = row * self.context
        low, high = torch.searchsorted(places_M, torch.tensor([front + first, front + last])).tolist()
        acts = torch.zeros(last - first)
        acts[places_M[low:high] - front - first] = values_M[low:high]
        on = (acts > threshold).tolist()
        pieces = token_texts(self.tokenizer, self.tokens_RT[row, first:last].tolist())
        text, marked = written(pieces, on)
        return Window(
            kind=kind,
            row=row,
            first=first,
            last=last,
            peak=float(acts.max()),
            active=any(on),
            text=text,
            marked=marked,
        )


def written(pieces: Sequence[str], on: Sequence[bool]) -> tuple[str, str]:
    """The text of tokens, and the same with every run of active ones between « and »; no other « or » is in it."""
    escaped = [piece.translate(ESCAPES) for piece in pieces]
    marked, open_ = "", False
    for piece, active in zip(escaped, on, strict=True):
        if active != open_:
            if active and piece.startswith(" ") and not piece.isspace():
                marked, piece = f"{marked} ", piece[1:]
            marked += OPEN if active else CLOSE
            open_ = active
        marked += piece
    return "".join(escaped), marked + (CLOSE if open_ else "")


def _groups(latents: Sequence[int], fired_F: Tensor) -> Iterator[list[int]]:
    """Latents in groups of at most `ENTRIES_KEPT` activations, or of one."""
    group: list[int] = []
    entries = 0
    for latent, count in zip(latents, fired_F[list(latents)].tolist(), strict=True):
        if group and entries + count > ENTRIES_KEPT:
            yield group
            group, entries = [], 0
        group.append(latent)
        entries += count
    if group:
        yield group
