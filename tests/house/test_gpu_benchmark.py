"""benchmarks/gpu.py runs from end to end, tells of parts that fail, and judges the targets."""

import json
import sys

import pytest
from places import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu

sys.path.remove(str(ROOT / "benchmarks"))


def test_every_part_runs_and_one_that_fails_stops_no_other(tmp_path, monkeypatch, capfd):
    def fails(setup):
        setup.put(until_then=1)
        raise RuntimeError("no kernel")

    monkeypatch.setitem(gpu.PARTS, "wide", fails)
    monkeypatch.setattr(gpu, "KINDS", ("relu", "batchtopk", "full"))
    document = gpu.main(["--tiny", "--here", "--into", str(tmp_path / "gpu.json"), *gpu.BUDGETS, "checks"])
    parts = document["parts"]
    assert {name for name, found in parts.items() if "error" in found} == {"wide"}
    assert parts["wide"]["until_then"] == 1 and parts["wide"]["error"] == "RuntimeError: no kernel"
    assert {key: verdict for key, verdict in parts["checks"].items() if verdict is not True}.keys() == {"seconds"}
    for kind in ("relu", "batchtopk", "full"):
        assert parts["training"][kind]["hsae"]["tokens_per_s"] > 0
        assert "absent" in parts["training"][kind]["sparsify"]
    measured = {row["target"]: row["reached"] for row in document["targets"]}
    assert measured["harvest, tokens/s"] is False and measured["training, topk / best peer"] is None
    assert measured["core, six: SAEBench's passes / hsae"] in (True, False)
    assert json.loads((tmp_path / "gpu.json").read_text()) == json.loads(json.dumps(document))
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["parts"]


def test_a_part_in_a_process_of_its_own_that_takes_too_long(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu.BUDGETS, "ceilings", 0.01)
    (tmp_path / "ceilings.json").write_text('{"matmul_tflop_per_s": 1}')
    found = gpu.run_part("ceilings", gpu.Setup(tmp_path, tiny=True), {})
    assert found["error"] == "not done in 0.01 s" and found["matmul_tflop_per_s"] == 1


def test_targets_are_ratios_to_the_best_peer():
    def speed(**by):
        return {name: {"tokens_per_s": value} for name, value in by.items()}

    steps = {"topk": speed(hsae=300, sparsify=100, saelens=50), "full": speed(hsae=190)}
    rows = {row["target"]: row for row in gpu.targets({"training": steps})}
    assert rows["training, topk / best peer"]["measured"] == pytest.approx(3)
    assert rows["training, topk / best peer"]["reached"] is True
    assert rows["training, full / best peer"]["measured"] == pytest.approx(1.9)  # of the best k-sparse one
    assert rows["training, full / best peer"]["reached"] is False
    assert rows["harvest, tokens/s"]["reached"] is None
