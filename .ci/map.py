"""The map of the house: every module, and what imports what. `python .ci/map.py` writes it into docs/map.md."""

import ast
import textwrap
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("hsae", "cache", "train", "eval", "cli")
PAGE = ROOT / "docs" / "map.md"
HEAD = """# The map

Every module with the first sentence of its docstring. Made by `make map`; a test compares it with the code.
Arrows go one way: `cli` imports `eval`, `eval` imports `train`, `train` imports `cache`.

"""
ROOMS = """
## What imports what

The folders of each part (and modules beside them), floor by floor: each imports only what stands below it.

"""


def line(depth: int, name: str, path: Path) -> str:
    """A name and the first sentence of its module's docstring, cut to 120 characters."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].split())
    start = f"{'  ' * depth}* {name} "
    return start + textwrap.shorten(text.split(". ")[0].rstrip("."), 120 - len(start), placeholder=" …")


def room(module: str) -> str:
    """`cache.storage` of `hsae.cache.storage.paths`: the folder or module right below a part."""
    return ".".join(module.split(".")[1:3])


def rooms(part: str) -> dict[str, set[str]]:
    """Each room of a part, and the others of that part that it imports when it runs."""
    below: dict[str, set[str]] = {}
    for path in (ROOT / part).rglob("*.py"):
        if path.name == "__init__.py":
            continue  # a front door: it names what lies behind it
        own = room(".".join(("hsae", *path.relative_to(ROOT).with_suffix("").parts)))
        tree = ast.parse(path.read_text())
        typed = {
            node
            for branch in ast.walk(tree)
            if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
            for node in ast.walk(branch)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node not in typed and str(node.module).startswith(f"hsae.{part}"):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                below.setdefault(own, set()).update({room(name) for name in names} - {own})
        below.setdefault(own, set())
    return below


def floors(below: dict[str, set[str]]) -> list[list[str]]:
    """The rooms, highest floor first. Raises graphlib.CycleError if some import each other in a circle."""
    height: dict[str, int] = {}
    for name in TopologicalSorter(below).static_order():
        height[name] = 1 + max((height[other] for other in below.get(name, ())), default=0)
    return [sorted(name for name in height if height[name] == floor) for floor in range(max(height.values()), 0, -1)]


def drawn_rooms() -> str:
    """The rooms of every part, floor by floor."""
    lines = []
    for part in PARTS[1:]:
        below = rooms(part)
        lines.append(f"* **{part}/**: {len(below)} rooms, {sum(map(len, below.values()))} arrows")
        for floor in floors(below):
            shown = []
            for name in floor:
                others = ", ".join(sorted(other.partition(".")[2] for other in below[name]))
                shown.append(f"  * `{name.partition('.')[2]}`" + (f" → {others}" if others else ""))
            lines += shown
    return ROOMS + "\n".join(lines) + "\n"


def drawn() -> str:
    """The page."""
    lines = []
    for part in PARTS:
        for folder in sorted({path.parent for path in (ROOT / part).rglob("__init__.py")}):
            depth = len(folder.relative_to(ROOT).parts) - 1
            lines.append(line(depth, f"**{folder.name}/**", folder / "__init__.py"))
            for path in sorted(folder.glob("*.py")):
                if path.name != "__init__.py":
                    lines.append(line(depth + 1, f"`{path.name}`", path))
    return HEAD + "\n".join(lines) + "\n" + drawn_rooms()


if __name__ == "__main__":
    PAGE.write_text(drawn())
