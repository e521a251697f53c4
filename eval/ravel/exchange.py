"""RAVEL: is there a set of latents that carries one attribute of an entity and no other (SAEBench's masked exchange)?

Two prompts of one attribute, base and source, with different answers. At the entity's last token of the base prompt the
chosen latents take the values they have in the source prompt. *Cause*: chosen for this attribute, the answer becomes
the source's. *Isolation*: chosen for another attribute, the answer stays. A mask over latents is trained for each
attribute: sigmoid(theta / temperature), the temperature falling from 1 to 1e-4; in the test the latents with theta > 0
are exchanged.

SAEBench's residual is decode(f'): the SAE's error is part of the score. Kept error: x' = x + sum of (f_source - f_base)
d over chosen latents. All passes are suffix passes from cached residuals, and where no chosen latent differs there is
none.

Shapes: B pairs of a batch, T tokens, D residual width, F latents.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from hsae.cache.errors import UserError
from hsae.cache.language_model.generation import PassCounts, PendingPrompt, complete
from hsae.cache.language_model.lm import LanguageModel
from hsae.cache.suites.entities import judge_answer
from hsae.cache.suites.ravel_store import Prompt, RavelStore, is_decided
from hsae.eval.probing.text_probes import generator_for
from hsae.eval.ravel.config import RavelConfig
from hsae.train.model.views import View

COOLEST = -4.0  # log10 of the last temperature
AT_ONCE = 256  # pairs whose residuals are in memory
SPLITS_TRIED = 50
Attributes = dict[str, list[Prompt]]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A base and a source prompt of the same attribute, with different labels."""

    base: Prompt
    source: Prompt
    cause: bool
    """Whether the answer should become the source's; else it should stay."""

    @property
    def target(self) -> str:
        """The answer that counts as right."""
        return self.source.label if self.cause else self.base.label

    @property
    def token(self) -> int:
        """Its first token."""
        return self.source.first_token if self.cause else self.base.first_token


# ---- pairs -----------------------------------------------------------------------------------------------------------


def _draw_pairs(prompts: Sequence[Prompt], count: int, mixed: random.Random, *, cause: bool) -> list[Pair]:
    """Base prompts without replacement (all if there are no more), each with some source that has another label."""
    pairs = []
    for base in mixed.sample(prompts, min(count, len(prompts))):
        if others := [prompt for prompt in prompts if prompt.label != base.label]:
            pairs.append(Pair(base=base, source=mixed.choice(others), cause=cause))
    return pairs


def pairs_of(prompts: Attributes, attribute: str, count: int, mixed: random.Random) -> list[Pair]:
    """Cause pairs of an attribute and as many isolation pairs of the others, mixed (SAEBench's construction)."""
    cause = _draw_pairs(prompts[attribute], count, mixed, cause=True)
    isolation = [
        pair
        for other in prompts
        if other != attribute
        for pair in _draw_pairs(prompts[other], count, mixed, cause=False)
    ]
    mixed.shuffle(isolation)
    pairs = cause + isolation[: len(cause)]
    mixed.shuffle(pairs)
    return pairs


def split_entities(prompts: Attributes, share: float, mixed: random.Random) -> tuple[Attributes, Attributes]:
    """Prompts about some entities to train on, about the others to test on; each attribute has two labels on both
    sides.

    Raises UserError if there is no such split.
    """
    entities = sorted({prompt.entity for group in prompts.values() for prompt in group})
    cut = min(max(1, round(share * len(entities))), len(entities) - 1)
    for _ in range(SPLITS_TRIED):
        mixed.shuffle(entities)
        chosen = set(entities[:cut])
        sides = tuple(
            {key: [p for p in group if (p.entity in chosen) is wanted] for key, group in prompts.items()}
            for wanted in (True, False)
        )
        if all(len({p.label for p in group}) > 1 for side in sides for group in side.values()):
            return sides[0], sides[1]
    raise UserError(
        f"RAVEL: {len(entities)} entities can't be split so that each attribute has two labels on both sides; use more "
        "entities, or change ravel.train_share"
    )


