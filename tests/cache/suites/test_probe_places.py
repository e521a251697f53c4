"""The suites' stores in other places and in harm's way: S3, memory and HTTP hold and give what a folder does, and
damage is named and mended."""

import json
import random
import uuid
from types import SimpleNamespace

import pytest
import torch
from commands import HOOK, an_sae, invoke, settings, write_entities, write_texts
from places import GOLDEN_MODEL as MODEL
from safetensors.torch import load, save

from hsae.cache.config import ModelConfig
from hsae.cache.errors import StoreError
from hsae.cache.language_model.lm import LanguageModel
from hsae.cache.storage.paths import place, publish, sizes
from hsae.cache.storage.remote import RemotePath
from hsae.cache.storage.server import find
from hsae.cache.suites import suite_files as module
from hsae.cache.suites.build import build_suites
from hsae.cache.suites.catalogue import list_stores
from hsae.cache.suites.probe_store import ProbeStore
from hsae.cache.suites.ravel_store import RavelStore
from hsae.cache.suites.residual_sets import ResidualSet, part_bytes, part_name
from hsae.cache.suites.suite_files import Part
from hsae.eval.harness.options import DrawOptions
from hsae.eval.probing.config import probe_spec
from hsae.eval.probing.evaluations import SparseProbing
from hsae.eval.ravel.config import RavelConfig, ravel_spec
from hsae.eval.ravel.ravel_runs import Ravel
from hsae.train.config.plan import load_plan
from hsae.train.model import saelens_folder

SUITES = ("sparse-probing", "absorption", "ravel")


class Counting:
    """A language model that counts its prefix passes, in texts, and suffix passes."""

    def __init__(self, model):
        self._model, self.texts, self.suffixes = model, 0, 0

    def __getattr__(self, name):
        self.suffixes += name == "suffix"
        return getattr(self._model, name)

    def prefix(self, ids, hooks):
        self.texts += len(ids)
        return self._model.prefix(ids, hooks)


@pytest.fixture(scope="module")
def language():
    return LanguageModel.load(ModelConfig(id=str(MODEL), dtype="float32"))


@pytest.fixture
def counting(language):
    return Counting(language)


@pytest.fixture(scope="module")
def given(tmp_path_factory, language):
    """(a folder with the stores of all SUITES, the overrides of a plan without its cache.dir)."""
    folder = tmp_path_factory.mktemp("places")
    write_texts(folder)
    write_entities(folder, language)
    values = {
        "model.id": str(MODEL), "train.dir": str(folder / "runs"), "suite.tasks": str(folder / "tasks.toml"),
        "suite.context": 16,
        "suite.batch_rows": 5, "suite.train_per_class": 11, "suite.test_per_class": 7, "suite.words": 380,
        "suite.min_letters": 1,
        "ravel.entities": str(folder / "words.toml"), "ravel.min_prompts": 5, "ravel.pairs": 10, "ravel.batch_pairs": 3,
        "ravel.batch_rows": 7, "ravel.learning_rate": 0.1, "ravel.least_ceiling": 0,
    }  # fmt: skip
    chosen = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    plan = load_plan("tiny", chosen)
    for suite in SUITES:
        built(plan, suite, folder / "near", language)
    return folder / "near", chosen


@pytest.fixture
def near(given):
    return given[0]


@pytest.fixture
def plan(given):
    return load_plan("tiny", given[1])


@pytest.fixture(params=["folder", "memory", "s3"])
def home(request, scratch_home, tmp_path):
    """An empty place."""
    if request.param == "s3":
        request.getfixturevalue("s3")
        return place(f"s3://bucket/{uuid.uuid4().hex}")
    return tmp_path / "stores" if request.param == "folder" else place(f"memory://{uuid.uuid4().hex}")


@pytest.fixture
def copied(home, near):
    """A place with what the suites' folder holds."""
    for name, data in contents(near).items():
        publish(home / name, data)
    return home


def built(plan, suite, root, model):
    if suite == "ravel":
        return build_suites([ravel_spec(plan)], root, model=model)[0]
    return build_suites([probe_spec(plan, suite)], root, model=model)[0]


