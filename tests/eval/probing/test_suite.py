"""The suite from its probe stores: what is stored, what is shared, what is made anew, and what the commands print."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import HOOK, D, an_sae, invoke, settings, write_texts
from models import changed
from places import GOLDEN
from pydantic import ValidationError
from safetensors.torch import load_file

from hsae import registry
from hsae.cache.errors import StoreError, UserError
from hsae.cache.language_model.lm import LanguageModel
from hsae.cache.suites.build import build_suites
from hsae.cache.suites.catalogue import list_stores
from hsae.cache.suites.probe_store import ProbeStore, TaskEntry
from hsae.cache.suites.residual_sets import part_bytes, part_name
from hsae.cache.suites.specs import SUITES, SuiteConfig
from hsae.cache.suites.suite_files import PART_TEXTS, Part, write_header
from hsae.eval.harness.options import DrawOptions
from hsae.eval.harness.saebench_file import first_problem, read_file
from hsae.eval.probing.config import probe_spec
from hsae.eval.probing.evaluations import Absorption, SparseProbing
from hsae.train import run_record
from hsae.train.config.plan import load_plan
from hsae.train.model import saelens_folder
from hsae.train.model.hierarchical_sae import AdditiveSAE
from hsae.train.runs import run_directory


def check_file(content, suite):
    """Raise ValidationError unless it is a result that SAEBench would read."""
    kind_of(suite).file_kind.model_validate(content)


def measured(path, suite):
    return read_file(path, kind_of(suite).file_kind, suite)


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    """Overrides of the tiny plan whose probe stores have been built, by the command."""
    folder = tmp_path_factory.mktemp("suite")
    write_texts(folder)
    values = {
        "model.id": str(GOLDEN / "model"),
        "cache.dir": str(folder / "activations"),
        "train.dir": str(folder / "runs"),
        "suite.tasks": str(folder / "tasks.toml"),
        "suite.context": 16,
        "suite.batch_rows": 5,
        "suite.train_per_class": 11,
        "suite.test_per_class": 7,
        "suite.train_per_quadrant": 6,
        "suite.test_per_quadrant": 3,
        "suite.words": None,
        "suite.min_letters": 1,
    }
    chosen = [f"{key}={json.dumps(value)}" for key, value in values.items() if value is not None]
    done = invoke("cache", "build", "--suite", "all", *settings(chosen))
    assert done.exit_code == 0, (done.output, done.exception)
    return chosen


@pytest.fixture(scope="module")
def plan(overrides):
    return load_plan("tiny", overrides)


@pytest.fixture
def no_language_model(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a language model was loaded")

    monkeypatch.setattr(LanguageModel, "load", refuse)


def kind_of(suite):
    return registry.resolve(registry.EVALUATIONS[suite].kind)


# ---- stores ----------------------------------------------------------------------------------------------------------


def test_a_store_holds_the_residuals_of_each_text_alone(plan):
    model = LanguageModel.load(plan.model)
    store = ProbeStore(probe_spec(plan, "sparse-probing"), plan.cache.dir)
    (task,) = store.header.tasks
    vectors = [part for acts, lengths in store.ragged(task, HOOK) for part in torch.split(acts, lengths)]
    assert len(vectors) == task.count == len(store.lengths(task))
    rows = [json.loads(line) for name in ("train", "test") for line in tasks_file(plan, f"{name}.jsonl").splitlines()]
    texts = {row["body"]: row for row in rows}
    found = 0
    for text, row in texts.items():
        ids = model.tokenizer(text, truncation=True, max_length=16).input_ids
        alone = model.prefix(torch.tensor([ids]), [HOOK])[HOOK][0]
        kept = [place for place, token in enumerate(ids) if token not in model.special_ids]
        assert 0 not in kept  # BOS
        matches = [
            index
            for index, held in enumerate(vectors)
            if held.shape == alone[kept].shape and torch.allclose(held, alone[kept], atol=1e-4)
        ]
        if matches:
            found += 1
            lists = task.lists["train"][row["topic"]] + task.lists["test"][row["topic"]]
            assert set(matches) & set(lists)
        if found == 9:
            break
    assert found == 9
    assert {name: len(held) for name, held in task.lists["train"].items()} == dict.fromkeys(
        ("lists", "files", "numbers"), 11
    )


def tasks_file(plan, name):
    return (Path(plan.table(SuiteConfig).tasks).parent / name).read_text()


def test_word_vectors_are_those_at_the_words_own_token(plan):
    model = LanguageModel.load(plan.model)
    store = ProbeStore(probe_spec(plan, "absorption"), plan.cache.dir)
    assert [task.name for task in store.header.tasks] == ["train", "test", "prompts"]
    train, test, prompts = store.header.tasks
    assert test.count == prompts.count and 3.5 < train.count / test.count < 4.5
    after = model.tokenizer(" starts with the letter:", add_special_tokens=False).input_ids
    assert store.header.prompt_token_pos == -len(after) - 1
    assert set(store.lengths(train).tolist()) == {1}
    letters = prompts.lists["prompts"]["letters"]
    assert len(letters) == prompts.count and set(letters) <= set(range(26))


def test_suites_share_the_residuals_of_the_same_texts(plan):
    sparse, tpp, scr = (
        ProbeStore(probe_spec(plan, suite), plan.cache.dir) for suite in ("sparse-probing", "tpp", "scr")
    )
    assert sparse.header.tasks[0].texts == tpp.header.tasks[0].texts != scr.header.tasks[0].texts
    assert scr.header.tasks[0].name == "topic_scr_lists_files" and len(scr.header.tasks[0].lists["train"]) == 6
    assert scr.header.passes == scr.header.tasks[0].count == 4 * (12 + 6) - 2 * (6 + 3)  # unique texts


def test_a_build_goes_on_where_it_was_and_ends_with_the_same_bytes(plan, tmp_path):
    source = ProbeStore(probe_spec(plan, "scr"), plan.cache.dir)
    (part,) = Path(plan.cache.dir, "probe/texts", source.header.tasks[0].texts).iterdir()
    model = LanguageModel.load(plan.model)
    path = build_suites([probe_spec(plan, "scr")], tmp_path, model=model)[0]
    copy = tmp_path / "probe" / "texts" / part.parent.name / part.name
    assert path.read_bytes() == source.path.read_bytes() and copy.read_bytes() == part.read_bytes()
    path.unlink()
    before = copy.stat().st_mtime_ns
    build_suites([probe_spec(plan, "scr")], tmp_path, model=model)
    assert copy.stat().st_mtime_ns == before and path.is_file()
    copy.unlink()
    with pytest.raises(StoreError) as raised:
        ProbeStore(probe_spec(plan, "scr"), tmp_path)
    assert str(raised.value) == f"{copy} is missing; go on with: hsae cache build --suite scr"


def test_a_missing_or_damaged_store_is_said(plan, tmp_path):
    spec = probe_spec(plan, "tpp")
    with pytest.raises(StoreError) as raised:
        ProbeStore(spec, tmp_path)
    assert str(raised.value) == (
        f"there is no probe store {spec.path(tmp_path)}; make it with: hsae cache build --suite tpp"
    )
    spec.path(tmp_path).parent.mkdir(parents=True)
    for content in ('{"format":2}', "[", "[]", "", '{"crc32c":"00000000","format":2}'):
        spec.path(tmp_path).write_text(content)
        with pytest.raises(StoreError, match=r"is damaged .* make it again with: hsae cache build --suite tpp"):
            ProbeStore(spec, tmp_path)


def test_probe_stores_are_listed_with_the_others(overrides, plan, tmp_path):
    done = invoke("cache", "ls", *settings(overrides)[:2], *settings(overrides)[4:])
    assert done.exit_code == 0, (done.output, done.exception)
    spec = probe_spec(plan, "scr")
    listed = list(list_stores(Path(plan.cache.dir)))
    assert [item.name.split("/")[1] for item in listed] == sorted(SUITES)
    found = next(item for item in listed if "/scr/" in item.name)
    assert found.name == f"probe/scr/{spec.path('').name}" and found.problem is None
    header = ProbeStore(spec, plan.cache.dir).header
    folder = Path(plan.cache.dir) / "probe" / "texts" / header.tasks[0].texts
    assert (found.count, found.hooks) == (header.passes, (HOOK,))
    assert found.bytes == sum(file.stat().st_size for file in folder.iterdir())
    assert "probe/scr/" in done.output.replace("\n", "") and "complete" in done.output
    home = tmp_path / "other"
    (home / "probe" / "scr").mkdir(parents=True)
    (home / "probe" / "scr" / "x.json").write_text(spec.path(plan.cache.dir).read_text())
    (home / "probe" / "tpp").mkdir()
    (home / "probe" / "tpp" / "y.json").write_text("[")
    scr, tpp = list_stores(home)
    part = f"probe/texts/{header.tasks[0].texts}/part-00000.safetensors"
    assert scr.problem == f"{part} is missing; go on with: hsae cache build --suite scr"
    assert tpp.problem.startswith("is damaged (")
    assert tpp.problem.endswith("make it again with: hsae cache build --suite tpp")


# ---- evaluating ------------------------------------------------------------------------------------------------------


def test_all_evaluates_without_a_language_model_and_goes_on_when_one_fails(
    overrides, plan, tmp_path, no_language_model, wide
):
    for latents in (29, 37):
        saelens_folder.save(an_sae(latents, seed=latents), tmp_path / f"sae{latents}")
    chosen = [part for latents in (29, 37) for part in ("--sae", tmp_path / f"sae{latents}")]
    done = invoke("eval", "all", *chosen, "--out", tmp_path / "out", "--draws", 2, *settings(overrides))
    assert done.exit_code == 1, (done.output, done.exception)
    summary = done.output[done.output.index("summary") :]
    assert "core" in summary and "no activation store at" in summary  # there is no evaluation store
    assert "F1 > 0.6 for 0 letters; 1 are needed" in summary  # the tiny model can't spell
    assert "2 of 7 evaluations failed" in summary and summary.count("done") == 3, summary
    assert summary.count("skipped: ") == 2  # no RAVEL store; unlearning is of runs
    for suite in SUITES[:3]:
        files = sorted((tmp_path / "out" / kind_of(suite).folder()).iterdir())
        assert len(files) == 2
        for file in files:
            content = json.loads(file.read_text())
            check_file(content, suite)
            assert content["hsae"]["lm_passes"] == 0
            measures = content["hsae"]["measures"]
            assert set(kind_of(suite).headlines.values()) <= set(measures) or suite in ("scr", "tpp")
            assert all(len(measure["seeds"]) == 2 for measure in measures.values())
    content = measured(sorted((tmp_path / "out" / "sparse_probing").iterdir())[0], "sparse-probing")
    assert content["eval_result_metrics"]["llm"]["llm_test_accuracy"] > 0.8
    assert content["hsae"]["residual"]["test_accuracy"]["value"] > 0.8
    assert content["eval_config"]["probe_train_set_size"] == 22
    scr = measured(sorted((tmp_path / "out" / "scr").iterdir())[0], "scr")
    assert scr["eval_config"]["column1_vals_lookup"] == {"topic": [["lists", "files"]]}
    assert scr["eval_result_metrics"]["scr_metrics"]["scr_dir1_threshold_50"] is None  # more than there are latents
    again = invoke("eval", "tpp", *chosen, "--out", tmp_path / "out", "--draws", 2, *settings(overrides))
    assert "2 of 2 were there already" in again.output, (again.output, again.exception)
    assert "within noise of it" in again.output or "apart from it" in again.output
    other = invoke("eval", "tpp", *chosen, "--out", tmp_path / "out", "--draws", 1, *settings(overrides))
    assert "were there already" not in other.output and "one draw gives no measure of noise" in other.output
    # FIX A7: what is evaluated anew because settings differ says so
    assert "evaluated anew, with draws 1 (was 2): " in other.output and "evaluated anew" not in again.output


def test_absorption_from_a_store_of_words_for_a_hierarchy_and_one_of_its_levels(plan, tmp_path, no_language_model):
    """A store with the reference data's vectors, which come from a model that can spell."""
    vectors = load_file(GOLDEN / "absorption" / "inputs.safetensors")
    prompts = load_file(GOLDEN / "absorption" / "prompt_vectors_float32.safetensors")
    kept = prompts["test_index"].long()
    parts = {
        "train": (vectors["X_train"], vectors["y_train"]),
        "test": (vectors["X_test"][kept], vectors["y_test"][kept]),
        "prompts": (prompts["vectors"], vectors["y_test"][kept]),
    }
    spec = probe_spec(plan, "absorption")
    spec = spec.model_copy(update={"tasks": spec.tasks.model_copy(update={"min_letters": 20})})
    held = ProbeStore(probe_spec(plan, "absorption"), plan.cache.dir).header
    tasks, written = [], {name: [] for name in parts}
    for name, (rows, letters) in parts.items():
        folder = tmp_path / "probe" / "texts" / name
        folder.mkdir(parents=True)
        for number, part in enumerate(torch.split(rows, PART_TEXTS)):
            tensors = {HOOK: part.contiguous(), "lengths": torch.ones(len(part), dtype=torch.int64)}
            data = part_bytes(tensors, f"{name}/{part_name(number)}")
            (folder / part_name(number)).write_bytes(data)
            written[name].append(Part.of(data))
        lists = {name: {"letters": letters.tolist()}}
        tasks.append(TaskEntry(name=name, source="reference", texts=name, count=len(rows), lists=lists))
    spec.path(tmp_path).parent.mkdir(parents=True)
    header = held.model_copy(update={"spec": spec, "tasks": tasks, "parts": written, "d_model": 40})
    write_header(spec.path(tmp_path), header)
    evaluation = Absorption(ProbeStore(spec, tmp_path), DrawOptions(draws=1))
    view = saelens_folder.load(GOLDEN / "absorption" / "saes" / "standard")
    view.metadata["hook_name"] = HOOK
    found = {}
    parts = {"level1": slice(view.d_sae // 3, None), "level2": slice(None, view.d_sae // 3)}
    levels = tuple(
        changed(view, name=name, W_enc=view.W_enc[:, part], W_dec=view.W_dec[part], b_enc=view.b_enc[part])
        for name, part in parts.items()
    )
    model = AdditiveSAE(levels)
    for name in ("sae", "level1"):
        target = SimpleNamespace(view=model.views()[name], hook=HOOK, release="r", sae_id=name, inputs={"sae": "0"})
        found[name] = evaluation.measure(target)
        check_file(found[name], "absorption")
    scores = {name: content["hsae"]["measures"]["mean_absorption_fraction_score"] for name, content in found.items()}
    assert scores["sae"] != scores["level1"]
    assert found["sae"]["sae_cfg_dict"]["d_sae"] == view.d_sae > found["level1"]["sae_cfg_dict"]["d_sae"]
    content = found["sae"]
    check_file(content, "absorption")
    assert content["eval_config"]["prompt_template"] == "{word} starts with the letter:"
    assert 20 <= len(content["eval_result_details"]) <= 26
    assert 0 < content["eval_result_metrics"]["mean"]["mean_absorption_fraction_score"] < 1
    assert 0 < content["hsae"]["measures"]["mean_absorption_fraction_score"]["value"] < 1


@pytest.mark.parametrize("suite", ["sparse-probing", "scr", "tpp"])
def test_every_level_of_a_hierarchy_is_evaluated(overrides, plan, no_language_model, suite):
    config = plan.runs[3]
    levels = tuple(an_sae(latents, latents, name=f"level{n}") for n, latents in enumerate((13, 7), 1))
    digests = dict.fromkeys(("model_digest", "tokenizer_digest", "corpus_digest"), "0" * 64)
    store = SimpleNamespace(spec=plan.store("train"), header=SimpleNamespace(d_model=D, **digests))
    run_directory.prepare(plan, config, store, "cpu", resume=False, restart=True)
    model = AdditiveSAE(levels)
    model.save(plan.run_dir(config) / "model")
    run_record.write_run(
        plan.run_dir(config), {**run_record.read_run(plan.run_dir(config)), "complete": True, "content": None}
    )
    done = invoke("eval", suite, "--run", 3, "--draws", 1, *settings(overrides))
    assert done.exit_code == 0, (done.output, done.exception)
    files = sorted((plan.run_dir(config) / "eval" / kind_of(suite).folder()).iterdir())
    views = ("level1", "level2", "sae")
    assert [file.name for file in files] == [f"hsae_tiny_3-full_{view}_eval_results.json" for view in views]
    results = [measured(file, suite) for file in files]
    assert [result["sae_cfg_dict"]["d_sae"] for result in results] == [13, 7, 20]
    assert results[0]["eval_result_metrics"] != results[1]["eval_result_metrics"]


def test_what_does_not_fit_the_store_is_refused(overrides, plan, tmp_path):
    saelens_folder.save(an_sae(9, metadata={"hook_name": "blocks.1.hook_resid_post"}), tmp_path / "foreign")
    done = invoke("eval", "tpp", "--sae", tmp_path / "foreign", "--out", tmp_path, *settings(overrides))
    assert isinstance(done.exception, UserError)
    assert str(done.exception) == f"SAE 'foreign' was made for blocks.1.hook_resid_post; this evaluation is of {HOOK}"
    both = invoke("eval", "scr", "--sae", tmp_path / "foreign", "--run", "3", *settings(overrides))
    assert str(both.exception) == "--run and --sae exclude each other"


# ---- result files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", SUITES)
def test_saebenchs_own_files_fit_the_schema_and_others_do_not(suite):
    folder = GOLDEN / suite.replace("-", "_") / "expected"
    files = [path for path in sorted(folder.glob("*.json")) if "eval_type_id" in path.read_text()]
    assert len(files) >= 4
    for file in files:
        check_file(json.loads(file.read_text()), suite)
    content = json.loads(files[0].read_text())
    category = next(iter(content["eval_result_metrics"]))
    key = next(iter(content["eval_result_metrics"][category]))
    content["eval_result_metrics"][category][key] = "high"
    del content["eval_config"]["model_name"]
    content["extra"] = 1
    with pytest.raises(ValidationError) as refused:
        check_file(content, suite)
    assert {".".join(map(str, problem["loc"])) for problem in refused.value.errors()} >= {
        "eval_config.model_name",
        "extra",
    }
    assert any(category in map(str, problem["loc"]) for problem in refused.value.errors())
    other = next(name for name in SUITES if name != suite)
    with pytest.raises(ValidationError) as refused:
        check_file(json.loads(files[0].read_text()), other)
    assert first_problem(refused.value).startswith("eval_type_id: Value error, is ")


@pytest.mark.slow
def test_what_ships_with_python_is_told_apart_by_gemma(tmp_path):
    """Offline, on the real model: probes on the residual are far above chance, which is 0.5."""
    small = {"train_per_class": 24, "test_per_class": 16, "context": 32}
    chosen = [f"suite.{key}={value}" for key, value in small.items()] + [f"cache.dir={str(tmp_path)!r}"]
    plan = load_plan("gemma-3-270m", chosen)
    build_suites([probe_spec(plan, "sparse-probing")], plan.cache.dir)
    evaluation = SparseProbing.of_plan(plan, DrawOptions(draws=2))
    measured = evaluation.residual(plan.hook.names[0])[1]
    assert list(measured["tasks"]) == ["python/package", "python/kind", "python/docstring-style"]
    for task in measured["tasks"].values():
        assert task["test_accuracy"]["value"] > 0.65
    assert measured["measures"]["test_accuracy"]["value"] > 0.75
