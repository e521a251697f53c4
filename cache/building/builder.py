"""One store in the making: its tokens, every missing chunk of activations as soon as its tokens are there, statistics.

Whatever is there and was written down (see `chunk_log`) is kept: a build that was killed goes on where it was, and ends
with the same bytes.
"""

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hsae.cache.building import chunk_log, sealing, writer
from hsae.cache.building.contents import StoreContents
from hsae.cache.building.liveness import sign_of_life, wait_for
from hsae.cache.building.packing_ahead import Packed
from hsae.cache.building.salvage import keep_what_is_right
from hsae.cache.building.statistics import summarise
from hsae.cache.errors import CorpusError, DamagedFileError, ModelError, StoreError, UnreachableError
from hsae.cache.files import check_seal, content_digest, crc32c, parse_json, sealed, sweep
from hsae.cache.format import layout
from hsae.cache.format.arrays import ArraySpec
from hsae.cache.format.chunk_codec import read_tensor
from hsae.cache.launcher import ALONE, Share
from hsae.cache.progress import Progress, Step, silent
from hsae.cache.storage.paths import Place, at_once, exists, map_parallel, publish, remove
from hsae.cache.text.packing import Packer

PACKING = "packing.json"
UNFINISHED = (sealing.FOLDER, chunk_log.FOLDER)  # folders of a store that is not complete
PACKED_AT_ONCE = 64  # chunks of tokens between two states of the packing
SAMPLED_CHUNKS = 64
MOST_UNKNOWN = 0.1  # of the tokens: of text in its own language a tokenizer misses a few in a thousand
READ_AHEAD = 4  # chunks whose tokens, and whether they are there, are read ahead
Chunk = Callable[[], Iterator[tuple[ArraySpec, int, Tensor]]]
"""Waits for a chunk of some arrays, and gives each array's, with the chunk's number."""


def clear(target: Place) -> None:
    """Delete what only an unfinished store needs."""
    (target / PACKING).unlink(missing_ok=True)
    sign_of_life(target).unlink(missing_ok=True)
    for folder in UNFINISHED:
        remove(target / folder, ignore_errors=True)  # another worker may be adding to it, and deletes that then


