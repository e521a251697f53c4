"""Text that comes with every CPython: English prose from its documentation, and the source code of its standard
library.

    python-docs    the language reference's topics and each module's docstrings, with signatures and examples
    python-prose   the paragraphs of those and of the modules' comments that are English prose (see `is_prose`)
    python-source  each module's source code without docstrings and comments
    python-mix     source, prose, ... while both last, then the rest of the longer one; of a long module only the
                   first 20,000 characters of source, so that prose is a good quarter of the text

A document is a topic or a module; its own topic is `language` or the module's top-level package (asyncio, email,
json, ...). Order is mixed by a fixed seed, and there are no doubles. Documents 0 to 2n-1 of python-mix are documents
0 to n-1 of python-source and of python-prose, so that windows of documents that don't overlap can be stated for all
three, whatever the Python version.
"""

import ast
import functools
import importlib
import itertools
import random
import re
import sysconfig
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import NamedTuple

from hsae.cache.errors import CorpusError

SEED = 20240229
LEAST_CHARACTERS = 200
LEAST_WORDS = 8
MOST_CHARACTERS_MIXED = 20_000
TESTS_AND_TOOLS = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip"}
SKIPPED_PARTS = TESTS_AND_TOOLS | {"site-packages", "__pycache__", "pydoc_data"}
TABLES = re.compile(r"encodings|_sysconfigdata.*")  # top-level names whose source is tables, not code
STRING_OR_COMMENT = re.compile(
    r"""\"{3}(?:\\.|[^\\])*?\"{3}|'{3}(?:\\.|[^\\])*?'{3}|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|\#[^\n]*""", re.DOTALL
)
WORD = re.compile(r"[\"'“‘(*]*[A-Za-z]+(?:['’-][A-Za-z]+)*[\"'”’)*]*[.,;:!?]*[\"'”’)]*")


@dataclass(frozen=True)
class Document:
    """One text of a corpus."""

    text: str
    topic: str | None = None  # what it is about, where the corpus knows: documents of one topic belong together


def _arranged(documents: Iterable[Document]) -> tuple[Document, ...]:
    """Without doubles, in an order that depends on the texts alone."""
    by_text = {document.text: document for document in documents if len(document.text) > LEAST_CHARACTERS}
    texts = sorted(by_text)
    random.Random(SEED).shuffle(texts)
    if not texts:
        raise CorpusError("this Python ships neither pydoc topics nor library sources; give another corpus")
    return tuple(by_text[text] for text in texts)


def library_files(package: str = "") -> list[tuple[Path, PurePath]]:
    """Files of the standard library, or of a package of it, sorted; the second path is relative."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [(file, file.relative_to(library)) for file in sorted((library / package).rglob("*.py"))]
    return [(file, inner) for file, inner in files if not SKIPPED_PARTS & set(inner.parts)]


def _modules() -> list[tuple[Path, str]]:
    """Files of the standard library and their top-level names."""
    return [(file, inner.parts[0].removesuffix(".py")) for file, inner in library_files()]


@functools.cache
def python_docs() -> tuple[Document, ...]:
    """Topics of the language reference, and each module's docstrings under their signatures."""
    return _arranged(_reference_and_modules(lambda file: _docstrings(file, signatures=True)))


@functools.cache
def python_prose() -> tuple[Document, ...]:
    """Prose paragraphs of the language reference's topics, and of each module's docstrings and comments."""
    documents = _reference_and_modules(lambda file: [*_docstrings(file), *_comments(file)])
    return _arranged(replace(document, text=prose(document.text)) for document in documents)


@functools.cache
def python_source() -> tuple[Document, ...]:
    """Source code alone: no docstrings, no comments."""
    return _arranged(Document(_code(file), topic) for file, topic in _modules() if not TABLES.fullmatch(topic))


@functools.cache
def python_mix() -> tuple[Document, ...]:
    """Source and prose by turns, long source cut short."""
    source = [replace(document, text=document.text[:MOST_CHARACTERS_MIXED]) for document in python_source()]
    pairs = itertools.zip_longest(source, python_prose())
    return tuple(document for pair in pairs for document in pair if document is not None)


