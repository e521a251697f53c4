"""Stage 1: run the language model once over the corpus and keep what its residual stream said.

Shapes: R rows, T context length, D residual width, N tokens of a slice, V vocabulary.

Tokens first, then every missing chunk of activations, then statistics. Whatever is there and was written down (see
`written`) is kept: a build that was killed goes on where it was, and ends with the same bytes.
"""

import contextlib
import itertools
import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hsae.cache.building import chunk_log, sealing, writer
from hsae.cache.building.salvage import keep_what_is_right
from hsae.cache.building.statistics import summarise
from hsae.cache.building.verification import mend_documents
from hsae.cache.errors import CorpusError, ModelError, StoreError, UnreachableError, UserError
from hsae.cache.files import check_seal, content_digest, parse_json, sealed, sweep
from hsae.cache.format.chunk_codec import DamagedChunkError, crc32c, read_chunk
from hsae.cache.format.layout import (
    DOCUMENTS,
    ArraySpec,
    Header,
    HookSummary,
    LostHeaderError,
    arrays,
    checks_array,
    chunk_rows,
    documents_digest,
    every_array,
    held_by,
    kept_array,
    read_header,
    statistics_arrays,
)
from hsae.cache.format.spec import FORMAT_VERSION, ModelConfig, StoreSpec
from hsae.cache.language_model import sources, token_losses
from hsae.cache.language_model.lm import LanguageModel, pinned
from hsae.cache.language_model.provenance import DIGESTS, is_made_of
from hsae.cache.launcher import Share
from hsae.cache.progress import Progress, Step, silent
from hsae.cache.reading.mapped_chunks import MappedArray
from hsae.cache.storage.paths import (
    IN_FLIGHT,
    Place,
    RemotePath,
    check_writable,
    exists,
    locked,
    many,
    place,
    publish,
    remove,
)
from hsae.cache.text.corpora import TEXT_TABLES, Corpus, Packer, check_corpus, open_corpus, tokenised
from hsae.cache.text.python_text import CORPORA

SLICE_TOKENS = 128  # tokens unembedded at once: 64 MiB of bfloat16 logits at V = 262,144
ALONE = Share()
WAIT, POLL, BEAT = 3600.0, 1.0, 60.0  # seconds
PACKING = "packing.json"
UNFINISHED = (sealing.FOLDER, chunk_log.FOLDER)  # folders of a store that is not complete
PACKED_AT_ONCE = 64  # chunks of tokens between two states of the packing
LOCAL_WRITERS = 2  # chunks written at once while the next one is computed
SAMPLED_CHUNKS = 64
MOST_UNKNOWN = 0.1  # of the tokens: of text in its own language a tokenizer misses a few in a thousand
ASKED_AHEAD = 4  # chunks whose tokens, and whose being there, are asked for ahead
LIBRARIES = ("torch", "transformers", "tokenizers", "zarr")


@dataclass(frozen=True)
class TokenisedText:
    """Text as documents of token ids, without BOS, in the place of a corpus."""

    documents: Iterable[Sequence[int]]
    digest: str = "given"
    """Digest of the text."""


