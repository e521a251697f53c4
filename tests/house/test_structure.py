"""The layout rules: arrows cli -> eval -> train -> cache, light start-up, nothing missing from the wheel."""

import ast
import functools
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from places import ROOT

import hsae.cache
import hsae.cli
import hsae.eval
import hsae.train

RANK = {"cache": 0, "train": 1, "eval": 2, "cli": 3}
ROOT_NAMES = {"__version__", "_lazy", "registry"}
"""What the parts may use of the package above them."""
HEAVY = ["torch", "transformers", "zarr", "numpy", "pandas", "plotly", "matplotlib", "jinja2", "datasets"]


def modules():
    return [path for package in RANK for path in sorted((ROOT / package).rglob("*.py"))]


@functools.cache
def imports(path):
    """hsae and other modules a file imports."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


@pytest.mark.parametrize("package", [hsae.cache, hsae.train, hsae.eval, hsae.cli])
def test_the_tests_run_against_this_checkout(package):
    assert Path(package.__file__).resolve().parent.parent == ROOT


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_arrows_go_one_way(path):
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "hsae" and len(parts) > 1 and parts[1] not in ROOT_NAMES:
            assert RANK[parts[1]] <= RANK[path.relative_to(ROOT).parts[0]], f"{path} imports {name}"
        assert parts[0] not in RANK, f"{path} imports {name} without hsae."


def test_only_one_module_loads_language_models():
    users = {
        path.relative_to(ROOT).as_posix()
        for path in modules()
        for name in imports(path)
        if name.split(".")[0] == "transformers"
    }
    assert users <= {f"cache/language_model/{name}.py" for name in ("lm", "loading", "gguf")}
    assert users


def test_the_wings_of_training_go_one_way():
    wings = ["config", "parallel", "model", "training", "runs"]
    for rank, wing in enumerate(wings):
        later = tuple(f"hsae.train.{name}." for name in wings[rank + 1 :])
        for path in (ROOT / "train" / wing).rglob("*.py"):
            assert not [name for name in imports(path) if later and name.startswith(later)], path


def test_training_never_imports_the_language_model():
    for path in (ROOT / "train").rglob("*.py"):
        assert "hsae.cache.language_model.lm" not in set(imports(path)), path


def test_help_is_light():
    code = "import sys; from hsae.cli.main import app; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "typer" in loaded
    assert sorted(set(HEAVY) & set(loaded)) == []


TRAINED = """
import sys, torch, hsae, hsae.train.runs.planned_runs, hsae.eval.core.core_evaluation, hsae.cli.pipeline
hsae.fit(torch.ones(64, 4).cumsum(0), widths=[8], l0=[2], steps=2, batch_tokens=16, progress=False, device="cpu")
print(*sys.modules)
"""


def test_training_and_core_load_only_what_they_need():
    loaded = subprocess.run([sys.executable, "-c", TRAINED], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in loaded
    seconds_each = {"transformers", "zarr", "numcodecs", "scipy", "sklearn", "datasets", "matplotlib", "torch._dynamo"}
    assert sorted(seconds_each & set(loaded)) == []


def test_every_data_file_is_packaged():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(settings["package-dir"]) == {"hsae", *(f"hsae.{part}" for part in RANK)}
    for package in ("hsae", *RANK):
        for path in (ROOT / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".py":
                assert any(path.match(pattern) for pattern in settings["package-data"]["*"]), (
                    f"{path} would not be in the wheel"
                )
            assert not path.is_dir() or path.name == "__pycache__" or (path / "__init__.py").is_file(), (
                f"{path} is no package"
            )


def test_no_pickle_and_no_remote_code():
    for path in modules():
        text = path.read_text()
        names = {name.split(".")[0] for name in imports(path)}
        assert not names & {"pickle", "cloudpickle", "joblib", "dill", "shelve"}, path
        assert "trust_remote_code=True" not in text and "torch.load(" not in text and "torch.save(" not in text, path
