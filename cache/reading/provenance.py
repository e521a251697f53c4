"""Whether a store was made with a model and a tokenizer that are here now, and with which commit of them."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hsae.cache.config import ModelConfig, at_commit
from hsae.cache.errors import StoreError
from hsae.cache.format.layout import Header, build_command, read_header
from hsae.cache.language_model.in_memory import IN_MEMORY, tokenizer_state_digest
from hsae.cache.language_model.model_files import tokenizer_digest, weights_digest
from hsae.cache.language_model.sources import on_hub
from hsae.cache.storage.paths import Place, children, place

if TYPE_CHECKING:
    from hsae.cache.language_model.lm import LanguageModel
    from hsae.cache.suites.suite_files import SuiteHeader

DIGESTS = {"model": weights_digest, "tokenizer": tokenizer_digest}


def pin_commit(model: ModelConfig, root: str | Place) -> ModelConfig:
    """A model of the hub at the commit that stores in folder `root` were made with, whatever its branch is now."""
    if on_hub(model):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for store in children(place(root)):
                with contextlib.suppress(StoreError):
                    header = read_header(store) if store.name.endswith(".zarr") else None
                    if header is not None and header.spec.model == model and header.model_commit is not None:
                        return at_commit(model, header.model_commit)
    return model


def check_model(store: Place, header: "Header | SuiteHeader", model: "LanguageModel", suite: str | None = None) -> None:
    """Raise StoreError unless a store was made with the weights and the tokenizer of a model that was loaded for it."""
    nouns: dict[Literal["model", "tokenizer"], str] = {"model": "weights", "tokenizer": "tokenizer files"}
    for part, noun in nouns.items():
        if not is_made_of(part, header, model.folder, model.digest_like(part, getattr(header, f"{part}_digest"))):
            raise _other(store, noun, suite)


def check_tokenizer(store: Place, header: "Header | SuiteHeader", tokenizer: Any) -> None:
    """Raise StoreError unless a store was made with a tokenizer that was loaded for it."""
    digest = tokenizer_state_digest(tokenizer) if header.tokenizer_digest.startswith(IN_MEMORY) else None
    if not is_made_of("tokenizer", header, Path(tokenizer.name_or_path), digest):
        raise _other(store, "tokenizer files")


def is_made_of(part: str, header: "Header | SuiteHeader", folder: Path | None, digest: str | None = None) -> bool:
    """Whether a store was made with the `model` or the `tokenizer` of a folder; an older one by the rule of its time.

    `digest` is that of the folder, where it is known; a model that was given in memory has a digest, and no folder.
    """
    wanted = getattr(header, f"{part}_digest")
    if folder is None:
        return bool(wanted == digest)
    if wanted == (DIGESTS[part](folder) if digest is None else digest):
        return True
    return header.older and wanted == DIGESTS[part](folder, anew=True, older=True)


def _other(store: Place, what: str, suite: str | None = None) -> StoreError:
    command = build_command(store) if suite is None else f"hsae cache build --suite {suite}"
    return StoreError(
        f"{store} was made with other {what} than the model has now; move it away and make it again with `{command}`"
    )
