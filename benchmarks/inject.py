"""Faults from outside: bits flipped in every kind of file that hsae keeps, and commands killed while they write; what
the commands then do, counted.

    python benchmarks/inject.py [--flips 60] [--kills 12] [--seed 0] [--only NAME] [--out docs/results/inject]

Needs hsae[dev] and no network. Everything is made with the tiny plan and the model of tests/golden, in a temporary
folder. Commands are the real ones, each in a process forked from this one, so that nothing is imported twice.

A flip changes one bit, or in text one digit, of one file. Then come the commands that use the file, and the trial is
one of
  refused     a command ended with status 2 and one line
  told        all ended with status 0, and one said what is damaged, and left it out or made it again
  unchanged   all ended with status 0, and everything they made is what they make without the flip
  accepted    all ended with status 0, with other results and not a word: a fault of hsae's
  crashed     a traceback, a signal or no end within two minutes: a fault of hsae's
A kill ends a command with SIGKILL before or after one of its renames, chosen at random. Then the same command is run
again, and the trial is `unchanged` if everything is as without the kill and no partial file is left. Prints Markdown
and, last, one JSON document; status 1 if anything was accepted or crashed.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "tests/golden/model"
LIMIT = 120  # seconds for one command
VOLATILE = re.compile(r"eval_id|datetime_epoch_millis|time|checksum|seconds|.*_seconds|tokens_per_s|date|.*commit_hash")
TOLD = re.compile(r"damaged|checksum|cut short|left out|skipped|made again|make it again|computed again", re.IGNORECASE)
OUTCOMES = ("refused", "told", "unchanged", "accepted", "crashed")
LIBRARIES = ("torch", "transformers", "zarr", "safetensors")
Command = Sequence[str]


# ---- running commands ------------------------------------------------------------------------------------------------


@dataclass
class Ended:
    """How a command ended."""

    status: int
    """Negative: the number of the signal."""
    output: str

    @property
    def crashed(self) -> bool:
        """Whether it ended in a way that no user should see."""
        return self.status < 0 or "Traceback (most recent" in self.output or self.status not in (0, 1, 2)


def run(command: Command, folder: Path, before: Callable[[], object] = lambda: None) -> Ended:
    """`hsae <command>` in a forked process whose working folder is `folder`."""
    with tempfile.TemporaryFile() as printed:
        child = os.fork()
        if not child:
            try:
                os.chdir(folder)
                os.dup2(printed.fileno(), 1)
                os.dup2(printed.fileno(), 2)
                sys.argv = ["hsae", *command]
                signal.alarm(LIMIT)
                before()
                from hsae.cli.main import main

                main()
                status = 0
            except SystemExit as left:
                status = left.code if isinstance(left.code, int) else int(left.code is not None)
            except BaseException:
                import traceback

                traceback.print_exc()
                status = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        _, status = os.waitpid(child, 0)
        printed.seek(0)
        code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        return Ended(code, printed.read().decode(errors="replace"))


def must(commands: Sequence[Command], folder: Path) -> None:
    """Run commands that have to go well."""
    for command in commands:
        ended = run(command, folder)
        if ended.status != 0:
            sys.exit(f"hsae {' '.join(command)} failed:\n{ended.output[-2000:]}")


def killed_at(number: int, after: bool) -> Callable[[], None]:
    """What makes a process kill itself before or after its rename `number`; -1 counts them, in the last line it
    prints.
    """

    def install() -> None:
        real, seen = os.replace, [0]

        def replace(*given: Any, **named: Any) -> None:
            seen[0] += 1
            if seen[0] == number and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*given, **named)
            if seen[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = replace  # type: ignore[assignment]
        Path.replace = lambda self, target: (replace(self, target), Path(target))[1]  # type: ignore[method-assign,assignment,return-value]
        if number < 0:
            real_exit = os._exit
            os._exit = lambda status: (os.write(1, f"\nrenames: {seen[0]}\n".encode()), real_exit(status))  # type: ignore[assignment]

    return install


# ---- comparing -------------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """JSON without what differs from one run to the next."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items() if not VOLATILE.fullmatch(key)}
    return [plain(inner) for inner in value] if isinstance(value, list) else value


