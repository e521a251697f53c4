import itertools
import json
import random

import pytest

from hsae.cache.config import CorpusConfig
from hsae.cache.corpus import Packer, open_corpus, python_docs
from hsae.cache.errors import CorpusError

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
    texts = python_docs()
    assert texts == python_docs()
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
