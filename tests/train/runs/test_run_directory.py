"""Run directories and results that are lost, harmed, or somebody else's (FIX A4, A10, B, C1, C3, C8, C11, C14): what
hsae did not write stays, a changed byte is told before it is used, and the command that is named mends it.
"""

import dataclasses
import errno
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from places import GOLDEN
from safetensors import SafetensorError
from safetensors.torch import save_file

from hsae.cache.errors import UserError
from hsae.cache.files import partial_name, write_atomically
from hsae.eval.core.core_result import read_core
from hsae.eval.harness import result_files
from hsae.eval.harness.saebench_file import write_envelope
from hsae.train import run_record
from hsae.train.config.plan import load_plan
from hsae.train.model import saelens_folder
from hsae.train.model.hierarchical_sae import StackedSAE
from hsae.train.model.model_files import load_model
from hsae.train.model.sae import SAE
from hsae.train.runs import run_directory
from hsae.train.runs.metrics_log import MetricsLog, damaged_metrics, read_metrics
from hsae.train.runs.planned_runs import train_runs
from hsae.train.training.checkpoints import FILE as CHECKPOINT
from hsae.train.training.checkpoints import load_checkpoint, save_checkpoint
from hsae.train.training.listener import Listener


class Recorder(Listener):
    def __init__(self):
        self.warnings = []

    def warning(self, run, message):
        self.warnings.append(message)


@pytest.fixture(scope="module")
def trained(activations, tmp_path_factory):
    """(overrides, the folder of a trained run 3 with a result and a note of somebody's in it)."""
    overrides = [f"model.id={str(GOLDEN / 'model')!r}", f"cache.dir={str(activations)!r}"]
    folder = tmp_path_factory.mktemp("runs")
    plan = load_plan("tiny", [*overrides, f"train.dir={str(folder)!r}"])
    train_runs(plan, plan.select("3"), device="cpu")
    (folder / "3" / "eval").mkdir()
    result_files.write_result(folder / "3" / "eval" / "composition.json", {"format": 1})
    (folder / "3" / "notes.txt").write_text("mine")
    return overrides, folder


@pytest.fixture
def run(trained, tmp_path):
    """(its plan, its directory, a function that trains it and returns (status, what was said))."""
    overrides, folder = trained
    shutil.copytree(folder, tmp_path / "runs")
    plan = load_plan("tiny", [*overrides, f"train.dir={str(tmp_path / 'runs')!r}"])

    def again(**options):
        listener = Recorder()
        ended = train_runs(plan, plan.select("3"), listener, device="cpu", **options)
        return ended[0].status, " ".join(listener.warnings)

    return plan, tmp_path / "runs" / "3", again


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def flip(path, at=-5):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)


# ---- C1 --------------------------------------------------------------------------------------------------------------


def test_what_hsae_did_not_write_is_never_deleted(run):
    plan, run_dir, again = run
    other = run_dir.parent / "11"
    for name in (
        "model/weights.pt",
        "eval/thesis.csv",
        "checkpoint/state.pt",
        "metrics.jsonl",
        "saelens/mine/cfg.json",
    ):
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        (other / name).write_text("mine")
    before = files(other)
    for options in ({}, {"restart": True}, {"resume": True}):
        with pytest.raises(UserError, match=r"is not empty .*eval.*not a run of hsae's.*--set train.dir=FOLDER"):
            train_runs(plan, plan.select("11"), device="cpu", **options)
    assert files(other) == before
    (run_dir / "model" / "weights.pt").write_text("mine")
    (run_dir / "saelens" / "mine").mkdir()
    (run_dir / "saelens" / "mine" / "cfg.json").write_text("mine")
    assert again(restart=True)[0] == "trained"
    kept = files(run_dir)
    assert [kept[name] for name in ("notes.txt", "model/weights.pt", "saelens/mine/cfg.json")] == [b"mine"] * 3
    assert not (run_dir / "eval").exists()


