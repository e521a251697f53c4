"""The whole pipeline on real Gemma-3-270M and the text that ships with Python."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hsae.cache.errors import need
from hsae.eval.harness.targets import Selection
from hsae.eval.pipeline import Pipeline
from hsae.train.config.plan import load_plan

PLAN, RUNS = "gemma-3-270m", "0-5"


def run_quickstart(
    out: Path | str = "quickstart", overrides: Sequence[str] = (), pipeline: Pipeline | None = None
) -> dict[str, float]:
    """Cache, train runs 0-5, evaluate and report into `out`; no GPU, no hub. Returns the seconds of each step.

    `overrides` are as `--set` takes them. A second call goes on from what is there. Raises UserError.

    >>> hsae.eval.run_quickstart()  # doctest: +SKIP
    """
    for package in ("jinja2", "matplotlib"):
        need("the report at the end", package, "quickstart")
    folder, pipeline = Path(out), pipeline or Pipeline()
    places = [f"cache.dir={str(folder / 'activations')!r}", f"train.dir={str(folder / 'runs')!r}"]
    plan = load_plan(PLAN, [*places, *overrides])
    runs = plan.select(RUNS)
    steps: dict[str, Callable[[], None]] = {
        "cache": lambda: pipeline.build(plan, ("eval", "train")),
        "train": lambda: pipeline.train(plan, runs),
        "core": lambda: pipeline.evaluate("core", plan, Selection(run=RUNS)),
        "report": lambda: pipeline.report(plan, runs, folder / "report"),
    }
    seconds = {}
    for number, (name, step) in enumerate(steps.items(), 1):
        pipeline.begin(f"{number}/{len(steps)} {name}")
        began = time.perf_counter()
        step()
        seconds[name] = time.perf_counter() - began
    return seconds
