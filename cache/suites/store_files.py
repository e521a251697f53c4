"""The files of probe stores, wherever they lie: how each tells whether it is whole, and opening the parts of a set.

A file has eight hex digits behind its first `"crc32c":"`, which is the first key of a JSON file and in the metadata of a safetensors
file: the crc32c of all its bytes, with zeros for the digits, and of its name below `probe/texts` or `probe/answers` (a suite's file: of no
name). So a part that is flipped, cut or in another's place is known while nothing lists it yet. A suite's file lists the bytes and the
crc32c of every part that it needs, which are compared when a part is first opened.

Shapes: D residual width, N tokens of a part.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, Self, TypeVar

import torch
from pydantic import Field, ValidationError, model_validator
from safetensors.torch import save
from torch import Tensor

from hsae.cache.errors import StoreError
from hsae.cache.files import parse_json
from hsae.cache.format.chunk_codec import crc32c
from hsae.cache.format.spec import Config
from hsae.cache.reading import page_faults
from hsae.cache.reading.mapped_chunks import mapped_pages, scratch_pages
from hsae.cache.reading.scratch import scratch
from hsae.cache.storage.paths import Place, RemotePath, TooLongError, again, publish, sizes
from hsae.cache.suites.suite_spec import PROBE_FORMAT

PART_TEXTS = 256
ZEROS = "0" * 8
MARK, WITHIN = b'"crc32c":"', 64  # bytes from the beginning in which the mark is
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I64": torch.int64}
HeaderT = TypeVar("HeaderT", bound="SuiteHeader")


class Part(Config):
    """What a suite's file says of a part."""

    bytes: int = Field(ge=1)
    crc32c: int = Field(ge=0, lt=1 << 32)


class SuiteHeader(Config):
    """A suite's file: what all suites have in theirs."""

    crc32c: str = ZEROS
    format: int = PROBE_FORMAT
    d_model: int = Field(ge=1)
    model_digest: str
    tokenizer_digest: str
    versions: dict[str, str]
    parts: dict[str, list[Part]]
    """Set of residuals -> its parts."""
    passes: int
    """Prefix passes (texts) that the sets took."""
    older: ClassVar[bool] = False
    """As an activation store's; these files have always had a checksum, so that it can't be told of them."""

    @property
    def sets(self) -> dict[str, int]:
        """Set of residuals -> its texts."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if {name: -(-count // PART_TEXTS) for name, count in self.sets.items()} != {
            name: len(held) for name, held in self.parts.items()
        }:
            raise ValueError("its parts are not those of its texts")
        return self


# ---- whole files --------------------------------------------------------------------------------------------------------


def seal(data: bytes, name: str = "") -> bytes:
    """The bytes of a file that has a place for the digits, with the digits."""
    at, digits = _digits(data, name)
    return b"".join((memoryview(data)[:at], digits, memoryview(data)[at + len(digits) :]))


def is_whole(data: bytes | memoryview, name: str = "") -> bool:
    """Whether a file is what was written under this name."""
    if MARK not in bytes(data[:WITHIN]):
        return False
    at, digits = _digits(data, name)
    return data[at : at + len(digits)] == digits


def _digits(data: bytes | memoryview, name: str) -> tuple[int, bytes]:
    view, found = memoryview(data), 0
    at = bytes(view[:WITHIN]).index(MARK) + len(MARK)
    for piece in (view[:at], ZEROS.encode(), view[at + len(ZEROS) :], name.encode()):
        found = crc32c(piece, found) if piece else found
    return at, f"{found:08x}".encode()


def kept(file: Place, name: str) -> bytes | None:
    """The bytes of a file that is there and whole; else None."""
    try:
        data = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return data if is_whole(data, name) else None


def write_header(path: Place, header: SuiteHeader) -> None:
    """Publish a suite's file."""
    publish(path, seal(header.model_dump_json().encode()))


def read_header(path: Place, kind: type[HeaderT], suite: str) -> HeaderT:
    """A suite's file. Raises StoreError if it is missing, damaged or of another format."""
    build = f"hsae cache build --suite {suite}"

    def read() -> HeaderT:
        data = path.read_bytes()
        try:
            content = parse_json(data)
            if isinstance(content, dict) and content.get("format") != PROBE_FORMAT:
                raise StoreError(
                    f"{path} has format {content.get('format')!r}, not {PROBE_FORMAT}; make it again with: {build}"
                )
            if not is_whole(data):
                raise ValueError("it fails its checksum")
            return kind(**content)
        except StoreError:
            raise
        except (ValidationError, ValueError, TypeError) as error:
            detail = str(error).splitlines()[0]
            raise StoreError(f"{path} is damaged ({detail}); make it again with: {build}") from None

    try:
        return again(path, read, StoreError)
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(f"there is no probe store {path}; make it with: {build}") from None


