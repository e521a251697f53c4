"""`hsae cache build --suite ravel`."""

from typing import TYPE_CHECKING

from hsae.cli.common import say

if TYPE_CHECKING:
    from hsae.train.config.plan import Plan


def print_counts(plan: "Plan") -> None:
    """Say how many of RAVEL's prompts are answered right."""
    from hsae.cache.suites.ravel_store import RavelStore
    from hsae.eval.ravel.config import ravel_spec
    from hsae.eval.ravel.ravel_runs import describe_store

    say(describe_store(RavelStore(ravel_spec(plan), plan.cache.dir)))
