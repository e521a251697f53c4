import argparse
import inspect
import io
import itertools
import json
import random
import re
import tokenize

import pytest

from hsae.cache import packaged
from hsae.cache.config import CorpusConfig
from hsae.cache.corpus import Packer, open_corpus
from hsae.cache.errors import CorpusError
from hsae.cache.packaged import Document, python_docs, python_mix, python_prose, python_source

BOS, T = 1, 7


def packed_naively(documents):
    """SAEBench's packing, token by token."""
    rows, row = [], []
    for document in documents:
        stream = list(document)
        if not stream:
            continue
        if row:
            row.append(BOS)
            if len(row) == T:
                rows.append(row)
                row = []
        for token in stream:
            if not row:
                row.append(BOS)
            row.append(token)
            if len(row) == T:
                rows.append(row)
                row = []
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_packing_matches_the_rule_and_can_stop_after_any_row(seed):
    generator = random.Random(seed)
    documents = [
        [generator.randrange(2, 99) for _ in range(generator.choice([0, 1, 2, 5, 6, 7, 11, 30]))] for _ in range(25)
    ]
    expected = packed_naively(documents)
    assert list(Packer(T, BOS).pack(iter(documents))) == expected
    for stop in range(len(expected)):
        first = Packer(T, BOS)
        rows = list(itertools.islice(first.pack(iter(documents)), stop))
        second = Packer(T, BOS)
        second.restore(json.loads(json.dumps(first.state())))
        rest = second.pack(iter(documents[max(0, first.documents - 1) :]))
        assert rows + list(rest) == expected


def test_packing_without_bos_is_plain_concatenation():
    assert list(Packer(3, None).pack(iter([[5, 6], [7, 8, 9], [4]]))) == [[5, 6, 7], [8, 9, 4]]


def test_python_docs_are_plenty_deterministic_and_without_doubles():
    texts = [document.text for document in python_docs()]
    assert texts == list(open_corpus(CorpusConfig(corpus="python-docs")).open())
    assert len(set(texts)) == len(texts) > 300
    assert sum(map(len, texts)) > 1_500_000
    assert any("context manager" in text for text in texts)


def read(path, **changes):
    return list(open_corpus(CorpusConfig(corpus=str(path), **changes)).open())


def test_local_files_and_folders(tmp_path):
    (tmp_path / "b.txt").write_text("second", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n\n{"text": "première"}\n', encoding="utf-8")
    (tmp_path / "ignored.md").write_text("x")
    assert read(tmp_path) == ["first", "première", "second"]
    assert read(tmp_path, first_document=1, last_document=2) == ["première"]
    assert read(tmp_path / "b.txt") == ["second"]
    digest = open_corpus(CorpusConfig(corpus=str(tmp_path))).digest
    (tmp_path / "b.txt").write_text("changed", encoding="utf-8")
    assert open_corpus(CorpusConfig(corpus=str(tmp_path))).digest != digest


def test_parquet_files(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"body": ["one", "two"], "n": [1, 2]}), tmp_path / "c.parquet")
    assert read(tmp_path / "c.parquet", column="body") == ["one", "two"]
    with pytest.raises(CorpusError, match=r"no text in column 'text' \(there is: body, n\)"):
        read(tmp_path / "c.parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "x.jsonl",
            b'{"body": "a"}\n',
            r"x.jsonl, line 1: no text in column 'text' \(there is: body\); set cache.train.column",
        ),
        ("x.jsonl", b"{", "can't be read as jsonl"),
        ("x.txt", b"\xff\xfe\x00", "can't be read as txt"),
        ("x.parquet", b"nonsense", "is not a parquet file"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        read(tmp_path / name)


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(CorpusError, match="there is no such file or folder"):
        read(tmp_path / "nothing.txt")
    with pytest.raises(CorpusError, match=r"no \.txt, \.jsonl, \.parquet file there"):
        read(tmp_path)


def test_a_data_set_that_cannot_be_reached_is_said_within_seconds(monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CorpusError, match=r"data set 'owner/absent' can't be opened .*; check the id and the network"):
        read("owner/absent")


def test_source_and_prose_are_apart_and_the_mix_is_made_of_both_by_turns():
    source, prose, mix = python_source(), python_prose(), python_mix()
    for documents in (source, prose):
        assert len({document.text for document in documents}) == len(documents) > 200
        assert all(document.topic for document in documents)
    both = 2 * min(len(source), len(prose))
    assert [document.text for document in mix[:both:2]] == [d.text[:20_000] for d in source[: both // 2]]
    assert [document.text for document in mix[1:both:2]] == [d.text for d in prose[: both // 2]]
    assert len(mix) == len(source) + len(prose)
    assert {"asyncio", "email", "json"} <= {document.topic for document in source}
    assert sum(len(document.text) for document in source) > 3_000_000
    assert sum(len(document.text) for document in prose) > 800_000
    assert not any(">>>" in document.text for document in prose)
    code = next(document.text for document in source if "def literal_eval(" in document.text)
    assert "Safely evaluate" not in code and '"""' not in code.split("def literal_eval(")[1][:400]
    assert any("context manager" in document.text for document in prose)


def test_code_is_what_is_left_of_a_module_without_comments_and_docstrings(tmp_path):
    module = tmp_path / "module.py"
    module.write_text(
        '"""A module.\n\nWith two paragraphs."""\n# A comment of a line.\n# It goes on here.\nx = "# kept"  # gone\n\n\n\n\n'
        'def f():\n    """Says."""\n    return (1,  # one\n            2)\n'
    )
    assert packaged._code(module) == 'x = "# kept"\n\ndef f():\n\n    return (1,\n            2)\n'
    assert packaged._comments(module) == ["A comment of a line.\nIt goes on here."]
    assert packaged._docstrings(module) == ["A module.\n\nWith two paragraphs.", "Says."]
    assert packaged._docstrings(module, signatures=True)[1] == "f()\nSays."


@pytest.mark.parametrize("module", [argparse, tokenize, re])
def test_comments_are_found_as_the_tokenizer_of_python_finds_them(module):
    text = inspect.getsource(module)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    expected = [token.string for token in tokens if token.type == tokenize.COMMENT]
    assert [match[0] for match in packaged._comment_signs(text)] == expected != []


@pytest.mark.parametrize(
    ("paragraph", "expected"),
    [
        ("This is a sentence of more than eight plain words.", True),
        ('The "with" statement is used here, (as one would\nexpect) to say: "stop" at the very end.', True),
        ("this is a sentence of more than eight plain words.", False),
        ("This is a heading of more than eight plain words", False),
        ("Too short to count.", False),
        (">>> This is an example of more than eight words.", False),
        ("Return x[0] * y_1 + z(2) where a = b(c) is d.e_f for all of the g_h.", False),
    ],
)
def test_prose_is_told_from_what_is_not(paragraph, expected):
    assert packaged.is_prose(paragraph) is expected


def test_packaged_corpora_know_their_topics_and_files_their_names(tmp_path):
    (tmp_path / "poems.txt").write_text("roses", encoding="utf-8")
    assert list(open_corpus(CorpusConfig(corpus=str(tmp_path))).documents()) == [Document("roses", "poems")]
    first = next(open_corpus(CorpusConfig(corpus="python-source", first_document=3)).documents())
    assert first == python_source()[3]