def build(
    specs: Sequence[StoreSpec],
    root: str | Place,
    *,
    device: str = "cpu",
    progress: Progress = silent,
    say: Callable[[str], None] = lambda text: None,
    model: LanguageModel | None = None,
    text: TokenisedText | None = None,
    share: Share = ALONE,
) -> list[Place]:
    """Make the stores that `specs` describe (of one model) in folder `root`, or finish them, and return their paths.

    The text of all of them is packed before the first activation is computed. `model` and `text` take the place of
    the model and the corpus that the specs name. With a share of several, workers on one store divide its chunks:
    worker 0 packs the tokens and finishes the store, the others return when no chunk is missing. Raises UserError if
    a store can't be made; what is there stays.
    """
    folder = place(root)
    targets: list[Place] = [folder / spec.name for spec in specs]
    finished, missing = _divided(specs, targets)
    for spec, target in finished if share.rank == 0 else ():
        if model is None:
            check_current(target, spec, text is not None, say)
        _clear_finished(target)
        if spec.rows_per_document is not None:
            mend_documents(target, device=device, say=say)
    if not missing:
        return targets
    config = pinned(specs[0].model, folder)
    _check_makeable(missing, config)
    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as locks:
        for _, target in missing:
            locks.enter_context(locked(target, f".rank{share.rank}" if share.rank else ""))
        if share.world > 1 and share.rank == 0:
            locks.enter_context(_signs_of_life([target for _, target in missing]))
        for spec, target in missing if text is None and share.rank == 0 else ():
            check_corpus(text_of(spec, begun(target)))
        if share.world > 1 and device == "cuda":
            torch.cuda.set_device(share.local_rank % torch.cuda.device_count())
        if model is None:
            say(f"loading {specs[0].model.id}")
            model = LanguageModel.load(config, device=device, say=say)
        builders = [Builder(spec, target, model, progress, text, share) for spec, target in missing]
        for note in dict.fromkeys(note for builder in builders for note in builder.corpus.notes):
            say(note)
        for builder in builders:
            builder.prepare()
        for builder in builders:
            builder.write_activations()
            builder.finish()
    return targets


