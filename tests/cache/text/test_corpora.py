"""Text and packing.

Kinds of FIX: A8 (evaluation text that is trained on), B (odd rows, folders and corpora that are too small).
"""

import argparse
import bz2
import gzip
import inspect
import io
import itertools
import json
import lzma
import os
import random
import re
import shutil
import tokenize
from pathlib import Path

import pytest
from places import GOLDEN_MODEL

from hsae.cache.building.build import build
from hsae.cache.config import CorpusConfig
from hsae.cache.errors import CorpusError
from hsae.cache.text import python_text
from hsae.cache.text.common_text import common_text
from hsae.cache.text.corpora import open_corpus
from hsae.cache.text.packing import Packer
from hsae.cache.text.python_text import Document, python_docs, python_mix, python_prose, python_source
from hsae.train.config.plan import load_plan

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
    with pytest.raises(CorpusError, match=r"no column 'text' \(there is: body, n\)"):
        read(tmp_path / "c.parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "x.jsonl",
            b'{"body": "a"}\n',
            r"x.jsonl, line 1: no column 'text' \(there is: body\); set cache.train.column$",
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
    with pytest.raises(CorpusError, match="there is no such file or folder"):
        read("~nobody-of-this-name/a.txt")
    with pytest.raises(CorpusError, match=r"no \.txt, \.jsonl, \.csv, \.tsv, \.parquet file there"):
        read(tmp_path)


def test_a_data_set_that_cannot_be_reached_is_said_within_seconds(monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        CorpusError, match=r"data set 'owner/absent' can't be found on the hub .*; check the network, or give"
    ):
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
        '"""A module.\n\nWith two paragraphs."""\n# A comment of a line.\n# It goes on here.\n'
        'x = "# kept"  # gone\n\n\n\n\n'
        'def f():\n    """Says."""\n    return (1,  # one\n            2)\n'
    )
    assert python_text._code(module) == 'x = "# kept"\n\ndef f():\n\n    return (1,\n            2)\n'
    assert python_text._comments(module) == ["A comment of a line.\nIt goes on here."]
    assert python_text._docstrings(module) == ["A module.\n\nWith two paragraphs.", "Says."]
    assert python_text._docstrings(module, signatures=True)[1] == "f()\nSays."


@pytest.mark.parametrize("module", [argparse, tokenize, re])
def test_comments_are_found_as_the_tokenizer_of_python_finds_them(module):
    text = inspect.getsource(module)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    expected = [token.string for token in tokens if token.type == tokenize.COMMENT]
    assert (
        [match[0] for match in python_text.STRING_OR_COMMENT.finditer(text) if match[0].startswith("#")]
        == expected
        != []
    )


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
    assert python_text.is_prose(paragraph) is expected


def test_packaged_corpora_know_their_topics_and_files_their_names(tmp_path):
    (tmp_path / "poems.txt").write_text("roses", encoding="utf-8")
    assert list(open_corpus(CorpusConfig(corpus=str(tmp_path))).documents()) == [Document("roses", "poems")]
    first = next(open_corpus(CorpusConfig(corpus="python-source", first_document=3)).documents())
    assert first == python_source()[3]


# --- FIX B: rows ---------------------------------------------------------------------


def test_halves_of_surrogate_pairs_are_replaced_wherever_text_enters(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "cut \\ud83d here, \\ud83d\\ude00 whole"}\n')
    (tmp_path / "b.txt").write_bytes(b"cut \xed\xa0\xbd here")
    (tmp_path / "c.csv").write_bytes(b"n,text\n1,cut \xed\xa0\xbd here\n")
    assert read(tmp_path) == ["cut \ufffd here, \U0001f600 whole", "cut \ufffd here", "cut \ufffd here"]


def test_rows_without_text_are_documents_without_tokens_and_keep_their_numbers(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = ["one", None, "three", ""]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "a.csv").write_text("n,text\n1,one\n2,\n3,three\n4\n")
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        assert read(tmp_path / name) == ["one", "", "three", ""], name
        assert read(tmp_path / name, first_document=2, last_document=3) == ["three"]


