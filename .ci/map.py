"""The map of the house: every module with the first sentence of its docstring. `python .ci/map.py` writes it into docs/map.md."""

import ast
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("hsae", "cache", "train", "eval", "cli")
PAGE = ROOT / "docs" / "map.md"
HEAD = """# The map

Every module with the first sentence of its docstring. Made by `make map`; a test compares it with the code.
Arrows go one way: `cli` imports `eval`, `eval` imports `train`, `train` imports `cache`.

"""


def line(depth: int, name: str, path: Path) -> str:
    """A name and the first sentence of its module's docstring, cut to 120 characters."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].split())
    start = f"{'  ' * depth}* {name} "
    return start + textwrap.shorten(text.split(". ")[0].rstrip("."), 120 - len(start), placeholder=" …")


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
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(drawn())