def opened(plan, suite, root):
    return RavelStore(ravel_spec(plan), root) if suite == "ravel" else ProbeStore(probe_spec(plan, suite), root)


def contents(root):
    return {name: (root / name).read_bytes() for name in sizes(root) if not name.endswith(".lock")}


def read_all(plan, suite, root):
    """Every tensor of a store."""
    store = opened(plan, suite, root)
    if suite == "ravel":
        return [store.resid(prompt, HOOK) for prompt in store.header.prompts]
    return [tensor for task in store.header.tasks for tensor, _ in store.ragged(task, HOOK)]


def evaluated(plan, root, language):
    """What an SAE's results of sparse probing and RAVEL say."""
    target = SimpleNamespace(view=an_sae(29), hook=HOOK, release="r", sae_id="sae", label="sae", inputs={"sae": "0"})
    once = DrawOptions(draws=1)
    probing = SparseProbing(ProbeStore(probe_spec(plan, "sparse-probing"), root), once)
    ravel = Ravel(RavelStore(ravel_spec(plan), root), once, plan.table(RavelConfig))
    ravel.language = language
    found = [evaluation.measure(target) for evaluation in (probing, ravel)]
    return [(content["eval_result_metrics"], content["hsae"]["measures"]) for content in found]


@pytest.fixture(scope="module")
def results(given, language):
    return evaluated(load_plan("tiny", given[1]), given[0], language)


def multi(near):
    """The set of several parts, below the folder of stores."""
    (name,) = {path.parent for path in near.rglob("part-00001.safetensors")}
    return name.relative_to(near).as_posix()


# ---- places ---------------------------------------------------------------------


def test_stores_at_any_place_are_the_same_and_are_read_alike(
    given, near, plan, home, counting, language, results, tmp_path
):
    for suite in SUITES:
        built(plan, suite, home, counting)
    assert contents(home) == contents(near)
    passes, counting.texts, counting.suffixes = counting.texts, 0, 0
    for suite in SUITES:
        built(plan, suite, home, counting)
        for here, there in zip(read_all(plan, suite, near), read_all(plan, suite, home), strict=True):
            assert torch.equal(here, there)
    assert passes > 400 and counting.texts == counting.suffixes == 0
    assert contents(home) == contents(near)
    assert (
        list(list_stores(home)) == list(list_stores(near))
        and [item.problem for item in list_stores(home)] == [None] * 3
    )
    if isinstance(home, RemotePath):
        listed = invoke("cache", "ls", str(home))
        assert listed.exit_code == 0 and listed.output.count("complete") == 3, listed.output
    if getattr(home, "protocol", None) == "s3":
        assert evaluated(plan, home, language) == results
        saelens_folder.save(an_sae(29), tmp_path / "sae")
        chosen = ["--sae", tmp_path / "sae", "--out", tmp_path / "out", "--draws", 1]
        done = invoke("eval", "sparse-probing", *chosen, *settings([*given[1], f"cache.dir={str(home)!r}"]))
        assert done.exit_code == 0, (done.output, done.exception)
        (file,) = (tmp_path / "out" / "sparse_probing").iterdir()
        assert json.loads(file.read_text())["eval_result_metrics"] == results[0][0]


def test_each_part_is_one_put_and_one_get_and_is_fetched_once(near, plan, s3, scratch_home, language):
    home = f"s3://bucket/{uuid.uuid4().hex}"
    s3.requests.clear()
    built(plan, "absorption", home, language)
    parts = [name for name in sizes(place(home)) if name.endswith(".safetensors")]
    assert s3.requests["PUT"] == len(parts) + 2 and len(parts) == 4  # a trial, the parts and the suite's file
    for gets in (len(parts), 0):
        store = ProbeStore(probe_spec(plan, "absorption"), home)
        s3.requests.clear()
        for task in store.header.tasks:
            list(store.ragged(task, HOOK))
        assert s3.requests["GET"] == gets and set(s3.requests) <= {"GET"}


