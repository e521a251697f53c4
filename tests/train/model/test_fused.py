"""Functions that are compiled where the device is fast, here on the processor."""

import shutil

import pytest
import torch

from hsae.train.model import levels
from hsae.train.model.fused import Fused

compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


@pytest.fixture
def everywhere(monkeypatch):
    monkeypatch.setattr(Fused, "where", frozenset({"cpu"}))
    monkeypatch.setattr(Fused, "failed", False)


@compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on importing its compiler
@pytest.mark.parametrize("function", [levels._remove_parallel, levels._normalise])
def test_compiled_is_the_function(function, everywhere):
    rows = torch.nn.functional.normalize(torch.randn(7, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    given = [torch.arange(35.0).view(7, 5), rows] if function is levels._remove_parallel else [rows * 3]
    plain, fused = [part.clone() for part in given], [part.clone() for part in given]
    function.function(*plain)
    Fused(function.function)(*fused)
    torch.testing.assert_close(fused, plain)
    assert not Fused.failed


def test_where_compiling_fails_the_function_runs_as_it_is(everywhere, monkeypatch, caplog):
    def broken(function, **options):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    double, triple = Fused(lambda x: 2 * x), Fused(lambda x: 3 * x)
    assert [double(torch.ones(())), triple(torch.ones(()))] == [2, 3]
    assert caplog.messages == ["training is slower than it could be: torch.compile fails here (no compiler)"]


def test_on_a_processor_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *_, **__: 1 / 0)
    assert Fused(lambda x: x + 1)(torch.zeros(())) == 1


def test_memory_that_runs_out_is_not_taken_for_a_failure_of_the_compiler(everywhere, monkeypatch):
    def full(x):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch, "compile", lambda function, **options: full)
    with pytest.raises(torch.OutOfMemoryError):
        Fused(lambda x: x)(torch.ones(()))
    assert not Fused.failed
