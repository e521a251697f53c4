"""An activation store of a model and texts that are in memory.

Shapes: T context length.
"""

import contextlib
import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from hsae.cache.building.build import build
from hsae.cache.building.contents import TokenisedText
from hsae.cache.config import Codec, CorpusConfig, ModelConfig, Split
from hsae.cache.device import can_compile
from hsae.cache.errors import CorpusError, ModelError, UserError
from hsae.cache.format.spec import StoreSpec, default_codec, gpu_rows
from hsae.cache.language_model import in_memory
from hsae.cache.language_model.lm import LanguageModel
from hsae.cache.language_model.loading import positions
from hsae.cache.language_model.sources import MEMORY_URL
from hsae.cache.progress import Progress, shown
from hsae.cache.reading.store import ActivationStore
from hsae.cache.storage.paths import Place, check_writable, place
from hsae.cache.text.packing import Packer, tokenise

CLEAN_SHARE = 11
"""By default one of so many rows of an evaluation store has clean losses, as SAEBench's 200 batches of 2,200."""


def build_in_memory(
    model: Any,
    tokenizer: Any = None,
    *,
    texts: Iterable[str],
    hook: str | Sequence[str],
    folder: str | Place = "activations",
    split: Split = "train",
    context: int = 128,
    rows: int | None = None,
    clean_rows: int | None = None,
    prepend_bos: bool = True,
    batch_rows: int = 16,
    forward_rows: int | None = None,
    compile: bool | None = None,
    chunk_mib: float = 32,
    codec: Codec | None = None,
    progress: bool | Progress = True,
) -> ActivationStore:
    """Run a model in memory over texts and write the activations at a hook, or several, into a store in `folder`.

    `model` is a causal language model of transformers with its `tokenizer`, or a `LanguageModel`. It computes on the
    device where it is, in evaluation mode, and is left as it was; activations have its dtype. `texts` are documents,
    packed into rows of `context` tokens one after the other, as SAEBench packs them. They are read until `rows` rows
    are full, or to their end. One forward pass takes `forward_rows` rows, and `compile` says whether its layers run
    through torch.compile; None leaves both to the device: SAEBench's `batch_rows` and no on a processor, 8,192 tokens
    and yes on a GPU where that works.

    An evaluation store (split="eval") also has the clean model's losses for its first `clean_rows` rows, by default
    an eleventh of all. The store's name has a fingerprint of the weights, the tokenizer, the texts and all settings:
    the same call again goes on where it was interrupted, or opens what is finished.

    Raises UserError, before anything is written, for a model that can't be cut at the hook or computes something else
    there than in its own pass, for a tokenizer without BOS and EOS, and for too little text.

    >>> store = build_in_memory(model, tokenizer, texts=texts, hook="blocks.3.hook_resid_post")  # doctest: +SKIP
    """
    if context < 2 or any(number is not None and number < 1 for number in (batch_rows, forward_rows, rows)):
        raise UserError(
            f"context={context}, batch_rows={batch_rows}, forward_rows={forward_rows}, rows={rows}: give a context of "
            "2 or more, others of 1"
        )
    with _borrowed(model, tokenizer) as lm:
        hooks = (hook,) if isinstance(hook, str) else tuple(hook)
        lm.check_hooks(hooks)
        if (longest := positions(lm.config)) is not None and context > longest:
            raise ModelError(f"context={context}, but the model has positions for {longest}: lower context")
        check_writable(place(folder), trial=False)
        text, full = _tokenised(texts, lm, context, lm.bos_id if prepend_bos else None, rows)
        if clean_rows is None:
            clean_rows = max(1, full // CLEAN_SHARE // batch_rows) * batch_rows if split == "eval" else 0
        if not 0 <= clean_rows < full:
            raise CorpusError(
                f"{clean_rows} of {full} rows can't be clean rows; lower clean_rows or batch_rows, or give more texts"
            )
        if forward_rows is None and lm.device.startswith("cuda"):
            forward_rows = gpu_rows(context, batch_rows)
        identity = hashlib.sha256(f"{lm.model_digest}{lm.tokenizer_digest}".encode()).hexdigest()[:16]
        spec = StoreSpec(
            split=split,
            model=ModelConfig.model_validate(
                {"id": f"{MEMORY_URL}{identity}/{lm.config.model_type}", "dtype": str(lm.dtype).removeprefix("torch.")}
            ),
            hooks=hooks,
            corpus=CorpusConfig(corpus=f"{MEMORY_URL}{text.digest[:16]}"),
            context=context,
            prepend_bos=prepend_bos,
            batch_rows=batch_rows,
            forward_rows=None if forward_rows == batch_rows else forward_rows,
            compiled=can_compile(lm.device) if compile is None else compile,
            chunk_mib=float(chunk_mib),
            codec=codec or default_codec(folder),
            rows=full,
            clean_rows=clean_rows,
        )
        with shown(progress) as report:
            (path,) = build([spec], folder, model=lm, text=text, progress=report)
        return ActivationStore.open(path)


@contextlib.contextmanager
def _borrowed(model: Any, tokenizer: Any) -> Iterator[LanguageModel]:
    """The language model, and after it the caller's model as it was: what trains, and what takes gradients."""
    if isinstance(model, LanguageModel):
        yield model
        return
    in_memory.check_in_memory(model, tokenizer)
    training = [module for module in model.modules() if module.training]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        yield LanguageModel.of(model, tokenizer)
    finally:
        for module in training:
            module.training = True
        for parameter in learning:
            parameter.requires_grad = True


def _tokenised(
    texts: Iterable[str], lm: LanguageModel, context: int, bos_id: int | None, rows: int | None
) -> tuple[TokenisedText, int]:
    """(documents of token ids that fill the rows, full rows). Raises CorpusError for too little text."""
    if isinstance(texts, str):
        raise CorpusError("texts is one string; give documents: a list or another iterable of strings")
    digest = hashlib.sha256()
    documents: list[Sequence[int]] = []

    def strings() -> Iterator[str]:
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise CorpusError(f"text {number} is a {type(text).__name__}, not a string")
            hashes.append(hashlib.sha256(text.encode()).digest())
            yield text

    def read() -> Iterator[Sequence[int]]:
        for number, ids in enumerate(tokenise(strings(), lm.tokenizer)):
            digest.update(hashes[number])
            documents.append(array("i", ids))
            yield documents[-1]

    hashes: list[bytes] = []
    full = 0
    for full, _ in enumerate(Packer(context, bos_id).pack(read()), 1):
        if full == rows:
            break
    if full < (rows or 1):
        tokens = sum(map(len, documents))
        raise CorpusError(
            f"{len(documents):,} texts of {tokens:,} tokens fill {full:,} rows of {context} tokens; {rows or 1:,} "
            "were asked for: lower rows or context, or give more texts"
        )
    return TokenisedText(documents, digest.hexdigest()), full
