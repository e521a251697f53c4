"""What a store must hold: computed from the model and the text, to the same bits whoever asks and whenever.

Shapes: R rows, T context length, D residual width, V vocabulary.
"""

import contextlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from hsae.cache.building.transfer import Transfer
from hsae.cache.config import at_commit
from hsae.cache.errors import CorpusError, StoreError
from hsae.cache.format.arrays import ArraySpec
from hsae.cache.format.chunk_codec import TORCH_DTYPES
from hsae.cache.format.layout import Header, arrays, chunk_rows, read_header
from hsae.cache.format.spec import FORMAT_VERSION, StoreSpec
from hsae.cache.language_model import token_losses
from hsae.cache.language_model.lm import LanguageModel
from hsae.cache.profiling import step_done
from hsae.cache.reading.provenance import DIGESTS, is_made_of
from hsae.cache.storage.paths import Place
from hsae.cache.text.corpora import TEXT_TABLES, Corpus, open_corpus
from hsae.cache.text.packing import Packer, tokenise

SLICE_TOKENS = {"cpu": 128, "cuda": 2048}  # unembedded at once: 64 MiB and 1 GiB of bfloat16 logits at V = 262,144


@dataclass(frozen=True)
class TokenisedText:
    """Text as documents of token ids, without BOS, in the place of a corpus."""

    documents: Iterable[Sequence[int]]
    digest: str = "given"
    """Digest of the text."""
    commit: None = None
    notes: tuple[str, ...] = ()


def existing_header(target: Place) -> Header | None:
    """The header of a store that was begun, if it can be read."""
    with contextlib.suppress(StoreError, OSError):
        return read_header(target)
    return None


def text_of(spec: StoreSpec, header: Header | None, *, anew: bool = False) -> Corpus:
    """The text of a store; of one that was begun with the `header`, what that was begun with.

    Of a data set on the hub that is the commit, whatever its branch has become since; of a folder that an older hsae
    read, the files that it read. Raises CorpusError if it can't be had.
    """
    config = spec.corpus if header is None else at_commit(spec.corpus, header.corpus_commit)
    if header is not None and header.older:
        with contextlib.suppress(CorpusError):
            before = open_corpus(config, spec.split, anew=anew, older=True)
            if before.digest == header.corpus_digest:
                return before
    return open_corpus(config, spec.split, anew=anew)


