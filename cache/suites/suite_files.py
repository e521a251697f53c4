"""The files of suites' stores, wherever they lie: how each tells whether it is whole, and the header of a store.

A file has eight hex digits behind its first `"crc32c":"`, which is the first key of a JSON file and in the metadata
of a safetensors file: the crc32c of all its bytes, with zeros for the digits, and of its name below `probe/texts` or
`probe/answers` (a suite's file: of no name). So a part that is flipped, cut or in another's place is known while
nothing lists it yet. A suite's file lists the bytes and the crc32c of every part that it needs, which are compared
when a part is first opened.
"""

from typing import ClassVar, Generic, Self, TypeVar

from pydantic import Field, model_validator

from hsae.cache.config import Config
from hsae.cache.errors import StoreError
from hsae.cache.files import crc32c, parse_json
from hsae.cache.storage.paths import Place, publish, read_again
from hsae.cache.suites.specs import PROBE_FORMAT, SuiteSpec, content_key

PART_TEXTS = 256
ZEROS = "0" * 8
MARK, WITHIN = b'"crc32c":"', 64  # bytes from the beginning in which the mark is
HeaderT = TypeVar("HeaderT", bound="SuiteHeader")


Data = bytes
"""A file's content; in `Part`, `bytes` is a field."""


class Part(Config):
    """What a suite's file says of a part."""

    bytes: int = Field(ge=1)
    crc32c: int = Field(ge=0, lt=1 << 32)

    @classmethod
    def of(cls, data: Data) -> "Part":
        """The part that has these bytes."""
        return cls(bytes=len(data), crc32c=crc32c(data))


class SuiteHeader(Config):
    """A suite's file: what all suites have in theirs."""

    crc32c: str = ZEROS
    format: int = PROBE_FORMAT
    d_model: int = Field(ge=1)
    model_digest: str
    tokenizer_digest: str
    versions: dict[str, str]
    parts: dict[str, list[Part]]  # set of residuals -> its parts
    passes: int  # prefix passes (texts) that the sets took
    spec: SuiteSpec
    older: ClassVar[bool] = False
    """As an activation store's; these files have always had a checksum, so that it can't be told of them."""

    @property
    def sets(self) -> dict[str, int]:
        """Set of residuals -> its texts."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if {name: -(-count // PART_TEXTS) for name, count in self.sets.items()} != {
            name: len(parts) for name, parts in self.parts.items()
        }:
            raise ValueError("its parts are not those of its texts")
        return self


class SuiteStore(Generic[HeaderT]):
    """A finished store of a suite. Raises StoreError if it is missing, unfinished or not to be trusted."""

    header_kind: type[HeaderT]

    def __init__(self, spec: SuiteSpec, root: str | Place) -> None:
        self.root, self.path = root, spec.path(root)
        self.url = str(self.path)
        self.header = read_header(self.path, self.header_kind, spec.suite)
        if self.header.spec != spec:
            raise StoreError(f"{self.path} was made for another configuration; delete it and build it again")

    @property
    def digest(self) -> str:
        """Sixteen hex digits of all that the store's numbers depend on."""
        return content_key(self.header.model_dump(mode="json"))

    def check_hook(self, hook: str) -> None:
        """Raise StoreError unless the store has residuals of a hook."""
        if hook not in self.header.spec.hooks:
            raise StoreError(f"{self.path} holds {', '.join(self.header.spec.hooks)}, not {hook}")


# ---- whole files ---------------------------------------------------------------------


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
    view, checksum = memoryview(data), 0
    at = bytes(view[:WITHIN]).index(MARK) + len(MARK)
    for piece in (view[:at], ZEROS.encode(), view[at + len(ZEROS) :], name.encode()):
        checksum = crc32c(piece, checksum) if piece else checksum
    return at, f"{checksum:08x}".encode()


def read_whole(file: Place, name: str) -> bytes | None:
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
        except (ValueError, TypeError) as error:
            detail = str(error).splitlines()[0]
            raise StoreError(f"{path} is damaged ({detail}); make it again with: {build}") from None

    try:
        return read_again(path, read, StoreError)
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(f"there is no probe store {path}; make it with: {build}") from None