def test_bytes_are_text_in_utf8_or_refused_with_their_row(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def write(*values):
        parquet.write_table(pyarrow.table({"text": pyarrow.array(values, pyarrow.binary())}), tmp_path / "a.parquet")
        return tmp_path / "a.parquet"

    assert read(write("zoë".encode(), b"half \xed\xa0\xbd")) == ["zoë", "half \ufffd"]
    with pytest.raises(CorpusError, match=r"a.parquet, row 2: column 'text' holds bytes that are not UTF-8"):
        read(write(b"a", b"\xff"))
    broken = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, *map(pyarrow.py_buffer, (b"\0\0\0\0\1\0\0\0", b"\xff"))]
    )
    parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "b.parquet")
    with pytest.raises(CorpusError, match=r"b.parquet, row 1: column 'text' holds bytes that are not UTF-8"):
        read(tmp_path / "b.parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "x.jsonl",
            b'{"text": "a"}\n{"text": 3}\n',
            "x.jsonl, line 2: column 'text' holds 3, not text; set cache.eval.column",
        ),
        ("x.jsonl", b'{"text": ["a"]}\n', "x.jsonl, line 1: column 'text' holds a list, not one value"),
        ("x.jsonl", b'["a"]\n', r"x.jsonl, line 1: no column 'text' \(there is: a list\); set cache.eval.column"),
        ("x.jsonl", b'{"text":' + b"[" * 200_000, "x.jsonl can't be read as jsonl: line 1: it is nested too deeply"),
        (
            "x.jsonl",
            b'{"text": "a"}\n{"n": ' + b"1" * 5000 + b"}",
            "x.jsonl can't be read as jsonl: line 2: .*5000 digits",
        ),
        ("x.jsonl", '{"text": "a"}\n'.encode("utf-16"), "x.jsonl can't be read as jsonl: 'utf-8' codec"),
        ("x.jsonl", b"\0" * 64, "x.jsonl can't be read as jsonl: line 1: Expecting value"),
        ("x.jsonl", b"", "has 0 documents"),
        ("x.txt", "words".encode("utf-16-le"), "x.txt is not text in UTF-8: much of it are null characters"),
        ("x.csv", b"", r"x.csv: no column 'text' \(there is: \); set cache.eval.column"),
        (
            "x.csv",
            b"n,text\n1,a,b\n",
            "x.csv, row 1 has more cells than the header; put text that holds commas in quotes",
        ),
        ("x.csv", b'text\n"a', "x.csv can't be read as csv: unexpected end of data"),
        (
            "x.txt.gz",
            gzip.compress(b"words" * 99, mtime=0)[:-9],
            "x.txt.gz can't be read as txt: Compressed file ended",
        ),
        ("x.jsonl.gz", b"words", "x.jsonl.gz can't be read as jsonl: Not a gzipped file"),
        ("x.jsonl.xz", b"words", "x.jsonl.xz can't be read as jsonl: Input format not supported"),
        (
            "x.pdf",
            b"words",
            r"x.pdf' can't be read; what can be read are files of the kinds \.txt, \.jsonl, \.csv, \.tsv, \.parquet",
        ),
    ],
)
def test_text_that_is_none_is_refused_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        list(open_corpus(CorpusConfig(corpus=str(tmp_path / name)), "eval").open())


def test_a_corpus_that_ends_before_the_first_document_names_the_key(tmp_path):
    (tmp_path / "book.txt").write_text("words")
    with pytest.raises(
        CorpusError, match=r"has 1 document \(a .txt file is one\), and cache.train.first_document = 80 leaves none"
    ):
        read(tmp_path / "book.txt", first_document=80)
    with pytest.raises(CorpusError, match=r"lower unlearning.forget.first_document"):
        list(open_corpus(CorpusConfig(corpus=str(tmp_path), first_document=1), "forget").open())
    with pytest.raises(ValueError, match="last_document = 7 leaves nothing: it must be above first_document = 7"):
        CorpusConfig(corpus="python-docs", first_document=7, last_document=7)


# --- FIX B: files and folders ---------------------------------------------------------------------


def test_compressed_files_csv_and_byte_order_marks_are_read(tmp_path):
    line, long = b'{"text": "json"}\n', "long " * 40_000
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line, mtime=0) + gzip.compress(line))
    (tmp_path / "b.csv.bz2").write_bytes(bz2.compress(f'text,n\n"two\nlines, {long}",1\n'.encode()))
    (tmp_path / "c.txt.xz").write_bytes(lzma.compress(b"text"))
    (tmp_path / "d.tsv").write_bytes(b"\xef\xbb\xbftext\tn\r\na, b\t1\r\n")
    (tmp_path / "e.JSONL").write_bytes(b"\xef\xbb\xbf" + line)
    expected = ["json", "json", f"two\nlines, {long}", "text", "a, b", "json"]
    assert read(tmp_path) == expected
    assert [document.topic for document in open_corpus(CorpusConfig(corpus=str(tmp_path))).documents()] == list(
        "aabcde"
    )
    pyarrow = pytest.importorskip("pyarrow")
    frame = pyarrow.compress(line, codec="zstd", asbytes=True)
    (tmp_path / "f.jsonl.zst").write_bytes(frame + frame)
    assert read(tmp_path) == [*expected, "json", "json"]


