"""Injects every fault of the table in docs/stores.md by running its tests, and prints the table with what was counted.

    python benchmarks/faults.py [--examples 80] [--outage 60] [--fast] [--report report.xml] [--also FILE.md ...] [--out
    docs/results/faults]

Needs hsae[dev]. `--examples` is how many random cases each property gets, `--outage` for how many seconds S3 is gone in
the middle of a training; `--fast` leaves out tests marked slow. `--report` takes what pytest wrote with `--junit-xml`
(and HSAE_EXAMPLES and HSAE_OUTAGE set to the same) and runs nothing. `--also` puts Markdown of other tools behind the
table (`inject.py --out` writes such a file). Prints Markdown and, last, one JSON document; with `--out` also writes
both. Status 1 if a test failed.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
HEADING = "## Faults that tests inject"
LIBRARIES = ("torch", "zarr", "fsspec", "s3fs", "aiohttp", "uvicorn", "starlette", "moto")


@dataclass
class Row:
    """A line of the table."""

    fault: str
    happens: str
    identical: str
    tests: list[str]
    """`tests/test_x.py::test_y`."""
    injected: int = 0
    passed: int = 0
    failed: int = 0
    seconds: float = 0.0


def rows() -> list[Row]:
    """The table as docs/stores.md has it."""
    section = (ROOT / "docs/stores.md").read_text().split(HEADING)[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ") and "::" in line]
    found = []
    for line in lines:
        fault, happens, identical, tests = (cell.strip() for cell in line.strip("|").split(" | "))
        found.append(Row(fault, happens, identical, [f"tests/{name}" for name in re.findall(r"`(\S+::\w+)`", tests)]))
    return found


def run(table: list[Row], examples: int, outage: float, fast: bool, report: Path) -> None:
    """Run the tests of all rows; pytest writes `report`."""
    names = sorted({name for row in table for name in row.tests})
    settings = {**os.environ, "HSAE_EXAMPLES": str(examples), "HSAE_OUTAGE": str(outage)}
    command = [sys.executable, "-m", "pytest", "-q", f"--junit-xml={report}", *(("-m", "not slow") if fast else ())]
    subprocess.run([*command, *names], cwd=ROOT, env=settings)


def count(table: list[Row], report: Path, fast: bool) -> None:
    """Add up what pytest reported."""
    by_name = defaultdict(list)
    for case in ElementTree.parse(report).iter("testcase"):
        module, name = case.attrib["classname"].replace(".", "/"), case.attrib["name"].partition("[")[0]
        by_name[f"{module}.py::{name}"].append(case)
    for row in table:
        for name in row.tests:
            if not by_name[name] and not fast:
                row.failed += 1
            for case in by_name[name]:
                found = [item.attrib for item in case.iter("property") if item.attrib["name"] == "injected"]
                good = all(case.find(kind) is None for kind in ("failure", "error", "skipped"))
                row.passed, row.failed = row.passed + good, row.failed + (not good)
                row.injected += sum(int(float(item["value"])) for item in found) if found else 1
                row.seconds += float(case.attrib["time"])


def markdown(table: list[Row], about: dict[str, str]) -> str:
    """The table with its counts."""
    lines = [
        "# Faults, injected",
        "",
        f"Made by `{about['command']}` on {about['date']} ({about['hardware']}; {about['versions']}). S3 was gone for "
        f"{about['outage']} s.",
        "",
        "| fault | what happens | bytes identical | injected | tests passed |",
        "|:--|:--|:--|--:|--:|",
    ]
    lines += [
        f"| {row.fault} | {row.happens} | {row.identical} | {row.injected:,} "
        f"| {row.passed} of {row.passed + row.failed} |"
        for row in table
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=80)
    parser.add_argument("--outage", type=float, default=60.0)
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--report", type=Path)
    parser.add_argument("--also", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    table = rows()
    with tempfile.TemporaryDirectory() as folder:
        report = arguments.report or Path(folder) / "report.xml"
        if not arguments.report:
            run(table, arguments.examples, arguments.outage, arguments.fast, report)
        count(table, report, arguments.fast)
    about = {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{platform.machine()}, {os.cpu_count()} threads",
        "versions": ", ".join(f"{name} {version(name)}" for name in LIBRARIES),
        "outage": f"{arguments.outage:g}",
        "command": " ".join(["python benchmarks/faults.py", *sys.argv[1:]]),
    }
    text = "\n".join([markdown(table, about), *(path.read_text() for path in arguments.also)])
    content = json.dumps({**about, "rows": [asdict(row) for row in table]}, indent=2)
    if arguments.out:
        arguments.out.with_suffix(".md").write_text(text)
        arguments.out.with_suffix(".json").write_text(content + "\n")
    print(text)
    print(json.dumps(json.loads(content)))
    sys.exit(any(row.failed for row in table))


if __name__ == "__main__":
    main()
