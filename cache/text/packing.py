"""From documents to token rows.

Shapes: T context length. Packing is SAEBench's: a row starts with BOS, a document that starts inside a row has a BOS
before it, a document goes on in the next row after that row's own BOS; nothing is padded.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

TOKENISED_AT_ONCE = 64  # documents: the tokenizer takes them on all cores


@dataclass
class Packer:
    """Packs documents into rows of T tokens; its fields are the whole state, so that packing can go on later."""

    context: int
    bos_id: int | None  # None packs without BOS
    documents: int = 0  # documents begun
    taken: int = 0  # tokens of the last document that are in finished rows or in `row`
    row: list[int] = field(default_factory=list)  # the row being filled

    def state(self) -> dict[str, Any]:
        """JSON-ready state."""
        return {"documents": self.documents, "taken": self.taken, "row": self.row}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.documents, self.taken, self.row = int(state["documents"]), int(state["taken"]), list(state["row"])

    def pack(self, documents: Iterator[Sequence[int]]) -> Iterator[list[int]]:
        """Finished rows; whenever one is given out, the state is that after it.

        `documents` starts at the first document, or, with a restored state, at the last one it had begun.
        """
        for position, tokens in enumerate(documents):
            # else it is the document that was being packed when the state was taken
            if position > 0 or self.documents == 0:
                self.documents, self.taken = self.documents + 1, 0
                if tokens and self.row and self.bos_id is not None:
                    self.row.append(self.bos_id)
            while self.taken < len(tokens):
                if not self.row and self.bos_id is not None and tokens[self.taken] != self.bos_id:
                    self.row.append(self.bos_id)
                part = tokens[self.taken : self.taken + self.context - len(self.row)]
                self.row.extend(part)
                self.taken += len(part)
                if len(self.row) == self.context:
                    finished, self.row = self.row, []
                    yield finished


def tokenise(texts: Iterator[str], tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of each document alone, without BOS or EOS, not truncated."""
    while group := list(islice(texts, TOKENISED_AT_ONCE)):
        yield from tokenizer(group, add_special_tokens=False, verbose=False).input_ids
