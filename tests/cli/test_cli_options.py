"""Options are followed or refused before anything is computed, and `eval all` goes on and tells how each evaluation
ended.

FIX B.
"""

import errno
import re
from importlib.util import find_spec

import pytest
from places import ROOT
from typer.testing import CliRunner

from hsae import registry
from hsae.cache import errors
from hsae.cli.evaluations import evaluation_command
from hsae.cli.main import app
from hsae.eval.harness import evaluate_all

TINY = ["--plan", "tiny", "--device", "cpu"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(*arguments):
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, errors.UserError), (result.output, result.exception)
    return str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cache", "build", "--suite", "ravel", "--split", "both"], "--split both doesn't go with --suite ravel"),
        (["cache", "build", "--suite", "unlearning", "--split", "eval"], "--split eval doesn't go with --suite unl"),
        (["cache", "ls", ".", "--plan", "tiny"], "it doesn't go with --plan or --set"),
        (["cache", "verify", "x.zarr", "--device", "cpu"], "--device cpu says where --repair computes; it doesn't go"),
        (["eval", "core", "--run", "3", "--all"], "--run and --all exclude each other"),
        (["eval", "core", "--sae", "x", "--all"], "--all and --sae exclude each other"),
        (["eval", "core", "--sae", "x", "--seeds", "2"], "--seeds 2 is for runs; it doesn't go with --sae"),
        (["eval", "core", "--sae", "x", "--whole"], "--whole is for runs"),
        (["eval", "core", "--out", "x"], "--out is for results of --sae"),
        (["eval", "scr", "--out", "x", "--run", "3"], "--out is for results of --sae"),
        (["eval", "ravel", "--sae", "x", "--run", "3"], "--run and --sae exclude each other"),
        (["eval", "all", "--sae", "x", "--seeds", "3"], "--seeds 3 is for runs"),
        (["eval", "autointerp", "--sae", "x", "--whole"], "--whole is for runs"),
        (["eval", "autointerp", "--yes", "--dry-run"], "--yes and --dry-run exclude each other"),
        (["eval", "composition", "--all", "--run", "3"], "--run and --all exclude each other"),
        (["eval", "synthetic", "--tokens", "9", "--set", "train.tokens=8"], "--tokens and --set train.tokens exclude"),
        (["eval", "core", "--run", "0-20", "--plan", "tiny"], "no run '17-20' (--run 0-20) in plan tiny"),
        (["cache", "build", "--plan", "tiny", "--set", "model.id='[/]'"], "'[/]' is neither a folder here nor a name"),
        (["report", "--out", "/dev/null"], "--out /dev/null: /dev/null is not a folder"),
        (["quickstart", "--out", "/dev/null/x"], "--out /dev/null/x: /dev/null is not a folder"),
        (["ablate", "--out", "/dev/null", "--plan", "tiny"], "--out /dev/null: /dev/null is not a folder"),
        (["eval", "synthetic", "--out", "/dev/null"], "--out /dev/null: /dev/null is not a folder"),
        (["eval", "tpp", "--sae", "x", "--out", "/dev/null"], "--out /dev/null: /dev/null is not a folder"),
        (["eval", "all", "--run", "99", "--plan", "tiny"], "no run '99' in plan tiny"),
        (["report", "--run", "3", "--plan", "tiny"], "run 3 full of plan tiny has not been trained in runs/3"),
        (["eval", "core", "--all", "--plan", "tiny"], "run 0 (baseline) of plan tiny has not been trained to its end"),
        (["eval", "tpp", "--all", "--plan", "tiny"], "run 0 (baseline) of plan tiny has not been trained to its end"),
        (
            ["ablate", "--plan", "tiny", "--run", "3", "--unlearning-run", "5"],
            "run 5 no-composition is not among those",
        ),
        (["ablate", "--plan", "tiny", "--without", "unlearning", "--unlearning-seeds", "1"], "don't go with --without"),
        (["ablate", "--plan", "tiny", "--seeds", "3", "--unlearning-seeds", "4"], "is more than --seeds 3"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_without_effect_are_refused(arguments, message, elsewhere):
    assert message in refused(*arguments)
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize(
    "config",
    [None, "[" * 100_000, "9" * 5000, "[1]", '{"text_config": [1]}', '{"hidden_size": "48", "vocab_size": 0}'],
    ids=range(6),
)
def test_odd_model_folders_end_a_dry_run_in_one_line(elsewhere, config):
    """FIX C14: deep JSON, huge numbers, and other odd configurations of a model."""
    model = elsewhere / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(bytes(100))
    if config is not None:
        (model / "config.json").write_text(config)
    assert str(model) in refused(
        "cache", "build", "--dry-run", "--plan", "tiny", "--device", "cpu", "--set", f"model.id='{model}'"
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("cache.eval.corpus='absent.txt'", "corpus 'absent.txt': there is no such file"),
        ("cache.eval.corpus='python-nothing'", "data set 'python-nothing' can't be found on the hub"),
        ("cache.eval.corpus='text'", "cache.eval.first_document = 9 leaves none of them"),
        ("cache.codec='int8'", "int8 stores are made from finished ones"),
    ],
)
def test_a_dry_run_refuses_what_the_build_would_refuse_at_its_start(elsewhere, monkeypatch, setting, message):
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *given, **named: 1 / 0)
    (elsewhere / "text").mkdir()
    (elsewhere / "text/a.txt").write_text("words")
    settings = [f"model.id='{ROOT / 'tests/golden/model'}'", "cache.eval.first_document=9", setting]
    options = [word for setting in settings for word in ("--set", setting)]
    for dry in (["--dry-run"], []):
        assert message in refused("cache", "build", *TINY, "--split", "eval", *dry, *options)
    assert list(elsewhere.rglob("zarr.json")) == []