# ---- parts --------------------------------------------------------------------------------------------------------------


def part_name(number: int) -> str:
    """The name of a part's file."""
    return f"part-{number:05}.safetensors"


def part_bytes(tensors: Mapping[str, Tensor], name: str) -> bytes:
    """A part's file."""
    return seal(save(dict(tensors), {"crc32c": ZEROS}), name)


def listed(data: bytes) -> Part:
    """What a suite's file says of a part with these bytes."""
    return Part(bytes=len(data), crc32c=crc32c(data))


class Parts:
    """The parts of a set, mapped where they lie or from their copies in the scratch folder.

    Raises StoreError, which names the part, if one is missing, has another length or, when it is opened, another checksum.
    """

    def __init__(self, folder: Place, parts: Sequence[Part], suite: str) -> None:
        self.folder, self.parts, self.build = folder, parts, f"hsae cache build --suite {suite}"
        self._checked: set[int] = set()
        """Local parts whose checksums were tested."""
        found = sizes(folder)
        for number, part in enumerate(parts):
            if (size := found.get(part_name(number))) != part.bytes:
                raise self._missing(number) if size is None else self._damaged(number, self._length(number, size))

    def __len__(self) -> int:
        return len(self.parts)

    def open(self, number: int) -> dict[str, Tensor]:
        """Each hook's [N, D] and `lengths` [texts], over mapped pages. Writing to them changes no file."""
        part, file = self.parts[number], self.folder / part_name(number)
        page_faults.note(str(self.folder))
        if isinstance(file, Path):
            try:
                pages = mapped_pages(file, part.bytes)
            except (FileNotFoundError, NotADirectoryError):
                raise self._missing(number) from None
            except ValueError:
                raise self._damaged(number, self._length(number, file.stat().st_size)) from None
            if number not in self._checked:
                self._check(number, pages.numpy().data)
                self._checked.add(number)
        else:
            key = f"{file}|{part.bytes}|{part.crc32c}"
            pages, _ = scratch_pages(
                partial(scratch().fetch, key, part.bytes, partial(self._fetched, number)), part.bytes
            )
        try:
            return _tensors(pages)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
            raise self._damaged(number, "is no safetensors file of residuals") from None

    def _fetched(self, number: int) -> bytes:
        file, size = self.folder / part_name(number), self.parts[number].bytes
        assert isinstance(file, RemotePath)

        def read() -> bytes:
            try:
                data = file.read_bytes(size)
            except TooLongError:
                raise self._damaged(number, f"is more than {size} bytes long") from None
            if len(data) != size:
                raise self._damaged(number, self._length(number, len(data)))
            self._check(number, data)
            return data

        try:
            return again(file, read, StoreError)
        except (FileNotFoundError, NotADirectoryError):
            raise self._missing(number) from None

    def _check(self, number: int, data: bytes | memoryview) -> None:
        found, name = crc32c(data), part_name(number)
        if found == self.parts[number].crc32c:
            return
        if any(found == part.crc32c for part in self.parts):
            problem = "is another part, put in this one's place"
        elif is_whole(data, f"{self.folder.name}/{name}"):
            problem = "was made anew, with other numbers than those that the store was made with"
        else:
            problem = "fails its checksum"
        raise self._damaged(number, problem)

    def _length(self, number: int, size: int) -> str:
        return f"is {size} bytes long, not {self.parts[number].bytes}"

    def _missing(self, number: int) -> StoreError:
        return StoreError(f"{self.folder / part_name(number)} is missing; go on with: {self.build}")

    def _damaged(self, number: int, problem: str) -> StoreError:
        return StoreError(f"{self.folder / part_name(number)} {problem}; mend the store with: {self.build}")


def _tensors(pages: Tensor) -> dict[str, Tensor]:
    """A safetensors file's tensors over its pages; its checksum has been tested."""
    data = pages.numpy().data
    start = 8 + int.from_bytes(data[:8], "little")
    found = {}
    for name, told in parse_json(bytes(data[8:start])).items():
        if name != "__metadata__":
            dtype, (first, last) = DTYPES[told["dtype"]], told["data_offsets"]
            count = (last - first) // dtype.itemsize
            found[name] = torch.frombuffer(data, dtype=dtype, count=count, offset=start + first).view(told["shape"])
    return found