@contextlib.contextmanager
def _signs_of_life(targets: Sequence[Place]) -> Iterator[None]:
    """Tell workers that wait for something at these stores, every BEAT seconds, that worker 0 is at work, whatever
    takes it long.
    """
    ended = threading.Event()

    def beat() -> None:
        while True:
            for target in targets:
                if ended.is_set():
                    return
                with contextlib.suppress(OSError, UserError):
                    publish(_sign(target), secrets.token_hex(8).encode())
            if ended.wait(BEAT):
                return

    thread = threading.Thread(target=beat, name="hsae-signs-of-life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
    thread.join()  # not after a failure: it may be trying again for minutes, and the next build deletes its sign
    for target in targets:
        with contextlib.suppress(OSError, UserError):
            _sign(target).unlink(missing_ok=True)


def _sign(target: Place) -> Place:
    """The file beside a store whose content changes as long as worker 0 lives."""
    name = f".{target.name}.alive"
    return (
        RemotePath(f"{target.url.rpartition('/')[0]}/{name}")
        if isinstance(target, RemotePath)
        else target.with_name(name)
    )


def check(specs: Sequence[StoreSpec], root: str | Place, say: Callable[[str], None] = lambda text: None) -> None:
    """Refuse what `build` would refuse before it loads the model, writing nothing. Raises UserError.

    Packaged text, which is there, is not looked at: to gather it takes long.
    """
    folder = place(root)
    finished, missing = _divided(specs, [folder / spec.name for spec in specs])
    for spec, target in finished:
        check_current(target, spec, spec.corpus.corpus in CORPORA, say)
    if missing:
        _check_makeable(missing, pinned(specs[0].model, folder))
        check_writable(folder, trial=False)
    for spec, target in missing:
        if spec.corpus.corpus not in CORPORA:
            check_corpus(text_of(spec, begun(target)))


def _divided(
    specs: Sequence[StoreSpec], targets: Sequence[Place]
) -> tuple[list[tuple[StoreSpec, Place]], list[tuple[StoreSpec, Place]]]:
    """The stores that are finished, and the others."""
    every = list(zip(specs, targets, strict=True))
    missing = [(spec, target) for spec, target in every if not is_finished(target, spec)]
    return [one for one in every if one not in missing], missing


def _check_makeable(missing: Sequence[tuple[StoreSpec, Place]], model: ModelConfig) -> None:
    """Raise UserError for a codec that no build makes, and for weights on this machine that can't be loaded."""
    if any(spec.codec == "int8" for spec, _ in missing):
        raise StoreError(
            "int8 stores are made from finished ones: build with --set cache.codec=mappable, then "
            "`hsae cache recode STORE FOLDER --codec int8`"
        )
    if (there := sources.folder_here(model)) is not None:
        sources.check_weights(there)  # what can't be loaded leaves no folder behind


def is_finished(target: Place, spec: StoreSpec) -> bool:
    """Whether a store is complete; one that has lost its header isn't.

    Raises StoreError if it was made for another configuration.
    """
    with contextlib.suppress(LostHeaderError):
        return held_by(target, spec).complete
    return False


def clear(target: Place) -> None:
    """Delete what only an unfinished store needs."""
    (target / PACKING).unlink(missing_ok=True)
    _sign(target).unlink(missing_ok=True)
    for folder in UNFINISHED:
        chunk_log.clear(target, folder)


def check_current(target: Place, spec: StoreSpec, given: bool, say: Callable[[str], None]) -> None:
    """Raise StoreError if the model, the tokenizer or the text are no longer those that a finished store was made from.

    The model is not loaded, nor downloaded or converted: what can't be had on this machine is not compared, and that
    is said. Of a store of token ids that were `given` there is no text.
    """
    header = read_header(target)
    folder = None
    with contextlib.suppress(ModelError, OSError):
        folder = sources.folder_here(sources.at_commit(spec.model, header.model_commit))
    now: dict[str, Callable[[], bool]] = {}
    if folder is not None:
        now |= {what: partial(is_made_of, what, header, folder) for what in DIGESTS}
    if not given:
        now["corpus"] = partial(_is_text, header)
    not_compared = {} if folder is not None else {"model": f"{spec.model.id} is not on this machine"}
    for what, is_same in now.items():
        try:
            same = is_same()
        except (ModelError, CorpusError, OSError) as error:
            not_compared[what] = str(error)
            continue
        if not same:
            name = spec.corpus.corpus if what == "corpus" else spec.model.id
            raise StoreError(
                f"{target} was made from another {what} than {name} is now; nothing was written. Delete the store or "
                f"move it away and "
                "build it again, or build elsewhere with --set cache.dir=FOLDER"
            )
    for what, reason in not_compared.items():
        say(f"{target.name}: its {what} was not compared with what there is now ({reason})")


def _is_text(header: Header) -> bool:
    """Whether the text that a store is made of is as it was.

    Raises CorpusError if it can't be had, or if no one knows which it was.
    """
    corpus = text_of(header.spec, header)
    if corpus.commit is not None and header.corpus_commit is None and corpus.digest != header.corpus_digest:
        raise CorpusError(f"an older hsae made it, and did not write down which commit of {corpus.name} it read")
    return corpus.digest == header.corpus_digest


def begun(target: Place) -> Header | None:
    """The header of a store that was begun, if it can be read."""
    with contextlib.suppress(StoreError, OSError):
        return read_header(target)
    return None


def text_of(spec: StoreSpec, held: Header | None, *, anew: bool = False) -> Corpus:
    """The text of a store; of one that was begun with the header `held`, what that was begun with.

    Of a data set on the hub that is the commit, whatever its branch has become since; of a folder that an older hsae
    read, the files that it read. Raises CorpusError if it can't be had.
    """
    config = spec.corpus if held is None else sources.at_commit(spec.corpus, held.corpus_commit)
    if held is not None and held.older:
        with contextlib.suppress(CorpusError):
            before = open_corpus(config, spec.split, anew=anew, older=True)
            if before.digest == held.corpus_digest:
                return before
    return open_corpus(config, spec.split, anew=anew)


def _clear_finished(target: Place) -> None:
    """Delete what a build that was killed after its last step has left in a finished store, if anything can be
    deleted there.
    """
    if isinstance(target, RemotePath) and target.read_only:
        return
    with contextlib.suppress(StoreError, OSError):
        if _sign(target).is_file() or any((target / folder).is_dir() for folder in UNFINISHED):
            with locked(target):
                clear(target)


class Builder:
    """One store in the making, with the model loaded."""

    def __init__(
        self,
        spec: StoreSpec,
        target: Place,
        model: LanguageModel,
        progress: Progress = silent,
        text: TokenisedText | None = None,
        share: Share = ALONE,
    ) -> None:
        self.spec, self.target, self.model, self.progress = spec, target, model, progress
        model.check_hooks(spec.hooks)
        if spec.split == "eval":
            model.check_ablation(spec.hooks)
        self.text, self.share = text, share
        held = begun(target)
        self.older = held is not None and held.older
        self.corpus = (
            text_of(spec, held, anew=True) if text is None else Corpus("token ids", text.digest, lambda: iter(()))
        )
        self.specs = arrays(spec, model.d_model)
        self.step = chunk_rows(spec, model.d_model)
        self.row_bytes = len(spec.hooks) * self.specs[f"acts/{spec.hooks[0]}"].chunk_bytes // self.step
        self.deepest = max(spec.hooks, key=lambda hook: (int(hook.split(".")[1]), hook.endswith("post")))
        self.documents_digest: str | None = None
        self._ablated: dict[str, Tensor] = {}
        self.written: chunk_log.Written | None = None
        """What was written of an unfinished store; None while a finished one is mended."""

    def report(self, stage: Literal["tokens", "activations", "statistics"], done: int) -> None:
        """Say how many rows of a stage, or hooks of the statistics, are done."""
        task, hooks = f"{self.spec.split} {stage}", len(self.spec.hooks)
        if stage == "statistics":
            return self.progress(Step(task=task, done=done, total=hooks, unit="hooks"))
        tokens, row_bytes = (self.spec.context, self.row_bytes) if stage == "activations" else (0, 0)
        self.progress(Step(task=task, done=done, total=self.spec.rows, unit="rows", tokens=tokens, bytes=row_bytes))

    def prepare(self) -> None:
        """Make the store if it isn't there, sweep up what a killed build left half-written, and pack the tokens.

        Workers other than the first wait for the store, and later for each chunk of tokens that they need.
        """
        header = self.header()
        kind = header.model_dump(
            mode="json", include={"spec", "model_digest", "tokenizer_digest", "corpus_digest", "versions"}
        )
        self.written = chunk_log.Written(self.target, content_digest(kind), self.specs.values())
        if self.share.rank:
            self._await(self._is_begun)
            return self.check_same(read_header(self.target), header)
        try:
            self.check_same(read_header(self.target), header)
        except LostHeaderError:
            keep_what_is_right(self)
            every = {**self.specs, **statistics_arrays(self.spec, self.model.d_model)}
            make = writer.write_metadata if exists(self.target) else writer.create
            make(self.target, header, every.values())
            self.check_same(read_header(self.target), header)
        if isinstance(self.target, Path) and self.share.world == 1:  # locks of files may not reach other machines
            sweep(self.target)
        chunk_log.clear(self.target, sealing.FOLDER)
        if self._finished():
            return
        try:
            self.write_tokens()
            self._refuse_unknown()
        except UnreachableError:
            raise  # what is packed stays: reading a data set on the hub may have taken hours
        except (CorpusError, ModelError):
            if not any(
                spec.written(self.target).any() for path, spec in self.specs.items() if path.startswith("acts/")
            ):
                remove(self.target)  # tokens only: nothing that took long is lost
            raise
        if self.spec.rows_per_document is not None:
            data = writer.encoded_json(self.row_documents[1])
            publish(self.target / DOCUMENTS, data)
            self.documents_digest = documents_digest(data)

    def _is_begun(self) -> bool:
        with contextlib.suppress(LostHeaderError):
            read_header(self.target)
            return True
        return False

    def _finished(self) -> bool:
        """Take in what was written down by now; whether another worker has finished the store, so that nothing is
        left to do.
        """
        assert self.written is not None
        self.written.load()
        return read_header(self.target).complete

    def _await(self, there: Callable[[], bool]) -> None:
        """Wait for something that worker 0 makes.

        Raises StoreError if that has given no sign of life for WAIT seconds.
        """
        told, since = b"", time.monotonic()
        while not there():
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                if (now := _sign(self.target).read_bytes()) != told:
                    told, since = now, time.monotonic()
            if time.monotonic() - since > WAIT:
                raise StoreError(
                    f"worker 0 has given no sign of life at {self.target} for {WAIT:.0f} s; is it running?"
                )
            time.sleep(POLL)

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
            corpus_digest=self.corpus.digest,
            corpus_commit=self.corpus.commit,
            versions={
                "python": platform.python_version(),
                "device": torch.device(model.device).type,
                **{name: version(name) for name in LIBRARIES},
            },
            older=self.older,
        )

    def check_same(self, held: Header, wanted: Header) -> None:
        """Raise StoreError if the store was begun with another model, tokenizer or corpus."""
        for name in (
            "model_digest",
            "tokenizer_digest",
            "corpus_digest",
            "d_model",
            "bos_id",
            "special_ids",
            "versions",
        ):
            if getattr(held, name) != getattr(wanted, name):
                what = name.removesuffix("_digest")
                if what in DIGESTS and is_made_of(what, held, self.model.folder, getattr(wanted, name)):
                    continue
                change = f"another {what} of the same name"
                if name == "versions":  # the same numbers are promised on the same libraries and kind of device only
                    pairs = ((key, held.versions.get(key), now) for key, now in wanted.versions.items())
                    change = ", ".join(f"{key} {before} (now {now})" for key, before, now in pairs if before != now)
                raise StoreError(
                    f"{self.target} was begun with {change}; nothing was written. "
                    "Move it away, or build elsewhere with --set cache.dir=FOLDER"
                )

    # --- tokens -------------------------------------------------------------------------------------------------

    def write_tokens(self) -> None:
        """Pack the corpus into rows; the state of the packing lies beside the tokens until they are all there."""
        spec, array = self.spec, self.specs["tokens"]
        state_file = self.target / PACKING
        packer = Packer(spec.context, self.model.bos_id if spec.prepend_bos else None)
        if array.written(self.target).all() and self._as_written(array.count) is not None:
            state_file.unlink(missing_ok=True)
            return
        first, checksum = self._packed(state_file, packer)
        rows = packer.pack(self.token_documents(packer.documents - 1 if packer.documents else 0))
        for start in range(first, array.count, PACKED_AT_ONCE):
            chunks = []
            for index in range(start, min(start + PACKED_AT_ONCE, array.count)):
                wanted = min(self.step, spec.rows - index * self.step)
                chunk = list(itertools.islice(rows, wanted))
                if len(chunk) < wanted:
                    self._too_little_text(index * self.step + len(chunk))
                ids = torch.tensor(chunk, dtype=torch.int32)
                self.model.check_ids(ids)
                chunks.append((array, index, ids))
                self.report("tokens", index * self.step + wanted)
            self._publish(chunks)
            if self.written is not None:
                last = start + len(chunks)
                checksum = crc32c(self.written["tokens"][start:last].astype("<u4").tobytes(), checksum)
                state = {"store": self.written.key, "chunks": last, "tokens": checksum, **packer.state()}
                writer.write_json(state_file, sealed(state))
        state_file.unlink(missing_ok=True)

    def _packed(self, state_file: Place, packer: Packer) -> tuple[int, int]:
        """Restore the state of the packing; returns how many chunks it is of, and the checksum of their checksums.

        Without the state, or with one that is damaged or another's, the text is packed from its beginning: the same
        tokens.
        """
        if self.written is not None:
            with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
                state = parse_json(state_file.read_bytes())
                check_seal(state)
                checksum = self._as_written(state["chunks"]) if state["store"] == self.written.key else None
                if checksum is not None and checksum == state["tokens"]:
                    packer.restore(state)
                    return state["chunks"], checksum
        return 0, 0

    def _as_written(self, count: int) -> int | None:
        """The checksum of the checksums of the first chunks of the tokens; None unless they lie there as they were
        written down.
        """
        if self.written is None:
            return 0
        array = self.specs["tokens"]
        with contextlib.suppress(DamagedChunkError):
            found = many(lambda index: writer.trailer(self.target, array, index), range(count))
            there = np.fromiter(found, "<u4", count)
            if np.array_equal(there, self.written["tokens"][:count]):
                return crc32c(there.tobytes())
        return None

    def _publish(self, chunks: Iterable[tuple[ArraySpec, int, Tensor]]) -> None:
        """Write chunks, and that they are written, while the next ones are being made; returns when they are all
        there.
        """
        at_once = IN_FLIGHT if isinstance(self.target, RemotePath) else LOCAL_WRITERS

        def write(chunk: tuple[ArraySpec, int, Tensor]) -> None:
            checksum = writer.write_chunk(self.target, *chunk)
            if self.written is not None:
                self.written.add(chunk[0].path, chunk[1], checksum)

        try:
            for _ in many(write, chunks, at_once):
                pass
        finally:
            if self.written is not None:
                self.written.flush()

    def token_documents(self, first: int = 0) -> Iterator[Sequence[int]]:
        """Token ids, without BOS, of each document from `first` on."""
        if self.spec.rows_per_document is not None:
            return itertools.islice(iter(self.row_documents[0]), first, None)
        if self.text is not None:
            return itertools.islice(self.text.documents, first, None)
        return tokenised(itertools.islice(self.corpus.open(), first, None), self.model.tokenizer)

    @cached_property
    def row_documents(self) -> tuple[list[list[int]], list[list[int | str | None]]]:
        """(documents of exactly one row each, cut from those of the corpus; whose each is: number and topic)."""
        assert self.spec.rows_per_document is not None
        length = self.spec.context - self.spec.prepend_bos
        documents = self.corpus.documents()
        kept: list[list[int | str | None]] = []
        texts = itertools.tee(documents)
        rows: list[list[int]] = []
        ids = tokenised((document.text for document in texts[0]), self.model.tokenizer)
        for number, (document, tokens) in enumerate(zip(texts[1], ids, strict=True)):
            for row in range(min(self.spec.rows_per_document, len(tokens) // length)):
                rows.append(tokens[row * length : (row + 1) * length])
                kept.append([number, document.topic])
            if len(rows) >= self.spec.rows:
                break
        return rows[: self.spec.rows], kept[: self.spec.rows]

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

    def _refuse_unknown(self) -> None:
        """Raise CorpusError if the tokenizer does not know the text: by a sample of the chunks of tokens."""
        unknown = self.model.tokenizer.unk_token_id
        if unknown in (None, self.model.bos_id):  # which stands before each document
            return
        count = self.specs["tokens"].count
        tokens = torch.cat([self.tokens(index) for index in range(0, count, -(-count // SAMPLED_CHUNKS))])
        share = float((tokens == unknown).double().mean())
        if share > MOST_UNKNOWN:
            raise CorpusError(
                f"{share:.0%} of the tokens of corpus {self.spec.corpus.corpus!r} are "
                f"{self.model.tokenizer.unk_token!r}: the tokenizer of "
                f"{self.spec.model.id} does not know this text; use text that the model was trained on, or the "
                f"model's own tokenizer files"
            )

    # --- activations --------------------------------------------------------------------------------------------

    def write_activations(self) -> None:
        """Compute every chunk that is missing from any array of activations or losses: this worker's own, then what
        others have left.
        """
        count = self.specs["tokens"].count
        for mine in (self.share.own(count), self.share.others(count)):
            if len(mine) and not self._finished():
                self._publish(self._computed(mine))

    @property
    def _shared(self) -> bool:
        """Whether others may be writing to the store."""
        return self.share.world > 1 or isinstance(self.target, RemotePath)

    def _computed(self, indices: NDArray[np.int64]) -> Iterator[tuple[ArraySpec, int, Tensor]]:
        """What is missing of these chunks, from one listing of each array; what the next ones need is asked for
        ahead.
        """
        assert self.written is not None
        there = {path: array.written(self.target) for path, array in self.specs.items() if path != "tokens"}
        held = {path: mask & (self.written[path] >= 0) for path, mask in there.items()}
        unfinished = np.zeros(self.specs["tokens"].count, bool)
        for mask in held.values():
            unfinished[: len(mask)] |= ~mask

        def ask(index: int) -> tuple[int, list[ArraySpec], Tensor | None]:
            missing = [self.specs[path] for path, mask in held.items() if index < len(mask) and not mask[index]]
            if self._shared:  # another worker may have written it since
                missing = [a for a in missing if there[a.path][index] or not a.is_written(self.target, index)]
            return index, missing, self._tokens_if_packed(index)

        for index, missing, tokens in many(ask, map(int, indices[unfinished[indices]]), ASKED_AHEAD):
            if missing:
                self.report("activations", index * self.step)
                if tokens is None:
                    self._await(lambda index=index: self._tokens_if_packed(index) is not None)  # type: ignore[misc]
                    tokens = self.tokens(index)
                yield from self.compute(index, missing, tokens)

    def _tokens_if_packed(self, index: int) -> Tensor | None:
        """Chunk `index` of the tokens; None if worker 0 has not packed it yet."""
        assert self.written is not None
        unknown = self.share.rank and self.written["tokens"][index] < 0
        if unknown and not self._finished() and self.written["tokens"][index] < 0:
            return None
        try:
            return self.tokens(index)
        except DamagedChunkError:
            if self.share.rank == 0:
                raise
            return None

    def tokens(self, index: int) -> Tensor:
        """Chunk `index` of the tokens, [rows, T], without padding.

        Raises DamagedChunkError unless it is what was written down.
        """
        array = self.specs["tokens"]
        listed = int(self.written["tokens"][index]) if self.written is not None else -1
        data = read_chunk(self.target, array, index, None if listed < 0 else listed)
        return torch.frombuffer(bytearray(data), dtype=torch.int32).view(array.chunks)[
            : self.spec.rows - index * self.step
        ]

    def compute(
        self, index: int, wanted: Sequence[ArraySpec], tokens: Tensor
    ) -> Iterator[tuple[ArraySpec, int, Tensor]]:
        """Chunk `index` of some arrays, always computed in the same batches."""
        start = index * self.step
        stop = min(start + self.step, self.spec.rows)
        paths = {array.path for array in wanted}
        buffers = {array.path: torch.zeros(array.chunks, dtype=writer.TORCH_DTYPES[array.dtype]) for array in wanted}
        for first in range(0, stop - start, self.spec.batch_rows):
            batch = tokens[first : first + self.spec.batch_rows]
            last = first + len(batch)
            resid = self.model.prefix(batch, self.spec.hooks)
            for hook, vectors in resid.items():
                self._refuse_non_finite(vectors, hook, start + first)
                if f"acts/{hook}" in paths:
                    buffers[f"acts/{hook}"][first:last] = vectors
            if start + first < self.spec.clean_rows and paths & {
                path for path in self.specs if not path.startswith("acts/")
            }:
                for path, values in self.clean(batch, resid[self.deepest]).items():
                    if path in paths:
                        buffers[path][first:last] = values
            self.report("activations", start + last)
        for array in wanted:
            yield array, index, buffers.pop(array.path)

    def _refuse_non_finite(self, vectors: Tensor, hook: str, row: int) -> None:
        if not torch.isfinite(vectors).all():
            bad = row + int((~torch.isfinite(vectors)).flatten(1).any(1).nonzero()[0])
            raise StoreError(
                f"the activations of row {bad} at {hook} are not finite in {self.spec.model.dtype}; "
                "use --set model.dtype=float32, or another model"
            )

    def clean(self, tokens_BT: Tensor, resid_BTD: Tensor) -> dict[str, Tensor]:
        """What an evaluation store keeps of one batch: clean final vector and loss, and loss and KL of each hook's
        ablation.
        """
        final = self.model.suffix(self.deepest, resid_BTD)
        rows, context = tokens_BT.shape
        targets = torch.cat([tokens_BT[:, 1:], tokens_BT[:, :1]], 1).flatten().long().to(final.device)
        flat = final.flatten(0, 1)
        kept = {"clean/loss": torch.zeros(rows * context)}
        hooks = self.spec.hooks if self.spec.split == "eval" else ()  # whose residual is zeroed
        kept |= {f"ablation/{hook}/{kind}": torch.zeros(rows * context) for hook in hooks for kind in ("loss", "kl")}
        for first in range(0, rows * context, SLICE_TOKENS):
            part = slice(first, first + SLICE_TOKENS)
            logits = self.model.unembed(flat[part])
            kept["clean/loss"][part] = token_losses.cross_entropy(logits, targets[part]).float().cpu()
            if not hooks:
                continue
            clean = token_losses.distribution(logits)
            for hook in hooks:
                ablated = self.ablated_logits(hook).expand_as(logits)
                kept[f"ablation/{hook}/loss"][part] = token_losses.cross_entropy(ablated, targets[part]).float().cpu()
                kept[f"ablation/{hook}/kl"][part] = (
                    token_losses.kl_divergence(clean.probs, clean.log_probs, ablated).float().cpu()
                )
        results = {path: values.view(rows, context) for path, values in kept.items()}
        for path, values in results.items():
            if path.endswith("loss"):
                values[:, -1] = 0  # the last token of a row has no next one
        return {"clean/final": final.cpu(), **results}

    def ablated_logits(self, hook: str) -> Tensor:
        """Logits [1, V] after zeroing the residual at `hook`: the same for every token, since position only enters by
        rotation.
        """
        if hook not in self._ablated:
            zero = torch.zeros(1, 1, self.model.d_model, dtype=self.model.dtype)
            self._ablated[hook] = self.model.unembed(self.model.suffix(hook, zero))[0]
        return self._ablated[hook]

    # --- statistics ---------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Take down this worker's share of the checksums; worker 0 then writes the statistics, the lists and, last,
        that the store is complete.
        """
        told = self._tallied()
        if told is not None and self.share.rank == 0:
            kept, checks = told
            update = {
                "statistics": self.write_statistics(checks),
                "kept_tokens": int(kept.sum(dtype=np.int64)),
                "complete": True,
                "documents_digest": self.documents_digest,
            }
            header = self.header().model_copy(update=update)
            writer.write_list(self.target, kept_array(self.spec, self.model.d_model), kept)
            every = every_array(header)
            header = header.model_copy(update={"checks": writer.seal(self.target, every, checks)})
            writer.write_metadata(
                self.target, header, [*every, checks_array(every)]
            )  # all: it may have been harmed since
        if read_header(self.target).complete:
            clear(self.target)

    def _tallied(self) -> tuple[NDArray[np.uint32], dict[str, NDArray[np.uint32]]] | None:
        """Write this worker's parts of the tally, and compute again what is not as it was written down; for worker 0
        what all parts tell.

        None if there is nothing left to do.
        """
        assert self.written is not None
        specs, wrong = list(self.specs.values()), []
        for attempt in range(4):
            if self._finished():
                return None
            wrong = sealing.write_parts(self.target, specs, self.model.special_ids, self.share, self.written)
            if not wrong:
                if self.share.rank:
                    return None
                if (told := sealing.collected(self.target, specs, self.written.key)) is not None:
                    return told
                continue
            if self._shared and attempt == 0:  # they may have been written and not been written down yet
                time.sleep(2 * chunk_log.EVERY)
                continue
            if any(array.path == "tokens" for array, _ in wrong):
                break
            by_index: dict[int, list[ArraySpec]] = {}
            for array, index in wrong:
                by_index.setdefault(index, []).append(array)
            again = (self.compute(index, by_index[index], self.tokens(index)) for index in sorted(by_index))
            self._publish(itertools.chain.from_iterable(again))
        changed = wrong[0][0].chunk_file(self.target, wrong[0][1]) if wrong else self.target / sealing.FOLDER
        raise StoreError(f"{changed} was changed while the store was being built; run the same command again")

    def write_statistics(self, checks: Mapping[str, NDArray[np.uint32]] = {}) -> dict[str, HookSummary]:
        """Write the arrays of statistics and return the scalars of each hook; `checks` are the checksums of chunks."""
        statistics = {}
        for number, hook in enumerate(self.spec.hooks):
            self.report("statistics", number)
            acts, tokens = (
                MappedArray(self.target, self.specs[path], checks.get(path)) for path in (f"acts/{hook}", "tokens")
            )
            statistics[hook], moments = summarise(self.target, acts, tokens, self.model.special_ids)
            for name, values in moments.items():
                array = statistics_arrays(self.spec, self.model.d_model)[f"stats/{hook}/{name}"]
                writer.write_chunk(self.target, array, 0, values)
        self.report("statistics", len(self.spec.hooks))
        return statistics