def test_a_lost_or_harmed_run_json_is_written_again_from_the_model(run):
    _, run_dir, again = run
    before = files(run_dir)
    for harm in (lambda path: path.unlink(), lambda path: path.write_text("[" * 100_000), lambda path: flip(path, 60)):
        harm(run_dir / "run.json")
        status, said = again()
        assert status == "already trained" and "is written again from the model" in said
        assert {**files(run_dir), "run.json": b""} == {**before, "run.json": b""}
        assert again() == ("already trained", "")
    described = json.loads((run_dir / "model/model.json").read_text())
    described.pop("run"), described.pop("checksum")  # as models were before
    (run_dir / "model/model.json").write_text(json.dumps(described))
    (run_dir / "run.json").unlink()
    with pytest.raises(UserError, match=r"holds a run .*but no run.json .*--restart replaces the run"):
        again()
    assert (run_dir / "eval/composition.json").is_file() and again(restart=True)[0] == "trained"


# ---- C3, C8 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model/model.safetensors", "model/model.json"])
def test_a_harmed_model_is_not_used_and_a_lost_one_is_trained_again(run, name):
    _, run_dir, again = run
    before = files(run_dir)
    flip(run_dir / name)
    with pytest.raises(UserError, match=r"is damaged.*delete it and run `hsae train --run 3`"):
        load_model(run_dir / "model")
    with pytest.raises(UserError, match=r"is damaged.*delete it and run `hsae train --run 3`"):
        again()
    (run_dir / name).unlink()
    with pytest.raises(UserError, match=r"is missing; train the run with: hsae train --run 3"):
        load_model(run_dir / "model")
    status, said = again()
    assert status == "trained" and "evaluations stay" in said
    after = files(run_dir)
    assert {**after, "metrics.jsonl": b"", "run.json": b""} == {**before, "metrics.jsonl": b"", "run.json": b""}


def test_folders_for_other_tools_are_made_again_from_the_model(run):
    _, run_dir, again = run
    before = files(run_dir)
    flip(run_dir / "saelens/sae/sae_weights.safetensors")
    with pytest.raises(UserError, match=r"is damaged"):
        saelens_folder.load(run_dir / "saelens/sae")
    status, said = again()
    assert status == "already trained" and "made again from the model" in said and files(run_dir) == before
    shutil.rmtree(run_dir / "saelens")
    assert again()[0] == "already trained" and files(run_dir) == before


def test_runs_from_before_digests_still_open(run):
    _, run_dir, again = run
    held = json.loads((run_dir / "run.json").read_text())
    held.pop("files"), held.pop("checksum")
    (run_dir / "run.json").write_text(json.dumps(held))
    described = json.loads((run_dir / "model/model.json").read_text())
    for key in ("run", "weights", "checksum"):
        described.pop(key)
    (run_dir / "model/model.json").write_text(json.dumps(described))
    before = files(run_dir)
    assert again() == ("already trained", "") and files(run_dir) == before
    data = (run_dir / "model/model.safetensors").read_bytes()
    (run_dir / "model/model.safetensors").write_bytes(data[:-9])
    with pytest.raises(UserError, match=r"is damaged"):
        again()


@pytest.mark.parametrize("place", range(7))
def test_a_checkpoint_with_a_changed_byte_is_refused(tmp_path, place):
    tensors = {"a": torch.arange(7.0), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.tensor(3)}
    state = tensors, {"step": 1234}
    save_checkpoint(state, tmp_path, {"identity": "me"})
    found, rest = load_checkpoint(tmp_path, ["me"])
    assert rest == {"step": 1234, "identity": "me"} and all(found[name].equal(part) for name, part in tensors.items())
    with pytest.raises(UserError, match=r"belongs to another configuration"):
        load_checkpoint(tmp_path, ["you"])
    data = (tmp_path / CHECKPOINT).read_bytes()
    at = data.index(b"1234") if place == 0 else len(data) * place // 7
    (tmp_path / CHECKPOINT).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(UserError, match=r"state.safetensors (is damaged|belongs to another).*--restart"):
        load_checkpoint(tmp_path, ["me"])