def state(folder: Path, places: Sequence[str]) -> dict[str, str]:
    """A digest of every file below these places, of JSON by its meaning; locks and logs left out."""
    found = {}
    for place in places:
        top = folder / place
        for path in sorted([top] if top.is_file() else top.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and not path.name.endswith((".lock", ".html", ".png")):
                data = path.read_bytes()
                try:
                    if path.suffix == ".json":
                        data = json.dumps(plain(json.loads(data)), sort_keys=True).encode()
                    elif path.suffix == ".jsonl":
                        lines = [json.dumps(plain(json.loads(line)), sort_keys=True) for line in data.splitlines()]
                        data = "\n".join(lines).encode()
                    elif path.suffix == ".md":
                        data = re.sub(rb"\d{4}-\d\d-\d\d[ T0-9:]*", b"", data)
                except ValueError:
                    pass
                found[name] = hashlib.sha256(data).hexdigest()
    return found


# ---- what is harmed, and what is run then ----------------------------------------------------------------------------


@dataclass
class Flips:
    """Files of one kind, and the commands that use them."""

    name: str
    base: str
    """Folder below the base folder that every trial begins with a copy of."""
    files: str
    """Pattern of the files that are harmed."""
    commands: list[list[str]]
    """All are run; one that refuses is enough."""
    compared: list[str]
    """Places that must be as they are without a flip, if no command refuses."""
    log: str = ""
    """A file of which all lines but the harmed one must be kept."""
    counts: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)


@dataclass
class Kills:
    """A command that is killed, and what must be there after it has been run again."""

    name: str
    base: str
    command: list[str]
    compared: list[str]
    again: list[str] = field(default_factory=list)
    """The command that goes on; the same one if empty."""
    counts: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)


def harm(path: Path, chance: random.Random) -> str:
    """Flip one bit, or in text change one digit, keeping size and times; says which."""
    before, data = path.stat(), bytearray(path.read_bytes())
    digits = [at for at, byte in enumerate(data) if chr(byte).isdigit()] if path.suffix in (".json", ".jsonl") else []
    if digits and chance.random() < 0.8:
        at = chance.choice(digits)
        data[at] = ord(str((int(chr(data[at])) + chance.randrange(1, 10)) % 10))
    else:
        at = chance.randrange(len(data))
        data[at] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return f"byte {at} of {path.name}"


def lost(wanted: Path, found: Path) -> int:
    """Lines of a log, by kind and step, that are not there."""

    def lines(path: Path) -> Counter[str]:
        texts = path.read_text(errors="replace").splitlines()
        return Counter(match[0] for text in texts if (match := re.search(r'"kind": "\w+", "step": \d+', text)))

    return (lines(wanted) - lines(found)).total()


def copied(base: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder, symlinks=True)
    return folder


def flip(kind: Flips, base: Path, trials: int, chance: random.Random, work: Path) -> None:
    """All trials of a kind."""
    os.environ["HSAE_HOME"] = str(
        work.with_name(f"home {kind.name}")
    )  # digests that it remembers are of this kind's trials
    whole = copied(base / kind.base, work)
    for command in kind.commands:
        ended_well = run(command, whole)
        if ended_well.status or TOLD.search(ended_well.output):
            sys.exit(f"without any harm, hsae {' '.join(command)} says:\n{ended_well.output[-2000:]}")
    wanted = state(whole, kind.compared)
    if kind.log:
        shutil.copy(whole / kind.log, work.with_name("log"))
    for _ in range(trials):
        folder = copied(base / kind.base, work)
        files = sorted(path for path in folder.glob(kind.files) if path.is_file() and path.stat().st_size)
        path = chance.choice(files)
        where = f"{path.relative_to(folder)}: {harm(path, chance)}"
        ended = [run(command, folder) for command in kind.commands]
        if any(one.crashed for one in ended):
            outcome = "crashed"
        elif any(one.status for one in ended):
            outcome = "refused"
        elif kind.log and lost(work.with_name("log"), folder / kind.log) > 1:
            outcome = "accepted"
        elif any(TOLD.search(one.output) for one in ended):
            outcome = "told"
        elif state(folder, kind.compared) == wanted:
            outcome = "unchanged"
        else:
            outcome = "accepted"
        kind.counts[outcome] += 1
        if outcome in ("crashed", "accepted"):
            last = [f"status {one.status}: {one.output.strip().splitlines()[-1:]}" for one in ended]
            kind.bad.append(f"{outcome}: {where}; {last}")
            print(f"{kind.name}: {kind.bad[-1]}", file=sys.stderr, flush=True)


