"""Losses under an intervention, from cached residuals and suffix passes of the language model.

Rows in which nothing fires cost no pass, and positions before the first firing no unembedding: causality leaves them as
they are. At a large vocabulary unembedding costs more than the pass itself, so a row's loss is taken at a few
positions, drawn once with a seed.

Shapes: R rows, B rows of a batch, T context, D residual width, A chosen latents, N positions of rows, V vocabulary.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hsae.cache.language_model import token_losses
from hsae.cache.language_model.lm import LanguageModel
from hsae.eval.harness.evaluation import cached_method
from hsae.eval.harness.result_files import read_result, write_result
from hsae.eval.unlearning.config import SIDES, Side, UnlearningConfig
from hsae.eval.unlearning.intervention import Intervention, changed
from hsae.eval.unlearning.rows import BATCH_ROWS, Rows, split_rows

UNEMBEDDED_BYTES = 256 << 20  # of float32 logits at a time: the head's weights are read for each slice
KEPT_BYTES = 1 << 30  # of clean logits; if there are more they are computed again for each intervention


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
        self.mask_RT = self.rows.mask(self.tokens_RT)
        self.positions = [self._draw_positions(place) for place in range(len(self.rows.numbers))]
        self.targets = [tokens_T[places + 1] for tokens_T, places in zip(self.tokens_RT, self.positions, strict=True)]
        self._places = torch.split(torch.arange(sum(self.counts)), self.counts)  # of each row's positions among all

    def _draw_positions(self, place: int) -> Tensor:
        """The row's positions, in order: not special, with a next token."""
        usable = self.mask_RT[place].clone()
        usable[-1] = False
        candidates = usable.nonzero()[:, 0]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.rows.numbers[place])
        places = torch.randperm(len(candidates), generator=generator)[: self.positions_per_row]
        return candidates[places.sort().values]

    @property
    def counts(self) -> list[int]:
        """Positions of each row."""
        return [len(positions) for positions in self.positions]

    @cached_property
    def clean_finals(self) -> list[Tensor]:
        """Final vectors [positions, D] of the model as it is, of each row."""
        finals = []
        for place, row in enumerate(self.rows.numbers):
            if row < self.rows.store.clean_rows:
                final_TD = self.rows.store.clean("final", row, row + 1)[0]
            else:
                final_TD = self.model.suffix(self.rows.hook, self.rows.residuals([place]))[0].cpu()
                self.passes.run += 1
            finals.append(final_TD[self.positions[place]])
        return finals

    @cached_property
    def clean_losses(self) -> list[Tensor]:
        """Losses [positions] of the model as it is, of each row."""
        loss_N, _ = self._losses(torch.cat(self.clean_finals), torch.cat(self.targets), None)
        return list(torch.split(loss_N, self.counts))

    @cached_property
    def _clean_logits(self) -> Tensor | None:
        """Logits [all positions, V] of the model as it is, where it computes; None if they are too many to keep."""
        size = sum(self.counts) * self.model.vocab_size * self.model.dtype.itemsize
        if size > KEPT_BYTES or size == 0:
            return None
        final_ND = torch.cat(self.clean_finals)
        parts = token_losses.slices(len(final_ND), self.model.vocab_size * 4, UNEMBEDDED_BYTES)
        return torch.cat([self.model.unembed(final_ND[part]) for part in parts])

    def _clean(self, which_N: Tensor) -> Tensor:
        """Logits of the model as it is, of some of all positions."""
        if self._clean_logits is None:
            return self.model.unembed(torch.cat(self.clean_finals)[which_N])
        return self._clean_logits[which_N.to(self._clean_logits.device)]

    def _losses(self, final_ND: Tensor, targets_N: Tensor, which_N: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Next-token loss [N] float32 from log-softmax and, if it is said which of all positions these are, KL(clean ||
        modified).
        """
        self.passes.unembedded += len(final_ND)
        loss_N = torch.empty(len(final_ND))
        kl_N = torch.empty(len(final_ND)) if which_N is not None else None
        if len(final_ND) == 0:
            return loss_N, kl_N
        for part in token_losses.slices(len(final_ND), self.model.vocab_size * 4, UNEMBEDDED_BYTES):
            log_probs_NV = self.model.unembed(final_ND[part]).float().log_softmax(-1)
            targets = targets_N[part].to(log_probs_NV.device)
            loss_N[part] = -log_probs_NV.gather(-1, targets[:, None])[:, 0].cpu()
            if which_N is not None and kl_N is not None:
                clean_NV = self._clean(which_N[part]).float().log_softmax(-1)
                kl_N[part] = (clean_NV.exp() * clean_NV.sub_(log_probs_NV)).sum(-1).cpu()
        return loss_N, kl_N

    @torch.no_grad()
    def measure(
        self, intervention: Intervention, acts_RTA: Tensor, directions_FD: Tensor, *, kl: bool = False
    ) -> Change:
        """What an intervention on latents with these activations does to each row."""
        clean_losses, rows = self.clean_losses, len(self.positions)
        fired_RTA = intervention.fired(acts_RTA, self.mask_RT)
        touched = fired_RTA.any(-1).any(1).nonzero()[:, 0].tolist()
        loss_R, kl_R = [0.0] * rows, [0.0] * rows
        self.passes.spared += rows - len(touched)
        self.passes.positions += sum(self.counts)
        for start in range(0, len(touched), BATCH_ROWS):
            places = touched[start : start + BATCH_ROWS]
            x_BTD, fired_BTA = self.rows.residuals(places), fired_RTA[places]
            delta_BTD = intervention.delta(acts_RTA[places], fired_BTA, directions_FD).cpu()
            final_BTD = self.model.suffix(self.rows.hook, changed(x_BTD, delta_BTD, fired_BTA)).cpu()
            self.passes.run += len(places)
            first_B = fired_BTA.any(-1).int().argmax(1).tolist()
            later = [(row, self.positions[row] >= first) for row, first in zip(places, first_B, strict=True)]
            finals = [
                final_TD[self.positions[row][is_later]]
                for final_TD, (row, is_later) in zip(final_BTD, later, strict=True)
            ]
            targets_N = torch.cat([self.targets[row][is_later] for row, is_later in later])
            which_N = torch.cat([self._places[row][is_later] for row, is_later in later]) if kl else None
            loss_N, kl_N = self._losses(torch.cat(finals), targets_N, which_N)
            sizes = [len(final) for final in finals]
            for (row, is_later), part in zip(later, torch.split(loss_N, sizes), strict=True):
                loss_R[row] = (part.double() - clean_losses[row][is_later].double()).sum().item()
            if kl_N is not None:
                for row, part in zip(places, torch.split(kl_N, sizes), strict=True):
                    kl_R[row] = part.double().sum().item()
        return Change(loss_R=loss_R, kl_R=kl_R if kl else None)


class MeasuredChanges:
    """Changes of the loss by what was measured; a file holds them as long as the inputs are the same."""

    def __init__(self, path: Path, inputs: dict[str, Any]) -> None:
        self.path, self.inputs = path, inputs
        self.changes: dict[str, dict[str, Any]] = {}
        if path.is_file():
            with suppress(ValueError, KeyError, TypeError):  # damaged: measured again
                content = read_result(path, "hsae eval unlearning")
                if content["inputs"] == inputs:
                    self.changes = content["pieces"]
        self.read = len(self.changes)
        """How many were in the file."""

    def get(self, key: str, measure: Callable[[], Change]) -> Change:
        """The change under a key, measured unless it is there."""
        if key not in self.changes:
            self.changes[key] = asdict(measure())
            write_result(self.path, {"inputs": self.inputs, "pieces": self.changes}, allow_nan=True)
        return Change(**self.changes[key])


class Texts:
    """Forget and retain rows, each split in three, with meters. Raises UserError if there are too few documents."""

    def __init__(self, rows: dict[Side, Rows], language: LanguageModel, config: UnlearningConfig) -> None:
        self.language, self.config, self.passes = language, config, Passes()
        self.rows = {side: split_rows(rows[side], config.tune_rows, config.test_rows) for side in SIDES}

    @cached_method
    def meter(self, side: Side, part: str) -> LossMeter:
        """The meter on one part of one side."""
        return self.meter_on(self.rows[side][part])

    def meter_on(self, rows: Rows) -> LossMeter:
        """A meter on any rows."""
        return LossMeter(
            model=self.language,
            rows=rows,
            positions_per_row=self.config.positions_per_row,
            seed=self.config.seed,
            passes=self.passes,
        )