def test_a_log_heals_at_its_tail_only(tmp_path):
    lines = [json.dumps({"kind": "metrics", "step": step}).encode() + b"\n" for step in range(1, 8)]
    lines[1] = b'{"kind": "metrics", \xff\n'
    lines[3] = b"[1]\n"
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(lines) + lines[0][:9])
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 3, 5, 6, 7]
    assert damaged_metrics(tmp_path) == [2, 4]
    MetricsLog(tmp_path, 5).write({"kind": "stage", "step": 5})
    lines[1] = b'{"kind": "damaged", "step": 1, "text": "{\\"kind\\": \\"metrics\\", \\\\xff"}\n'
    lines[3] = b'{"kind": "damaged", "step": 3, "text": "[1]"}\n'
    assert path.read_bytes() == b"".join(lines[:5]) + b'{"kind": "stage", "step": 5}\n'
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 3, 5, 5]
    assert damaged_metrics(tmp_path) == [2, 4]
    lines[0] = lines[0].replace(b"1", b"9")  # a step beyond the checkpoint, in the middle
    path.write_bytes(b"".join(lines))
    MetricsLog(tmp_path, 6)
    assert path.read_bytes() == b"".join(lines[:6])


def test_a_digit_of_a_result_is_told(tmp_path):
    path = tmp_path / "5" / "eval" / "unlearning.json"
    result_files.write_result(path, {"value": 0.25, "inputs": {}})
    assert result_files.read_result(path, "x") == {"value": 0.25, "inputs": {}}
    path.write_text(path.read_text().replace("0.25", "0.35"))
    with pytest.raises(UserError, match=r"unlearning.json is damaged .*make it again with: hsae eval unlearning"):
        result_files.read_result(path, "hsae eval unlearning")
    path.write_text('{"value": 0.35}')
    assert result_files.read_result(path, "x") == {"value": 0.35}  # older ones have no checksum
    with (GOLDEN / "user_baseline_core.json").open() as file:
        content = json.load(file)
    content["hsae"] = {"inputs": {}, "measures": {}}
    path = write_envelope(tmp_path / "5" / "eval" / "core" / "r_s_eval_results.json", content)
    assert read_core(path).hsae == content["hsae"]
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    text = path.read_text()
    at = text.index('"ce_loss_with_sae": ') + 22
    path.write_text(text[:at] + ("1" if text[at] != "1" else "2") + text[at + 1 :])
    with pytest.raises(UserError, match=r"is damaged .*make it again with: hsae eval core --run 5"):
        read_core(path)


def test_half_written_results_of_killed_evaluations_are_swept(tmp_path):
    for name in (partial_name(tmp_path / "other.json").name, ".tmpAb3dE9"):
        (tmp_path / name).write_text("half")
    (tmp_path / "mine.partial").write_text("mine")
    result_files.write_result(tmp_path / "a.json", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "mine.partial"]


# ---- A4, A10 ---------------------------------------------------------------------------------------------------------


def test_a_run_is_evaluated_on_stores_of_its_model_only(tmp_path):
    digests = {"model_digest": "a", "tokenizer_digest": "b", "corpus_digest": "c"}
    run_record.write_run(tmp_path, {"content": digests})
    header = {"model_digest": "a", "tokenizer_digest": "b", "corpus_digest": "of another text"}

    def store(**changes):
        return SimpleNamespace(url="store", header=SimpleNamespace(**header | changes))

    run_record.check_same_model(tmp_path, store())
    run_record.check_same_model(None, store(model_digest="d"))
    for name, what in (("model_digest", "weights"), ("tokenizer_digest", "tokenizer")):
        with pytest.raises(UserError, match=rf"other {what} than those of store; .*hsae cache build"):
            run_record.check_same_model(tmp_path, store(**{name: "d"}))


