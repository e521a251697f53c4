"""Faults injected into builds of a small real store, and what became of it; writes the table of docs/faults.md.

    python benchmarks/faults.py [--kills 20] [--out docs/faults.md]

Every row ends by finishing the build undisturbed and comparing all bytes with those of an undisturbed build. Builders are forked, so that
a kill hits numerical work rather than imports. Disk-full and read-only use a tmpfs and need root; without it those rows say so.
"""

import argparse
import hashlib
import os
import platform
import random
import signal
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import s3_server

from hsae.cache import remote
from hsae.cache.build import build
from hsae.cache.config import CorpusConfig, ModelConfig, StoreSpec
from hsae.cache.errors import StoreError
from hsae.cache.layout import read_header
from hsae.cache.remote import Place, place, sizes
from hsae.cache.verify import verify

GOLDEN = Path(__file__).resolve().parent.parent / "tests/golden"
HOOK = "blocks.2.hook_resid_post"
SPEC = StoreSpec(
    split="eval", model=ModelConfig(id=str(GOLDEN / "model"), dtype="bfloat16"), hooks=(HOOK,),
    corpus=CorpusConfig(corpus="python-docs", last_document=30), context=21, prepend_bos=True, batch_rows=5, chunk_mib=0.01,
    codec="mappable", rows=83, clean_rows=25,
)  # fmt: skip
HEAD = """# Faults injected into a store

{when}Every row below builds the same small store (bfloat16, {chunks} chunk files) of a tiny Gemma-2 while something goes wrong, then
finishes the build undisturbed with the same command, checks every chunk, and compares all bytes with an undisturbed build's. "Visible damage"
counts chunks that `hsae cache verify` called damaged, other than missing, at any moment; "chunks lost" counts whole chunks that were there
before a fault and not after it.

| fault | times | what happened | visible damage | chunks lost | bytes identical |
|:--|--:|:--|--:|--:|:--|
"""


def digests(root: Place) -> dict[str, str]:
    """SHA-256 of every file of a store."""
    return {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in sizes(root)}


