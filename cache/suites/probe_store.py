"""Probe stores: residuals of labelled texts and of words, computed once for every SAE that will be evaluated on them.

    <cache.dir>/probe/<suite>/<model>-<fingerprint>.json    what a suite is made of: its tasks, the set of residuals each uses, and sums
    <cache.dir>/probe/texts/<model>-<key>/part-00000.safetensors, ...    a set: `<hook>` [n, D] in the model's type, `lengths` [texts] int64

A set holds the residuals of some tokens of each text (all that are not special, or the one at a word), without padding. Its key is
that of the token ids themselves, the weights and all else that the numbers depend on, so suites share it and nothing stale is found.
Parts appear whole and are kept when a build is interrupted; the suite's file is written last. Checksums: see `parts`.

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
from pydantic import Field
from torch import Tensor

from hsae.cache.errors import CorpusError, StoreError
from hsae.cache.files import JUST_MADE, sweep
from hsae.cache.format.spec import Config, ModelConfig
from hsae.cache.language_model.lm import LanguageModel, pinned
from hsae.cache.storage.paths import Place, check_writable, locked, publish
from hsae.cache.suites.labelled_texts import after_the_word, text_tasks, word_task
from hsae.cache.suites.store_files import (
    PART_TEXTS,
    Part,
    Parts,
    SuiteHeader,
    kept,
    listed,
    part_bytes,
    part_name,
    read_header,
    write_header,
)
from hsae.cache.suites.suite_spec import PROBE_FORMAT, ProbeSpec, content_key, model_slug, probe_folder

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


class ProbeHeader(SuiteHeader):
    """The suite's file."""

    spec: ProbeSpec
    tasks: list[TaskEntry]
    prompt_token_pos: int | None = None
    """absorption: where the word is, counted from the end of a prompt."""

    @property
    def sets(self) -> dict[str, int]:
        """Set of residuals -> its texts."""
        return {task.texts: task.count for task in self.tasks}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Token ids of texts and the positions whose residuals are kept."""

    ids: list[list[int]]
    kept: list[list[int]]


def build_probe(
    spec: ProbeSpec,
    root: str | Place,
    *,
    device: str = "cpu",
    progress: Progress = lambda name, done, total: None,
    say: Callable[[str], None] = lambda text: None,
    model: LanguageModel | None = None,
) -> Place:
    """Make a suite's probe store, or finish or mend it, and return its file. Raises UserError if it can't be made; parts stay."""
    path = spec.path(root)
    check_writable(probe_folder(root) / spec.suite)
    with locked(path):
        sweep_probes(root)
        if model is None:
            say(f"loading {spec.model.id}")
            model = LanguageModel.load(pinned(spec.model, root), device=device, say=say)
        model.check_hooks(spec.hooks)
        say(f"reading the texts of {spec.suite}")
        described, sets, position = _described(spec, model)
        entries: list[TaskEntry] = []
        parts: dict[str, list[Part]] = {}
        passes = 0
        for entry, wanted in zip(described, sets, strict=True):
            name, parts_of = build_set(root, wanted, spec, spec.tasks.batch_rows, model, partial(progress, entry.name))
            parts[name] = parts_of
            entries.append(entry.model_copy(update={"texts": name}))
            passes += len(wanted.ids)
        header = ProbeHeader(
            spec=spec,
            d_model=model.d_model,
            model_digest=model.model_digest,
            tokenizer_digest=model.tokenizer_digest,
            versions=versions(model),
            parts=parts,
            tasks=entries,
            prompt_token_pos=position,
            passes=passes,
        )
        write_header(path, header)
    return path


def sweep_probes(root: str | Place) -> None:
    """Delete what killed builds of suites left half-written; what others are writing stays."""
    folder = probe_folder(root)
    if isinstance(folder, Path):
        sweep(folder, youngest=JUST_MADE)


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
    root: str | Place,
    wanted: Wanted,
    spec: OfModel,
    batch_rows: int,
    model: LanguageModel,
    progress: Callable[[int, int], None],
) -> tuple[str, list[Part]]:
    """Compute every part of a set that is missing or damaged, and return the set's name and parts.

    Batches never cross parts, so parts do not depend on when they were made.
    """
    name = f"{model_slug(spec.model)}-{_set_key(spec, batch_rows, model, wanted)}"
    total, parts = len(wanted.ids), []
    for number, first in enumerate(range(0, total, PART_TEXTS)):
        last = min(first + PART_TEXTS, total)
        inner = f"{name}/{part_name(number)}"
        file = sets_folder(root) / name / part_name(number)
        data = kept(file, inner)
        if data is None:
            rows = range(first, last)
            tensors = _residuals(wanted, rows, spec, batch_rows, model, lambda done: progress(done, total))
            tensors["lengths"] = torch.tensor([len(places) for places in wanted.kept[first:last]])
            data = part_bytes(tensors, inner)
            publish(file, data)
        parts.append(listed(data))
        progress(last, total)
    return name, parts


def _residuals(
    wanted: Wanted,
    rows: range,
    spec: OfModel,
    batch_rows: int,
    model: LanguageModel,
    progress: Callable[[int], None],
) -> dict[str, Tensor]:
    """Each hook's [N, D] of some texts."""
    vectors: dict[str, list[Tensor]] = {hook: [] for hook in spec.hooks}
    for start in range(rows.start, rows.stop, batch_rows):
        stop = min(start + batch_rows, rows.stop)
        resid = model.prefix(padded(wanted.ids[start:stop], model), spec.hooks)
        for hook, batch in resid.items():
            places = enumerate(wanted.kept[start:stop])
            vectors[hook].append(torch.cat([batch[row, held].cpu() for row, held in places]))
        progress(stop)
    tensors = {hook: torch.cat(batches).contiguous() for hook, batches in vectors.items()}
    for hook, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise StoreError(
                f"activations at {hook} are not finite in {spec.model.dtype}; use --set model.dtype=float32, or another model"
            )
    return tensors


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


