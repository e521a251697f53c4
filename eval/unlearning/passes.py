"""Losses under an intervention, from cached residuals and suffix passes of the language model.

Rows in which nothing fires cost no pass, and positions before the first firing no unembedding: causality leaves them as they are. At a
large vocabulary unembedding is dearer than the pass itself, so a row's loss is taken at a few positions, drawn once with a seed.

Shapes: R rows, T context, D residual width, A chosen latents, P positions of a row, N positions of several rows, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hsae.cache.errors import UserError
from hsae.cache.language_model import token_losses
from hsae.cache.language_model.lm import LanguageModel
from hsae.cache.reading.store import ActivationStore
from hsae.eval.unlearning.intervention import Dictionary, Intervention, changed

BATCH_ROWS = 16  # rows of one suffix pass
UNEMBEDDED_BYTES = 64 << 20  # of float32 logits at a time


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of a store: which, of which documents, about what."""

    store: ActivationStore
    hook: str
    numbers: tuple[int, ...]
    documents: tuple[int, ...]
    topics: tuple[str | None, ...]

    @classmethod
    def all_of(cls, store: ActivationStore, hook: str) -> "Rows":
        """Every row of a store of one document a row."""
        held = store.documents()
        return cls(
            store=store,
            hook=hook,
            numbers=tuple(range(store.rows)),
            documents=tuple(document for document, _ in held),
            topics=tuple(topic for _, topic in held),
        )

    def where(self, wanted: Callable[[int], bool]) -> "Rows":
        """The rows whose place in `self` is wanted."""
        places = [place for place in range(len(self.numbers)) if wanted(place)]
        parts = {
            name: tuple(getattr(self, name)[place] for place in places) for name in ("numbers", "documents", "topics")
        }
        return Rows(store=self.store, hook=self.hook, **parts)

    def tokens(self) -> Tensor:
        """[R, T]"""
        return torch.stack([self.store.tokens(row, row + 1)[0] for row in self.numbers])

    def kept(self, tokens_RT: Tensor | None = None) -> Tensor:
        """[R, T] True where a token is not special."""
        return ~self.store.special_mask(self.tokens() if tokens_RT is None else tokens_RT)

    def residuals(self, places: Sequence[int]) -> Tensor:
        """[places, T, D] of some of the rows."""
        return torch.stack(
            [self.store.acts(self.hook, row, row + 1)[0] for row in map(self.numbers.__getitem__, places)]
        )

    def batches(self) -> "list[tuple[Tensor, Tensor]]":
        """Residuals and masks of kept tokens, batch by batch."""
        kept_RT = self.kept()
        starts = range(0, len(self.numbers), BATCH_ROWS)
        places = [range(start, min(start + BATCH_ROWS, len(self.numbers))) for start in starts]
        return [(self.residuals(part), kept_RT[part.start : part.stop]) for part in places]

    def activations(self, dictionary: Dictionary, latents: Sequence[int]) -> Tensor:
        """[R, T, A] float32 activations of some latents."""
        chosen = list(latents)
        return torch.cat([dictionary.encode(x_RTD)[..., chosen].float() for x_RTD, _ in self.batches()])


@dataclass(frozen=True, kw_only=True)
class Trial:
    """An intervention with the activations it needs, on all of some rows."""

    intervention: Intervention
    acts_RTA: Tensor
    directions_FD: Tensor


@dataclass(frozen=True, kw_only=True)
class Change:
    """What an intervention did to each row: sums over its positions, in nats."""

    loss_R: list[float]
    """Modified minus clean next-token loss."""
    kl_R: list[float] | None
    """KL(clean || modified); None if not asked for."""


@dataclass
class Passes:
    """How much was computed, and what was spared."""

    run: int = 0
    """Rows sent through the suffix."""
    spared: int = 0
    """Rows in which nothing fired."""
    unembedded: int = 0
    """Positions whose logits were computed."""
    positions: int = 0
    """Positions that were asked for."""