def forked(work: Callable[[], object]) -> tuple[int, int]:
    """(process id, read end of a pipe with its error) of a child that does the work and exits."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        status = 0
        try:
            work()
        except (StoreError, OSError) as error:
            os.write(send, f"{type(error).__name__}: {error}".encode())
            status = 1
        except BaseException:
            os.write(send, traceback.format_exc().encode())
            status = 2
        os._exit(status)
    os.close(send)
    return child, receive


def ended(child: int, receive: int) -> tuple[int, str]:
    """(exit status, its error's text)."""
    _, status = os.waitpid(child, 0)
    with os.fdopen(receive, "rb") as file:
        return os.waitstatus_to_exitcode(status), file.read().decode()


class Watch:
    """What is visible in a store between faults."""

    def __init__(self, target: Place) -> None:
        self.target, self.held = target, set[str]()
        self.damaged = self.lost = 0

    def look(self) -> None:
        """Compare with the last look."""
        if not remote.exists(self.target):
            return
        self.damaged += sum(damage.problem != "is missing" for damage in verify(self.target))
        now = {name for name in sizes(self.target) if "/c/" in name}
        self.lost += len(self.held - now)
        self.held = now


def kills(folder: str, wanted: dict[str, str], times: int, seconds: float) -> tuple[str, Watch, bool]:
    """Kill a builder `times` times, at moments spread over the time that a build takes."""
    generator, target, killed, finished, same = random.Random(0), place(folder) / SPEC.name, 0, 0, True
    watch = Watch(target)
    while killed < times:
        child, receive = forked(lambda: build([SPEC], folder))
        time.sleep(seconds * generator.random())
        os.kill(child, signal.SIGKILL)
        status, text = ended(child, receive)
        if status > 0:
            raise RuntimeError(text)
        watch.look()
        killed += status < 0
        if status == 0:
            finished += 1
            same &= digests(target) == wanted
            remote.remove(target)
            watch.held = set()
    build([SPEC], folder)
    return f"{killed} kills, {finished} builds ended in between", watch, same and digests(target) == wanted


def mounted(folder: Path, options: str) -> bool:
    """Mount a tmpfs, or change one; False without the right to."""
    folder.mkdir(exist_ok=True)
    return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode == 0


def short(text: str) -> str:
    """An error as a table cell."""
    return (
        text.splitlines()[-1].replace(str(tempfile.gettempdir()), "…").replace("|", "/")[:110] if text else "no error"
    )


def on_a_small_disk(folder: Path, wanted: dict[str, str], spoil: str, mend: str) -> tuple[str, Watch, bool] | None:
    """Build on a tmpfs that `spoil` makes too small or read-only, after a first part was built, then `mend` it and go on."""
    if not mounted(folder, "size=64m"):
        return None
    try:
        watch = Watch(folder / SPEC.name)
        child, receive = forked(lambda: build([SPEC], folder))
        while not any("/c/" in name and name.startswith("acts") for name in sizes(folder / SPEC.name)):
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        ended(child, receive)
        watch.look()
        subprocess.run(["mount", "-o", f"remount,{spoil.format(kib=256)}", folder], check=True, capture_output=True)
        status, text = ended(*forked(lambda: build([SPEC], folder)))
        watch.look()
        subprocess.run(["mount", "-o", f"remount,{mend}", folder], check=True, capture_output=True)
        build([SPEC], folder)
        return f"status {status}, {short(text)}", watch, digests(folder / SPEC.name) == wanted
    finally:
        subprocess.run(["umount", folder], check=False, capture_output=True)


def without_permission(folder: Path, wanted: dict[str, str]) -> tuple[str, Watch, bool] | None:
    """Go on with a build as a user who may not write to it."""
    if os.geteuid() != 0:
        return None
    watch = Watch(folder / SPEC.name)
    child, receive = forked(lambda: build([SPEC], folder))
    while not any(name.startswith("acts") and "/c/" in name for name in sizes(folder / SPEC.name)):
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    ended(child, receive)
    watch.look()

    def as_nobody() -> None:
        os.setuid(65534)
        build([SPEC], folder)

    status, text = ended(*forked(as_nobody))
    watch.look()
    build([SPEC], folder)
    return f"status {status}, {short(text)}", watch, digests(folder / SPEC.name) == wanted


def clock_skew(folder: str, wanted: dict[str, str]) -> tuple[str, Watch, bool]:
    """Build while the clock jumps by up to a day either way at every look."""
    real, generator = time.time, random.Random(1)
    time.time = lambda: real() + generator.uniform(-86400, 86400)
    try:
        target = build([SPEC], folder)[0]
    finally:
        time.time = real
    watch = Watch(target)
    watch.look()
    return "nothing noticed: no decision looks at a clock", watch, digests(target) == wanted


def two_builders(folder: str, wanted: dict[str, str]) -> tuple[str, Watch, bool]:
    """Two builders of one store at the same time."""
    pair = [forked(lambda: build([SPEC], folder)) for _ in range(2)]
    told = [ended(*child) for child in pair]
    build([SPEC], folder)
    watch = Watch(place(folder) / SPEC.name)
    watch.look()
    text = "; ".join("finished" if status == 0 else f"refused: {short(error)}" for status, error in sorted(told))
    return text, watch, digests(watch.target) == wanted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("docs/faults.md"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, s3_server.served("bucket") as (endpoint, faults):
        root = Path(name)
        root.chmod(0o755)
        os.environ |= {**s3_server.CREDENTIALS, "AWS_ENDPOINT_URL": endpoint, "HSAE_HOME": str(root / "home")}
        began = time.perf_counter()
        undisturbed = build([SPEC], root / "undisturbed")[0]
        seconds, wanted = time.perf_counter() - began, digests(undisturbed)
        assert read_header(undisturbed).complete and verify(undisturbed) == []
        rows = []

        def row(fault: str, times: object, result: tuple[str, Watch, bool] | None) -> None:
            text, watch, same = result or ("not tried: needs root", None, None)
            cells = (
                ("-", "-", "-") if watch is None else (str(watch.damaged), str(watch.lost), "yes" if same else "**NO**")
            )
            rows.append(f"| {fault} | {times} | {text} | {' | '.join(cells)} |")
            print(rows[-1], flush=True)

        row(
            "`kill -9` at random moments, local",
            arguments.kills,
            kills(str(root / "killed"), wanted, arguments.kills, seconds),
        )
        row("disk full", 1, on_a_small_disk(root / "small", wanted, "size={kib}k", "size=64m"))
        row("disk turned read-only", 1, on_a_small_disk(root / "fixed", wanted, "ro", "rw"))
        row("permission denied", 1, without_permission(root / "denied", wanted))
        row("clock jumping by up to a day", 1, clock_skew(str(root / "skewed"), wanted))
        row("two builders at once, local", 1, two_builders(str(root / "both"), wanted))
        row("two builders at once, S3", 1, two_builders("s3://bucket/both", wanted))
        faults.rate = 0.3
        target = build([SPEC], "s3://bucket/flaky")[0]
        watch = Watch(target)
        watch.look()
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(faults.faults.items()))
        faults.rate = 0.0
        row(
            "S3 fails 30 % of requests",
            faults.faults.total(),
            (f"built and verified; {kinds}", watch, digests(target) == wanted),
        )
        faults.faults.clear()
        child, receive = forked(lambda: build([SPEC], "s3://bucket/gone"))
        while not any("acts" in key for key in sizes(place("s3://bucket/gone"))):
            time.sleep(0.1)
        faults.gone_until = time.monotonic() + 60
        status, text = ended(child, receive)
        target = place("s3://bucket/gone") / SPEC.name
        watch = Watch(target)
        watch.look()
        row(
            "S3 gone for 60 s in mid-build",
            faults.faults.total(),
            (f"status {status}, {short(text)}: waited and went on", watch, digests(target) == wanted),
        )
        half = max(1, arguments.kills // 4)
        row("`kill -9` at random moments, S3", half, kills("s3://bucket/killed", wanted, half, 2 * seconds))
        when = f"Made by `python benchmarks/faults.py --kills {arguments.kills}` on {platform.system()}, Python {platform.python_version()}. "
        arguments.out.write_text(
            HEAD.format(when=when, chunks=sum("/c/" in key for key in wanted)) + "\n".join(rows) + "\n"
        )


if __name__ == "__main__":
    main()
