"""`hsae eval core`: which SAEs are evaluated, where results go, when they are made anew, and what is printed."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from hsae.cache.building.build import build
from hsae.cache.errors import UserError
from hsae.cache.language_model.lm import LanguageModel
from hsae.cache.reading.store import ActivationStore
from hsae.cli.eval import app
from hsae.eval.core.core import CoreOptions, check
from hsae.eval.core.core_evaluation import Core
from hsae.eval.core.core_result import read_core, read_core_file
from hsae.eval.harness import targets
from hsae.eval.harness.evaluation import evaluate_targets
from hsae.eval.harness.listener import Listener
from hsae.train import run_record
from hsae.train.config.plan import load_plan
from hsae.train.model import saelens_folder
from hsae.train.model.hierarchical_sae import AdditiveSAE, FlatSAE
from hsae.train.model.sae import SAE
from hsae.train.runs import run_directory

HOOK, D = "blocks.2.hook_resid_post", 48


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    """Overrides of the tiny plan whose evaluation store has been built."""
    folder = tmp_path_factory.mktemp("eval")
    text = folder / "text.txt"
    text.write_text(
        "\n\n".join(f"The value {n} of the list is returned by the function call number {n * n}." for n in range(150))
    )
    chosen = [
        f"cache.dir={str(folder / 'activations')!r}",
        f"cache.eval.corpus={str(text)!r}",
        "cache.eval.last_document=1",
    ]
    plan = load_plan("tiny", chosen)
    build([plan.store("eval")], plan.cache.dir)
    return chosen


@pytest.fixture
def plan(overrides, tmp_path):
    return load_plan("tiny", [*overrides, f"train.dir={str(tmp_path / 'runs')!r}"])


@pytest.fixture
def store(plan):
    return ActivationStore.of(plan.store("eval"), plan.cache.dir)


def an_sae(latents, seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(D, latents, generator=generator)
    W /= W.norm(dim=0)
    parts = {"W_enc": W, "W_dec": W.T.clone(), "b_enc": torch.zeros(latents), "b_dec": torch.zeros(D)}
    return SAE(**({"name": "sae", "architecture": "standard", "metadata": {"hook_name": HOOK}} | parts | changes))


def a_trained_run(plan, number, levels):
    config = plan.runs[number]
    model = (FlatSAE if len(levels) == 1 else AdditiveSAE)(levels)
    digests = dict.fromkeys(("model_digest", "tokenizer_digest", "corpus_digest"), "0" * 64)
    store = SimpleNamespace(spec=plan.store("train"), header=SimpleNamespace(d_model=D, **digests))
    run_directory.prepare(plan, config, store, "cpu", resume=False, restart=False)
    held = run_record.read_run(plan.run_dir(config))
    model.save(plan.run_dir(config) / "model")
    run_record.write_run(plan.run_dir(config), {**held, "complete": True, "content": None})
    return config


def two_levels(seed=0):
    return tuple(an_sae(latents, seed + n, name=f"level{n}") for n, latents in enumerate((13, 7), 1))


class Loader:
    """Loads the model, and counts."""

    def __init__(self, store):
        self.store, self.calls = store, 0

    def __call__(self):
        self.calls += 1
        return LanguageModel.load(self.store.spec.model)


def test_every_view_of_a_run_is_evaluated_into_its_folder(plan, store):
    config = a_trained_run(plan, 3, two_levels())
    chosen = targets.run_targets(plan, config)
    done = evaluate_targets(Core(store), chosen)
    folder = plan.run_dir(config) / "eval" / "core"
    names = [f"hsae_tiny_3-full_{view}_eval_results.json" for view in ("level1", "level2", "sae")]
    assert sorted(path.name for path in folder.iterdir()) == names
    for item in done:
        held = read_core(item.path)
        assert (held.release, held.name) == ("hsae_tiny_3-full", item.target.view.name)
        assert held.metrics == item.content["eval_result_metrics"] and not item.is_reused
        assert held.sae_config["d_sae"] == item.target.view.d_sae


def test_results_are_used_again_until_something_they_depend_on_changes(plan, store, tmp_path):
    saelens_folder.save(an_sae(11), tmp_path / "first")
    saelens_folder.save(an_sae(17, seed=1), tmp_path / "second")
    load = Loader(store)

    told = []
    listener = Listener()
    listener.say = told.append

    def run(options=None, force=False):
        chosen = targets.folder_targets(plan, [tmp_path / "first", tmp_path / "second"], tmp_path / "out")
        evaluation = Core(store, options, listener=listener)
        evaluation.load_language_model = load
        done = evaluate_targets(evaluation, chosen, force=force)
        return [item.is_reused for item in done], done

    assert run()[0] == [False, False]
    before = load.calls
    reused, again = run()
    assert reused == [True, True] and load.calls == before == 1
    assert again[0].content["eval_result_metrics"] == read_core(again[0].path).metrics
    assert run(force=True)[0] == [False, False]
    saelens_folder.save(an_sae(17, seed=2), tmp_path / "second")
    told.clear()
    assert run()[0] == [True, False]
    assert told == [f"evaluated anew, with other SAE: {again[1].label}"]
    again[0].path.write_text("{")
    assert run()[0] == [False, True]
    # FIX A7: other settings have a name of their own, and the standard results stay
    other, kept = run(CoreOptions(all_tokens=True))
    assert other == [False, False] and all("_all-tokens_eval" in item.path.name for item in kept)
    assert run()[0] == run(CoreOptions(all_tokens=True))[0] == [True, True]
    # ... and so have results of another store
    elsewhere = "0" * 16
    done = targets.find_result(
        kept[0].target, {**kept[0].content["hsae"]["inputs"], "store": elsewhere}, read_core_file
    )
    assert done.path.name == again[0].path.name.replace("_eval", f"_{elsewhere}_eval") and done.content is None


def test_every_sae_is_checked_before_any_compute(plan, store, tmp_path):
    saelens_folder.save(an_sae(11), tmp_path / "good")
    saelens_folder.save(an_sae(11, metadata={"hook_name": "blocks.0.hook_resid_post"}), tmp_path / "bad")
    chosen = targets.folder_targets(plan, [tmp_path / "good", tmp_path / "bad"], tmp_path / "out")
    load = Loader(store)
    with pytest.raises(UserError, match=rf"made for blocks.0.hook_resid_post; this evaluation is of {HOOK}"):
        evaluation = Core(store)
        evaluation.load_language_model = load
        evaluate_targets(evaluation, chosen)
    assert load.calls == 0 and not (tmp_path / "out").exists()


def test_folders_that_would_share_a_file_are_refused(plan, tmp_path):
    saelens_folder.save(an_sae(11), tmp_path / "one")
    with pytest.raises(UserError, match="two SAEs would write the same file"):
        targets.folder_targets(plan, [tmp_path / "one", tmp_path / "one"], tmp_path / "out")


def test_folders_of_one_name_can_be_told_apart(plan, tmp_path, monkeypatch):
    """FIX A7: in labels and in file names, also where a path goes up."""
    for place in ("a/x/sae", "b/x/sae", "b/sae"):
        saelens_folder.save(an_sae(11), tmp_path / place)
    monkeypatch.chdir(tmp_path / "b")
    given = [tmp_path / "a/x/sae", tmp_path / "b/x/sae", Path("sae"), Path("../b/x/../sae")]
    found = targets.folder_targets(plan, given, tmp_path / "out")
    assert len({target.path() for target in found}) == 4
    assert [target.label for target in found[:2]] == [path.as_posix() for path in given[:2]]
    assert found[2].path().name == "sae_custom_sae_eval_results.json"


def test_a_hook_under_its_other_name_is_evaluated(plan, store, tmp_path):
    """FIX B: what enters layer 3 is what left layer 2."""
    saelens_folder.save(an_sae(11, metadata={"hook_name": "blocks.3.hook_resid_pre"}), tmp_path / "sae")
    (target,) = targets.folder_targets(plan, [tmp_path / "sae"], tmp_path / "out")
    assert target.hook == HOOK
    check([target.view], store, None, target.hook)


def test_a_run_that_is_not_trained_is_said(plan):
    with pytest.raises(
        UserError, match=r"run 2 \(stacked-curriculum\) of plan tiny has not been trained .* hsae train --run 2"
    ):
        targets.run_targets(plan, plan.runs[2])


def invoke(*arguments):
    return CliRunner().invoke(app, ["core", "--device", "cpu", *map(str, arguments)], env={"COLUMNS": "150"})


def with_sets(overrides, *more):
    return [part for value in (*overrides, *more) for part in ("--set", value)]


def test_the_command_evaluates_trained_runs_and_names_those_left_out(plan, overrides, tmp_path):
    a_trained_run(plan, 0, (an_sae(19),))
    a_trained_run(plan, 5, two_levels(4))
    sets = with_sets(overrides, f"train.dir={str(tmp_path / 'runs')!r}")
    result = invoke("--plan", "tiny", *sets, "--legacy")
    assert "±." in result.output and "core, corrected" in result.output and plan.store("eval").name in result.output
    assert result.exit_code == 0, result.output
    assert "left out: run 1, 2, 3, 4" in result.output
    for text in ("0 baseline sae", "5 no-composition level2", "CE score", "EV", "alive"):
        assert text in result.output
    again = invoke("--plan", "tiny", *sets, "--faithful").output
    assert "4 of 4 were there already" in again and "as SAEBench computes it" in again
    only = invoke("--plan", "tiny", *sets, "--run", "baseline", "--force").output
    assert "5 no-composition" not in only and "already" not in only
    (legacy,) = (tmp_path / "runs" / "0" / "eval" / "core" / "legacy").iterdir()
    assert read_core(legacy).legacy


def test_the_command_evaluates_saelens_folders_and_marks_the_dead(overrides, tmp_path):
    saelens_folder.save(an_sae(11), tmp_path / "lively")
    saelens_folder.save(an_sae(23, b_enc=torch.full((23,), -1e6)), tmp_path / "quiet")
    out = tmp_path / "results"
    result = invoke(
        "--plan", "tiny", *with_sets(overrides), "--sae", tmp_path / "lively", "--sae", tmp_path / "quiet", "--out", out
    )
    assert result.exit_code == 0, result.output
    assert "the SAE looks dead" in result.output and "The SAE is dead" in " ".join(result.output.split())
    files = {read_core(path).release.rsplit("/")[-1]: read_core(path) for path in (out / "core").iterdir()}
    assert {name: held.dead for name, held in files.items()} == {"lively": False, "quiet": True}
    assert all(held.name == "custom_sae" for held in files.values())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--run", "0", "--all"], "exclude each other"),
        (["--plan", "tiny", "--set", "train.dir='nowhere'"], "no run of plan tiny has been trained in nowhere"),
        (["--plan", "tiny", "--sae", "nowhere"], "nowhere is not a SAELens folder"),
    ],
)
def test_what_the_command_refuses(arguments, said):
    result = invoke(*arguments)
    assert isinstance(result.exception, UserError)
    assert said in str(result.exception)