def kill(kind: Kills, base: Path, trials: int, chance: random.Random, work: Path) -> None:
    """All trials of a command."""
    whole = copied(base / kind.base, work)
    first = run(kind.command, whole, killed_at(-1, False))
    found = re.search(r"renames: (\d+)", first.output)
    if first.status or not found:
        sys.exit(f"hsae {' '.join(kind.command)} failed:\n{first.output[-2000:]}")
    renames, wanted = int(found[1]), state(whole, kind.compared)
    for _ in range(trials):
        folder = copied(base / kind.base, work)
        at, after = chance.randint(1, renames), chance.random() < 0.5
        ended = run(kind.command, folder, killed_at(at, after))
        again = run(kind.again or kind.command, folder)
        if again.status == 2 and kind.again:  # killed before there was anything to go on from
            again = run(kind.command, folder)
        left = [path.name for path in folder.rglob("*.partial")]
        if again.crashed:
            outcome = "crashed"
        elif again.status:
            outcome = "refused"
        else:
            outcome = "accepted" if left or state(folder, kind.compared) != wanted else "unchanged"
        kind.counts[outcome] += 1
        if outcome != "unchanged":
            where = f"rename {at} of {renames}, {'after' if after else 'before'} (status {ended.status})"
            kind.bad.append(f"{outcome}: {where}; left: {left}; {again.output.strip().splitlines()[-1:]}")
            print(f"{kind.name}: {kind.bad[-1]}", file=sys.stderr, flush=True)


# ---- the base --------------------------------------------------------------------------------------------------------


def settings(folder: Path) -> list[str]:
    """Options that make the tiny plan use the folder's own model and text."""
    return ["--plan", "tiny", "--set", "model.id=model", *(
        part for value in ("cache.train.corpus=text.jsonl", "cache.eval.corpus=text.jsonl", "train.tokens=6000",
            "unlearning.forget.corpus=text.jsonl", "unlearning.retain.corpus=text.jsonl",
            "unlearning.forget.first_document=0",
            "unlearning.retain.first_document=700", "unlearning.rows=24", "unlearning.tune_rows=6",
            "unlearning.test_rows=6")
        for part in ("--set", value)
    )]  # fmt: skip


