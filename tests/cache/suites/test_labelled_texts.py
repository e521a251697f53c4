"""Labelled texts: SAEBench's draws and lists, local files, and what ships with Python."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from hsae.cache.errors import CorpusError
from hsae.cache.suites import python_tasks
from hsae.cache.suites.labelled_texts import SCR_LISTS, DataSet, Record, classes, quadrants
from hsae.cache.suites.probe_store import vocabulary, word_prompts
from hsae.cache.suites.specs import SuiteConfig
from hsae.cache.suites.text_tasks import text_tasks
from hsae.cache.text.data_sets import records

CONFIG = SuiteConfig(train_per_class=6, test_per_class=4, train_per_quadrant=3, test_per_quadrant=2, seed=7)


def held(counts=(23, 19)):
    """Records of three labels and two attributes; every text says what it is."""
    return {
        split: [
            Record(f"{split} {label} {attribute} {number}", label, attribute)
            for number in range(count)
            for label in ("p", "q", "r")
            for attribute in ("m", "f")
        ]
        for split, count in zip(("train", "test"), counts, strict=True)
    }


def a_set(**changes):
    given = {
        "name": "made",
        "read": held,
        "source": "here",
        "pairs": {"p_q": ("p", "q")},
        "attribute_values": ("m", "f"),
    }
    return DataSet(**(given | changes))


def test_texts_are_drawn_as_pandas_draws_them():
    pandas = pytest.importorskip("pandas")
    records = held()
    task = classes(a_set(by_attribute=True), records, CONFIG)
    frame = pandas.DataFrame([vars(record) for record in records["train"]])
    for label in ("p", "q", "r"):
        groups = frame[frame.label == label].groupby("attribute", sort=True)
        wanted = [text for _, group in groups for text in group.sample(n=3, random_state=7).text]
        assert [task.texts[row] for row in task.train[label]] == wanted
    assert list(task.train) == ["p", "q", "r"] and {len(rows) for rows in task.test.values()} == {4}


def test_scr_lists_are_made_of_quadrants_in_the_datas_order():
    task = quadrants(a_set(), held(), "p_q", CONFIG)
    assert task.name == "made_scr_p_q" and tuple(task.train) == tuple(task.test) == SCR_LISTS
    chosen = {name: [task.texts[row] for row in rows] for name, rows in task.train.items()}
    three = {corner: [f"train {corner} {n}" for n in range(3)] for corner in ("p m", "p f", "q m", "q f")}
    assert sorted(chosen["male / female"]) == sorted(three["p m"] + three["q m"])
    assert sorted(chosen["nurse_data_only"]) == sorted(three["q m"] + three["q f"])
    assert sorted(chosen["female_nurse_data_only"]) == sorted(f"train q f {n}" for n in range(6))
    mixed = np.random.default_rng(7)
    first = three["p m"] + three["q m"]
    mixed.shuffle(first)
    assert chosen["male / female"] == first


def test_too_few_texts_are_said():
    with pytest.raises(CorpusError) as raised:
        classes(a_set(classes=("p", "z")), held(), CONFIG)
    assert str(raised.value) == ("data set made: 0 train texts of class z; 6 are needed. Lower suite.train_per_class")
    with pytest.raises(CorpusError) as raised:
        quadrants(a_set(), held((5, 9)), "p_q", CONFIG)
    assert str(raised.value) == (
        "data set made: 5 train texts of p with m; 6 are needed. Lower suite.train_per_quadrant"
    )


def test_local_files_and_what_is_wrong_with_them(tmp_path):
    tasks = tmp_path / "tasks.toml"
    tasks.write_text('[[task]]\nname = "t"\ntrain = "a.jsonl"\ntest = "b.csv"\nlabel = "kind"\n')
    rows = [{"text": f"{kind} {n}", "kind": kind} for kind in "abc" for n in range(9)]
    odd = [{"text": "no kind", "kind": None}, {"text": None, "kind": "d"}]  # neither is a text with a label (FIX B)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows + odd)))
    (tmp_path / "b.csv").write_text(
        "kind,text\n" + "".join(f"{kind},{kind} test {n}\n" for kind in "abc" for n in range(9))
    )
    config = CONFIG.model_copy(update={"tasks": str(tasks)})
    (task,) = text_tasks("sparse-probing", config)
    assert task.name == "t" and list(task.train) == ["a", "b", "c"]
    with pytest.raises(CorpusError) as raised:
        text_tasks("scr", config)
    assert str(raised.value) == (
        f"suite.tasks {str(tasks)!r} has no data for scr; SCR needs two attributes and pairs of labels"
    )
    (tmp_path / "b.csv").write_text("kind,text\n" + "".join(f"{row['kind']},{row['text']}\n" for row in rows))
    with pytest.raises(
        CorpusError, match=r"task t: every test text is a training text; give b.csv texts of its own"
    ):  # FIX A8
        text_tasks("sparse-probing", config)
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    with pytest.raises(CorpusError) as raised:
        text_tasks("sparse-probing", config)
    assert str(raised.value) == f"{tmp_path / 'a.jsonl'}, line 1: no column 'kind' (there is: text)"
    tasks.write_bytes("\ufeff[[task]]\nname = 3\n".encode())
    with pytest.raises(CorpusError, match=r"tasks.toml: \[\[task\]\] name: Input should be a valid string"):
        text_tasks("sparse-probing", config)
    with pytest.raises(CorpusError) as raised:
        text_tasks("tpp", CONFIG.model_copy(update={"tasks": "nowhere.toml"}))
    assert str(raised.value) == (
        "suite.tasks 'nowhere.toml': no such file; give saebench, python, or a TOML file with [[task]] tables"
    )


def test_parquet_gives_the_same_as_jsonl(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    from pyarrow import parquet

    from hsae.cache.text.data_sets import records

    rows = [{"text": f"t{n}", "label": n % 3, "other": None} for n in range(11)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert list(records(tmp_path / "a.parquet", ["label", "text"])) == list(
        records(tmp_path / "a.jsonl", ["label", "text"])
    )


def test_no_file_gives_texts_to_both_splits():
    sizes = {"a": (9, 4, 4, 12, 3, 5), "b": (8, 8, 8, 2)}
    pieces = {
        (label, ""): [(f"{label}{f}", f"{label}{f} {n}") for f, size in enumerate(held) for n in range(size)]
        for label, held in sizes.items()
    }
    pieces["a", ""] += [("a0", "licence"), ("a1", "licence")]
    config = SuiteConfig(train_per_class=9, test_per_class=5)
    split = python_tasks._split(pieces, config, scr=False)
    for label in sizes:
        files = [{r.text.split()[0] for r in split[side] if r.label == label} for side in ("train", "test")]
        assert files[0] and files[1] and not files[0] & files[1]
        assert sum(r.label == label for r in split["test"]) >= 5
    assert "licence" not in {r.text for side in split.values() for r in side}  # not one file's own
    assert sum(map(len, split.values())) == sum(sum(held) for held in sizes.values())


def test_pythons_packages_are_told_by_enough_texts():
    config = SuiteConfig(
        tasks="python", train_per_class=80, test_per_class=40, train_per_quadrant=30, test_per_quadrant=12
    )
    packages = python_tasks.python_sets(config)[0]
    records = packages.read()
    task = classes(packages, records, config)
    assert list(task.train) == list(python_tasks.PACKAGES)
    assert {len(rows) for rows in task.train.values()} == {80} and {len(rows) for rows in task.test.values()} == {40}
    assert len(quadrants(packages, records, "asyncio_email", config).texts) > 100


@pytest.mark.parametrize(
    ("docstring", "style"),
    [
        ("Return the sum.", "imperative"),
        ("Returns the sum.", "third person"),
        ("A class of sums.", "noun phrase"),
        ("Add.\n\n>>> 1 + 1\n2", "example"),
        ("Whatever this is.", None),
    ],
)
def test_the_style_of_a_docstring(docstring, style):
    assert python_tasks.style_of(docstring) == style


def test_pieces_end_at_line_ends():
    lines = [f"line {n} {'x' * 60}" for n in range(20)]
    pieces = python_tasks.pieces_of("\n".join(lines))
    assert "\n".join(pieces).splitlines() == lines
    assert all(python_tasks.SHORTEST <= len(piece) <= 2 * python_tasks.PIECE for piece in pieces)


class Speller:
    """A tokenizer with a table of its own order."""

    def get_vocab(self):
        return {
            "_beta": 0,
            "alpha": 1,
            "_a1": 2,
            "": 3,
            "_": 4,
            "Gamma": 5,
            **{f"_w{chr(97 + n)}": 6 + n for n in range(9)},
        }

    def convert_tokens_to_string(self, tokens):
        return tokens[0].replace("_", " ")


def test_words_are_sorted_and_prompts_are_the_seeds():
    words = vocabulary(Speller())
    assert words == sorted(words) and " beta" in words and "Gamma" in words and " a1" not in words
    config = SuiteConfig(icl_examples=2, seed=3)
    task = word_prompts(Speller(), config)
    assert len(task["train"]) == 9 and len(task["test"]) == len(task["prompts"]) == 3  # four to one, rounded down
    assert word_prompts(Speller(), config) == task != word_prompts(Speller(), SuiteConfig(icl_examples=2, seed=4))
    for word, prompt in task["prompts"]:
        lines = prompt.split("\n")
        assert lines[0] == "" and len(lines) == 4
        assert lines[-1] == f"{word} starts with the letter:"
        assert all(line.endswith(f": {line.strip()[0].upper()}") for line in lines[1:-1])
        assert not any(line.startswith(f"{word} ") for line in lines[1:-1])


def test_hub_data_sets_are_asked_for_at_their_pinned_revisions_and_what_to_do_offline_is_said(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    pytest.importorskip("datasets")
    asked = {}

    def found(self, name, *, revision, timeout):
        asked[name] = revision
        if len(asked) == 3:
            raise ConnectionError("no route")
        return SimpleNamespace(sha="f" * 40)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", found)
    with pytest.raises(CorpusError) as raised:
        text_tasks("tpp", SuiteConfig(revisions={"LabHC/bias_in_bios": "0123abc"}))
    names = list(asked)
    assert asked == {"LabHC/bias_in_bios": "0123abc", names[1]: None, names[2]: None}
    assert str(raised.value) == (
        f"data set {names[2]!r} can't be found on the hub (ConnectionError: no route); check the network, or use "
        f"texts that ship with "
        "Python with --set suite.tasks=python, or local files with --set suite.tasks=FILE.toml"
    )


def test_rows_are_read_from_csv(tmp_path):
    (tmp_path / "x.csv").write_text('name,label\n"a, b",1\nc,2\n', encoding="utf-8")
    assert list(records(tmp_path / "x.csv", ["label", "name"])) == [("1", "a, b"), ("2", "c")]
    with pytest.raises(CorpusError, match=r"x.csv: no column 'text' \(there is: name, label\)"):
        list(records(tmp_path / "x.csv", ["text"]))
    with pytest.raises(CorpusError, match=r"rows are read from \.jsonl, \.csv, \.tsv, \.parquet files"):
        (tmp_path / "x.txt").write_text("")
        list(records(tmp_path / "x.txt", ["text"]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text":' + b"[" * 200_000, "x.jsonl can't be read as jsonl: line 1: it is nested too deeply"),
        ("x.jsonl", b'{"text": ' + b"1" * 5000 + b"}", "x.jsonl can't be read as jsonl: line 1: .*5000 digits"),
        ("x.jsonl", b'{"text": {"a": 1}}', "x.jsonl, line 1: column 'text' holds a dict, not one value"),
        ("x.csv", "text\nzoë\n".encode("latin-1"), "x.csv can't be read as csv: 'utf-8' codec can't decode"),
        ("x.csv", b"text,n\na\0b,1,2\n", "x.csv, row 1 has more cells than the header"),
    ],
)
def test_rows_that_are_none_are_refused_in_a_sentence(tmp_path, name, content, message):
    """FIX B and C14."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        list(records(tmp_path / name, ["text"]))


@pytest.mark.parametrize(
    "content", [b"task = " + b"[" * 100_000, b"x = " + b"1" * 5000, b'x = "\xff"', b"task = 3", b"task = [3]"]
)
def test_a_tasks_file_that_is_none_is_refused_in_a_sentence(tmp_path, content):
    """FIX C14."""
    (tmp_path / "tasks.toml").write_bytes(content)
    with pytest.raises(CorpusError, match=r"tasks\.toml"):
        text_tasks("tpp", CONFIG.model_copy(update={"tasks": str(tmp_path / "tasks.toml")}))