def test_a_dry_run_writes_nothing(elsewhere, monkeypatch):
    model = f"model.id='{ROOT / 'tests/golden/model'}'"
    result = CliRunner().invoke(app, ["cache", "build", *TINY, "--dry-run", "--set", model])
    assert result.exit_code == 0, result.output
    assert list(elsewhere.iterdir()) == []
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert "nothing can be written in" in refused("cache", "build", *TINY, "--dry-run", "--set", model)


def test_numbers_beyond_reason_are_usage_mistakes(elsewhere):
    for arguments in (
        ["train", "--run", "3", "--seeds", "9" * 40],
        ["eval", "scr", "--draws", "1001"],
        ["ablate", "--seeds", "0"],
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2 and "Invalid value for" in result.output, result.output
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "package"),
    [
        (["eval", "ravel", "--run", "3", "--plan", "tiny"], "scipy"),
        (["eval", "stability", "--run", "3", "--plan", "tiny"], "scipy"),
        (["ablate", "--plan", "tiny"], "scipy"),
        (["ablate", "--plan", "tiny", "--seeds", "1"], "matplotlib"),
        (["quickstart"], "jinja2"),
    ],
)
def test_packages_are_asked_for_before_compute(arguments, package, elsewhere, monkeypatch):
    monkeypatch.setattr(errors, "find_spec", lambda name: None if name == package else find_spec(name))
    assert re.search(rf"needs the package {package}; run: pip install 'hsae\[\w+\]'", refused(*arguments))
    assert list(elsewhere.iterdir()) == []