def test_files_of_a_folder_that_are_not_read_are_told(tmp_path):
    for name in (
        "a.txt",
        "b.md",
        "c.pdf",
        "d.pdf",
        "._a.txt",
        "_SUCCESS",
        "notes",
        "sub/.git/x.txt",
        ".ipynb_checkpoints/a.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "list.csv").write_text("name,size\na.txt,5\n")
    corpus = open_corpus(CorpusConfig(corpus=str(tmp_path)))
    assert list(corpus.open()) == ["a.txt"]
    assert corpus.notes == (
        f"corpus {str(tmp_path)!r}: files read: 1; not read: 1 .csv without a column 'text', 1 .md, 2 .pdf, 1 hidden, "
        "1 without suffix",
    )
    assert open_corpus(CorpusConfig(corpus=str(tmp_path / "a.txt"))).notes == ()


def test_links_are_followed_and_no_file_is_read_twice(tmp_path):
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "texts" / "b.txt").write_text("b")
    (tmp_path / "elsewhere" / "x.txt").write_text("x")
    for name, target in {
        "a.txt": "b.txt",
        "deep/loop": "../../texts",
        "linked": "../elsewhere",
        "linked again": "../elsewhere",
        "gone.txt": "nowhere.txt",
    }.items():
        (tmp_path / "texts" / name).symlink_to(target)
    corpus = open_corpus(CorpusConfig(corpus=str(tmp_path / "texts")))
    assert list(corpus.documents()) == [Document("b", "a"), Document("x", "x")]
    assert "1 broken link, 1 the same file again" in corpus.notes[0]