def sets_folder(root: str | Place) -> Place:
    """Where the sets of a folder or URL of stores lie."""
    return probe_folder(root) / "texts"


# ---- reading ------------------------------------------------------------------------------------------------------------


class ProbeStore:
    """A finished probe store. Raises StoreError if it is missing, unfinished or not to be trusted."""

    def __init__(self, spec: ProbeSpec, root: str | Place) -> None:
        self.path, self.spec, self.folder = spec.path(root), spec, sets_folder(root)
        self.url = str(self.path)
        self.header = read_header(self.path, ProbeHeader, spec.suite)
        if self.header.spec != spec:
            raise StoreError(f"{self.path} was made for another configuration; delete it and build it again")
        self._parts = {name: Parts(self.folder / name, parts, spec.suite) for name, parts in self.header.parts.items()}

    @property
    def digest(self) -> str:
        """Sixteen hex digits of all that the store's numbers depend on."""
        return content_key(self.header.model_dump(mode="json"))

    def lengths(self, task: TaskEntry) -> Tensor:
        """Kept tokens of each text, int64."""
        return torch.cat([part["lengths"] for part in self._opened(task)])

    def ragged(self, task: TaskEntry, hook: str) -> Iterator[tuple[Tensor, list[int]]]:
        """Part by part the vectors [N, D] of the kept tokens, and how many each text has."""
        if hook not in self.spec.hooks:
            raise StoreError(f"{self.path} holds {', '.join(self.spec.hooks)}, not {hook}")
        for part in self._opened(task):
            yield part[hook], part["lengths"].tolist()

    def _opened(self, task: TaskEntry) -> Iterator[dict[str, Tensor]]:
        parts = self._parts[task.texts]
        return (parts.open(number) for number in range(len(parts)))
