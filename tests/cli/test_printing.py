"""What is printed is printed as it is, and what ends a command is one line.

FIX B: square brackets; FIX C14: errors that name no file.
"""

import ast
import errno
import io
import re
import subprocess
import sys
import typing
from types import SimpleNamespace

import pytest
from places import ROOT
from rich import get_console
from rich.table import Table
from typer.testing import CliRunner

from hsae import registry
from hsae.cache.errors import StoreError, UserError
from hsae.cli import common, main
from hsae.cli.common import one_line
from hsae.cli.evaluations import callback_of

CLI = ROOT / "cli"
NAMES = ["[red]x[/]", "[/]", "[/nothing]", "a [b] c", "[link=http://x]", "\\[x]", "tail\\", ":smile:", "{task}"]


def commands(group, path=()):
    for command in group.registered_commands:
        yield (*path, command.name or command.callback.__name__), command
    for inner in group.registered_groups:
        yield from commands(inner.typer_instance, (*path, inner.name))
        for name, entry in registry.EVALUATIONS.items() if inner.name == "eval" else ():
            yield (*path, "eval", name), SimpleNamespace(help=entry.summary, callback=callback_of(name))


@pytest.fixture
def printed():
    """What is printed, on a wide console."""
    file = io.StringIO()
    common.use_plain_console(file=file, width=200)
    yield file
    common.use_plain_console()


@pytest.mark.parametrize("name", NAMES)
def test_names_are_printed_as_they_are(name, printed):
    table = Table(title=f"title {name}")
    table.add_column(f"column {name}")
    table.add_row(f"cell {name}")
    get_console().print(table)
    get_console().print(f"plain {name}")
    get_console().rule(f"rule {name}")
    common.say("in ", (f"bold {name}", "bold"), style="yellow")
    with common.progress_bars() as bars:
        bars.update(bars.add_task(f"bar {name}", total=1), completed=1)
    text = printed.getvalue()
    for kind in ("title", "column", "cell", "plain", "rule", "bold", "bar"):
        assert f"{kind} {name}" in text, kind


def test_no_command_has_a_console_or_markup_of_its_own():
    for path in CLI.glob("*.py"):
        source = path.read_text()
        if path.name != "common.py":
            assert not re.search(r"\bConsole\(|TextColumn\(|(?<!\w)Progress\(|get_console\(\)\.status\(", source), path
        assert "rich.markup" not in source and "from_markup" not in source, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert "[/]" not in node.value and "[bold]" not in node.value, (path, node.value)


def test_help_keeps_every_word():
    found = dict(commands(main.app))
    assert len(found) >= 20
    for path, command in found.items():
        done = CliRunner().invoke(main.app, [*path, "--help"], env={"COLUMNS": "160"})
        assert done.exit_code == 0, path
        shown = re.sub(r"\s+", "", done.output)
        hints = typing.get_type_hints(command.callback, include_extras=True)
        helps = [hint.__metadata__[0].help for hint in hints.values() if hasattr(hint, "__metadata__")]
        for text in [command.help or command.callback.__doc__, *helps]:
            assert re.sub(r"\s+", "", text or "") in shown, (path, text)
    assert "[unlearning.qa]" in CliRunner().invoke(main.app, ["eval", "unlearning", "--help"]).output


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (StoreError("no store at [x]"), r"no store at \[x\]"),
        (OSError(errno.EMFILE, "Too many open files"), r"\[Errno 24\] Too many open files; .*`ulimit -n 65536`"),
        (OSError(errno.EMFILE, "Too many open files", "a/b"), r"a/b: Too many open files; .*`ulimit -n 65536`"),
        (OSError(errno.ENOSPC, "No space left on device"),
            r"\[Errno 28\] No space left on device; of cache.dir, train.dir"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), r"x: No space left on device; make room"),
        (OSError(errno.EIO, "Input/output error"), r"\[Errno 5\] Input/output error \(the system names no file"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "x: Permission denied"),
        (FileExistsError(errno.EEXIST, "File exists", "runs"), "runs: File exists; a file is where a folder must be"),
        (ConnectionResetError(), "ConnectionResetError"),
        (MemoryError(), r"the machine is out of memory; .* \(MemoryError\)"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"),
            "the machine is out of"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), "the GPU is out of memory"),
    ],
    ids=range(12),
)  # fmt: skip
def test_what_is_no_bug_is_one_line(error, line):
    assert re.match(line, one_line(error))


@pytest.mark.parametrize(
    "error", [RuntimeError("x"), KeyError("x"), ValueError("x"), RecursionError(), AssertionError()]
)
def test_a_bug_is_no_line(error):
    assert one_line(error) is None


def ended_by(error, monkeypatch, capsys):
    def raising():
        raise error

    monkeypatch.setattr(main, "app", raising)
    with pytest.raises(BaseException) as caught:
        main.main()
    return caught.value, capsys.readouterr().err


def test_the_last_resort_has_a_status_for_each_kind(monkeypatch, capsys):
    for error, status, said in [
        (UserError("[red] wrong"), 2, "Error: [red] wrong\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "Error: [Errno 28] No space left"),
        (SystemExit(130), 130, "Interrupted."),
        (SystemExit(3), 3, ""),
    ]:
        ended, text = ended_by(error, monkeypatch, capsys)
        assert isinstance(ended, SystemExit) and ended.code == status and text.startswith(said)
    bug = KeyError("x")
    assert ended_by(bug, monkeypatch, capsys) == (bug, "")


def test_a_reader_that_goes_away_ends_a_command_quietly(tmp_path):
    program = f"{sys.executable} -c 'from hsae.cli.main import main; main()'"
    done = subprocess.run(
        ["bash", "-c", f"{program} cache --help | true; {program} cache ls . | true"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
