"""Functions that are compiled where the device is fast, here on the processor."""

import functools
import shutil

import pytest
import torch

from hsae.train.model import levels
from hsae.train.model.fused import Compiled, Fused

compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


@pytest.fixture
def everywhere(monkeypatch):
    monkeypatch.setattr(Fused, "where", frozenset({"cpu"}))
    monkeypatch.setattr(Compiled, "failed", False)


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
    assert not Compiled.failed


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_where_compiling_fails_the_function_runs_as_it_is(everywhere, caplog, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=broken))
    double, triple = Fused(lambda x: 2 * x), Fused(lambda x: 3 * x)
    assert [double(torch.ones(())), triple(torch.ones(()))] == [2, 3]
    (message,) = (record.getMessage() for record in caplog.records if record.name == "hsae")
    assert "torch.compile fails here" in message and "no compiler" in message


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_graph_in_pieces_is_no_graph(everywhere, caplog):
    def reads(x):
        return 2 * x if x.sum().item() > 0 else x

    assert Fused(reads)(torch.ones(())) == 2
    assert Compiled.failed and [record.name for record in caplog.records].count("hsae") == 1


def test_on_a_processor_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *_, **__: 1 / 0)
    assert Fused(lambda x: x + 1)(torch.zeros(())) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_other_errors_are_not_taken_for_failures_of_the_compiler(everywhere, monkeypatch):
    def full(x):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch, "compile", lambda function, **options: full)
    with pytest.raises(torch.OutOfMemoryError):
        Fused(lambda x: x)(torch.ones(()))
    assert not Compiled.failed