class StoreContents:
    """The tokens, activations, losses and header of one store. Raises ModelError if a hook can't be cut at."""

    def __init__(
        self, spec: StoreSpec, model: LanguageModel, text: Corpus | TokenisedText, *, older: bool = False
    ) -> None:
        self.spec, self.model, self.text, self.older = spec, model, text, older
        model.check_hooks(spec.hooks)
        if spec.split == "eval":
            model.check_ablation(spec.hooks)
        if spec.compiled:
            model.check_compiled(spec.hooks, spec.pass_rows, spec.context)
        self.specs = arrays(spec, model.d_model)
        self.step = chunk_rows(spec, model.d_model)
        self.deepest = max(spec.hooks, key=lambda hook: (int(hook.split(".")[1]), hook.endswith("post")))
        self._ablated: dict[str, AblatedPrediction] = {}

    def header(self) -> Header:
        """The header of the store while it is unfinished."""
        model = self.model
        return Header(
            format=FORMAT_VERSION,
            spec=self.spec,
            d_model=model.d_model,
            vocab_size=model.vocab_size,
            bos_id=model.bos_id,
            special_ids=model.special_ids,
            model_digest=model.model_digest,
            tokenizer_digest=model.tokenizer_digest,
            model_commit=model.commit,
            corpus_digest=self.text.digest,
            corpus_commit=self.text.commit,
            versions=model.versions("zarr"),
            older=self.older,
        )

    def check_same(self, target: Place, header: Header) -> None:
        """Raise StoreError if the store was begun with another model, tokenizer or corpus."""
        wanted = self.header()
        digests = ("model_digest", "tokenizer_digest", "corpus_digest")
        for name in (*digests, "d_model", "bos_id", "special_ids", "versions"):
            if getattr(header, name) != getattr(wanted, name):
                what = name.removesuffix("_digest")
                if what in DIGESTS and is_made_of(what, header, self.model.folder, getattr(wanted, name)):
                    continue
                change = f"another {what} of the same name"
                if name == "versions":  # the same numbers are promised on the same libraries and kind of device only
                    pairs = ((key, header.versions.get(key), now) for key, now in wanted.versions.items())
                    change = ", ".join(f"{key} {before} (now {now})" for key, before, now in pairs if before != now)
                raise StoreError(
                    f"{target} was begun with {change}; nothing was written. "
                    "Move it away, or build elsewhere with --set cache.dir=FOLDER"
                )

    # --- tokens -------------------------------------------------------------------------------------------------

    def packer(self) -> Packer:
        """What makes rows of documents."""
        return Packer(self.spec.context, self.model.bos_id if self.spec.prepend_bos else None)

    def token_chunks(self, packer: Packer | None = None, first: int = 0) -> Iterator[tuple[int, Tensor]]:
        """(number, [rows, T]) of the chunks of tokens, where `packer` is. Raises CorpusError for too little text."""
        packer = packer or self.packer()
        rows = packer.pack(self.token_documents(packer.documents - 1 if packer.documents else 0))
        for index in range(first, self.specs["tokens"].count):
            chunk = list(itertools.islice(rows, self.specs["tokens"].rows(index)))
            if len(chunk) < self.specs["tokens"].rows(index):
                self._too_little_text(index * self.step + len(chunk))
            yield index, torch.tensor(chunk, dtype=torch.int32)

    def token_documents(self, first: int = 0) -> Iterator[Sequence[int]]:
        """Token ids, without BOS, of each document from `first` on."""
        if self.spec.rows_per_document is not None:
            return itertools.islice(iter(self.row_documents[0]), first, None)
        if isinstance(self.text, TokenisedText):
            return itertools.islice(self.text.documents, first, None)
        return tokenise(itertools.islice(self.text.open(), first, None), self.model.tokenizer)

    @cached_property
    def row_documents(self) -> tuple[list[list[int]], list[list[int | str | None]]]:
        """(documents of exactly one row each, cut from those of the corpus; whose each is: number and topic)."""
        assert self.spec.rows_per_document is not None and isinstance(self.text, Corpus)
        length = self.spec.context - self.spec.prepend_bos
        owners: list[list[int | str | None]] = []
        texts = itertools.tee(self.text.documents())
        rows: list[list[int]] = []
        ids = tokenise((document.text for document in texts[0]), self.model.tokenizer)
        for number, (document, tokens) in enumerate(zip(texts[1], ids, strict=True)):
            for row in range(min(self.spec.rows_per_document, len(tokens) // length)):
                rows.append(tokens[row * length : (row + 1) * length])
                owners.append([number, document.topic])
            if len(rows) >= self.spec.rows:
                break
        return rows[: self.spec.rows], owners[: self.spec.rows]

    @property
    def documents_json(self) -> bytes:
        """The bytes of `documents.json`."""
        return json.dumps(self.row_documents[1]).encode()

    def _too_little_text(self, rows: int) -> None:
        spec, table = self.spec, TEXT_TABLES[self.spec.split]
        last = "the last" if spec.corpus.last_document is None else str(spec.corpus.last_document - 1)
        names = {
            "train": "cache.train.rows",
            "eval": "cache.eval.batches_variance",
            "autointerp": "autointerp.total_tokens",
        }
        wider = [f"lower {table}.first_document"] if spec.corpus.first_document else []
        wider += [f"raise {table}.last_document"] if spec.corpus.last_document else []
        raise CorpusError(
            f"corpus {spec.corpus.corpus!r}, documents {spec.corpus.first_document} to {last}, gives {rows} rows of "
            f"{spec.context} tokens; {spec.rows} were asked for. Lower {names.get(spec.split, 'unlearning.rows')}, "
            f"or use more text" + (f" ({' or '.join(wider)}, but let no document be in two splits)" if wider else "")
        )

    # --- activations --------------------------------------------------------------------------------------------

    def compute(
        self, index: int, wanted: Sequence[ArraySpec], tokens: Tensor, report: Callable[[int], None] = lambda rows: None
    ) -> "ComputedChunk":
        """Chunk `index` of some arrays, of its `tokens`; `report` is called with the number of the last row done.

        A GPU may still be computing when this returns.
        """
        start, rows = index * self.step, self.spec.pass_rows
        chunk = ComputedChunk(self, index, wanted, len(tokens))
        has_clean = any(not array.path.startswith("acts/") for array in wanted)
        with torch.inference_mode():
            for first in range(0, len(tokens), rows):
                batch = tokens[first : first + rows]
                resid = self._prefix(batch)
                for hook, vectors in resid.items():
                    chunk.add(f"acts/{hook}", first, vectors)
                    chunk.add(f"finite/{hook}", first, torch.isfinite(vectors).flatten(1).all(1))
                if has_clean and start + first < self.spec.clean_rows:
                    for path, values in self.clean(batch, resid[self.deepest]).items():
                        chunk.add(path, first, values)
                report(start + first + len(batch))
                step_done("batches")
        return chunk

    def _prefix(self, batch: Tensor) -> dict[str, Tensor]:
        """Residuals of one pass; compiled layers always see as many rows, so that they are compiled once."""
        missing = self.spec.pass_rows - len(batch)
        if not self.spec.compiled or not missing:
            return self.model.prefix(batch, self.spec.hooks, compiled=self.spec.compiled)
        padded = torch.nn.functional.pad(batch, (0, 0, 0, missing))
        resid = self.model.prefix(padded, self.spec.hooks, compiled=True)
        return {hook: vectors[: len(batch)] for hook, vectors in resid.items()}

    def clean(self, tokens_BT: Tensor, resid_BTD: Tensor) -> dict[str, Tensor]:
        """Of one pass: clean final vector and loss, and for an evaluation loss and KL of each hook's ablation."""
        final = self.model.suffix(self.deepest, resid_BTD)
        rows, context = tokens_BT.shape
        targets = tokens_BT.to(final.device, non_blocking=True).long().roll(-1, 1).flatten()
        flat = final.flatten(0, 1)
        hooks = self.spec.hooks if self.spec.split == "eval" else ()  # whose residual is zeroed
        parts: dict[str, list[Tensor]] = {}
        step = SLICE_TOKENS[final.device.type]
        for first in range(0, rows * context, step):
            part = slice(first, first + step)
            logits = self.model.unembed(flat[part])
            measures = {"clean/loss": token_losses.cross_entropy(logits, targets[part])}
            if hooks:
                clean = token_losses.distribution(logits)
            for hook in hooks:
                ablated = self.ablated(hook)
                measures[f"ablation/{hook}/loss"] = -ablated.log_softmax_V[targets[part]]
                measures[f"ablation/{hook}/kl"] = token_losses.divergence(clean, ablated.log_probs_1V)
            for path, values in measures.items():
                parts.setdefault(path, []).append(values.float())
        results = {path: torch.cat(values).view(rows, context) for path, values in parts.items()}
        for path, values in results.items():
            if path.endswith("loss"):
                values[:, -1] = 0  # the last token of a row has no next one
        return {"clean/final": final, **results}

    def ablated(self, hook: str) -> "AblatedPrediction":
        """What the model predicts after zeroing the residual at `hook`: the same at every token."""
        if hook not in self._ablated:
            zero = torch.zeros(1, 1, self.model.d_model, dtype=self.model.dtype)
            logits_2V = self.model.unembed(self.model.suffix(hook, zero))[0].expand(2, -1)  # torch sums one otherwise
            self._ablated[hook] = AblatedPrediction(
                logits_2V.log_softmax(-1)[0], token_losses.distribution(logits_2V).log_probs[:1]
            )
        return self._ablated[hook]


class AblatedPrediction(NamedTuple):
    """The next-token distribution with the residual at a hook zeroed, as SAEBench rounds it for its loss and its KL."""

    log_softmax_V: Tensor
    log_probs_1V: Tensor


class ComputedChunk:
    """One chunk of some arrays, which a GPU may still be computing."""

    def __init__(self, contents: StoreContents, index: int, wanted: Sequence[ArraySpec], rows: int) -> None:
        self.spec, self.index, self.first_row = contents.spec, index, index * contents.step
        self._wanted, self._transfer = wanted, Transfer(contents.model.device)
        self._memory = {
            **{array.path: self._transfer.memory(array.chunks, TORCH_DTYPES[array.dtype]) for array in wanted},
            **{f"finite/{hook}": self._transfer.memory((rows,), torch.bool) for hook in self.spec.hooks},
        }

    def add(self, path: str, first: int, values: Tensor) -> None:
        """Take rows of an array from row `first` of the chunk on, if it is wanted."""
        if path in self._memory:
            self._transfer.copy(values, self._memory[path][first : first + len(values)])

    def arrays(self) -> Iterator[tuple[ArraySpec, int, Tensor]]:
        """(array, number of the chunk, values) once they are there. Raises StoreError if one is not finite."""
        self._transfer.wait()
        for hook in self.spec.hooks:
            finite = self._memory[f"finite/{hook}"]
            if not finite.all():
                raise StoreError(
                    f"the activations of row {self.first_row + int((~finite).nonzero()[0])} at {hook} are not finite "
                    f"in {self.spec.model.dtype}; use --set model.dtype=float32, or another model"
                )
        for array in self._wanted:
            yield array, self.index, self._memory[array.path]
