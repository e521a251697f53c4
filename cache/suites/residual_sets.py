"""Sets of residuals of texts, computed once for every SAE that will be evaluated on them.

<cache.dir>/probe/texts/<model>-<key>/part-00000.safetensors, ...    a set: `<hook>` [n, D] in the model's type,
`lengths` [texts] int64

A set holds the residuals of some tokens of each text (all that are not special, or the one at a word), without
padding. Its key is that of the token ids themselves, the weights and all else that the numbers depend on, so suites
share it and nothing stale is found. Parts appear whole and are kept when a build is interrupted. Checksums: see
`suite_files`.

Shapes: T tokens of a text, N tokens of a part, D residual width.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from hsae.cache.errors import StoreError, TooLongError
from hsae.cache.files import crc32c, parse_json
from hsae.cache.language_model.lm import LanguageModel
from hsae.cache.reading import page_faults
from hsae.cache.reading.mapped_chunks import mapped_pages, scratch_pages
from hsae.cache.reading.scratch import scratch
from hsae.cache.storage.paths import Place, publish, read_again, sizes
from hsae.cache.suites.specs import PROBE_FORMAT, SuiteSpec, content_key, suites_folder
from hsae.cache.suites.suite_files import PART_TEXTS, ZEROS, Part, is_whole, read_whole, seal

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I64": torch.int64}
MAPPED_PARTS = 64  # most parts that stay mapped
Progress = Callable[[str, int, int], None]
"""Called with what is being computed (`scr: a task`), how many of its texts are done, and how many there are."""


@dataclass(frozen=True, kw_only=True)
class TokenSet:
    """Token ids of texts and the positions whose residuals go into the set."""

    ids: list[list[int]]
    positions: list[list[int]]


@dataclass(frozen=True, kw_only=True)
class SetBuilder:
    """Computes the sets of one suite's store."""

    root: str | Place
    spec: SuiteSpec
    model: LanguageModel
    progress: Progress

    def report(self, name: str, done: int, total: int) -> None:
        """Tell `progress` how many texts of a task of the suite are done."""
        self.progress(f"{self.spec.suite}: {name}", done, total)

    def build(self, tokens: TokenSet, name: str) -> tuple[str, list[Part]]:
        """Compute the parts that are missing or damaged, in batches within parts; returns the set's key and parts."""
        key = f"{self.spec.model.slug}-{self._key(tokens)}"
        total, parts = len(tokens.ids), []
        for number, first in enumerate(range(0, total, PART_TEXTS)):
            last = min(first + PART_TEXTS, total)
            inner = f"{key}/{part_name(number)}"
            file = sets_folder(self.root) / inner
            if (data := read_whole(file, inner)) is None:
                tensors = self._residuals(tokens, range(first, last), name)
                tensors["lengths"] = torch.tensor([len(positions) for positions in tokens.positions[first:last]])
                data = part_bytes(tensors, inner)
                publish(file, data)
            parts.append(Part.of(data))
            self.report(name, last, total)
        return key, parts

    def made_with(self) -> dict[str, Any]:
        """What a store's header says of the model and the libraries."""
        names = ("d_model", "model_digest", "tokenizer_digest")
        return {name: getattr(self.model, name) for name in names} | {"versions": self.model.versions()}

    def _residuals(self, tokens: TokenSet, rows: range, name: str) -> dict[str, Tensor]:
        """Each hook's [N, D] of some texts."""
        spec = self.spec
        vectors: dict[str, list[Tensor]] = {hook: [] for hook in spec.hooks}
        for start in range(rows.start, rows.stop, spec.batch_rows):
            stop = min(start + spec.batch_rows, rows.stop)
            resid = self.model.prefix(self.model.padded(tokens.ids[start:stop]), spec.hooks)
            for hook, batch in resid.items():
                texts = enumerate(tokens.positions[start:stop])
                vectors[hook].append(torch.cat([batch[row, positions].cpu() for row, positions in texts]))
            self.report(name, stop, len(tokens.ids))
        tensors = {hook: torch.cat(batches).contiguous() for hook, batches in vectors.items()}
        for hook, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise StoreError(
                    f"activations at {hook} are not finite in {spec.model.dtype}; "
                    "use --set model.dtype=float32, or another model"
                )
        return tensors

    def _key(self, tokens: TokenSet) -> str:
        digest = hashlib.sha256(json.dumps([tokens.ids, tokens.positions]).encode()).hexdigest()
        model = self.spec.model.model_dump(mode="json", include={"dtype", "attention"})
        content = {"format": PROBE_FORMAT, "model": self.model.model_digest, **model, "hooks": self.spec.hooks}
        content |= {"batch": self.spec.batch_rows, "tokens": digest, "versions": self.model.versions()}
        return content_key(content)


