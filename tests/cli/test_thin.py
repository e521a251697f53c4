"""The command line only parses, calls and shows: no command calls another, and its modules import each other without a
circle.
"""

import ast
from graphlib import TopologicalSorter

from places import ROOT

REGISTERING = {"main", "eval"}
"""Modules that put commands together."""
MODULES = {path.stem: ast.parse(path.read_text()) for path in (ROOT / "cli").glob("*.py") if path.stem != "__init__"}


def imported(tree):
    """What a module imports of cli: module, name or None for the whole module, and its name here."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "hsae.cli":
            yield from ((alias.name, None, alias.asname or alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("hsae.cli."):
            yield from ((node.module.split(".")[2], alias.name, alias.name) for alias in node.names)


def commands():
    """(module, function) of every command."""
    for name, tree in MODULES.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and "Example: hsae " in (ast.get_docstring(node) or ""):
                yield name, node.name


def test_no_circle():
    graph = {name: {module for module, _, _ in imported(tree)} for name, tree in MODULES.items()}
    assert set(TopologicalSorter(graph).static_order()) == set(MODULES)


def test_no_command_calls_another():
    every = set(commands())
    assert {("train", "train"), ("cache", "build"), ("report", "report")} <= every and len(every) >= 9
    for name in MODULES.keys() - REGISTERING:
        for module, function, here in imported(MODULES[name]):
            assert (module, function) not in every, f"cli/{name}.py imports the command {module}.{function}"
            attributes = [node for node in ast.walk(MODULES[name]) if isinstance(node, ast.Attribute)]
            used = {node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id == here}
            assert function or not any((module, part) in every for part in used), f"cli/{name}.py calls {module}"
