"""The files of a model's folder: which of them are read, what is wrong with them, and digests of them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hsae.cache.errors import ModelError
from hsae.cache.files import files_digest, parse_json

WEIGHTS = "*.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
VOCABULARIES = (
    *("*.model", "*.model.v*", "vocab.json", "vocab.txt", "merges.txt"),
    *("*.bpe", "*.tiktoken", "tekken.json", "added_tokens.json"),
)
"""What tokenizers without a tokenizer.json are made of."""
LFS_POINTER = b"version https://git-lfs"
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
NUMBERS = {"F64", "F32", "F16", "BF16"}  # types of tensors that are weights as they stand


def check_names(name: str, names: Iterable[str]) -> None:
    """Refuse a folder or repository for the files it has and lacks. Raises ModelError."""
    present = set(names)
    if adapters := [file for file in ADAPTERS if file in present]:
        raise ModelError(
            f"{name} holds an adapter ({adapters[0]}), which would be applied or left out depending on what else is "
            "installed; merge it into the model (peft's merge_and_unload, then save_pretrained), or move the adapter's "
            "files away to use the model alone"
        )
    if "config.json" not in present:
        raise ModelError(f"{name} is a folder without config.json; it must hold a model in Hugging Face's layout")
    if not any(file.endswith(".safetensors") for file in present):
        raise ModelError(f"{name} has no .safetensors files; other weight formats can run code and are not read")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads. Raises ModelError if it would read other files."""
    named = read_object(folder / "config.json").get("transformers_weights")
    names = ["model.safetensors", "model.safetensors.index.json"] if named is None else [str(named)]
    first = next((name for name in names if _beside(folder, name)), None)
    if first is None:
        missing = " and no ".join(names)
        raise ModelError(
            f"{folder} has no {missing}; save the model with transformers' save_pretrained, which names its files so"
        )
    if not first.endswith(".json"):
        return [folder / first]
    index = read_object(folder / first).get("weight_map")
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
        refuse_pointer(path)
        try:
            with safe_open(path, "pt") as file:
                types = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} is cut short or damaged ({error}); download or copy the model again") from None
        for key, kind in types.items():
            if key.endswith(".weight") and kind not in NUMBERS:
                raise ModelError(
                    f"{path}: {key} holds numbers of type {kind}: quantised weights are not read; "
                    "give the model in bfloat16, float16 or float32"
                )


def weights_digest(folder: Path, *, anew: bool = False, older: bool = False) -> str:
    """`files_digest` of config.json and weights; `older` as hsae made it before it looked at the index."""
    files = [folder / "config.json", *sorted(folder.glob(WEIGHTS))]
    if not older:
        loaded = weight_files(folder)
        others = {path for path in files[1:] if not path.name.startswith("consolidated")} - set(loaded)
        if others and loaded != [folder / "model.safetensors"]:  # then the index says which files are read
            files += sorted(folder.glob("*.safetensors.index.json"))
    return files_digest(files, anew=anew)


def tokenizer_digest(folder: Path, *, anew: bool = False, older: bool = False) -> str:
    """`files_digest` of the tokenizer; `older` as hsae made it before it looked at vocabularies."""
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not older and not (folder / "tokenizer.json").is_file():  # which would hold the whole vocabulary
        files += sorted(vocabulary_files(folder) - set(files))
    return files_digest(files, anew=anew)


def vocabulary_files(folder: Path) -> set[Path]:
    """The files of a folder that tokenizers without a tokenizer.json are made of."""
    return {path for pattern in VOCABULARIES for path in folder.glob(pattern)}


def read_object(path: Path) -> dict[str, Any]:
    """An object of JSON. Raises ModelError for anything else."""
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read as JSON: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object")
    return content


def _beside(folder: Path, name: str) -> bool:
    return Path(name).name == name and (folder / name).is_file()


def refuse_pointer(path: Path) -> None:
    """Raise ModelError for a file that only says where git-LFS has the real one."""
    if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(LFS_POINTER):
        raise ModelError(f"{path} is a pointer of git-LFS, not the file itself; run `git lfs pull` in {path.parent}")


def one_line(error: BaseException) -> str:
    """Kind and text of another library's error, without its line breaks."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}" if lines else type(error).__name__
