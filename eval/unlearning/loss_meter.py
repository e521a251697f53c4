"""Losses under an intervention, from cached residuals and suffix passes of the language model.

Rows in which nothing fires cost no pass, and positions before the first firing no unembedding: causality leaves them as
they are. At a large vocabulary unembedding costs more than the pass itself, so a row's loss is taken at a few
positions, drawn once with a seed.

Shapes: R rows, B rows of a batch, T context, D residual width, A chosen latents, N positions of rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hsae.cache.language_model import token_losses
from hsae.cache.language_model.lm import LanguageModel
from hsae.eval.unlearning.intervention import Intervention, changed
from hsae.eval.unlearning.rows import BATCH_ROWS, Rows

UNEMBEDDED_BYTES = 64 << 20  # of float32 logits at a time


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
        self.positions = [self._draw_positions(place) for place in range(len(self.rows.numbers))]
        self.clean: list[Tensor] = []
        self._clean_finals: dict[int, Tensor] = {}

    def _draw_positions(self, place: int) -> Tensor:
        """The row's positions, in order: not special, with a next token."""
        usable = self.kept_RT[place].clone()
        usable[-1] = False
        candidates = usable.nonzero()[:, 0]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.rows.numbers[place])
        places = torch.randperm(len(candidates), generator=generator)[: self.positions_per_row]
        return candidates[places.sort().values]

    @property
    def counts(self) -> list[int]:
        """Positions of each row."""
        return [len(positions) for positions in self.positions]

    def _prepare(self) -> None:
        """Clean final vectors and losses at the chosen positions, once."""
        if self.clean or not self.positions:
            return
        store, hook = self.rows.store, self.rows.hook
        for place, row in enumerate(self.rows.numbers):
            if row < store.clean_rows:
                final_TD = store.clean("final", row, row + 1)[0]
            else:
                final_TD = self.model.suffix(hook, self.rows.residuals([place]))[0].cpu()
                self.passes.run += 1
            self._clean_finals[place] = final_TD[self.positions[place]].clone()
        finals_ND = torch.cat([self._clean_finals[place] for place in range(len(self.positions))])
        loss_N, _ = self._losses(finals_ND, self._targets(range(len(self.positions))), None)
        self.clean = list(torch.split(loss_N, self.counts))

    def _targets(self, places: Sequence[int]) -> Tensor:
        return torch.cat([self.tokens_RT[place, self.positions[place] + 1] for place in places])

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
        loss_R, kl_R = [0.0] * len(self.positions), [0.0] * len(self.positions)
        self.passes.spared += len(self.positions) - len(touched)
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
        later = [self.positions[place] >= first for place, first in zip(places, first_B, strict=True)]
        finals = [final_BTD[index, self.positions[place][later[index]]] for index, place in enumerate(places)]
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
