"""Stage 1: run the language model once over the corpus and keep what its residual stream said."""

import contextlib
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from hsae.cache.building.builder import UNFINISHED, Builder, clear
from hsae.cache.building.contents import StoreContents, TokenisedText, existing_header, text_of
from hsae.cache.building.liveness import sign_of_life, signs_of_life
from hsae.cache.building.packing_ahead import packing_ahead
from hsae.cache.building.repair import mend_documents
from hsae.cache.config import ModelConfig, at_commit
from hsae.cache.errors import CorpusError, ModelError, StoreError
from hsae.cache.format.layout import Header, is_finished, read_header
from hsae.cache.format.spec import StoreSpec
from hsae.cache.language_model import sources
from hsae.cache.language_model.lm import LanguageModel
from hsae.cache.language_model.model_files import check_weights
from hsae.cache.launcher import ALONE, Share
from hsae.cache.progress import Progress, silent
from hsae.cache.reading.provenance import DIGESTS, is_made_of, pin_commit
from hsae.cache.storage.paths import Place, check_writable, locked, place
from hsae.cache.text.corpora import Corpus
from hsae.cache.text.packing import TOKENISED_AT_ONCE
from hsae.cache.text.python_text import CORPORA

Stores = list[tuple[StoreSpec, Place]]


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

    Text is packed in a thread, ahead of the model: `progress` is called from both. `model` and `text` take the place of
    the model and the corpus that the specs name. With a share of several, workers on one store divide its chunks:
    worker 0 packs the tokens and finishes the store, the others return when no chunk is missing. Raises UserError if
    a store can't be made; what is there stays.
    """
    folder = place(root)
    targets: list[Place] = [folder / spec.name for spec in specs]
    finished, missing = _divided(specs, folder)
    for spec, target in finished if share.rank == 0 else ():
        if model is None:
            check_current(target, spec, text is None, say)
        _clear_finished(target)
        if spec.rows_per_document is not None:
            mend_documents(target, device=device, say=say)
    if not missing:
        return targets
    config = pin_commit(specs[0].model, folder)
    _check_makeable(missing, config)
    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as locks:
        for _, target in missing:
            locks.enter_context(locked(target, f".rank{share.rank}" if share.rank else ""))
        if share.world > 1 and share.rank == 0:
            locks.enter_context(signs_of_life([target for _, target in missing]))
        headers = [existing_header(target) for _, target in missing]
        texts = [text or text_of(spec, header, anew=True) for (spec, _), header in zip(missing, headers, strict=True)]
        for one in texts if share.rank == 0 else ():
            check_text(one)
        if share.world > 1 and device == "cuda":
            torch.cuda.set_device(share.local_rank % torch.cuda.device_count())
        if model is None:
            say(f"loading {specs[0].model.id}")
            model = LanguageModel.load(config, device=device, say=say)
        builders = [
            Builder(StoreContents(spec, model, one, older=header is not None and header.older), target, progress, share)
            for (spec, target), one, header in zip(missing, texts, headers, strict=True)
        ]
        for note in dict.fromkeys(note for one in texts for note in one.notes):
            say(note)
        for builder in builders:
            builder.prepare()
        try:
            with packing_ahead([(builder.packed, builder.pack) for builder in builders]):
                for builder in builders:
                    builder.write_activations()
                    builder.finish()
        except (CorpusError, ModelError):
            for builder in builders:
                builder.discard_impossible()
            raise
    return targets


def check(specs: Sequence[StoreSpec], root: str | Place, say: Callable[[str], None] = lambda text: None) -> None:
    """Raise UserError for what `build` refuses before it loads the model; packaged text is not looked at."""
    folder = place(root)
    finished, missing = _divided(specs, folder)
    for spec, target in finished:
        check_current(target, spec, spec.corpus.corpus not in CORPORA, say)
    if missing:
        _check_makeable(missing, pin_commit(specs[0].model, folder))
        check_writable(folder, trial=False)
    for spec, target in missing:
        if spec.corpus.corpus not in CORPORA:
            check_text(text_of(spec, existing_header(target)))


def check_text(text: Corpus | TokenisedText) -> None:
    """Read a corpus's first documents, before a model is loaded for it. Raises CorpusError if they can't be had."""
    if isinstance(text, Corpus):
        for _ in itertools.islice(text.documents(), TOKENISED_AT_ONCE):
            pass


def _divided(specs: Sequence[StoreSpec], folder: Place) -> tuple[Stores, Stores]:
    """The stores that are finished, and the others."""
    every: Stores = [(spec, folder / spec.name) for spec in specs]
    missing = [(spec, target) for spec, target in every if not is_finished(target, spec)]
    return [one for one in every if one not in missing], missing


def _check_makeable(missing: Stores, model: ModelConfig) -> None:
    """Raise UserError for a codec that no build makes, and for weights on this machine that can't be loaded."""
    if any(spec.codec == "int8" for spec, _ in missing):
        raise StoreError(
            "int8 stores are made from finished ones: build with --set cache.codec=mappable, then "
            "`hsae cache recode STORE FOLDER --codec int8`"
        )
    if (there := sources.folder_here(model)) is not None:
        check_weights(there)  # what can't be loaded leaves no folder behind


def check_current(target: Place, spec: StoreSpec, compare_text: bool, say: Callable[[str], None]) -> None:
    """Raise StoreError if the model, the tokenizer or the text are no longer those that a finished store was made from.

    The model is not loaded, nor downloaded or converted: what can't be had on this machine is not compared, and that
    is said.
    """
    header = read_header(target)
    folder = None
    with contextlib.suppress(ModelError, OSError):
        folder = sources.folder_here(at_commit(spec.model, header.model_commit))
    now: dict[str, Callable[[], bool]] = {}
    not_compared = {}
    if folder is None:
        not_compared["model"] = f"{spec.model.id} is not on this machine"
    else:
        now |= {what: partial(is_made_of, what, header, folder) for what in DIGESTS}
    if compare_text:
        now["corpus"] = partial(_is_text, header)
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
                "move it away and build it again, or build elsewhere with --set cache.dir=FOLDER"
            )
    for what, reason in not_compared.items():
        say(f"{target.name}: its {what} was not compared with what there is now ({reason})")


def _is_text(header: Header) -> bool:
    """Whether a store's text is as it was. Raises CorpusError if it can't be had or was not written down."""
    corpus = text_of(header.spec, header)
    if corpus.commit is not None and header.corpus_commit is None and corpus.digest != header.corpus_digest:
        raise CorpusError(f"an older hsae made it, and did not write down which commit of {corpus.name} it read")
    return corpus.digest == header.corpus_digest


def _clear_finished(target: Place) -> None:
    """Delete what a build that was killed after its last step has left, if anything can be deleted there."""
    if not isinstance(target, Path) and target.read_only:
        return
    with contextlib.suppress(StoreError, OSError):
        if sign_of_life(target).is_file() or any((target / folder).is_dir() for folder in UNFINISHED):
            with locked(target):
                clear(target)
