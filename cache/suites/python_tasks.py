"""Labelled texts that ship with every CPython: pieces of the standard library and of its documentation, told apart by
what they are.

No file gives texts to both the training and the test split of a class, so that a probe can't win by knowing a file.
"""

import functools
import random
import re
import sysconfig
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hsae.cache.errors import CorpusError
from hsae.cache.suites.labelled_texts import SPLITS, DataSet, Record
from hsae.cache.suites.specs import SuiteConfig
from hsae.cache.text.python_text import language_topics, library_files, read_module

PACKAGES = ("asyncio", "email", "multiprocessing", "unittest", "xml")
PAIRS = {"asyncio_email": ("asyncio", "email"), "unittest_xml": ("unittest", "xml")}
KINDS = ("code", "docstring", "comment", "reference")
STYLES = ("imperative", "third person", "noun phrase", "example")
IMPERATIVES = """
return create get set make convert check read write open close run add remove find parse send start stop call raise
print format test compare build load compute determine initialize execute given decode encode copy delete generate
handle insert join list register replace wait yield display define expand extract fetch import install split update
use wrap append apply
"""
NOUNS = {"a", "an", "the", "this", "these", "class", "base", "simple", "abstract", "internal", "helper"}
PIECE, SHORTEST = 400, 60  # characters

Pieces = dict[tuple[str, str], list[tuple[str, str]]]
"""(Label, attribute) -> (a file's name, a piece of its text)."""


def python_sets(config: SuiteConfig) -> list[DataSet]:
    """Packages, with pairs for SCR; code, docstring, comment or reference; how a docstring is written."""
    source = f"the standard library of Python {sysconfig.get_python_version()}"

    def one(name: str, pieces: Callable[[], Pieces], labels: tuple[str, ...], **scr: Any) -> DataSet:
        def read() -> dict[str, list[Record]]:
            return _split(pieces(), config, scr=bool(scr))

        return DataSet(name=name, read=read, source=source, classes=labels, **scr)

    return [
        one("python/package", _packages, PACKAGES, pairs=PAIRS, attribute_values=("code", "docstring")),
        one("python/kind", _kinds, KINDS),
        one("python/docstring-style", _styles, STYLES),
    ]


def _split(pieces: Pieces, config: SuiteConfig, scr: bool) -> dict[str, list[Record]]:
    """Records of both splits: whole files go to the test split, in an order mixed by the seed, until it has enough."""
    homes = defaultdict[str, set[str]](set)
    for file, text in (piece for members in pieces.values() for piece in members):
        homes[text].add(file)
    needed = max(config.test_per_class, 2 * config.test_per_quadrant if scr else 0)
    records: dict[str, list[Record]] = {split: [] for split in SPLITS}
    for (label, attribute), members in sorted(pieces.items()):
        by_file = defaultdict[str, list[str]](list)
        for file, text in dict.fromkeys(piece for piece in members if len(homes[piece[1]]) == 1):
            by_file[file].append(text)
        files = sorted(by_file)
        random.Random(f"{config.seed} {label} {attribute}").shuffle(files)
        count, share = 0, max(1, len(members) // 3)
        parts: dict[str, list[Record]] = {split: [] for split in SPLITS}
        for file in files:
            texts = by_file[file]
            split = "test" if count < needed and len(texts) <= share else "train"
            count += len(texts) if split == "test" else 0
            parts[split] += [Record(text, label, attribute) for text in texts]
        for split, mine in parts.items():
            random.Random(f"{config.seed} {split}").shuffle(mine)
            records[split] += mine
    return records


def _packages() -> Pieces:
    pieces: Pieces = defaultdict(list)
    for package in PACKAGES:
        for file, name in _files(package):
            for kind, texts in zip(KINDS[:2], _parts(file), strict=False):
                pieces[package, kind] += [(name, text) for text in texts]
    return pieces


def _kinds() -> Pieces:
    pieces: Pieces = defaultdict(list)
    for file, name in _files():
        for kind, texts in zip(KINDS[:3], _parts(file), strict=True):
            pieces[kind, ""] += [(name, text) for text in texts]
    topics = language_topics().items()
    pieces["reference", ""] = [(topic, text) for topic, whole in topics for text in pieces_of(whole)]
    return pieces


def _styles() -> Pieces:
    pieces: Pieces = defaultdict(list)
    for file, name in _files():
        for text in _parts(file)[1]:
            if (style := style_of(text)) is not None:
                pieces[style, ""].append((name, text))
    return pieces


def style_of(docstring: str) -> str | None:
    """How a docstring is written, where its first word tells."""
    if ">>>" in docstring:
        return "example"
    first = re.match(r"[A-Za-z]+", docstring)
    word = first[0].lower() if first else ""
    imperatives = set(IMPERATIVES.split())
    if word in imperatives:
        return "imperative"
    if word in NOUNS:
        return "noun phrase"
    return "third person" if {word.removesuffix("s"), word.removesuffix("es")} & imperatives else None


def _files(package: str = "") -> Iterator[tuple[Path, str]]:
    """Files of the library, and their names in it."""
    files = library_files(package)
    if not files:
        raise CorpusError(
            f"this Python ships no sources of {package or 'its library'}; "
            "give other texts with --set suite.tasks=FILE.toml"
        )
    return ((file, inner.as_posix()) for file, inner in files)


@functools.cache
def _parts(file: Path) -> tuple[list[str], list[str], list[str]]:
    """Pieces of a file's code without docstrings and comments, its docstrings, and its blocks of comment lines."""
    module = read_module(file)
    docstrings = [text[:PIECE] for text, _, _ in module.docstrings if len(text) >= SHORTEST]
    documented = {line for docstring in module.docstrings for line in docstring.lines}
    code, comments, block = [], [], list[str]()
    for number, line in enumerate([*module.text.splitlines(), ""]):
        bare = line.strip()
        if bare.startswith("#"):
            block.append(bare.lstrip("#! ").rstrip())
            continue
        if block and len(text := "\n".join(block)) >= SHORTEST:
            comments += pieces_of(text)
        block = []
        if bare and number not in documented:
            code.append(line)
    return pieces_of("\n".join(code)), docstrings, comments


def pieces_of(text: str) -> list[str]:
    """A text cut at line ends into pieces of about PIECE characters; short rests are left out."""
    pieces, piece = [], ""
    for line in text.splitlines():
        piece += f"{line}\n"
        if len(piece) >= PIECE:
            pieces.append(piece[: 2 * PIECE].rstrip())
            piece = ""
    if len(piece.strip()) >= SHORTEST:
        pieces.append(piece.rstrip())
    return pieces