@dataclass(kw_only=True)
class LossMeter:
    """Measures what interventions do to the loss on some rows."""

    model: LanguageModel
    rows: Rows
    positions_per_row: int
    seed: int
    passes: Passes = field(default_factory=Passes)

    def __post_init__(self) -> None:
        self.tokens_RT = self.rows.tokens().long()
        self.kept_RT = self.rows.kept(self.tokens_RT)
        self.chosen = [self._chosen(place) for place in range(len(self.rows.numbers))]
        self.clean: list[Tensor] = []
        self._clean_finals: dict[int, Tensor] = {}

    def _chosen(self, place: int) -> Tensor:
        """The row's positions, in order: not special, with a next token."""
        usable = self.kept_RT[place].clone()
        usable[-1] = False
        candidates = usable.nonzero()[:, 0]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.rows.numbers[place])
        drawn = torch.randperm(len(candidates), generator=generator)[: self.positions_per_row]
        return candidates[drawn.sort().values]

    @property
    def counts(self) -> list[int]:
        """Positions of each row."""
        return [len(positions) for positions in self.chosen]

    def _prepare(self) -> None:
        """Clean final vectors and losses at the chosen positions, once."""
        if self.clean or not self.chosen:
            return
        store, hook = self.rows.store, self.rows.hook
        for place, row in enumerate(self.rows.numbers):
            if row < store.clean_rows:
                final_TD = store.clean("final", row, row + 1)[0]
            else:
                final_TD = self.model.suffix(hook, self.rows.residuals([place]))[0].cpu()
                self.passes.run += 1
            self._clean_finals[place] = final_TD[self.chosen[place]].clone()
        finals_ND = torch.cat([self._clean_finals[place] for place in range(len(self.chosen))])
        loss_N, _ = self._losses(finals_ND, self._targets(range(len(self.chosen))), None)
        self.clean = list(torch.split(loss_N, self.counts))

    def _targets(self, places: Sequence[int]) -> Tensor:
        return torch.cat([self.tokens_RT[place, self.chosen[place] + 1] for place in places])

    def _losses(self, final_ND: Tensor, targets_N: Tensor, clean_ND: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Next-token loss and, given clean final vectors, KL(clean || modified), [N] float32, from log-softmax."""
        self.passes.unembedded += len(final_ND)
        loss_N = torch.empty(len(final_ND))
        kl_N = torch.empty(len(final_ND)) if clean_ND is not None else None
        if len(final_ND) == 0:
            return loss_N, kl_N
        for part in token_losses.slices(len(final_ND), self.model.vocab_size * 4, UNEMBEDDED_BYTES):
            log_probs_NV = self.model.unembed(final_ND[part]).float().log_softmax(-1)
            targets = targets_N[part].to(log_probs_NV.device)
            loss_N[part] = -log_probs_NV.gather(-1, targets[:, None])[:, 0].cpu()
            if clean_ND is not None and kl_N is not None:
                clean_NV = self.model.unembed(clean_ND[part]).float().log_softmax(-1)
                kl_N[part] = (clean_NV.exp() * clean_NV.sub_(log_probs_NV)).sum(-1).cpu()
        return loss_N, kl_N

    @torch.no_grad()
    def measure(self, trial: Trial, *, kl: bool = False) -> Change:
        """What the intervention does to each row."""
        self._prepare()
        fired_RTA = trial.intervention.fired(trial.acts_RTA, self.kept_RT)
        fired_RT = fired_RTA.any(-1)
        touched = fired_RT.any(1).nonzero()[:, 0].tolist()
        loss_R, kl_R = [0.0] * len(self.chosen), [0.0] * len(self.chosen)
        self.passes.spared += len(self.chosen) - len(touched)
        self.passes.positions += sum(self.counts)
        for start in range(0, len(touched), BATCH_ROWS):
            places = touched[start : start + BATCH_ROWS]
            self._measure_batch(trial, fired_RTA[places], places, loss_R, kl_R if kl else None)
        return Change(loss_R=loss_R, kl_R=kl_R if kl else None)

    def _measure_batch(
        self, trial: Trial, fired_BTA: Tensor, places: list[int], loss_R: list[float], kl_R: list[float] | None
    ) -> None:
        x_BTD = self.rows.residuals(places)
        delta_BTD = trial.intervention.delta(trial.acts_RTA[places], fired_BTA, trial.directions_FD)
        after_BTD = changed(x_BTD, delta_BTD.cpu(), fired_BTA)
        final_BTD = self.model.suffix(self.rows.hook, after_BTD).cpu()
        self.passes.run += len(places)
        first_B = fired_BTA.any(-1).int().argmax(1).tolist()
        later = [self.chosen[place] >= first for place, first in zip(places, first_B, strict=True)]
        finals = [final_BTD[index, self.chosen[place][later[index]]] for index, place in enumerate(places)]
        targets_N = torch.cat([self._targets([place])[late] for place, late in zip(places, later, strict=True)])
        clean_ND = None
        if kl_R is not None:
            clean = [self._clean_finals[place][late] for place, late in zip(places, later, strict=True)]
            clean_ND = torch.cat(clean)
        loss_N, kl_N = self._losses(torch.cat(finals), targets_N, clean_ND)
        sizes = [len(part) for part in finals]
        for index, (place, part) in enumerate(zip(places, torch.split(loss_N, sizes), strict=True)):
            loss_R[place] = (part.double() - self.clean[place][later[index]].double()).sum().item()
        if kl_R is not None and kl_N is not None:
            for place, part in zip(places, torch.split(kl_N, sizes), strict=True):
                kl_R[place] = part.double().sum().item()


def split_rows(rows: Rows, tune_rows: int, test_rows: int) -> tuple[Rows, Rows, Rows]:
    """(select, tune, test): whole documents, tune first, then test, and the rest selects. Raises UserError if one is empty."""
    first = {document: place for place, document in reversed(list(enumerate(rows.documents)))}
    last = {document: place for place, document in enumerate(rows.documents)}
    end = tune_rows + test_rows

    def part(place: int) -> str:
        document = rows.documents[place]
        if first[document] < tune_rows:
            return "tune"
        return "test" if last[document] < end else "select"

    parts = [rows.where(lambda place, name=name: part(place) == name) for name in ("select", "tune", "test")]  # type: ignore[misc]
    for name, found in zip(("select", "tune", "test"), parts, strict=True):
        if not found.numbers:
            raise UserError(
                f"the {rows.store.spec.split} text leaves no whole document to {name} on ({tune_rows} tune and {test_rows} test rows of "
                f"{len(rows.numbers)}); raise unlearning.rows, or lower unlearning.rows_per_document"
            )
    return parts[0], parts[1], parts[2]
