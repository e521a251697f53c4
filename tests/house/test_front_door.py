"""The Python API: every public name is there, typed, documented, and its examples run; importing it loads nothing
heavy.
"""

import ast
import doctest
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import hsae
import hsae.cache
import hsae.eval
import hsae.train

FACES = [hsae, hsae.cache, hsae.train, hsae.eval]
faces = pytest.mark.parametrize("face", FACES, ids=lambda face: face.__name__)


def public(face):
    """The functions and classes of a face, by name."""
    return {name: value for name in face.__all__ if callable(value := getattr(face, name))}


@faces
def test_names_resolve_and_are_typed(face):
    assert dir(face) == sorted(face.__all__)
    parts = {"cache", "train", "eval"} if face is hsae else set()
    assert {name for name in face.__all__ if inspect.ismodule(getattr(face, name))} == parts
    (typed,) = (node for node in ast.parse(Path(face.__file__).read_text()).body if isinstance(node, ast.If))
    imported = {
        alias.asname: node.module
        for node in typed.body
        for alias in node.names
    }  # fmt: skip
    assert sorted(imported) == face.__all__, "only public names are imported there"
    for name, value in public(face).items():
        assert value.__module__ == imported[name], f"{name} is defined in {value.__module__}"
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        face.missing  # noqa: B018


@pytest.mark.parametrize("face", FACES, ids=lambda face: face.__name__)
def test_importing_is_light(face):
    code = f"import sys, {face.__name__}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    ours = {name for name in loaded if name.startswith("hsae.")}
    assert ours == {"hsae._lazy", face.__name__} - {"hsae"}
    assert not {"torch", "numpy", "zarr", "transformers", "pydantic"} & set(loaded)


@faces
def test_everything_public_is_documented(face):
    assert face.__doc__
    for name, value in public(face).items():
        assert inspect.getdoc(value), name
        for part, member in inspect.getmembers(value, inspect.isfunction) if inspect.isclass(value) else []:
            if not part.startswith("_") and member.__module__.startswith("hsae."):
                assert inspect.getdoc(member), f"{name}.{part}"


@faces
def test_examples_run(face, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for name, value in {face.__name__: face, **public(face)}.items():
        for example in doctest.DocTestFinder(recurse=inspect.isclass(value)).find(value, name):
            runner.run(example)
    assert runner.summarize(verbose=False).failed == 0
