"""What CONTRIBUTING.md and README.md say is so: the map, the Python example, and a store behind another driver of
fsspec.
"""

import importlib.util
import re
from typing import ClassVar

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from places import ROOT

import hsae
from hsae.cache.storage.remote import BACKENDS, Backend


@pytest.mark.parametrize("name", ["map", "keys"])
def test_pages_that_are_made_are_those_of_the_code(name):
    where = importlib.util.spec_from_file_location(name, ROOT / f".ci/{name}.py")
    module = importlib.util.module_from_spec(where)
    where.loader.exec_module(module)
    assert module.PAGE.read_text() == module.drawn(), f"{module.PAGE.name} is old; `make map` writes it anew"


def test_every_part_has_a_line_in_contributing():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert all(f"\n{part}/ " in text for part in ("hsae", "cache", "train", "eval", "cli", "tests"))


def test_the_python_section_of_the_readme_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 15
    exec(compile(code, "README.md", "exec"), {})


class Shelf(MemoryFileSystem):
    """A storage backend that hsae knows nothing of."""

    protocol = "shelf"
    store, pseudo_dirs = {}, [""]


def test_a_storage_backend_is_a_driver_of_fsspec(make_store):
    fsspec.register_implementation("shelf", Shelf, clobber=True)
    target, values = make_store("shelf://stores")
    store = hsae.ActivationStore.open(str(target))
    hook = store.spec.hooks[0]
    assert torch.equal(store.acts(hook, 0, store.rows), values[f"acts/{hook}"])


class CountingBackend(Backend):
    """One that needs more than a driver: it counts what is read."""

    reads: ClassVar[list[str]] = []

    def read(self, filesystem, path, most):
        self.reads.append(path)
        return super().read(filesystem, path, most)


def test_a_storage_backend_that_needs_more_is_a_class_and_a_line(make_store, monkeypatch):
    fsspec.register_implementation("shelf", Shelf, clobber=True)
    monkeypatch.setitem(BACKENDS, "shelf", f"{__name__}:CountingBackend")
    target, values = make_store("shelf://counted")
    store = hsae.ActivationStore.open(str(target))
    hook = store.spec.hooks[0]
    assert torch.equal(store.acts(hook, 0, store.rows), values[f"acts/{hook}"])
    assert any(path.endswith("zarr.json") for path in CountingBackend.reads)