# ---- exchanging ------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Exchange:
    """Exchanges latents at entities and asks the model what follows."""

    store: RavelStore
    hook: str
    language: LanguageModel
    config: RavelConfig
    passes: PassCounts = field(default_factory=PassCounts)

    def latents(self, view: View, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """[B, F] each: activations at the base's entity and at the source's."""
        with torch.no_grad():
            base_BF, source_BF = (
                view.encode(self.store.entity(prompts, self.hook).to(view.W_dec.device))
                for prompts in ([pair.base for pair in pairs], [pair.source for pair in pairs])
            )
        return base_BF, source_BF

    def moved(
        self, view: View, pairs: Sequence[Pair], latents: tuple[Tensor, Tensor], gate_F: Tensor, *, keep_error: bool
    ) -> Tensor:
        """[B, D] the entity's residual with each latent moved towards the source's by its gate (0: stays, 1:
        exchanged).
        """
        base_BF, source_BF = (acts_BF.float() for acts_BF in latents)
        if keep_error:
            x_BD = self.store.entity([pair.base for pair in pairs], self.hook).to(gate_F.device).float()
            return x_BD + ((source_BF - base_BF) * gate_F) @ view.W_dec.float()
        mixed_BF = (1 - gate_F) * base_BF + gate_F * source_BF
        return view.decode(mixed_BF.to(view.W_dec.dtype))

    def _resid(self, pairs: Sequence[Pair]) -> list[Tensor]:
        return [self.store.resid(pair.base, self.hook) for pair in pairs]

    # --- the mask -----------------------------------------------------------------------------------------------------

    def loss(self, view: View, pairs: Sequence[Pair], gate_F: Tensor, *, keep_error: bool) -> Tensor:
        """Mean cross-entropy of the first token of the right answer; pairs whose latents are all alike need no pass and
        count 0.
        """
        base_BF, source_BF = self.latents(view, pairs)
        differing = (base_BF != source_BF).any(-1)
        differing_pairs = [pair for pair, differs in zip(pairs, differing.tolist(), strict=True) if differs]
        self.passes.spared += len(pairs) - len(differing_pairs)
        if not differing_pairs:
            return 0.0 * gate_F.sum()
        x_BTD = pad_sequence(self._resid(differing_pairs), batch_first=True).to(gate_F.device)
        rows = torch.arange(len(differing_pairs), device=gate_F.device)
        places = torch.tensor([pair.base.position for pair in differing_pairs], device=gate_F.device)
        ends = [len(pair.base.ids) - 1 for pair in differing_pairs]
        latents = base_BF[differing], source_BF[differing]
        moved_BD = self.moved(view, differing_pairs, latents, gate_F, keep_error=keep_error)
        x_BTD = x_BTD.index_put((rows, places), moved_BD.to(x_BTD.dtype))
        final_BTD = self.language.suffix(self.hook, x_BTD, grad=True)
        logits_BV = self.language.unembed(final_BTD[range(len(differing_pairs)), ends], grad=True).float()
        self.passes.suffix += len(differing_pairs)
        self.passes.backward += len(differing_pairs)
        tokens_B = torch.tensor([pair.token for pair in differing_pairs], device=logits_BV.device)
        return nn.functional.cross_entropy(logits_BV, tokens_B, reduction="sum") / len(pairs)

    def train(self, view: View, pairs: Sequence[Pair], *, keep_error: bool) -> Tensor:
        """[F] True for the latents that the trained mask exchanges.

        Batches are whole: what is left over of the pairs is not used.
        """
        batch = min(self.config.batch_pairs, len(pairs))
        starts = range(0, len(pairs) - batch + 1, batch)
        temperatures = torch.logspace(0, COOLEST, self.config.epochs * len(starts)).to(view.W_dec.dtype).float()
        theta_F = torch.zeros(view.d_sae, device=view.W_dec.device, requires_grad=True)
        optimizer = torch.optim.Adam([theta_F], lr=self.config.learning_rate)
        for step, temperature in enumerate(temperatures.tolist()):
            start = starts[step % len(starts)]
            gate_F = torch.sigmoid(theta_F / temperature)
            loss = self.loss(view, pairs[start : start + batch], gate_F, keep_error=keep_error)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return theta_F.detach() > 0

    # --- the test -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def outcomes(self, view: View, pairs: Sequence[Pair], mask_F: Tensor, *, keep_error: bool) -> list[bool]:
        """For each pair whether the right answer is written when the masked latents are exchanged.

        Where none of them differs and the error is kept, the model says what it said: the base's label, at no pass.
        """
        known: dict[tuple[int, str], bool] = {}
        results: list[bool] = []
        for start in range(0, len(pairs), AT_ONCE):
            part = pairs[start : start + AT_ONCE]
            base_BF, source_BF = self.latents(view, part)
            touched = ((base_BF != source_BF) & mask_F).any(-1).tolist()
            moved_BD = self.moved(view, part, (base_BF, source_BF), mask_F.float(), keep_error=keep_error)
            states: list[bool | None] = []
            for pair, is_touched in zip(part, touched, strict=True):
                key = (pair.base.row, pair.target)
                states.append(None if is_touched else not pair.cause if keep_error else known.get(key))
            open_places = [place for place, state in enumerate(states) if state is None]
            self.passes.spared += len(part) - len(open_places)
            for place, right in zip(
                open_places, self._written([part[p] for p in open_places], moved_BD[open_places]), strict=True
            ):
                states[place] = right
                if not touched[place]:
                    known[part[place].base.row, part[place].target] = right
            results += [bool(state) for state in states]
        return results

    @torch.no_grad()
    def whole(self, pairs: Sequence[Pair]) -> list[bool]:
        """The same with the whole residual of the entity exchanged: what no choice of latents can be expected to
        exceed.
        """
        results: list[bool] = []
        for start in range(0, len(pairs), AT_ONCE):
            part = pairs[start : start + AT_ONCE]
            results += self._written(part, self.store.entity([pair.source for pair in part], self.hook))
        return results

    def _written(self, pairs: Sequence[Pair], moved_BD: Tensor) -> list[bool]:
        opened = []
        for pair, resid_TD, moved_D in zip(pairs, self._resid(pairs), moved_BD, strict=True):
            changed_TD = resid_TD.clone()
            changed_TD[pair.base.position] = moved_D.to(changed_TD)
            opened.append(PendingPrompt(ids=pair.base.ids, resid_TD=changed_TD, is_decided=is_decided(pair.target)))
        texts = complete(self.language, self.hook, opened, self.config.new_tokens, self.config.batch_rows, self.passes)
        return [judge_answer(text, pair.target, final=True) is True for text, pair in zip(texts, pairs, strict=True)]


# ---- scores ----------------------------------------------------------------------------------------------------------

Scores = dict[str, float | None]


def scores(outcomes: Sequence[bool], is_cause: Sequence[bool]) -> Scores:
    """Cause, isolation and their average; None where there is no pair."""
    parts: dict[bool, list[bool]] = {True: [], False: []}
    for right, kind in zip(outcomes, is_cause, strict=True):
        parts[kind].append(right)
    cause, isolation = (sum(part) / len(part) if part else None for part in parts.values())
    both = None if cause is None or isolation is None else (cause + isolation) / 2
    return {"cause_score": cause, "isolation_score": isolation, "disentangle_score": both}


def own_scores(pairs: Sequence[Pair], outcomes: Sequence[bool]) -> Scores:
    """Scores of pairs as they were made."""
    return scores(outcomes, [pair.cause for pair in pairs])


def saebench_scores(pairs: Sequence[Pair], outcomes: Sequence[bool]) -> Scores:
    """SAEBench tells the kinds apart by first tokens: a pair is of isolation if the base's answer begins as the right
    one does.
    """
    return scores(outcomes, [pair.base.first_token != pair.token for pair in pairs])


def resampled_scores(pairs: Sequence[Pair], outcomes: Sequence[bool], name: str, seed: int) -> Scores:
    """Scores of pairs whose base entities are drawn with replacement; what a pair is was fixed when it was made."""
    resampled: list[bool] = []
    is_cause: list[bool] = []
    for cause in (True, False):
        by_entity: dict[str, list[bool]] = {}
        for pair, right in zip(pairs, outcomes, strict=True):
            if pair.cause is cause:
                by_entity.setdefault(pair.base.entity, []).append(right)
        entities = sorted(by_entity)
        generator = generator_for("ravel", name, cause, seed)
        indices = torch.randint(len(entities), (len(entities),), generator=generator).tolist() if entities else []
        resampled += [right for index in indices for right in by_entity[entities[index]]]
        is_cause += [cause] * (len(resampled) - len(is_cause))
    return scores(resampled, is_cause)


def averaged(entries: Sequence[Scores]) -> Scores:
    """The plain mean of each score; None where one is missing."""
    means: Scores = {}
    for name in ("cause_score", "isolation_score", "disentangle_score"):
        values = [value for entry in entries if (value := entry[name]) is not None]
        means[name] = sum(values) / len(values) if values and len(values) == len(entries) else None
    return means