def test_a_third_of_the_requests_fails_and_no_part_is_lost(near, plan, s3, scratch_home, counting, record_property):
    home = place(f"s3://bucket/{uuid.uuid4().hex}")
    s3.faults.clear()
    s3.rate = 0.3
    built(plan, "absorption", home, counting)
    for here, there in zip(read_all(plan, "absorption", near), read_all(plan, "absorption", home), strict=True):
        assert torch.equal(here, there)
    s3.rate = 0.0
    assert s3.faults.total() > 2
    record_property("injected", s3.faults.total())
    assert contents(home).items() <= contents(near).items()


def test_over_http_stores_are_read_and_nothing_else_is_shown(given, near, plan, serve, token, scratch_home, language,
results, monkeypatch, wide):  # fmt: skip
    monkeypatch.setattr(LanguageModel, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    with serve(near) as (url, _, _):
        assert evaluated(plan, url, language) == results
        assert list(list_stores(place(url))) == list(list_stores(near))
        listed = invoke("cache", "ls", url)
        assert listed.output.count("complete") == 3, listed.output
        for suite in ("tpp", "ravel"):
            done = invoke("cache", "build", "--suite", suite, *settings([*given[1], f"cache.dir={url!r}"]))
            assert isinstance(done.exception, StoreError)
            assert "stores at http:// can only be read; write where they lie" in str(done.exception)
        with pytest.raises(StoreError, match=r"there is no probe store http://\S+; make it with: hsae cache build"):
            ProbeStore(probe_spec(plan, "tpp"), url)


def test_what_may_be_shown_of_the_suites_folder(near, tmp_path):
    folder = tmp_path / "probe" / "texts" / "x"
    folder.mkdir(parents=True)
    shown = (folder / part_name(0), folder.parent.parent / "tpp.json")
    hidden = (folder / "notes.txt", folder / ".part-00000.safetensors.1f.partial", folder / ".x.json", folder / "part")
    outside = tmp_path / "config.json"
    for path in (*shown, *hidden, outside):
        path.write_text("{}")
    (folder / "link.json").symlink_to(outside)
    (folder / "renamed.json").symlink_to(folder / "notes.txt")
    (tmp_path / "a.zarr").mkdir()
    for path in (*shown, folder):
        name = path.relative_to(tmp_path).as_posix()
        assert find(tmp_path, None, name) == path and find(tmp_path, "a.zarr", name) is None
    for path in (*hidden, outside, folder / "link.json", folder / "renamed.json"):
        assert find(tmp_path, None, path.relative_to(tmp_path).as_posix()) is None
    assert find(tmp_path, None, "probe/../config.json") is None
    other = tmp_path / "other"
    other.mkdir()
    (other / "probe").write_text("{}")
    assert find(other, None, "probe") is None


def test_a_place_that_can_not_be_written_is_said_before_the_model_is_loaded(given, plan, s3, tmp_path, monkeypatch):
    monkeypatch.setattr(LanguageModel, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("")
    missing = "there is no such bucket; make it, or correct the URL"
    for home, cause, words in (
        ("s3://nowhere/x", missing, missing),
        (str(tmp_path / "file" / "x"), "nothing can be written in",
        "there is no probe store .*; make it with: hsae cache build --suite"),
    ):  # fmt: skip
        for suite in ("absorption", "ravel"):
            done = invoke("cache", "build", "--suite", suite, *settings([*given[1], f"cache.dir={home!r}"]))
            assert isinstance(done.exception, StoreError), done.exception
            assert cause in str(done.exception) and f"{home}/probe" in str(done.exception), done.exception
            with pytest.raises(StoreError, match=words):
                opened(plan, suite, home)


# ---- damage ---------------------------------------------------------------------

HARMS = {
    "flipped": lambda data, other: flipped(data),
    "cut": lambda data, other: data[: len(data) // 2],
    "emptied": lambda data, other: b"",
    "lengthened": lambda data, other: data + b"\0",
    "swapped": lambda data, other: other,
    "removed": lambda data, other: None,
}


def flipped(data):
    at = random.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]


@pytest.mark.parametrize("home", ["folder", "memory"], indirect=True)
@pytest.mark.parametrize("harm", HARMS)
def test_a_harmed_part_is_named_and_mended_to_the_same_bytes(near, plan, copied, counting, harm, record_property):
    name, whole = multi(near), contents(copied)
    file, other = (copied / name / part_name(number) for number in (0, 1))
    data = HARMS[harm](file.read_bytes(), other.read_bytes())
    file.unlink() if data is None else publish(file, data)
    record_property("injected", 1)
    told = {
        "flipped": "fails its checksum; mend the store with",
        "swapped": f"is {len(data or b'')} bytes long, not {len(whole[f'{name}/{part_name(0)}'])}; mend the store with",
        "removed": "is missing; go on with",
    }.get(harm, "bytes long, not")
    with pytest.raises(StoreError) as raised:
        read_all(plan, "absorption", copied)
    assert str(raised.value).startswith(f"{file} ") and told in str(raised.value)
    assert str(raised.value).endswith("with: hsae cache build --suite absorption")
    listed = next(item for item in list_stores(copied) if "/absorption/" in item.name)
    assert (listed.problem is None) == (harm == "flipped")
    built(plan, "absorption", copied, counting)
    assert contents(copied) == whole and counting.texts == module.PART_TEXTS
    read_all(plan, "absorption", copied)
    if harm != "removed":
        file.unlink()
        built(plan, "absorption", copied, counting)
        assert contents(copied) == whole and counting.texts == 2 * module.PART_TEXTS


@pytest.mark.parametrize("home", ["folder", "memory"], indirect=True)
def test_of_parts_of_one_length_only_the_checksums_tell_them_apart(home, record_property):
    generator = torch.Generator().manual_seed(3)

    def made(name):
        lengths = torch.tensor([2, 1, 4])
        return part_bytes({HOOK: torch.randn(7, 5, generator=generator).bfloat16(), "lengths": lengths}, name)

    names = [part_name(number) for number in range(3)]
    held = [made(f"x/{name}") for name in names]
    again, foreign = made(f"x/{names[1]}"), made(f"y/{names[1]}")
    assert len({len(data) for data in (*held, again, foreign)}) == 1
    folder, listed = home / "x", [Part.of(data) for data in held]
    problems = [
        (held[0], "is another part, put in this one's place"),
        (again, "was made anew, with other numbers than those that the store was made with"),
        (foreign, "fails its checksum"),
        *((flipped(held[1]), "fails its checksum") for _ in range(60)),
    ]
    for harmed, problem in problems:
        for name, data in zip(names, (held[0], harmed, held[2]), strict=True):
            publish(folder / name, data)
        parts = ResidualSet(folder, listed, "tpp")
        with pytest.raises(StoreError) as raised:
            parts.open(1)
        assert str(raised.value) == f"{folder}/{names[1]} {problem}; mend the store with: hsae cache build --suite tpp"
        found = module.read_whole(folder / names[1], f"x/{names[1]}")
        assert (found is not None) == (harmed == again)
        record_property("injected", 1)
    for foreign in (save({"x": torch.zeros(3, dtype=torch.int8)}), b"\2" + bytes(7) + b"[]", b"\xff" * 40):
        publish(folder / names[1], foreign)
        with pytest.raises(StoreError, match="is no safetensors file of residuals; mend the store with"):
            ResidualSet(folder, [listed[0], Part.of(foreign), listed[2]], "tpp").open(1)
    publish(folder / names[1], held[1])
    expected = load(held[1])
    assert all(
        torch.equal(tensor, expected[name]) for name, tensor in ResidualSet(folder, listed, "tpp").open(1).items()
    )


def test_a_changed_suites_file_is_refused_and_made_again(given, near, plan, tmp_path, counting, record_property):
    for suite in ("absorption", "ravel"):
        for name, data in contents(near).items():
            publish(tmp_path / name, data)
        path = opened(plan, suite, tmp_path).path
        whole = path.read_bytes()
        for data in (*(flipped(whole) for _ in range(60)), whole[:-1], whole + b" ", b"", b"{}", b"[" * 10**5):
            path.write_bytes(data)
            with pytest.raises(StoreError) as raised:
                opened(plan, suite, tmp_path)
            assert str(raised.value).startswith((f"{path} is damaged (", f"{path} has format "))
            assert f"hsae cache build --suite {suite}" in str(raised.value)
            record_property("injected", 1)
        if suite == "ravel":
            with pytest.raises(StoreError, match="is damaged"):  # not taken for one that was never built
                Ravel.open_store(load_plan("tiny", [*given[1], f"cache.dir={str(tmp_path)!r}"]))
        built(plan, suite, tmp_path, counting)
        assert path.read_bytes() == whole and counting.texts == counting.suffixes == 0


@pytest.mark.parametrize("home", ["folder", "s3"], indirect=True)
def test_a_build_goes_on_and_takes_no_harmed_part_for_a_whole_one(
    near, plan, home, counting, monkeypatch, record_property
):
    """While nothing lists the parts."""
    done = {}
    for suite, last in (("absorption", part_name(1)), ("ravel", ".json")):
        whole = {name: data for name, data in contents(near).items() if not name.startswith("probe/sparse-probing")}
        real = publish

        def failing(target, data, last=last, real=real):
            if target.name.endswith(last):
                raise OSError(28, "No space left on device")
            real(target, data)

        for user in ("residual_sets", "ravel_store"):
            monkeypatch.setattr(f"hsae.cache.suites.{user}.publish", failing)
        with pytest.raises(OSError, match="No space left"):
            built(plan, suite, home, counting)
        for user in ("residual_sets", "ravel_store"):
            monkeypatch.setattr(f"hsae.cache.suites.{user}.publish", real)
        with pytest.raises(StoreError, match="there is no probe store"):
            opened(plan, suite, home)
        begun = {name: data for name, data in contents(home).items() if name not in done}
        (name,) = begun
        assert begun[name] == whole[name]
        publish(home / name, flipped(begun[name]))
        record_property("injected", 2)
        built(plan, suite, home, counting)
        done = contents(home)
        assert {name: whole[name] for name in done} == done and opened(plan, suite, home)


@pytest.mark.parametrize("home", ["folder", "memory"], indirect=True)
def test_harmed_answers_are_asked_for_again(near, plan, copied, counting, record_property):
    whole = contents(copied)
    (name,) = (name for name in whole if "/answers/" in name)
    for harmed in (flipped(whole[name]), whole[name][:-9], b"[]", None):
        (copied / name).unlink() if harmed is None else publish(copied / name, harmed)
        record_property("injected", 1)
        counting.suffixes = 0
        built(plan, "ravel", copied, counting)
        assert contents(copied) == whole and counting.suffixes > 0


@pytest.mark.parametrize("home", ["folder", "memory"], indirect=True)
def test_another_suite_with_the_same_residuals_says_that_they_were_made_anew(near, plan, copied, counting):
    """As on a machine that computes other bits."""
    built(plan, "tpp", copied, counting)
    sparse, tpp = (ProbeStore(probe_spec(plan, suite), copied) for suite in ("sparse-probing", "tpp"))
    (name,) = sparse.header.parts
    assert tpp.header.parts == sparse.header.parts and counting.texts == 0
    file = copied / "probe" / "texts" / name / part_name(0)
    tensors = load(file.read_bytes())
    publish(file, part_bytes({**tensors, HOOK: tensors[HOOK] + 1}, f"{name}/{part_name(0)}"))
    built(plan, "sparse-probing", copied, counting)
    (held,) = read_all(plan, "sparse-probing", copied)
    assert torch.equal(held, tensors[HOOK] + 1)
    with pytest.raises(StoreError) as raised:
        read_all(plan, "tpp", copied)
    assert str(raised.value) == (
        f"{file} was made anew, with other numbers than those that the store was made with; mend the store with: "
        f"hsae cache build --suite tpp"
    )
    built(plan, "tpp", copied, counting)
    (held,) = read_all(plan, "tpp", copied)
    assert torch.equal(held, tensors[HOOK] + 1) and counting.texts == 0


def test_another_format_is_refused(near, plan, copied):
    path = probe_spec(plan, "absorption").path(copied)
    publish(path, json.dumps({"format": 1}).encode())
    with pytest.raises(
        StoreError, match="has format 1, not 2; make it again with: hsae cache build --suite absorption"
    ):
        opened(plan, "absorption", copied)