CORPORA: dict[str, Callable[[], tuple[Document, ...]]] = {
    "python-docs": python_docs,
    "python-prose": python_prose,
    "python-source": python_source,
    "python-mix": python_mix,
}


def prose(text: str) -> str:
    """The paragraphs of a text that are prose, each on a line of its own."""
    return "\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if is_prose(part))


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph is English sentences.

    It begins with a capital, ends as a sentence does, has no examples, and of at least eight words 85 % are plain words
    of letters (quotes, brackets and punctuation around them allowed).
    """
    words = paragraph.split()
    return (
        len(words) >= LEAST_WORDS
        and ">>>" not in words
        and words[-1].rstrip("\"')”").endswith((".", "!", "?", ":"))
        and words[0].lstrip("\"'(“*")[:1].isupper()
        and sum(WORD.fullmatch(word) is not None for word in words) >= 0.85 * len(words)
    )


class Docstring(NamedTuple):
    """A docstring: what it says, the signature of what it documents ("" for the module), the lines it stands on."""

    text: str
    signature: str
    lines: range


@dataclass(frozen=True)
class Module:
    """A module of Python's, read: its text, its docstrings, and the lines (from 0) of all bare strings."""

    text: str
    docstrings: list[Docstring]
    bare_strings: list[range]


@functools.cache
def read_module(file: Path) -> Module:
    """A module; an empty one if it is no Python that this Python parses.

    Syntax trees are not kept: those of the whole library fill a gigabyte and make the garbage collector slow.
    """
    try:
        text = file.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return Module("", [], [])
    docstrings, bare = [], []
    for node in _statements(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            bare.append(_lines(node))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            docstring := ast.get_docstring(node)
        ):
            docstrings.append(Docstring(docstring, _signature(node), _lines(node.body[0])))
    return Module(text, docstrings, bare)


def _lines(node: ast.stmt) -> range:
    return range(node.lineno - 1, node.end_lineno or node.lineno)


def _signature(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    if isinstance(node, ast.Module):
        return ""
    return f"class {node.name}" if isinstance(node, ast.ClassDef) else f"{node.name}({ast.unparse(node.args)})"


def language_topics() -> dict[str, str]:
    """The texts of the language reference by topic, as `help` shows them."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return topics


def _reference_and_modules(parts: Callable[[Path], list[str]]) -> Iterator[Document]:
    yield from (Document(text, "language") for text in language_topics().values())
    yield from (Document("\n\n".join(parts(file)), topic) for file, topic in _modules())


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """The module and its statements (handlers and cases too) in ast.walk's order, without their expressions."""
    nodes: deque[ast.AST] = deque([tree])
    while nodes:
        yield (node := nodes.popleft())
        for field in ("body", "handlers", "orelse", "finalbody", "cases"):
            nodes.extend(getattr(node, field, ()))


def _docstrings(file: Path, *, signatures: bool = False) -> list[str]:
    """A module's docstring and those of its classes and functions, each under its signature if asked for."""
    return [
        f"{signature}\n{text}" if signatures and signature else text
        for text, signature, _ in read_module(file).docstrings
    ]


def _comments(file: Path) -> list[str]:
    """Blocks of comment lines that have nothing else on them and follow each other, without their signs."""
    text = read_module(file).text
    blocks: list[list[str]] = []
    end = -1
    for match in STRING_OR_COMMENT.finditer(text):
        start = text.rfind("\n", 0, match.start()) + 1
        if match[0].startswith("#") and not text[start : match.start()].strip():
            if end != start:
                blocks.append([])
            blocks[-1].append(match[0].lstrip("#!:").removeprefix(" "))
            end = match.end() + 1
    return ["\n".join(block) for block in blocks]


def _code(file: Path) -> str:
    """A module's source without comments, docstrings and double empty lines."""
    module = read_module(file)
    text = STRING_OR_COMMENT.sub(lambda match: "" if match[0].startswith("#") else match[0], module.text)
    lines = text.split("\n")
    for bare in module.bare_strings:
        lines[bare.start : bare.stop] = [""] * len(bare)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"(?m)[ \t\f]+$", "", "\n".join(lines))).strip() + "\n"
