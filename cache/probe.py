"""Probe stores: residuals of labelled texts and of words, computed once for every SAE that will be evaluated on them.

    <cache.dir>/probe/<suite>/<model>-<fingerprint>.json    what a suite is made of: its tasks, and the set of residuals each uses
    <cache.dir>/probe/texts/<model>-<key>/part-00000.safetensors, ...    a set: `<hook>` [n, D] in the model's type, `lengths` [texts] int64

A set holds the residuals of some tokens of each text (all that are not special, or the one at a word), without padding. Its key is
that of the token ids themselves, the weights and all else that the numbers depend on, so suites share it and nothing stale is found.
Parts are published by rename and kept when a build is interrupted; the suite's file is written last.

Shapes: D residual width, N tokens of a part.
"""

import hashlib
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Protocol

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hsae.cache.config import Config, ModelConfig
from hsae.cache.errors import CorpusError, StoreError
from hsae.cache.files import write_atomically
from hsae.cache.lm import LanguageModel
from hsae.cache.probe_config import PROBE_FORMAT, ProbeSpec, content_key, model_slug, probe_folder
from hsae.cache.remote import locked
from hsae.cache.tasks import after_the_word, text_tasks, word_task

PART_TEXTS = 256
LIBRARIES = ("torch", "transformers", "tokenizers")
Progress = Callable[[str, int, int], None]
"""Told the set, how many of its texts are done, and how many there are."""


class TaskEntry(Config):
    """One task of a suite."""

    name: str
    source: str
    texts: str
    """Name of the set of residuals."""
    count: int = Field(ge=1)
    """Texts in the set."""
    pair: Annotated[tuple[str, str], Field(strict=False)] | None = None
    """SCR: the two labels."""
    lists: dict[str, dict[str, list[int]]]
    """Split -> class -> rows of the set. For absorption: of each split the letter (0-25) of each word, as list `letters`."""


class ProbeHeader(Config):
    """The suite's file."""

    format: int
    spec: ProbeSpec
    d_model: int = Field(ge=1)
    model_digest: str
    tokenizer_digest: str
    versions: dict[str, str]
    tasks: list[TaskEntry]
    prompt_token_pos: int | None = None
    """absorption: where the word is, counted from the end of a prompt."""
    passes: int
    """Prefix passes (texts) that the sets took."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Token ids of texts and the positions whose residuals are kept."""

    ids: list[list[int]]
    kept: list[list[int]]


def build_probe(
    spec: ProbeSpec,
    root: str | Path,
    *,
    device: str = "cpu",
    progress: Progress = lambda name, done, total: None,
    say: Callable[[str], None] = lambda text: None,
    model: LanguageModel | None = None,
) -> Path:
    """Make a suite's probe store, or finish it, and return its file. Raises UserError if it can't be made; parts stay."""
    path = spec.path(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):
        if model is None:
            say(f"loading {spec.model.id}")
            model = LanguageModel.load(spec.model, device=device, say=say)
        model.check_hooks(spec.hooks)
        say(f"reading the texts of {spec.suite}")
        described, sets, position = _described(spec, model)
        entries, passes = [], 0
        for entry, wanted in zip(described, sets, strict=True):
            name = build_set(root, wanted, spec, spec.tasks.batch_rows, model, partial(progress, entry.name))
            entries.append(entry.model_copy(update={"texts": name}))
            passes += len(wanted.ids)
        header = ProbeHeader(
            format=PROBE_FORMAT,
            spec=spec,
            d_model=model.d_model,
            model_digest=model.model_digest,
            tokenizer_digest=model.tokenizer_digest,
            versions=versions(model),
            tasks=entries,
            prompt_token_pos=position,
            passes=passes,
        )
        text = header.model_dump_json()
        write_atomically(path, lambda file: file.write_text(text))
    return path


def _described(spec: ProbeSpec, model: LanguageModel) -> tuple[list[TaskEntry], list[Wanted], int | None]:
    config, tokenizer = spec.tasks, model.tokenizer
    if spec.suite == "absorption":
        words = word_task(tokenizer, config)
        after = after_the_word(tokenizer, config)
        letters = {
            name: [ord(word.strip()[0].lower()) - ord("a") for word in held]
            for name, held in (("train", words.train_words), ("test", words.test_words), ("prompts", words.test_words))
        }
        prompts = {"train": words.train_prompts, "test": words.test_prompts, "prompts": words.evaluation_prompts}
        entries, sets = [], []
        for name, texts in prompts.items():
            ids = [list(row) for row in tokenizer(texts, verbose=False).input_ids]
            sets.append(Wanted(ids=ids, kept=[[len(row) - after - 1] for row in ids]))
            entries.append(_entry(name, "the tokenizer's vocabulary", len(texts), {name: {"letters": letters[name]}}))
        return entries, sets, -after - 1
    entries, sets = [], []
    for task in text_tasks(spec.suite, config):
        rows = tokenizer(list(task.texts), truncation=True, max_length=config.context, verbose=False).input_ids
        kept = [[place for place, token in enumerate(row) if token not in model.special_ids] for row in rows]
        if empty := [index for index, places in enumerate(kept) if not places]:
            raise CorpusError(f"task {task.name}: text {task.texts[empty[0]][:40]!r} has no token but special ones")
        sets.append(Wanted(ids=[list(row) for row in rows], kept=kept))
        entry = _entry(task.name, task.source, len(rows), {"train": task.train, "test": task.test})
        entries.append(entry.model_copy(update={"pair": task.pair}))
    return entries, sets, None


def _entry(name: str, source: str, count: int, lists: dict[str, dict[str, list[int]]]) -> TaskEntry:
    return TaskEntry(name=name, source=source, texts="", count=count, lists=lists)


