"""Where a language model's files come from: a hub id, a local folder, or a .gguf file.

Whatever the source, the result is a local folder with config.json, safetensors and tokenizer files.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hsae.cache.config import ModelConfig
from hsae.cache.errors import ModelError
from hsae.cache.language_model.gguf import PACKAGED, Say, gguf_model
from hsae.cache.language_model.model_files import (
    TOKENIZER_FILES,
    VOCABULARIES,
    WEIGHTS,
    check_names,
    vocabulary_files,
    weight_files,
)

TOKENIZER_PATTERNS = ["config.json", *TOKENIZER_FILES, *VOCABULARIES]
HUB_PATTERNS = [WEIGHTS, "*.json", *VOCABULARIES]
HUB_TIMEOUT_S = 10.0
COMMIT = re.compile("[0-9a-f]{40}")
MEMORY_URL = "memory://"
"""How the id of a model, or the name of a corpus, begins that was given in memory."""


def model_folder(config: ModelConfig, say: Say = lambda text: None) -> Path:
    """The local folder of a model's files, downloaded or converted if need be. Raises ModelError without one."""
    if (gguf := gguf_model(config.id)) is not None:
        return gguf.folder(say)
    path = Path(config.id).expanduser()
    if path.suffix == ".gguf":
        raise ModelError(f"model.id {config.id!r}: there is no such file")
    if path.is_dir():
        _check_files(config, path)
        return path.resolve()
    if config.id.startswith(MEMORY_URL):
        raise ModelError(
            f"the model {config.id} was given in memory; give it again: lm=hsae.LanguageModel.of(model, tokenizer)"
        )
    if not on_hub(config):
        raise ModelError(
            f"model.id {config.id!r}: no such folder; give a local folder, a .gguf file, a hub id such as "
            f"google/gemma-2-2b, or a packaged model ({', '.join(PACKAGED)})"
        )
    if (folder := folder_here(config)) is None:
        info = _hub_info(config)  # fails within seconds where there is no hub or no access
        check_names(config.id, (sibling.rfilename for sibling in info.siblings or []))
        say(f"downloading {config.id}")
        folder = _fetched(config, HUB_PATTERNS)
    _check_files(config, folder)
    return folder


def folder_here(config: ModelConfig) -> Path | None:
    """The folder of a model's files as it is on this machine, nothing downloaded or converted; None without one."""
    if (gguf := gguf_model(config.id)) is not None:
        return gguf.folder_here
    if not on_hub(config):
        path = Path(config.id).expanduser()
        return path.resolve() if path.suffix != ".gguf" and path.is_dir() else None
    snapshot = _hub_snapshot(config)
    return snapshot if snapshot is not None and _has_weights(snapshot) else None


def tokenizer_folder(config: ModelConfig) -> Path:
    """A local folder with the tokenizer's files; of a model on the hub only these are downloaded. Raises ModelError."""
    if not on_hub(config):
        return model_folder(config)
    snapshot = _hub_snapshot(config)
    if snapshot is not None and _has_weights(snapshot):
        return snapshot
    try:
        _hub_info(config)  # fails within seconds where there is no hub or no access
        return _fetched(config, TOKENIZER_PATTERNS)
    except ModelError:
        has_tokenizer = snapshot and ((snapshot / "tokenizer.json").is_file() or vocabulary_files(snapshot))
        if snapshot and has_tokenizer and (snapshot / "config.json").is_file():
            return snapshot
        raise


def on_hub(config: ModelConfig) -> bool:
    """Whether a model's id is one of the hub's, by its form and because there is no such folder."""
    if config.id in PACKAGED or config.id.count("/") != 1 or config.id.startswith((".", "/", "~")):
        return False
    path = Path(config.id)
    return not path.is_dir() and path.suffix != ".gguf"


def commit_of(config: ModelConfig, folder: Path) -> str | None:
    """The commit that a model of the hub was taken from; None for models from elsewhere."""
    return folder.name if on_hub(config) and COMMIT.fullmatch(folder.name) else None


def weight_bytes(config: ModelConfig) -> int | None:
    """Bytes of the model's weights on disk, without downloading or converting; None if that can't be told."""
    if (gguf := gguf_model(config.id)) is not None:
        return gguf.bytes
    if (folder := folder_here(config)) is not None:
        return sum(file.stat().st_size for file in folder.glob(WEIGHTS))
    if not on_hub(config):
        return None
    return sum(
        sibling.size or 0 for sibling in _hub_info(config).siblings or [] if sibling.rfilename.endswith(".safetensors")
    )


def config_file(config: ModelConfig) -> Path | None:
    """The model's config.json, fetched alone from the hub if need be; None for a GGUF file that was not converted."""
    if not on_hub(config):
        if (folder := folder_here(config)) is None:
            return None
        _check_files(config, folder)
        return folder / "config.json"
    from huggingface_hub import hf_hub_download

    with _clear_hub_errors(config):
        return Path(hf_hub_download(config.id, "config.json", revision=config.revision))


def _check_files(config: ModelConfig, folder: Path) -> None:
    check_names(f"model.id {config.id!r}", (file.name for file in folder.iterdir()))


def _hub_info(config: ModelConfig) -> Any:
    from huggingface_hub import HfApi

    with _clear_hub_errors(config):
        return HfApi().model_info(config.id, revision=config.revision, timeout=HUB_TIMEOUT_S, files_metadata=True)


def _hub_snapshot(config: ModelConfig) -> Path | None:
    """The folder of a model in the hub's local cache, with whatever was fetched of it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(config.id, revision=config.revision, allow_patterns=HUB_PATTERNS, local_files_only=True)
        )
    except (LocalEntryNotFoundError, FileNotFoundError):
        return None
    except HFValidationError:
        raise ModelError(f"model.id {config.id!r} is neither a folder here nor a name that the hub can have") from None


def _has_weights(snapshot: Path) -> bool:
    """Whether all that the index names is there, and so no download broke off."""
    try:
        return bool(weight_files(snapshot))
    except ModelError:
        return False


def _fetched(config: ModelConfig, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    with _clear_hub_errors(config):
        return Path(snapshot_download(config.id, revision=config.revision, allow_patterns=patterns))


@contextlib.contextmanager
def _clear_hub_errors(config: ModelConfig) -> Iterator[None]:
    """Turns the hub client's errors into ModelError with what to do next."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    name = config.id
    try:
        yield
        return
    except GatedRepoError:
        terms = f"accept its terms at https://huggingface.co/{name}"
        text = f"{name} is gated: {terms}, then run `hf auth login` (or set HF_TOKEN)"
    except RevisionNotFoundError:
        text = f"{name} has no revision {config.revision!r}"
    except RepositoryNotFoundError:
        text = f"the hub has no model {name!r}, or you may not see it; check the id, or run `hf auth login`"
    except HfHubHTTPError as error:
        text = f"the hub refused {name}: {error}"
    except Exception as error:
        text = (
            f"{name} is neither on this machine nor is the hub reachable ({type(error).__name__}); give a local folder "
            "or .gguf file with --set model.id=PATH, or try offline with --plan gemma-3-270m"
        )
    raise ModelError(text) from None
