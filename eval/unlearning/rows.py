"""Rows of the forget and the retain store, and which of them tune, test and select latents.

Shapes: R rows, T context, D residual width, A chosen latents.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hsae.cache.errors import UserError
from hsae.cache.reading.store import ActivationStore
from hsae.eval.unlearning.intervention import Dictionary

BATCH_ROWS = 16  # rows of one pass
PARTS = ("select", "tune", "test")


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
        documents, topics = zip(*store.documents(), strict=True)
        return cls(store=store, hook=hook, numbers=tuple(range(store.rows)), documents=documents, topics=topics)

    def at(self, places: Iterable[int]) -> "Rows":
        """The rows at some places of these."""
        places = list(places)
        return replace(
            self,
            numbers=tuple(self.numbers[place] for place in places),
            documents=tuple(self.documents[place] for place in places),
            topics=tuple(self.topics[place] for place in places),
        )

    def tokens(self) -> Tensor:
        """[R, T]"""
        return torch.stack([self.store.tokens(row, row + 1)[0] for row in self.numbers])

    def mask(self, tokens_RT: Tensor | None = None) -> Tensor:
        """[R, T] True where a token is not special."""
        return ~self.store.special_mask(self.tokens() if tokens_RT is None else tokens_RT)

    def residuals(self, places: Sequence[int]) -> Tensor:
        """[places, T, D] of some of the rows."""
        numbers = [self.numbers[place] for place in places]
        return torch.stack([self.store.acts(self.hook, row, row + 1)[0] for row in numbers])

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Residuals and masks, batch by batch."""
        mask_RT = self.mask()
        starts = range(0, len(self.numbers), BATCH_ROWS)
        places = [range(start, min(start + BATCH_ROWS, len(self.numbers))) for start in starts]
        return [(self.residuals(part), mask_RT[part.start : part.stop]) for part in places]

    def activations(self, dictionary: Dictionary, latents: Sequence[int]) -> Tensor:
        """[R, T, A] float32 activations of some latents."""
        return torch.cat([dictionary.encode(x_RTD)[..., list(latents)].float() for x_RTD, _ in self.batches()])


def split_rows(rows: Rows, tune_rows: int, test_rows: int) -> dict[str, Rows]:
    """`select`, `tune` and `test`: whole documents, the first ones tune, the next test, and the rest selects latents.

    Raises UserError if one is empty.
    """
    first = {document: place for place, document in reversed(list(enumerate(rows.documents)))}
    last = {document: place for place, document in enumerate(rows.documents)}

    def part_of(place: int) -> str:
        document = rows.documents[place]
        if first[document] < tune_rows:
            return "tune"
        return "test" if last[document] < tune_rows + test_rows else "select"

    every = range(len(rows.numbers))
    parts = {name: rows.at([place for place in every if part_of(place) == name]) for name in PARTS}
    for name, part in parts.items():
        if not part.numbers:
            raise UserError(
                f"the {rows.store.spec.split} text leaves no whole document to {name} on ({tune_rows} tune and "
                f"{test_rows} test rows of {len(every)}); raise unlearning.rows, or lower unlearning.rows_per_document"
            )
    return parts
