"""What this machine and this installation have: versions, devices, disk, caches, extras and credentials."""

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from hsae.cache.files import home
from hsae.cache.language_model.matmul import bfloat16_is_slow
from hsae.cache.progress import format_bytes
from hsae.cache.storage.paths import existing_folder

SECRETS = {"HSAE_TOKEN": "stores over HTTP", "OPENAI_API_KEY": "autointerp's judge"}
"""Environment variables that hold a secret, and what it is for."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    group: str
    """`version`, `device`, `disk`, `cache`, `extra` or `credential`."""
    name: str
    value: str
    """What was found, in words; of a secret only whether there is one."""
    is_bad: bool = False
    """Whether hsae itself can't work as it is; a missing extra is not bad."""


def examine() -> list[Finding]:
    """Everything that can be looked at in a few seconds, without network and without changing anything."""
    return [*_versions(), *_devices(), *_disks(), *_caches(), *_extras(), *_credentials()]


def _requirements() -> dict[str, list[Requirement]]:
    """What each extra needs; the empty name has what hsae itself needs."""
    needed: dict[str, list[Requirement]] = {"": []}
    for requirement in map(Requirement, requires("hsae") or ()):
        text = str(requirement.marker or "")
        extra = text.rpartition("extra == ")[2].strip("\"'") if "extra == " in text else ""
        if requirement.name != "hsae":
            needed.setdefault(extra, []).append(requirement)
    return needed


def _state(requirement: Requirement) -> str | None:
    """What is wrong with an installed requirement; None if nothing is."""
    try:
        there = version(requirement.name)
    except PackageNotFoundError:
        return f"{requirement.name} is missing"
    return None if requirement.specifier.contains(there, prereleases=True) else f"{requirement} needed, {there} found"


def _versions() -> Iterator[Finding]:
    yield Finding(group="version", name="hsae", value=f"{version('hsae')} in {Path(__file__).parent.parent}")
    yield Finding(group="version", name="python", value=f"{platform.python_version()} in {sys.prefix}")
    yield Finding(group="version", name="system", value=platform.platform())
    for requirement in _requirements()[""]:
        problem = _state(requirement)
        yield Finding(
            group="version",
            name=requirement.name,
            value=problem or version(requirement.name),
            is_bad=problem is not None,
        )


def _devices() -> Iterator[Finding]:
    import torch

    speed = "float32 is the faster type" if bfloat16_is_slow("cpu") else "bfloat16 is fast"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    text = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {format_bytes(memory)} of memory, {speed}"
    yield Finding(group="device", name="cpu", value=text)
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        text = f"{gpu.name}, {format_bytes(gpu.total_memory)}, compute capability {gpu.major}.{gpu.minor}"
        yield Finding(group="device", name=f"cuda:{index}", value=text)
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "CUDA finds no GPU"
        yield Finding(group="device", name="cuda", value=f"none: {why}")


def _disks() -> Iterator[Finding]:
    for name, folder in {"here": Path.cwd(), "caches": home(), "temporary files": Path(tempfile.gettempdir())}.items():
        free = shutil.disk_usage(existing_folder(folder)).free
        yield Finding(group="disk", name=name, value=f"{format_bytes(free)} free at {folder}")


def _caches() -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    places = {"models": home() / "models", "scratch": home() / "scratch", "hub": Path(HF_HUB_CACHE)}
    for name, folder in places.items():
        there = f"{format_bytes(_bytes_in(folder))} in {folder}" if folder.is_dir() else f"empty ({folder})"
        yield Finding(group="cache", name=name, value=there)


def _bytes_in(folder: Path) -> int:
    """Bytes of all files below a folder; those that vanish or may not be read are left out."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            try:
                total += 0 if path.is_symlink() else path.stat().st_size
            except OSError:
                continue
    return total


def _extras() -> Iterator[Finding]:
    for extra, needed in _requirements().items():
        if extra and extra != "dev":
            missing = [problem for requirement in needed if (problem := _state(requirement)) is not None]
            advice = f"{', '.join(missing)}; pip install 'hsae[{extra}]'"
            yield Finding(group="extra", name=extra, value=advice if missing else "installed")


def _credentials() -> Iterator[Finding]:
    from huggingface_hub import get_token

    yield Finding(
        group="credential", name="hub", value="logged in" if get_token() else "not logged in (`hf auth login`)"
    )
    profile = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or Path.home() / ".aws" / "credentials")
    aws = "set" if "AWS_ACCESS_KEY_ID" in os.environ else f"in {profile}" if profile.is_file() else "not set"
    yield Finding(group="credential", name="S3", value=aws)
    for name, what in SECRETS.items():
        yield Finding(group="credential", name=name, value=f"{'set' if os.environ.get(name) else 'not set'} ({what})")
