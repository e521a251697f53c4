"""`hsae quickstart`: the whole pipeline on real Gemma-3-270M and the text that ships with Python."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from hsae.cli.common import SetOption, check_folder, console, say

PLAN, RUNS = "gemma-3-270m", "0-5"


def quickstart(
    out: Annotated[Path, typer.Option("--out", help="Folder for activations, runs and report.")] = Path("quickstart"),
    overrides: SetOption = None,
) -> None:
    """Cache, train runs 0-5, evaluate and report on Gemma-3-270M; no GPU, no hub, minutes on two cores.

    A second call goes on from what is there.

    Example: hsae quickstart
    """
    from hsae.cache.errors import need
    from hsae.cli import cache, report, train
    from hsae.cli.evaluations import callback_of

    check_folder(out)
    for package in ("jinja2", "matplotlib"):
        need("the report at the end", package, "quickstart")

    places = [f"cache.dir={str(out / 'activations')!r}", f"train.dir={str(out / 'runs')!r}", *(overrides or ())]
    stages: dict[str, Callable[[], None]] = {
        "cache": lambda: cache.build(plan=PLAN, overrides=places),
        "train": lambda: train.train(run=RUNS, plan=PLAN, overrides=places, resume=True),
        "core": lambda: callback_of("core")(run=RUNS, plan=PLAN, overrides=places),
        "report": lambda: report.report(run=RUNS, plan=PLAN, overrides=places, out=out / "report"),
    }
    seconds = {}
    for number, (name, stage) in enumerate(stages.items(), 1):
        console.rule(f"{number}/{len(stages)} {name}")
        began = time.perf_counter()
        stage()
        seconds[name] = time.perf_counter() - began
    console.rule("done")
    console.print(
        "  ".join(f"{name} {value:.0f} s" for name, value in seconds.items()) + f"  total {sum(seconds.values()):.0f} s"
    )
    say("Look at ", (str((out / "report" / "index.html").resolve()), "bold"))