class OfModel(Protocol):
    """What a set's residuals are of."""

    @property
    def model(self) -> ModelConfig:
        """The language model."""

    @property
    def hooks(self) -> tuple[str, ...]:
        """Where its residual is taken."""


def build_set(
    root: str | Path,
    wanted: Wanted,
    spec: OfModel,
    batch_rows: int,
    model: LanguageModel,
    progress: Callable[[int, int], None],
) -> str:
    """Compute every part of a set that is missing, and return the set's name.

    Batches never cross parts, so parts do not depend on when they were made.
    """
    name = f"{model_slug(spec.model)}-{_set_key(spec, batch_rows, model, wanted)}"
    folder = sets_folder(root) / name
    folder.mkdir(parents=True, exist_ok=True)
    total = len(wanted.ids)
    for number, first in enumerate(range(0, total, PART_TEXTS)):
        file, last = part_file(folder, number), min(first + PART_TEXTS, total)
        if not file.is_file():
            vectors: dict[str, list[Tensor]] = {hook: [] for hook in spec.hooks}
            for start in range(first, last, batch_rows):
                stop = min(start + batch_rows, last)
                resid = model.prefix(padded(wanted.ids[start:stop], model), spec.hooks)
                for hook, batch in resid.items():
                    places = enumerate(wanted.kept[start:stop])
                    vectors[hook].append(torch.cat([batch[row, kept].cpu() for row, kept in places]))
                progress(stop, total)
            tensors = {hook: torch.cat(parts).contiguous() for hook, parts in vectors.items()}
            for hook, tensor in tensors.items():
                if not torch.isfinite(tensor).all():
                    raise StoreError(
                        f"activations at {hook} are not finite in {spec.model.dtype}; use --set model.dtype=float32, or another model"
                    )
            tensors["lengths"] = torch.tensor([len(kept) for kept in wanted.kept[first:last]])
            write_atomically(file, partial(save_file, tensors))
        progress(last, total)
    return name


def padded(rows: Sequence[list[int]], model: LanguageModel) -> Tensor:
    """Token ids with padding behind, which causal attention never sees."""
    width = max(map(len, rows))
    return torch.tensor([row + [model.special_ids[0]] * (width - len(row)) for row in rows])


def versions(model: LanguageModel) -> dict[str, str]:
    """What residuals were computed with."""
    found = {"python": platform.python_version(), "device": torch.device(model.device).type}
    return found | {name: version(name) for name in LIBRARIES}


def _set_key(spec: OfModel, batch_rows: int, model: LanguageModel, wanted: Wanted) -> str:
    tokens = hashlib.sha256(json.dumps([wanted.ids, wanted.kept]).encode()).hexdigest()
    described = spec.model.model_dump(mode="json", include={"dtype", "attention"})
    held = {"format": PROBE_FORMAT, "model": model.model_digest, **described, "hooks": spec.hooks}
    return content_key({**held, "batch": batch_rows, "tokens": tokens, "versions": versions(model)})


def sets_folder(root: str | Path) -> Path:
    """Where the sets of a cache folder lie."""
    return probe_folder(root) / "texts"


def part_file(folder: Path, number: int) -> Path:
    """One part of a set."""
    return folder / f"part-{number:05}.safetensors"


# ---- reading ------------------------------------------------------------------------------------------------------------


class ProbeStore:
    """A finished probe store. Raises StoreError if it is missing, unfinished or not to be trusted."""

    def __init__(self, spec: ProbeSpec, root: str | Path) -> None:
        self.path = spec.path(root)
        if not self.path.is_file():
            raise StoreError(
                f"there is no probe store {self.path}; make it with: hsae cache build --suite {spec.suite}"
            )
        try:
            self.header = ProbeHeader(**json.loads(self.path.read_text()))
        except (ValidationError, ValueError, TypeError) as error:
            raise StoreError(
                f"{self.path} is damaged ({str(error).splitlines()[0]}); delete it and build it again"
            ) from None
        if self.header.format != PROBE_FORMAT or self.header.spec != spec:
            raise StoreError(f"{self.path} was made for another configuration; delete it and build it again")
        self.spec, self.folder = spec, sets_folder(root)
        self._parts: dict[str, list[Path]] = {}
        for task in self.header.tasks:
            parts = [part_file(self.folder / task.texts, n) for n in range(-(-task.count // PART_TEXTS))]
            if missing := [part for part in parts if not part.is_file()]:
                raise StoreError(f"{missing[0]} is missing; go on with: hsae cache build --suite {spec.suite}")
            self._parts[task.texts] = parts

    @property
    def digest(self) -> str:
        """Sixteen hex digits of all that the store's numbers depend on."""
        return content_key(self.header.model_dump(mode="json"))

    def lengths(self, task: TaskEntry) -> Tensor:
        """Kept tokens of each text, int64."""
        return torch.cat([self._read(part, "lengths") for part in self._parts[task.texts]])

    def ragged(self, task: TaskEntry, hook: str) -> Iterator[tuple[Tensor, list[int]]]:
        """Part by part the vectors [N, D] of the kept tokens, and how many each text has."""
        if hook not in self.spec.hooks:
            raise StoreError(f"{self.path} holds {', '.join(self.spec.hooks)}, not {hook}")
        for part in self._parts[task.texts]:
            yield self._read(part, hook), self._read(part, "lengths").tolist()

    def _read(self, part: Path, name: str) -> Tensor:
        try:
            with safe_open(part, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor
        except (SafetensorError, OSError) as error:
            raise StoreError(
                f"{part} is damaged ({error}); delete it and run: hsae cache build --suite {self.spec.suite}"
            ) from None
