"""Training from a real store of the tiny Gemma-2: determinism, resume, several runs in a pass, what is refused."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from places import GOLDEN_MODEL

from hsae.cache.building.build import build
from hsae.cache.device import pick_device
from hsae.cache.errors import StoreError, UserError
from hsae.cache.reading.store import ActivationStore
from hsae.train import run_record
from hsae.train.config.plan import load_plan
from hsae.train.config.run_config import StreamConfig
from hsae.train.model import saelens_folder
from hsae.train.model.model_files import load_model
from hsae.train.runs import run_directory
from hsae.train.runs.metrics_log import read_metrics
from hsae.train.runs.planned_runs import train_runs
from hsae.train.training.checkpoints import FILE as CHECKPOINT
from hsae.train.training.listener import Listener
from hsae.train.training.sources import StoreSource
from hsae.train.training.training_run import TrainingRun


class Recorder(Listener):
    def __init__(self):
        self.lines, self.warnings, self.starts = [], [], []

    def started(self, run, step, steps):
        self.starts.append((run.number, step))

    def metrics(self, run, metrics):
        self.lines.append((run.number, metrics))

    def warning(self, run, message):
        self.warnings.append((run.number, message))


@pytest.fixture
def plan_in(overrides_in):
    def make(folder, *overrides):
        return load_plan("tiny", overrides_in(folder, *overrides))

    return make


def results(run_dir):
    """Digest of everything a run leaves, without the times in its log."""
    digests = {}
    for path in sorted(run_dir.rglob("*")):
        if path.is_file() and path.name != "metrics.jsonl":
            digests[path.relative_to(run_dir).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    digests["metrics"] = [
        {key: value for key, value in line.items() if key != "time"} for line in read_metrics(run_dir)
    ]
    return digests


def test_every_run_trains_and_leaves_what_others_read(plan_in, tmp_path):
    plan, recorder = plan_in(tmp_path), Recorder()
    ended = train_runs(plan, list(plan.runs.values()), recorder, device="cpu")
    assert [result.status for result in ended] == ["trained"] * 17
    for run in plan.runs.values():
        run_dir = plan.run_dir(run)
        assert run_record.read_run(run_dir)["complete"] is True
        assert not (run_dir / CHECKPOINT).exists()
        last = [line for line in read_metrics(run_dir) if line["kind"] == "metrics"][-1]
        assert last["step"] == plan.train.steps and last["explained_variance"] > 0.3
        assert all(l0 > 0 for l0 in last["l0"])
        model = load_model(run_dir / "model")
        assert model.level_widths == run.widths
        assert len(model.compositions) == (run.composition.mode != "none")
        for folder in (run_dir / "saelens").iterdir():
            assert saelens_folder.load(folder).d_sae in (*run.widths, sum(run.widths))
    stages = [line["stage"] for line in read_metrics(plan.run_dir(plan.runs[3])) if line["kind"] == "stage"]
    assert stages[0] == "level 2 alone" and stages[1] == "level 1 joins" and stages[-1] == "decay"


def test_runs_in_one_pass_are_bit_identical_to_runs_alone_and_to_a_second_time(plan_in, tmp_path):
    together, alone = plan_in(tmp_path / "together"), plan_in(tmp_path / "alone")
    train_runs(together, together.select("0,2,3"), Recorder(), device="cpu")
    for number in (3, 0, 2):
        train_runs(alone, alone.select(str(number)), Recorder(), device="cpu")
        one, other = (results(plan.run_dir(plan.runs[number])) for plan in (together, alone))
        one.pop("run.json"), other.pop("run.json")  # they differ in train.dir
        assert one == other


def test_two_processes_do_not_train_one_run(plan_in, tmp_path):
    plan = plan_in(tmp_path)
    with run_directory.lock(plan, plan.runs[0]), pytest.raises(UserError, match="another process is training"):
        train_runs(plan, plan.select("0"), device="cpu")
    assert train_runs(plan, plan.select("0"), device="cpu")[0].status == "trained"


def test_a_run_knows_what_its_store_was_made_from(plan_in, tmp_path, activations):
    plan = plan_in(tmp_path)
    train_runs(plan, plan.select("0"), device="cpu")
    held = run_record.read_run(plan.run_dir(plan.runs[0]))
    run_record.write_run(plan.run_dir(plan.runs[0]), {**held, "content": {**held["content"], "corpus_digest": "other"}})
    with pytest.raises(UserError, match="was trained on a store of the same name made from another model or text"):
        train_runs(plan, plan.select("0"), device="cpu")


def test_nan_weights_of_the_last_step_are_not_saved_as_a_model(plan_in, tmp_path, monkeypatch):
    plan = plan_in(tmp_path, "train.checkpoint_steps=5")
    step = TrainingRun.step

    def poisoned(self, x):
        parts = step(self, x)
        if self.is_done:
            with torch.no_grad():
                self.model.level(1).b_enc[0] = torch.nan
        return parts

    monkeypatch.setattr(TrainingRun, "step", poisoned)
    result = train_runs(plan, plan.select("3"), Recorder(), device="cpu")[0]
    assert result.status == "failed" and "NaN or infinite" in result.detail
    assert not (plan.run_dir(plan.runs[3]) / "model").exists() and (plan.run_dir(plan.runs[3]) / CHECKPOINT).is_file()


def test_a_frozen_relu_level_does_not_wind_up_its_controller(plan_in, tmp_path):
    plan = plan_in(tmp_path, "runs.3.activation=relu", "train.precision=float32")
    run = TrainingRun(
        plan.runs[3],
        StoreSource(ActivationStore.open(plan.store_path("train")), plan.hook.names[0], plan.train).scaling,
        steps=100,
        seed=0,
        device="cpu",
    )
    for number in range(45):
        before = run.controllers[1].coefficient
        run.step(torch.randn(31, 48, generator=torch.Generator().manual_seed(number)))
        frozen = run.last_moment.stage.rates.get(2) == 0
        assert (run.controllers[1].coefficient == before) == frozen, number


def test_another_seed_gives_another_model(plan_in, tmp_path):
    digests = set()
    for seed in (0, 1):
        plan = plan_in(tmp_path / str(seed), f"train.seed={seed}")
        train_runs(plan, plan.select("3"), Recorder(), device="cpu")
        digests.add(results(plan.run_dir(plan.runs[3]))["model/model.safetensors"])
    assert len(digests) == 2


@pytest.mark.parametrize("stop_after", [1, 13, 24])
def test_a_stopped_run_resumes_to_the_same_bits(plan_in, tmp_path, stop_after):
    whole, broken = plan_in(tmp_path / "whole"), plan_in(tmp_path / "broken")
    train_runs(whole, whole.select("0,2,3"), Recorder(), device="cpu")
    calls = iter(range(1000))
    ended = train_runs(
        broken, broken.select("0,2,3"), Recorder(), device="cpu", should_stop=lambda: next(calls) == stop_after - 1
    )
    assert {result.status for result in ended} == {"stopped"}
    with pytest.raises(UserError, match="was not finished; --resume goes on from its checkpoint"):
        train_runs(broken, broken.select("3"), Recorder(), device="cpu")
    recorder = Recorder()
    train_runs(broken, broken.select("0,2,3"), recorder, device="cpu", resume=True)
    assert recorder.starts == [(0, stop_after), (2, stop_after), (3, stop_after)]
    for number in (0, 2, 3):
        one, other = (results(plan.run_dir(plan.runs[number])) for plan in (whole, broken))
        one.pop("run.json"), other.pop("run.json")
        assert one == other


@pytest.mark.slow
def test_kill_minus_nine_ten_times_then_resume_gives_the_same_bits(plan_in, tmp_path, activations, record_property):
    """Train in a process that is killed with SIGKILL at random moments, resume to the end, compare."""
    record_property("injected", 10)
    generator = torch.Generator().manual_seed(1)
    overrides = ["train.tokens=60_000", "train.checkpoint_steps=7", "train.log_steps=3"]
    whole, broken = plan_in(tmp_path / "whole", *overrides), plan_in(tmp_path / "broken", *overrides)
    train_runs(whole, whole.select("0,3"), Recorder(), device="cpu")
    folder = f"train.dir={str(tmp_path / 'broken')!r}"
    places = [f"model.id={str(GOLDEN_MODEL)!r}", f"cache.dir={str(activations)!r}", folder, *overrides]
    command = [
        sys.executable,
        "-c",
        "from hsae.cli.main import main; main()",
        "train",
        "--run",
        "0,3",
        "--plan",
        "tiny",
    ]
    command += ["--resume", "--device", "cpu", *(part for place in places for part in ("--set", place))]
    killed = 0
    while killed < 10:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
        log = broken.run_dir(broken.runs[3]) / "metrics.jsonl"
        before, deadline = log.stat().st_size if log.exists() else -1, time.monotonic() + 60
        while (
            process.poll() is None
            and time.monotonic() < deadline
            and (not log.exists() or log.stat().st_size == before)
        ):
            time.sleep(0.002)  # until this process trains, so that the kill meets real work
        time.sleep(0.25 * torch.rand((), generator=generator).item())
        if process.poll() is not None:
            assert process.returncode == 0, process.communicate()[1].decode()
            process.communicate()
            shutil.rmtree(tmp_path / "broken")  # it got to the end: begin again
            continue
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        killed += 1
    train_runs(broken, broken.select("0,3"), Recorder(), device="cpu", resume=True)
    for number in (0, 3):
        one, other = (results(plan.run_dir(plan.runs[number])) for plan in (whole, broken))
        one.pop("run.json"), other.pop("run.json")
        assert one == other


def test_finished_runs_are_left_alone_and_other_configurations_are_not_overwritten(plan_in, tmp_path):
    plan = plan_in(tmp_path)
    train_runs(plan, plan.select("0"), device="cpu")
    before = results(plan.run_dir(plan.runs[0]))
    assert train_runs(plan, plan.select("0"), device="cpu")[0].status == "already trained"
    assert results(plan.run_dir(plan.runs[0])) == before
    other = plan_in(tmp_path, "train.learning_rate=1e-4")
    with pytest.raises(UserError, match="holds a run of another configuration or store"):
        train_runs(other, other.select("0"), Recorder(), device="cpu")
    assert results(plan.run_dir(plan.runs[0])) == before
    assert train_runs(other, other.select("0"), Recorder(), device="cpu", restart=True)[0].status == "trained"


def test_nan_stops_the_run_keeps_the_last_good_state_and_lets_the_others_finish(plan_in, tmp_path, monkeypatch):
    plan, recorder = plan_in(tmp_path, "train.checkpoint_steps=5"), Recorder()
    step = TrainingRun.step

    def poisoned(self, x):
        parts = step(self, x)
        if self.config.number == 3 and self.step_number == 12:
            parts["loss"] = torch.tensor(torch.nan)
        return parts

    monkeypatch.setattr(TrainingRun, "step", poisoned)
    ended = train_runs(plan, plan.select("0,3"), recorder, device="cpu")
    assert [result.status for result in ended] == ["trained", "failed"]
    assert "the loss became nan at step 12" in ended[1].detail
    assert [
        (number, "the last good state is in" in message) for number, message in recorder.warnings if "nan" in message
    ] == [(3, True)]
    assert run_record.read_run(plan.run_dir(plan.runs[3]))["complete"] is False
    monkeypatch.undo()
    resumed = Recorder()
    assert train_runs(plan, plan.select("3"), resumed, device="cpu", resume=True)[0].status == "trained"
    assert resumed.starts == [(3, 10)]


def test_weights_that_stop_being_finite_are_never_checkpointed(plan_in, tmp_path, monkeypatch):
    plan = plan_in(tmp_path, "train.checkpoint_steps=5")
    step = TrainingRun.step

    def poisoned(self, x):
        parts = step(self, x)
        if self.step_number == 10:
            with torch.no_grad():
                self.model.level(1).b_enc[0] = torch.inf
        return parts

    monkeypatch.setattr(TrainingRun, "step", poisoned)
    assert (
        train_runs(plan, plan.select("3"), Recorder(), device="cpu")[0].detail
        == "a weight became NaN or infinite by step 10"
    )
    monkeypatch.undo()
    resumed = Recorder()
    train_runs(plan, plan.select("3"), resumed, device="cpu", resume=True)
    assert resumed.starts == [(3, 5)]


def test_a_silent_level_is_reported_at_once(plan_in, tmp_path, monkeypatch):
    plan, recorder = plan_in(tmp_path, "train.dead_after_tokens=1000"), Recorder()
    monkeypatch.setattr("hsae.train.model.levels.ReLULevel.activate", lambda self, pre: pre * 0)
    train_runs(plan, plan.select("0"), recorder, device="cpu")
    messages = [message for _, message in recorder.warnings]
    assert messages == ["level 1 does not fire at all (L0 = 0)", "100% of level 1's latents are dead"]
    logged = [line["message"] for line in read_metrics(plan.run_dir(plan.runs[0])) if line["kind"] == "warning"]
    assert logged == messages


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch_tokens=9000", "train.batch_tokens is 9000, but the store has only"),
        ("runs.3.l0=[8.9999, 0.0001]", r"run 3: l0 \(8.9999, 0.0001\) keeps no latent in a batch of 250"),
        ("train.tokens=750", "its curriculum has 5 stages, but train.tokens makes only 3 steps"),
        ("cache.train.rows=121", "cache build"),
    ],
)
def test_what_cannot_work_is_refused_before_any_compute(plan_in, tmp_path, override, message):
    plan = plan_in(tmp_path, override)
    with pytest.raises(UserError, match=message):
        train_runs(plan, plan.select("0,3"), Recorder(), device="cpu")
    assert not tmp_path.joinpath("0").exists()


def test_a_missing_store_names_the_command_that_makes_it(tmp_path):
    plan = load_plan("tiny", [f"cache.dir={str(tmp_path)!r}"])
    with pytest.raises(StoreError, match="hsae cache build"):
        train_runs(plan, plan.select("0"), device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="sees no GPU; use --device cpu"):
        pick_device("cuda")


def test_scaling_gives_unit_mean_square_per_dimension(activations):
    store = ActivationStore.open(
        activations / load_plan("tiny", [f"model.id={str(GOLDEN_MODEL)!r}"]).store("train").name
    )
    hook = store.spec.hooks[0]
    scaling = StoreSource(store, hook, StreamConfig(tokens=250, batch_tokens=250)).scaling
    tokens, acts = store.tokens(0, store.rows), store.acts(hook, 0, store.rows)
    x = acts[~store.special_mask(tokens)].double() * scaling.scale
    assert x.square().sum(1).mean().item() == pytest.approx(x.shape[1], rel=1e-4)
    assert scaling.variance == pytest.approx((x - x.mean(0)).square().sum(1).mean().item(), rel=1e-3)


def test_training_needs_no_model_and_imports_neither_transformers_nor_evaluations(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(GOLDEN_MODEL, model)
    places = [
        f"model.id={str(model)!r}",
        f"cache.dir={str(tmp_path / 'activations')!r}",
        f"train.dir={str(tmp_path / 'runs')!r}",
    ]
    plan = load_plan("tiny", places)
    build([plan.store("train")], plan.cache.dir)
    shutil.rmtree(model)
    arguments = ["train", "--run", "3", "--plan", "tiny", "--device", "cpu"]
    arguments += [part for place in places for part in ("--set", place)]
    code = (
        "import sys; sys.argv = ['hsae', *" + json.dumps(arguments) + "]\n"
        "from hsae.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.splitlines()[-1].split()
    assert "torch" in loaded and "transformers" not in loaded
    evaluations = {name for name in loaded if re.match(r"hsae\.eval\.(?!harness)", name)}
    assert evaluations <= {"hsae.eval.ravel", "hsae.eval.ravel.config"}, "and these for the plan's table [ravel]"
    assert run_record.read_run(plan.run_dir(plan.runs[3]))["complete"] is True


def test_seeds_train_in_one_pass_each_as_if_alone(plan_in, tmp_path, monkeypatch):
    passes, real = [], StoreSource.batches
    monkeypatch.setattr(
        StoreSource, "batches", lambda self, *args, **named: passes.append(self) or real(self, *args, **named)
    )
    plan, alone = plan_in(tmp_path / "together"), plan_in(tmp_path / "alone")
    ended = train_runs(plan, plan.select("3,11"), seeds=2, device="cpu")
    assert len(passes) == 1
    assert [result.run.label for result in ended] == ["3 full", "11 batchtopk", "3 full seed 1", "11 batchtopk seed 1"]
    train_runs(alone.seeded(1), alone.select("3"), device="cpu")
    run = plan.runs[3]
    together, single = (results(each.seeded(1).run_dir(run)) for each in (plan, alone))
    assert together.pop("run.json") != single.pop("run.json")  # which name their folders
    assert together == single
    seeds = [load_model(folder.run_dir(run) / "model").levels[0].W_dec for folder in (plan, plan.seeded(1))]
    assert not torch.allclose(*seeds)


def test_a_seed_of_another_order_is_another_run(plan_in, tmp_path):
    plan = plan_in(tmp_path)
    other = plan_in(tmp_path, "train.seed=1")
    assert other.train.seed == plan.seeded(1).train.seed
    run = plan.runs[3]
    assert run_directory.identities(other, run) != run_directory.identities(plan.seeded(1), run)
    assert plan.seeded(1).seeded(1).stream.seed == plan.train.seed