def test_a_folder_of_parts_is_one(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder = tmp_path / "poems.parquet"
    folder.mkdir()
    for number, text in enumerate(("one", "two")):
        parquet.write_table(pyarrow.table({"text": [text]}), folder / f"part-0000{number}.snappy.parquet")
    for name in ("_SUCCESS", "._SUCCESS.crc", ".part-00000.snappy.parquet.crc"):
        (folder / name).touch()
    for place in (folder, tmp_path):
        corpus = open_corpus(CorpusConfig(corpus=str(place)))
        assert list(corpus.documents()) == [Document("one", "poems"), Document("two", "poems")]
        assert corpus.notes == ()


# --- FIX A8: evaluation text that is trained on ---------------------------------------------------------------------


def common(one, other, **windows):
    names = {
        "first": "first_document",
        "last": "last_document",
        "column": "column",
        "split": "split",
        "seed": "shuffle_seed",
    }
    configs = [
        CorpusConfig(
            corpus=str(corpus), **{key: windows[f"{name}{n}"] for name, key in names.items() if f"{name}{n}" in windows}
        )
        for n, corpus in ((1, one), (2, other))
    ]
    found = {common_text(*configs) is not None, common_text(*reversed(configs)) is not None}
    assert len(found) == 1
    return common_text(*configs)


def test_windows_of_documents_that_meet_are_told():
    assert common("python-docs", "python-docs", last1=80, first2=80) is None
    assert (
        common("python-docs", "python-docs", last1=81, first2=80) == "both read 'python-docs', documents 80 to 80 of it"
    )
    assert common("o/n", "O/N", first1=7) == "both read 'o/n' from document 7 on"
    assert common("o/n", "o/n", last1=7, first2=7) is None
    assert common("o/n", "o/n", last1=7, first2=7, seed1=3) is not None
    assert common("o/n", "o/n", split1="test") is None
    assert common("o/n", "o/m") is None


def test_packaged_corpora_that_share_documents_are_told():
    assert common("python-mix", "python-source", last1=600, first2=325) is None
    assert common("python-mix", "python-prose", last1=600, first2=325) is None
    told = common("python-mix", "python-source", first1=600, last1=650, last2=325)
    assert told == "python-mix and python-source have 25 of these documents in common"
    assert common("python-prose", "python-source") is None
    assert common("python-prose", "python-docs") == "python-docs and python-prose are made of the same docstrings"


def test_each_corpus_is_read_by_its_own_column(tmp_path):
    for name, column in (("one", "text"), ("other", "body")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.csv").write_text(f"{column}\n{name}\nmore\n")
    assert common(tmp_path / "one", tmp_path / "other", column2="body") is None
    for name in ("one", "other"):
        (tmp_path / name / "b.txt").write_text("the same")
    shared = common(tmp_path / "one", tmp_path / "other", column2="body", first1=1)
    assert shared == f"both read {str(tmp_path / 'one/b.txt')!r}, documents 0 to 0 of it"


def test_one_file_under_several_names_is_one_text(tmp_path, monkeypatch):
    lines = [json.dumps({"text": f"words {n}", "body": f"other {n}"}) + "\n" for n in range(20)]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "b.jsonl").write_text("".join(lines))
    shutil.copy(tmp_path / "texts" / "b.jsonl", tmp_path / "copy.jsonl")
    os.link(tmp_path / "copy.jsonl", tmp_path / "linked.jsonl")
    (tmp_path / "folder").symlink_to("texts")
    (tmp_path / "other.jsonl").write_text("".join(reversed(lines)))
    monkeypatch.chdir(tmp_path)
    for name in (
        "texts",
        "folder",
        "texts/b.jsonl",
        "copy.jsonl",
        "linked.jsonl",
        tmp_path / "texts" / ".." / "copy.jsonl",
    ):
        assert common("texts/b.jsonl", name), name
        assert common("texts/b.jsonl", name, last1=8, first2=8) is None, name
    assert common("texts/b.jsonl", "copy.jsonl", column1="body") is None
    assert common("texts/b.jsonl", "other.jsonl") is None
    (tmp_path / "texts" / "a.txt").write_text("one more")
    assert common("texts", "copy.jsonl", last1=9, first2=8) is None
    assert (
        common("texts", "copy.jsonl", last1=10, first2=8)
        == f"both read {str(Path('texts/b.jsonl'))!r}, documents 8 to 8 of it"
    )


def test_a_build_that_fails_in_the_text_leaves_no_store(tmp_path):
    """FIX B: the mended file can be built from with the same command."""
    good = [json.dumps({"text": f"some words of document {n}"}) + "\n" for n in range(200)]
    (texts := tmp_path / "texts").mkdir()
    text = texts / "a.jsonl"
    (texts / "a.md").touch()
    sets = [f"cache.train.corpus={str(texts)!r}", "cache.train.first_document=0", "cache.train.rows=24"]
    model = str(GOLDEN_MODEL)
    spec = load_plan("tiny", [*sets, f"model.id={model!r}"]).store("train")
    for line in (2, 80):  # among the documents that are read before the model is loaded, and behind them
        text.write_text("".join([*good[: line - 1], '{"txt": "x"}\n', *good]))
        with pytest.raises(CorpusError, match=rf"a.jsonl, line {line}: no column 'text' .*; set cache.train.column"):
            build([spec], tmp_path / "stores")
        assert not (tmp_path / "stores" / spec.name).exists()
    text.write_text("".join(good))
    said = []
    (path,) = build([spec], tmp_path / "stores", say=said.append)
    assert (path / "zarr.json").is_file()
    assert f"corpus {str(texts)!r}: files read: 1; not read: 1 .md" in said


def test_rows_of_a_data_set_on_the_hub_are_read_as_those_of_files(monkeypatch):
    """FIX B."""

    def rows():
        yield from ({"text": "cut \ud83d"}, {"text": None}, {"text": b"bytes"})
        raise ConnectionError("no route")

    monkeypatch.setattr("hsae.cache.text.data_sets.resolve_revision", lambda name, revision, instead: "abc")
    monkeypatch.setattr("hsae.cache.text.data_sets.open_data_set", lambda *asked: rows())
    texts = open_corpus(CorpusConfig(corpus="owner/name"), "retain").open()
    assert list(itertools.islice(texts, 3)) == ["cut \ufffd", "", "bytes"]
    with pytest.raises(CorpusError, match=r"ConnectionError: no route\); .* --set unlearning.retain.corpus=PATH"):
        next(texts)
    monkeypatch.setattr("hsae.cache.text.data_sets.open_data_set", lambda *asked: [{"text": "a"}, {"text": 4}])
    with pytest.raises(CorpusError, match=r"data set owner/name, row 2: column 'text' holds 4, not text"):
        read("owner/name")


def test_a_build_knows_text_that_changed_under_an_unchanged_time(tmp_path, monkeypatch):  # FIX C9
    monkeypatch.setenv("HSAE_HOME", str(tmp_path / "home"))
    path = tmp_path / "text.txt"
    path.write_text("one two three")
    before, config = path.stat(), CorpusConfig(corpus=str(path))
    digest = open_corpus(config, anew=True).digest
    path.write_text("one two thrEe")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert open_corpus(config).digest == digest
    assert open_corpus(config, anew=True).digest != digest