def sets_folder(root: str | Place) -> Place:
    """Where the sets of a folder or URL of stores lie."""
    return suites_folder(root) / "texts"


def part_name(number: int) -> str:
    """The name of a part's file."""
    return f"part-{number:05}.safetensors"


def part_bytes(tensors: Mapping[str, Tensor], name: str) -> bytes:
    """A part's file."""
    return seal(save(dict(tensors), {"crc32c": ZEROS}), name)


# ---- reading ----


class ResidualSet:
    """The parts of a set, mapped in place or from scratch. Raises StoreError naming the part that is wrong."""

    def __init__(self, folder: Place, parts: Sequence[Part], suite: str) -> None:
        self.folder, self.parts, self.build = folder, parts, f"hsae cache build --suite {suite}"
        self._checked: set[int] = set()  # local parts whose checksums were tested
        self._recent = lru_cache(MAPPED_PARTS)(self._with_ends)
        lengths = sizes(folder)
        for number, part in enumerate(parts):
            if (size := lengths.get(part_name(number))) != part.bytes:
                raise self._wrong_size(number, size)

    def __len__(self) -> int:
        return len(self.parts)

    def of_text(self, row: int, hook: str) -> Tensor:
        """[T, D] of one text."""
        part, place = divmod(row, PART_TEXTS)
        tensors, ends = self._recent(part)
        return tensors[hook][ends[place - 1] if place else 0 : ends[place]].clone()

    def _with_ends(self, number: int) -> tuple[dict[str, Tensor], list[int]]:
        tensors = self.open(number)
        return tensors, tensors["lengths"].cumsum(0).tolist()

    def open(self, number: int) -> dict[str, Tensor]:
        """Each hook's [N, D] and `lengths` [texts], over mapped pages. Writing to them changes no file."""
        part, file = self.parts[number], self.folder / part_name(number)
        page_faults.note(str(self.folder))
        if isinstance(file, Path):
            try:
                pages = mapped_pages(file, part.bytes)
            except (FileNotFoundError, NotADirectoryError):
                raise self._wrong_size(number, None) from None
            except ValueError:
                raise self._wrong_size(number, file.stat().st_size) from None
            if number not in self._checked:
                self._check(number, pages.numpy().data)
                self._checked.add(number)
        else:
            key = f"{file}|{part.bytes}|{part.crc32c}"
            fetch = partial(scratch().fetch, key, part.bytes, partial(self._fetch, number))
            pages, _ = scratch_pages(fetch, part.bytes)
        try:
            return _tensors(pages)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
            raise self._damaged(number, "is no safetensors file of residuals") from None

    def _fetch(self, number: int) -> bytes:
        file, size = self.folder / part_name(number), self.parts[number].bytes
        assert not isinstance(file, Path)

        def read() -> bytes:
            try:
                data = file.read_bytes(size)
            except TooLongError:
                raise self._damaged(number, f"is more than {size} bytes long") from None
            if len(data) != size:
                raise self._wrong_size(number, len(data))
            self._check(number, data)
            return data

        try:
            return read_again(file, read, StoreError)
        except (FileNotFoundError, NotADirectoryError):
            raise self._wrong_size(number, None) from None

    def _check(self, number: int, data: bytes | memoryview) -> None:
        checksum, name = crc32c(data), part_name(number)
        if checksum == self.parts[number].crc32c:
            return
        if any(checksum == part.crc32c for part in self.parts):
            problem = "is another part, put in this one's place"
        elif is_whole(data, f"{self.folder.name}/{name}"):
            problem = "was made anew, with other numbers than those that the store was made with"
        else:
            problem = "fails its checksum"
        raise self._damaged(number, problem)

    def _wrong_size(self, number: int, size: int | None) -> StoreError:
        if size is None:
            return StoreError(f"{self.folder / part_name(number)} is missing; go on with: {self.build}")
        return self._damaged(number, f"is {size} bytes long, not {self.parts[number].bytes}")

    def _damaged(self, number: int, problem: str) -> StoreError:
        return StoreError(f"{self.folder / part_name(number)} {problem}; mend the store with: {self.build}")


def _tensors(pages: Tensor) -> dict[str, Tensor]:
    """A safetensors file's tensors over its pages; its checksum has been tested."""
    data = pages.numpy().data
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in parse_json(bytes(data[8:start])).items():
        if name != "__metadata__":
            dtype, (first, last) = DTYPES[entry["dtype"]], entry["data_offsets"]
            count = (last - first) // dtype.itemsize
            tensors[name] = torch.frombuffer(data, dtype=dtype, count=count, offset=start + first).view(entry["shape"])
    return tensors
