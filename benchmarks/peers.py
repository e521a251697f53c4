"""hsae and its peers side by side on this machine's processor: ceilings first, then tokens/s of training steps.

    python benchmarks/peers.py [--quick] [--cases relu topk] [--into docs/results/peers.json]

The peers of peers.txt are installed once, in an environment of their own (--venv). Every library trains in a process of
its own, with its batches in memory; they take turns for so many rounds, so that what slows the machine down slows all
of them. A figure is the median over rounds of a round's median step. Prints a table and, last, one JSON document with
every round; --into adds the cases to those of an earlier run on the same machine.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import venv
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from hsae.cache.files import home, write_atomically

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "peers.txt"
PEERS = {"dictionary_learning": "dictionary_learning", "saelens": "sae-lens", "sparsify": "eai-sparsify"}
BEFORE = "hsae before"
K_SPARSE = ("topk", "batchtopk", "matryoshka", "jumprelu")
KINDS = ("relu", *K_SPARSE, "full", "stacked")


def peers_environment(folder: Path) -> tuple[Path, dict[str, str]]:
    """The Python of the peers' environment, made if it isn't there, and why what could not be installed could not."""
    python, report, wanted = folder / "bin" / "python", folder / "installed.json", REQUIREMENTS.read_text()
    if report.exists() and (installed := json.loads(report.read_text()))["requirements"] == wanted:
        return python, installed["absent"]
    print(f"installing the peers of {REQUIREMENTS} in {folder} (minutes, the first time)", file=sys.stderr)
    venv.create(folder, with_pip=True, clear=True)
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]

    def install(*what: str) -> str | None:
        done = subprocess.run([*pip, "install", *what], capture_output=True, text=True)
        return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]

    absent = {}
    if install("-r", str(REQUIREMENTS)) is not None:  # what can be had, one by one
        for name in (*PEERS.values(), "sae-bench"):
            if reason := install("-c", str(REQUIREMENTS), name):
                absent[name] = reason
    # sae-bench asks for it, nothing here uses it, and a build for GPUs beside a PyTorch for processors breaks imports
    subprocess.run([*pip, "uninstall", "--yes", "torchvision"], check=True)
    report.write_text(json.dumps({"requirements": wanted, "absent": absent}))
    return python, absent


class Worker:
    """A library in a process of its own; see training_steps.py."""

    def __init__(self, library: str, python: Path, before: Path | None = None) -> None:
        command = [str(python), str(HERE / "training_steps.py"), "hsae" if library == BEFORE else library]
        environment = {**os.environ, "PYTHONWARNINGS": "ignore", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
        if library == BEFORE:
            environment["PYTHONPATH"] = str(before)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Its answer to a request."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        return json.loads(answer) if answer else {"error": f"its process ended with status {self.process.wait()}"}

    def stop(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(
    case: dict[str, Any], pythons: dict[str, Path], rounds: int, seconds: float, before: Path | None = None
) -> dict[str, Any]:
    """What each library makes of a case: its variant and seconds a step by round, or why there are none."""
    workers = {library: Worker(library, python, before) for library, python in pythons.items()}
    found = {library: worker.ask(case=case) for library, worker in workers.items()}
    for _ in range(rounds):
        for library, worker in workers.items():
            if "variant" in found[library]:
                answer = worker.ask(seconds=seconds)
                if "seconds" in answer:
                    found[library].setdefault("rounds_s", []).append(answer["seconds"])
                else:
                    found[library] = answer
    for worker in workers.values():
        worker.stop()
    for result in found.values():
        if "rounds_s" in result:
            result["step_s"] = statistics.median(statistics.median(part) for part in result["rounds_s"])
            result["tokens_per_s"] = case["batch"] / result["step_s"]
    return found


def summary(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """By kind: tokens/s of hsae and of the best peer, and their ratio; kinds that no peer has are held against the best
    of their k-sparse ones."""
    speeds = {kind: {name: r.get("tokens_per_s") for name, r in found.items()} for kind, found in cases.items()}
    peers = {kind: {name: v for name, v in by.items() if name in PEERS and v} for kind, by in speeds.items()}
    k_sparse = {f"{name} {kind}": v for kind in K_SPARSE for name, v in peers.get(kind, {}).items()}
    rows = {}
    for kind, by in speeds.items():
        others = peers[kind] or (k_sparse if kind in KINDS else {})
        best = max(others, key=others.__getitem__, default=None)
        ours = by.get("hsae")
        ratio = ours / others[best] if ours and best else None
        rows[kind] = {"hsae": ours, "best_peer": best, "peer": others.get(best) if best else None, "ratio": ratio}
        if before := by.get(BEFORE):
            rows[kind]["before"] = before
    return rows


def show(document: dict[str, Any]) -> None:
    """Print the table."""
    print(f"{'tokens/s':12} {'hsae':>10} {'best peer':>10}  ratio")
    for kind, row in document["summary"].items():
        if kind in KINDS:
            numbers = " ".join(f"{row[key]:10,.0f}" if row[key] else f"{'-':>10}" for key in ("hsae", "peer"))
            ratio = f"{row['ratio']:6.2f}" if row["ratio"] else f"{'-':>6}"
            before = f"; before {row['before']:,.0f}" if "before" in row else ""
            print(f"{kind:12} {numbers} {ratio}  {row['best_peer'] or ''}{before}")
    for kind, found in document["cases"].items():
        for library, result in found.items():
            if "error" in result:
                print(f"{kind}: {library} failed: {result['error']}")
    for name, reason in document["absent"].items():
        print(f"absent: {name}: {reason}")


def machine() -> dict[str, Any]:
    """What figures depend on besides the code."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "processor": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hsae": version("hsae"),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--d-in", type=int, default=640)
    parser.add_argument("--width", type=int, default=2560)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each library in each round")
    parser.add_argument("--quick", action="store_true", help="two rounds of two steps")
    parser.add_argument("--venv", type=Path, default=home() / "peers", help="environment of the peers")
    parser.add_argument(
        "--libraries", nargs="+", help="only these: plain, hsae, dictionary_learning, saelens, sparsify"
    )
    parser.add_argument("--before", type=Path, help="folder in which another hsae lies, to be measured too")
    parser.add_argument("--into", type=Path, help="a JSON file that the cases are added to")
    options = parser.parse_args()
    rounds, seconds = (2, 0.0) if options.quick else (options.rounds, options.seconds)
    sizes = {"d_in": options.d_in, "width": options.width, "batch": options.batch, "k": options.k}
    theirs, absent = peers_environment(options.venv)
    ours = {library: Path(sys.executable) for library in ("plain", "hsae")}
    pythons = ours | {library: theirs for library, package in PEERS.items() if package not in absent}
    if options.libraries:
        pythons = {library: pythons[library] for library in options.libraries}
    if options.before:
        pythons[BEFORE] = Path(sys.executable)

    document: dict[str, Any] = {"machine": machine(), "sizes": sizes, "absent": absent, "cases": {}}
    if options.into and options.into.exists():
        earlier = json.loads(options.into.read_text())
        if any(earlier[key] != document[key] for key in ("machine", "sizes")):
            parser.error(f"{options.into} has figures of another machine, version or size")
        document["cases"] = earlier["cases"]
    listing = subprocess.run([theirs, "-m", "pip", "list", "--format=json"], capture_output=True, text=True, check=True)
    document |= {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "peers": {package["name"]: package["version"] for package in json.loads(listing.stdout)},
    }
    product = measure({"kind": "product", **sizes}, {"plain": Path(sys.executable)}, rounds, seconds)
    operations = 2 * options.batch * options.d_in * options.width
    document["cases"]["product"] = product
    document["product_gflop_per_s"] = operations / product["plain"]["step_s"] / 1e9
    print(f"encoder's product: {document['product_gflop_per_s']:,.0f} GFLOP/s")
    for kind in options.cases:
        document["cases"][kind] = measure({"kind": kind, **sizes}, pythons, rounds, seconds, options.before)
    document["summary"] = summary(document["cases"])
    show(document)
    if options.into:
        write_atomically(options.into, lambda partial: partial.write_text(json.dumps(document) + "\n"))
    print(json.dumps(document))


if __name__ == "__main__":
    main()
