"""The harness: what a new evaluation needs, how it becomes a command, and evaluating a model in memory."""

import inspect
import json

import pytest
from commands import an_sae, invoke, settings
from pydantic import Field

import hsae
from hsae import registry
from hsae.cache.errors import NotApplicable, UserError
from hsae.eval.harness.estimates import Estimate
from hsae.eval.harness.evaluation import Evaluation, evaluate_plan
from hsae.eval.harness.options import Options
from hsae.eval.harness.tables import Table, interval_cell
from hsae.eval.harness.targets import Selection


class ToyOptions(Options):
    rows: int = Field(default=4, ge=1, le=9, description="Rows that are read.")


class Toy(Evaluation):
    """Mean number of active latents."""

    name, options_kind, headlines = "toy", ToyOptions, {"active": "active"}

    @classmethod
    def open_store(cls, plan):
        return hsae.ActivationStore.of(plan.store("eval"), plan.cache.dir)

    def measure(self, target):
        codes = target.view.encode(self.store.acts(target.hook, 0, self.options.rows).float())
        active = Estimate((codes != 0).sum(-1).float().mean().item())
        return {"measures": {"active": active.to_dict()}, "inputs": self.inputs(target)}


@pytest.fixture
def toy(monkeypatch):
    entry = registry.Entry(f"{__name__}:Toy", "How many latents are active.")
    monkeypatch.setitem(registry.EVALUATIONS, "toy", entry)
    monkeypatch.setattr("hsae.registry.resolve", lambda name: Toy)


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    from places import GOLDEN_MODEL

    folder = tmp_path_factory.mktemp("toy")
    chosen = [
        f"model.id={str(GOLDEN_MODEL)!r}", "hook.names=['blocks.2.hook_resid_post']",
        f"cache.dir={str(folder / 'activations')!r}", f"train.dir={str(folder / 'runs')!r}",
        "cache.eval.batches_reconstruction=1", "cache.eval.batches_variance=1",
    ]  # fmt: skip
    done = invoke(
        "cache", "build", "--split", "eval", "--plan", "tiny", *(part for value in chosen for part in ("--set", value))
    )
    assert done.exit_code == 0, (done.output, done.exception)
    return chosen


def test_an_evaluation_is_a_class_and_a_line(toy, overrides, tmp_path):
    """Counted: the whole of a new evaluation, with its command, options, table, reuse and files."""
    from hsae.train.model import saelens_folder

    plan = hsae.load_plan("tiny", overrides)
    saelens_folder.save(
        an_sae(11, metadata={"hook_name": plan.hook.names[0]}),
        tmp_path / "sae",
    )
    arguments = ["eval", "toy", "--sae", tmp_path / "sae", "--out", tmp_path / "out", "--rows", 3, *settings(overrides)]
    done = invoke(*arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    assert "toy; ± spans" in done.output and "active" in done.output
    (file,) = (tmp_path / "out" / "toy").iterdir()
    assert json.loads(file.read_text())["measures"]["active"]["value"] > 0
    assert "1 of 1 were there already" in invoke(*arguments).output
    assert "rows" in invoke("eval", "toy", "--help").output
    assert len(inspect.getsource(Toy).splitlines()) <= 14


def test_a_model_in_memory_is_evaluated_and_saved(overrides, tmp_path):
    plan = hsae.load_plan("tiny", overrides)
    store = hsae.ActivationStore.of(plan.store("eval"), plan.cache.dir)
    sae = an_sae(11, metadata={"hook_name": plan.hook.names[0]})
    result = hsae.evaluate(sae, store, "core")
    assert result.to_dict()["eval_type_id"] == "core" and "CE score" in str(result.table())
    assert [str(table) for table in result.tables()] == [str(result.table())] and str(result.table()) in repr(result)
    assert result.save(tmp_path).name == "hsae_sae_eval_results.json" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UserError, match=r"there is no evaluation 'cores'; there are core, "):
        hsae.evaluate(sae, store, "cores")
    with pytest.raises(UserError, match="core has no option draws"):
        hsae.evaluate(sae, store, "core", draws=3)
    with pytest.raises(UserError, match="composition is of trained runs of a plan; run: hsae eval composition --run N"):
        hsae.evaluate(sae, store, "composition")


def test_an_evaluation_of_runs_has_no_options_of_saelens_folders(overrides):
    for name in ("composition", "unlearning"):
        shown = invoke("eval", name, "--help").output
        assert "--run" in shown and "--force" in shown and "--sae" not in shown and "--out" not in shown
    with pytest.raises(NotApplicable, match="composition is of trained runs, all levels together; it takes no --sae"):
        kind = registry.resolve(registry.EVALUATIONS["composition"].kind)
        evaluate_plan(kind, hsae.load_plan("tiny", overrides), Selection(folders=["x"]))


def test_numbers_stand_with_half_their_interval():
    assert str(interval_cell(0.9123, 0.9, 0.92)) == "0.912 ±.012"
    assert str(interval_cell(12.345, 12.1, 12.4, digits=None)) == "12.3 ±.2"
    assert interval_cell(1.5, None, None, digits=None) == "1.50" and interval_cell(None, 0, 1) == "undefined"
    table = Table("title", ("name", "value"), notes=["a line"])
    table.add("first", "1.0")
    assert str(table) == "title\nname   value\nfirst    1.0\na line"