def make_base(base: Path) -> tuple[list[Flips], list[Kills]]:
    """Everything that trials begin with, and the trials."""
    start = base / "start"
    start.mkdir(parents=True)
    shutil.copytree(MODEL, start / "model")
    chance, words = random.Random(3), Path(os.__file__).read_text().split()
    with (start / "text.jsonl").open("w") as file:
        for _ in range(1500):
            at = chance.randrange(len(words) - 400)
            file.write(json.dumps({"text": " ".join(words[at : at + chance.randrange(20, 200)])}) + "\n")
    plan = settings(start)
    options = [*plan, "--device", "cpu"]
    build, train = ["cache", "build", *options], ["train", *options, "--run", "3,11"]
    core, composition = ["eval", "core", *options, "--run", "3,11"], ["eval", "composition", *options, "--run", "3"]
    report = ["report", *plan]

    stored = copied(start, base / "stored")
    must([build], stored)
    train_store = next(path.name for path in (stored / "activations").glob("*-train-*.zarr"))
    eval_store = next(path.name for path in (stored / "activations").glob("*-eval-*.zarr"))
    trained = copied(stored, base / "trained")
    must([train], trained)
    done = copied(trained, base / "done")
    must([core, composition, report], done)
    forgetting = copied(start, base / "forgetting")
    unlearning = ["cache", "build", *options, "--suite", "unlearning"]
    must([unlearning], forgetting)
    forget = next(path.name for path in (forgetting / "activations").glob("*-forget-*.zarr"))

    half_built = copied(start, base / "half-built")
    split = ["cache", "build", *options, "--split", "train", "--set", "cache.chunk_mib=0.05"]
    counted = run(split, copied(start, base / "counted"), killed_at(-1, False))
    renames = int(re.search(r"renames: (\d+)", counted.output)[1])  # type: ignore[index]
    run(split, half_built, killed_at(renames * 2 // 3, True))
    half_packed = copied(start, base / "half-packed")
    many = [
        "cache",
        "build",
        *options,
        "--split",
        "train",
        "--set",
        "cache.train.rows=840",
        "--set",
        "cache.chunk_mib=0.01",
    ]
    run(many, half_packed, lambda: _stop_after("packing.json"))
    tallied = copied(start, base / "tallied")
    run(split, tallied, lambda: _stop_after("tally/0"))
    half_trained = copied(stored, base / "half-trained")
    alone = ["train", *options, "--run", "11"]
    run(alone, half_trained, lambda: _stop_after("checkpoint/state.safetensors"))
    resume = [*alone, "--resume"]

    train_place, eval_place = f"activations/{train_store}", f"activations/{eval_store}"
    force = ["eval", "core", *options, "--run", "11", "--force"]
    results = ["runs/11/eval"]
    flips = [
        Flips("a training store's header", "stored", f"{train_place}/zarr.json",
            [["cache", "verify", train_place], alone], [train_place, "runs/11/model"]),
        Flips("metadata of a training store's arrays", "stored", f"{train_place}/*/**/zarr.json",
            [["cache", "verify", train_place], alone], [train_place, "runs/11/model"]),
        Flips("chunks, statistics and lists of a training store", "stored", f"{train_place}/**/c/**/*",
            [["cache", "verify", train_place], alone], [train_place, "runs/11/model"]),
        Flips("an evaluation store's header", "trained", f"{eval_place}/zarr.json",
            [["cache", "verify", eval_place], force], [eval_place, *results]),
        Flips("chunks, statistics and lists of an evaluation store", "trained", f"{eval_place}/**/c/**/*", [force],
            results),
        Flips("a forget store's header and documents.json", "forgetting", f"activations/{forget}/*.json",
            [["cache", "verify", f"activations/{forget}"]], [f"activations/{forget}"]),
        Flips("an unfinished store: header and metadata", "half-built", "activations/*/**/zarr.json", [split],
            ["activations"]),
        Flips("an unfinished store: chunks", "half-built", "activations/*/**/c/**/*",
            [split, ["cache", "verify", f"activations/{_only(half_built)}"]], ["activations"]),
        Flips("an unfinished store: packing.json", "half-packed", "activations/*/packing.json", [many],
            ["activations"]),
        Flips("an unfinished store: tally", "tallied", "activations/*/tally/*", [split], ["activations"]),
        Flips("a run's run.json", "trained", "runs/11/run.json", [force, alone], ["runs/11/eval", "runs/11/model"]),
        Flips("a run's model", "trained", "runs/11/model/*", [force], results),
        Flips("a run's SAELens folder", "trained", "runs/11/saelens/sae/*",
            [["eval", "core", *options, "--sae", "runs/11/saelens/sae", "--out", "runs/11/eval"]], results),
        Flips("a checkpoint", "half-trained", "runs/11/checkpoint/*", [resume], ["runs/11/model"]),
        Flips("an unfinished run's run.json", "half-trained", "runs/11/run.json", [resume], ["runs/11"]),
        Flips("an unfinished run's metrics.jsonl", "half-trained", "runs/11/metrics.jsonl", [resume],
            ["runs/11/model"], "runs/11/metrics.jsonl"),
        Flips("results", "done", "runs/*/eval/**/*.json", [report], ["report/report.md"]),
        Flips("weights, config and tokenizer of the language model, times kept", "trained", "model/*", [force],
            results),
        Flips("the text behind a finished store", "stored", "text.jsonl", [build], ["activations"]),
    ]  # fmt: skip
    copy, recode = (
        ["cache", "copy", train_place, "copies"],
        ["cache", "recode", train_place, "copies", "--codec", "compact"],
    )
    harmed = copied(stored, base / "harmed")
    for path in list((harmed / train_place / "acts").rglob("c/*/0/0"))[::2]:
        harm(path, chance)
    kills = [
        Kills("cache build", "start", build, ["activations"]),
        Kills("cache build --suite unlearning", "start", unlearning, ["activations"]),
        Kills(
            "cache verify --repair",
            "harmed",
            ["cache", "verify", train_place, "--repair", "--device", "cpu"],
            ["activations"],
        ),
        Kills("cache copy", "stored", copy, ["copies"]),
        Kills("cache recode", "stored", recode, ["copies"]),
        Kills("train", "stored", train, ["runs/3", "runs/11"], [*train, "--resume"]),
        Kills("train --resume", "half-trained", resume, ["runs/11"]),
        Kills("eval core", "trained", core, ["runs"]),
        Kills("eval composition", "trained", composition, ["runs"]),
        Kills("report", "done", report, ["report"]),
    ]
    return flips, kills


def _only(folder: Path) -> str:
    return next(path.name for path in (folder / "activations").glob("*.zarr"))


def _stop_after(end: str) -> None:
    """Make this process kill itself after the first rename to a path that ends so."""
    real = Path.replace

    def replace(self: Path, target: Any) -> Path:
        found = real(self, target)
        if str(target).endswith(end):
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    Path.replace = replace  # type: ignore[method-assign,assignment]


# ---- the table -------------------------------------------------------------------------------------------------------


def markdown(flips: list[Flips], kills: list[Kills], about: dict[str, str]) -> str:
    """Both tables."""
    made = f"Made by `{about['command']}` on {about['date']}"
    made += f" ({about['hardware']}; {about['versions']}; {about['minutes']} minutes)."
    lines = ["## From outside", "", made, ""]
    for title, kinds in (("one bit or digit changed in", flips), ("killed at a rename, then run again", kills)):
        shown = ("refused", "told and left out or made again", "no effect", "silently accepted", "crashed")
        lines += [f"| {title} | trials | {' | '.join(shown)} |", f"|:--|--:|{'--:|' * len(OUTCOMES)}"]
        rows: list[tuple[str, Counter[str]]] = [(kind.name, kind.counts) for kind in kinds]
        rows.append(("**all**", sum((kind.counts for kind in kinds), Counter())))
        for name, counts in rows:
            cells = " | ".join(str(counts[outcome]) for outcome in OUTCOMES)
            lines.append(f"| {name} | {counts.total()} | {cells} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=60)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    began = time.monotonic()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "COLUMNS": "300"}
    for name in ("torch", "zarr", "transformers.models.gemma2.modeling_gemma2", "hsae.cli.main",
        "hsae.cache.building.build", "hsae.train.runs.planned_runs",
        "hsae.eval.core.core", "hsae.eval.hierarchy.composition_evaluation", "hsae.eval.report.page"):  # fmt: skip
        import_module(name)
    with tempfile.TemporaryDirectory(prefix="hsae-inject-") as temporary:
        base = Path(temporary)
        os.environ["HSAE_HOME"] = str(base / "home")
        flips, kills = make_base(base / "base")
        chance = random.Random(arguments.seed)
        chosen = [kind for kind in (*flips, *kills) if arguments.only in kind.name]
        for kind in chosen:
            if isinstance(kind, Flips):
                flip(kind, base / "base", arguments.flips, chance, base / "work")
            else:
                kill(kind, base / "base", arguments.kills, chance, base / "work")
            print(f"{kind.name}: {dict(kind.counts)}", file=sys.stderr, flush=True)
    about = {
        "command": " ".join(["python benchmarks/inject.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{platform.machine()}, {os.cpu_count()} threads",
        "versions": ", ".join(f"{name} {version(name)}" for name in LIBRARIES),
        "minutes": f"{(time.monotonic() - began) / 60:.0f}",
    }
    text = markdown([kind for kind in flips if kind.counts], [kind for kind in kills if kind.counts], about)
    rows = [{"name": kind.name, **kind.counts, "bad": kind.bad} for kind in chosen]
    if arguments.out:
        arguments.out.with_suffix(".md").write_text(text)
        arguments.out.with_suffix(".json").write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")
    print(text)
    print(json.dumps({**about, "rows": rows}))
    sys.exit(any(kind.bad for kind in chosen))


if __name__ == "__main__":
    main()
