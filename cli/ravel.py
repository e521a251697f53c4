"""`hsae cache build --suite ravel`."""

from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, TaskID

from hsae.cli.common import progress_bars, say

if TYPE_CHECKING:
    from hsae.train.config.plan import Plan


def build(plan: "Plan", device: str) -> None:
    """Make RAVEL's store."""
    from hsae.cache.suites.ravel_store import RavelStore, build_ravel
    from hsae.eval.ravel.config import ravel_spec
    from hsae.eval.ravel.ravel_runs import describe_store

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "prompts")
    with progress_bars(*columns) as bars:
        shown: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in shown:
                shown[what] = bars.add_task(what, total=total)
            bars.update(shown[what], completed=done)

        path = build_ravel(
            ravel_spec(plan),
            plan.cache.dir,
            device=device,
            progress=progress,
            say=say,
        )
    say(describe_store(RavelStore(ravel_spec(plan), plan.cache.dir)))
    say("ravel store: ", (str(path), "bold"))