def test_all_goes_on_whatever_one_evaluation_raises(monkeypatch):
    """FIX B: every kind of failure is a line of the summary, a bug its type and place beside its traceback."""
    raised = {
        "sparse-probing": ModuleNotFoundError("No module named 'sklearn'"),
        "scr": OSError(errno.EMFILE, "Too many open files"),
        "tpp": MemoryError(),
        "absorption": AssertionError("[/] odd"),
    }

    for name in ("ravel", "unlearning"):
        raised[name] = errors.NotApplicable(f"no store; make it with `hsae cache build --suite {name}`")

    real = evaluate_all.evaluate_one

    def evaluate(name, *arguments, **given):
        if name == "core":
            real(name, *arguments, **given)
        raise raised[name]

    monkeypatch.setattr(evaluate_all, "evaluate_one", evaluate)
    result = CliRunner().invoke(app, ["eval", "all", *TINY], env={"COLUMNS": "160"})
    assert result.exit_code == 1, result.exception
    table = result.stdout[result.stdout.index("summary") :]
    for name, said in [
        ("core", "no run of plan tiny has been trained in runs"),
        ("sparse-probing", "ModuleNotFoundError: No module named 'sklearn' (test_cli_options.py, line"),
        ("scr", "Too many open files; too many files are open at once: raise the limit"),
        ("tpp", "the machine is out of memory"),
        ("absorption", "AssertionError: [/] odd (test_cli_options.py, line"),
        ("ravel", "skipped: no store; make it with `hsae cache build --suite ravel`"),
        ("unlearning", "skipped: no store"),
        ("", "5 of 7 evaluations failed"),
    ]:
        assert re.search(rf"{name} .*{re.escape(said)}" if name else re.escape(said), table), (name, table)
    assert "Traceback" in result.stderr and "AssertionError: [/] odd" in result.stderr


def test_all_writes_its_summary_when_it_is_interrupted(monkeypatch):
    def evaluate(name, *_, **__):
        if name != "core":
            raise KeyboardInterrupt
        return []

    monkeypatch.setattr(evaluate_all, "evaluate_one", evaluate)
    result = CliRunner().invoke(app, ["eval", "all", *TINY], env={"COLUMNS": "160"})
    assert result.exit_code == 130
    assert re.search(r"sparse-probing +0 s +interrupted", result.stdout)
    assert re.search(r"tpp +0 s +not begun", result.stdout)


# ---- documents --------------------------------------------------------------------------------------------------


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_documents_name_modules_paths_and_links_that_are_there():
    """FIX B: docs/measures.md named modules that had moved."""
    wrong = []
    for page in DOCUMENTS:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"\bhsae(?:\.\w+)+", text):
            parts = name.split(".")[1:]
            if parts[0] in ("cache", "train", "eval", "cli") and not resolves(parts):
                wrong.append((page.name, name))
        for path in re.findall(r"`((?:cache|train|eval|cli|tests|docs|benchmarks)/[\w./-]*\.(?:py|md|toml))\b", text):
            if not (ROOT / path).exists():
                wrong.append((page.name, path))
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            if "://" not in link and not (page.parent / link).exists():
                wrong.append((page.name, link))
    assert wrong == []


def resolves(parts):
    """Whether `cache.build.thing` is a module, a package, or a name that its module has."""
    for count in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:count])
        files = [place.with_suffix(".py"), place / "__init__.py"]
        for file in files:
            if file.is_file():
                rest = parts[count:]
                return (
                    not rest
                    or re.search(rf"^(?:def|class|async def)? ?{rest[0]}\b| as {rest[0]}$", file.read_text(), re.M)
                    is not None
                )
    return False


def test_documents_name_commands_and_options_that_there_are():
    from typer.main import get_command

    from hsae.cli import main  # noqa: F401

    root, wrong = get_command(app), []
    for page in DOCUMENTS:
        for line in re.findall(r"hsae (?:[a-z-]+)(?: [^`|\n#&]*)?", page.read_text(encoding="utf-8")):
            words, command = line.split()[1:], root
            while words and hasattr(command, "commands") and words[0].strip("`.,;:") in command.commands:
                command = command.commands[words.pop(0).strip("`.,;:")]
            if command.name == "eval" and words and (name := words[0].strip("`.,;:")) in registry.EVALUATIONS:
                command = evaluation_command(name)
            if command is root:
                continue
            known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
            given = {word for word in words if re.fullmatch(r"--[a-z][a-z-]*", word)}
            if unknown := given - known - {"--help"}:
                wrong.append((page.name, line, unknown))
    assert wrong == []