class Builder:
    """Writes one store, alone or with other workers."""

    def __init__(
        self, contents: StoreContents, target: Place, progress: Progress = silent, share: Share = ALONE
    ) -> None:
        self.contents, self.target, self.progress, self.share = contents, target, progress, share
        self.spec, self.model, self.specs, self.step = contents.spec, contents.model, contents.specs, contents.step
        self.row_bytes = len(self.spec.hooks) * self.specs[f"acts/{self.spec.hooks[0]}"].chunk_bytes // self.step
        self.documents_digest: str | None = None
        self.packed = Packed()
        self._is_new = self._is_impossible = False
        self.written: chunk_log.Written

    def report(self, stage: Literal["tokens", "activations", "statistics"], done: int) -> None:
        """Say how many rows of a stage, or hooks of the statistics, are done."""
        task, hooks = f"{self.spec.split} {stage}", len(self.spec.hooks)
        if stage == "statistics":
            return self.progress(Step(task=task, done=done, total=hooks, unit="hooks"))
        tokens, row_bytes = (self.spec.context, self.row_bytes) if stage == "activations" else (0, 0)
        self.progress(Step(task=task, done=done, total=self.spec.rows, unit="rows", tokens=tokens, bytes=row_bytes))

    def prepare(self) -> None:
        """Make the store if it isn't there, and sweep up what a killed build left half-written.

        Workers other than the first wait for the store, and later for each chunk of tokens that they need.
        """
        header = self.contents.header()
        kind = header.model_dump(
            mode="json", include={"spec", "model_digest", "tokenizer_digest", "corpus_digest", "versions"}
        )
        self.written = chunk_log.Written(self.target, content_digest(kind), self.specs.values())
        if self.share.rank:
            wait_for(self.target, self._is_begun)
        elif not self._is_begun():
            keep_what_is_right(self.contents, self.target, self.written)
            self._is_new = not exists(self.target)
            writer.write_metadata(self.target, header, replace=not self._is_new)
        self.contents.check_same(self.target, layout.read_header(self.target))
        if self.share.rank:
            return
        if isinstance(self.target, Path) and self.share.world == 1:  # locks of files may not reach other machines
            sweep(self.target)
        remove(self.target / sealing.FOLDER, ignore_errors=True)

    def pack(self) -> None:
        """Pack the tokens that are missing; nothing to do for workers other than the first."""
        count = self.specs["tokens"].count
        if not self.share.rank and not self._finished():
            try:
                self.write_tokens()
                self._refuse_unknown(count)
            except UnreachableError:
                raise  # what is packed stays: reading a data set on the hub may have taken hours
            except (CorpusError, ModelError):
                self._is_impossible = True
                raise
            if self.spec.rows_per_document is not None:
                publish(self.target / layout.DOCUMENTS, self.contents.documents_json)
                self.documents_digest = layout.documents_digest(self.contents.documents_json)
        self.packed.reach(count + 1)

    def discard_impossible(self) -> None:
        """Delete a store that can't be finished, if it was begun in this build or has tokens only."""
        if self._is_impossible and (
            self._is_new or not any(self.specs[f"acts/{hook}"].written(self.target).any() for hook in self.spec.hooks)
        ):
            remove(self.target)

    def _is_begun(self) -> bool:
        with contextlib.suppress(layout.LostHeaderError):
            layout.read_header(self.target)
            return True
        return False

    def _finished(self) -> bool:
        """Take in what was written down by now; whether the store is finished, so that nothing is left to do."""
        self.written.load()
        return layout.read_header(self.target).complete

    # --- tokens -------------------------------------------------------------------------------------------------

    def write_tokens(self) -> None:
        """Pack the corpus into rows; the state of the packing lies beside the tokens until they are all there."""
        array, state_file, packer = self.specs["tokens"], self.target / PACKING, self.contents.packer()
        if array.written(self.target).all() and self._as_written(array.count) is not None:
            state_file.unlink(missing_ok=True)
            return
        first, checksum = self._packed(state_file, packer)
        self.packed.reach(first)
        packed = self.contents.token_chunks(packer, first)
        for start in range(first, array.count, PACKED_AT_ONCE):
            chunks: list[Chunk] = []
            for index, ids in itertools.islice(packed, PACKED_AT_ONCE):
                self.model.check_ids(ids)
                chunks.append(partial(iter, [(array, index, ids)]))
                self.packed.reach(0)  # the build goes on
                self.report("tokens", index * self.step + len(ids))
            self._publish(chunks)
            last = start + len(chunks)
            checksum = crc32c(self.written["tokens"][start:last].astype("<u4").tobytes(), checksum)
            state = {"store": self.written.key, "chunks": last, "tokens": checksum, **packer.state()}
            publish(state_file, json.dumps(sealed(state)).encode())
            if start == first:
                self._refuse_unknown(last)  # before anything is computed on them
            self.packed.reach(last)
        state_file.unlink(missing_ok=True)

    def _packed(self, state_file: Place, packer: Packer) -> tuple[int, int]:
        """Restore the state of the packing; returns how many chunks it is of, and the checksum of their checksums.

        Without the state, or with one that is damaged or another's, the text is packed from its beginning: the same
        tokens.
        """
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            state = parse_json(state_file.read_bytes())
            check_seal(state)
            checksum = self._as_written(state["chunks"]) if state["store"] == self.written.key else None
            if checksum is not None and checksum == state["tokens"]:
                packer.restore(state)
                return state["chunks"], checksum
        return 0, 0

    def _as_written(self, count: int) -> int | None:
        """The checksum of the checksums of the first chunks of tokens; None unless they are as written down."""
        array = self.specs["tokens"]
        with contextlib.suppress(DamagedFileError):
            trailers = map_parallel(lambda index: writer.trailer(self.target, array, index), range(count))
            there = np.fromiter(trailers, "<u4", count)
            if np.array_equal(there, self.written["tokens"][:count]):
                return crc32c(there.tobytes())
        return None

    def _publish(self, chunks: Iterable[Chunk]) -> None:
        """Write chunks, and write that down, while the next ones are being made."""

        def write(chunk: Chunk) -> None:
            for array, index, values in chunk():
                self.written.add(array.path, index, writer.write_chunk(self.target, array, index, values))

        try:
            for _ in map_parallel(write, chunks, at_once(self.target)):
                pass
        finally:
            self.written.flush()

    def _refuse_unknown(self, count: int) -> None:
        """Raise CorpusError if the tokenizer does not know the text: by a sample of the first chunks of tokens."""
        unknown = self.model.tokenizer.unk_token_id
        if unknown in (None, self.model.bos_id):  # which stands before each document
            return
        tokens = torch.cat([self.tokens(index) for index in range(0, count, -(-count // SAMPLED_CHUNKS))])
        share = float((tokens == unknown).double().mean())
        if share > MOST_UNKNOWN:
            raise CorpusError(
                f"{share:.0%} of the tokens of corpus {self.spec.corpus.corpus!r} are "
                f"{self.model.tokenizer.unk_token!r}: the tokenizer of {self.spec.model.id} does not know this text; "
                "use text that the model was trained on, or the model's own tokenizer files"
            )

    # --- activations --------------------------------------------------------------------------------------------

    def write_activations(self) -> None:
        """Compute every chunk that is missing: this worker's own, then what others have left."""
        count = self.specs["tokens"].count
        for mine in (self.share.own(count), self.share.others(count)):
            if len(mine) and not self._finished():
                self._publish(self._computed(mine))

    @property
    def _shared(self) -> bool:
        """Whether others may be writing to the store."""
        return self.share.world > 1 or not isinstance(self.target, Path)

    def _computed(self, indices: NDArray[np.int64]) -> Iterator[Chunk]:
        """What is missing of these chunks, by one listing of each array; what comes next is read ahead."""
        there = {path: array.written(self.target) for path, array in self.specs.items() if path != "tokens"}
        present = {path: mask & (self.written[path] >= 0) for path, mask in there.items()}
        unfinished = np.zeros(self.specs["tokens"].count, bool)
        for mask in present.values():
            unfinished[: len(mask)] |= ~mask

        def ask(index: int) -> tuple[int, list[ArraySpec], Tensor | None]:
            missing = [self.specs[path] for path, mask in present.items() if index < len(mask) and not mask[index]]
            if self._shared:  # another worker may have written it since
                missing = [a for a in missing if there[a.path][index] or not a.is_written(self.target, index)]
            return index, missing, self._tokens_if_packed(index)

        for index, missing, tokens in map_parallel(ask, map(int, indices[unfinished[indices]]), READ_AHEAD):
            if missing:
                self.report("activations", index * self.step)
                if tokens is None:
                    wait_for(self.target, lambda index=index: self._tokens_if_packed(index) is not None)  # type: ignore[misc]
                    tokens = self.tokens(index)
                yield self.contents.compute(index, missing, tokens, partial(self.report, "activations")).arrays

    def _tokens_if_packed(self, index: int) -> Tensor | None:
        """Chunk `index` of the tokens; None if worker 0, which waits for it itself, has not packed it yet."""
        if not self.share.rank:
            self.packed.wait(index + 1)
        unknown = self.share.rank and self.written["tokens"][index] < 0
        if unknown and not self._finished() and self.written["tokens"][index] < 0:
            return None
        try:
            return self.tokens(index)
        except DamagedFileError:
            if self.share.rank == 0:
                raise
            return None

    def tokens(self, index: int) -> Tensor:
        """Chunk `index` of the tokens, [rows, T]. Raises DamagedFileError unless it is what was written down."""
        return read_tensor(self.target, self.specs["tokens"], index, self.written["tokens"])

    # --- statistics ---------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Note this worker's share of the checksums; worker 0 then writes statistics, lists and, last, `complete`."""
        self.packed.wait(self.specs["tokens"].count + 1)
        if (tally := self._tally()) is not None:
            counts, checks = tally
            update = {
                "statistics": self.write_statistics(checks),
                "kept_tokens": int(counts.sum(dtype=np.int64)),
                "complete": True,
                "documents_digest": self.documents_digest,
            }
            header = self.contents.header().model_copy(update=update)
            writer.write_list(self.target, layout.kept_array(self.spec, self.model.d_model), counts)
            sealed_arrays = layout.every_array(header)
            header = header.model_copy(update={"checks": writer.seal(self.target, sealed_arrays, checks)})
            # all of them: some may have been harmed since
            writer.write_metadata(self.target, header)
        if layout.read_header(self.target).complete:
            clear(self.target)

    def _tally(self) -> tuple[NDArray[np.uint32], dict[str, NDArray[np.uint32]]] | None:
        """Write this worker's parts of the tally, and compute again what is not as it was written down; for worker 0
        what all parts tell.

        None if there is nothing left to do.
        """
        specs, report, wrong = list(self.specs.values()), partial(self.report, "activations"), []
        for attempt in range(4):
            if self._finished():
                return None
            wrong = sealing.write_parts(self.target, specs, self.model.special_ids, self.share, self.written)
            if not wrong:
                if self.share.rank:
                    return None
                if (tally := sealing.collect_parts(self.target, specs, self.written.key)) is not None:
                    return tally
                continue
            if self._shared and attempt == 0:  # they may have been written and not been written down yet
                time.sleep(2 * chunk_log.EVERY)
                continue
            if any(array.path == "tokens" for array, _ in wrong):
                break
            by_index: dict[int, list[ArraySpec]] = {}
            for array, index in wrong:
                by_index.setdefault(index, []).append(array)
            recomputed = (
                self.contents.compute(index, arrays, self.tokens(index), report).arrays
                for index, arrays in sorted(by_index.items())
            )
            self._publish(recomputed)
        changed = wrong[0][0].chunk_file(self.target, wrong[0][1]) if wrong else self.target / sealing.FOLDER
        raise StoreError(f"{changed} was changed while the store was being built; run the same command again")

    def write_statistics(self, checks: Mapping[str, NDArray[np.uint32]]) -> dict[str, layout.HookSummary]:
        """Write the arrays of statistics and return the scalars of each hook; `checks` are the checksums of chunks."""
        statistics = {}
        for number, hook in enumerate(self.spec.hooks):
            self.report("statistics", number)
            statistics[hook], moments = summarise(self.target, self.specs, hook, self.model.special_ids, checks)
            for name, values in moments.items():
                array = layout.statistics_arrays(self.spec, self.model.d_model)[f"stats/{hook}/{name}"]
                writer.write_chunk(self.target, array, 0, values)
        self.report("statistics", len(self.spec.hooks))
        return statistics