def test_a_run_is_the_same_whatever_lossless_codec_its_store_has(run):
    plan, run_dir, _ = run
    kinds = {
        codec: dataclasses.replace(plan, cache=plan.cache.model_copy(update={"codec": codec}))
        for codec in ("auto", "mappable", "compact", "int8")
    }
    found = {codec: run_directory.identities(made, made.runs[3]) for codec, made in kinds.items()}
    assert found["auto"] == found["mappable"] == found["compact"] and len(set(found["auto"])) == 2
    assert not {*found["int8"]} & {*found["auto"]}  # int8 changes the numbers
    assert run_record.read_run(run_dir)["identity"] == found["auto"][0]
    for identity in found["auto"]:  # the second is that of runs from before, trained on a compact store
        run_record.write_run(run_dir, {**run_record.read_run(run_dir), "identity": identity})
        assert all(run_directory.is_complete(kinds[codec], plan.runs[3]) for codec in ("auto", "mappable", "compact"))


# ---- C14, B ----------------------------------------------------------------------------------------------------------


def test_a_full_disk_names_the_file_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(({"a": torch.ones(2)}, {"step": 1}), tmp_path, {"identity": "me"})
    before = files(tmp_path)

    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("hsae.train.training.checkpoints.save_file", full)
    with pytest.raises(OSError, match=r"No space left on device: .*state.safetensors") as raised:
        save_checkpoint(({"a": torch.ones(2)}, {"step": 2}), tmp_path, {"identity": "me"})
    assert raised.value.errno == errno.ENOSPC and files(tmp_path) == before


def test_odd_models_are_refused_in_a_sentence(run):
    _, run_dir, _ = run
    path = run_dir / "model" / "model.json"
    described = json.loads(path.read_text())
    described.pop("checksum")
    run_record.write_run(run_dir, {key: value for key, value in run_record.read_run(run_dir).items() if key != "files"})
    odd = [
        {"levels": 3},
        {"levels": [1]},
        {"structure": "other"},
        {"compositions": ["x"]},
        {"effective_thresholds": ["x"]},
    ]
    odd += [{"levels": [{**described["levels"][0], "name": "level5"}, described["levels"][1]]}, {"format": [1]}]
    for change in odd:
        path.write_text(json.dumps({**described, **change}))
        with pytest.raises(UserError):
            load_model(run_dir / "model")
    for text in ("[" * 100_000, "[1]", '{"format": ' + "1" * 5000 + "}", "\x00"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"model.json is damaged"):
            load_model(run_dir / "model")
    with pytest.raises(UserError, match=r"there is no such folder"):
        load_model("nowhere/model")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_stack_in_another_type_has_views_of_that_type(dtype):
    def level(number, d_in, d_sae):
        W = torch.randn(d_in, d_sae, generator=torch.Generator().manual_seed(number))
        parts = {"W_enc": W, "W_dec": W.T.clone(), "b_enc": torch.ones(d_sae), "b_dec": torch.ones(d_in)}
        return SAE(name=f"level{number}", architecture="standard", **parts)

    stack = StackedSAE((level(1, 6, 9), level(2, 9, 4)))
    view, plain = stack.copy_to(dtype=dtype).views()["level2"], stack.views()["level2"]
    assert {view.W_enc.dtype, view.W_dec.dtype, view.b_enc.dtype, view.b_dec.dtype, view.norms.dtype} == {dtype}
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))
    assert view.decode(view.encode(x.to(dtype))).dtype == dtype
    torch.testing.assert_close(view.W_enc.float(), plain.W_enc, rtol=0.05, atol=0.3)


def test_a_model_is_given_as_text_or_path_and_its_files_have_the_usual_mode(run, tmp_path):
    _, run_dir, _ = run
    assert load_model(str(run_dir / "model")).level_widths == load_model(run_dir / "model").level_widths
    (tmp_path / "usual").touch()
    write_atomically(tmp_path / "weights", lambda path: save_file({"a": torch.ones(2)}, path))
    for path in (
        run_dir / "model/model.safetensors",
        run_dir / "saelens/sae/sae_weights.safetensors",
        tmp_path / "weights",
    ):
        assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode
