"""`hsae eval ravel`, and `hsae cache build --suite ravel`."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, TaskID

from hsae.cli.common import progress_bars, say, waiting

if TYPE_CHECKING:
    from hsae.cache.suites.ravel_store import RavelStore
    from hsae.train.config.plan import Plan


def evaluate(
    plan: "Plan",
    run: str | None,
    seeds: int,
    sae: list[Path] | None,
    out: Path,
    draws: int,
    force: bool,
    device: str,
) -> None:
    """Evaluate and print; raises NotApplicable if the hook carries nothing that could be exchanged."""
    from hsae.cache.device import pick_device
    from hsae.cache.errors import need
    from hsae.cache.language_model.lm import LanguageModel, pinned
    from hsae.cache.suites.ravel_store import RavelStore
    from hsae.cli.suite import print_results, targets_of
    from hsae.eval.probing.probing_runs import evaluate_with
    from hsae.eval.ravel.config import RavelConfig, ravel_spec
    from hsae.eval.ravel.ravel_runs import RavelBench, told

    if draws > 1:
        need("the interval over several draws", "scipy", "eval")
    targets = targets_of(plan, "ravel", run, seeds, sae, out)
    store, place = RavelStore(ravel_spec(plan), plan.cache.dir), pick_device(device)
    with waiting("ravel: reading") as tell:
        results = evaluate_with(
            lambda hook: RavelBench(
                store,
                hook,
                draws,
                plan.table(RavelConfig),
                lambda: LanguageModel.load(pinned(plan.model, plan.cache.dir), device=place),
                place,
                tell,
            ),
            targets,
            force=force,
            say=tell,
            warn=say,
        )
    print_results(results, "ravel")
    _print_passes(store, [result.content["hsae"] for result in results])
    say(told(store))


def _print_passes(store: "RavelStore", blocks: list[dict[str, object]]) -> None:
    from hsae.eval.ravel.ravel_runs import passes_of

    spent = passes_of(blocks)
    say(
        f"behind these results: {spent['suffix']:,} prompts through the suffix ({spent['backward']:,} of them back too), {spent['prefix']:,} through the prefix for "
        f"further tokens, {spent['spared']:,} spared because no chosen latent differs"
    )


def check_store(plan: "Plan") -> None:
    """Raise NotApplicable if RAVEL's store has not been built."""
    from hsae.cache.errors import NotApplicable, StoreError
    from hsae.cache.storage.paths import size_of
    from hsae.cache.suites.ravel_store import RavelStore
    from hsae.eval.ravel.config import ravel_spec

    spec = ravel_spec(plan)
    try:
        RavelStore(spec, plan.cache.dir)
    except StoreError as error:
        if size_of(spec.path(plan.cache.dir)) is None:
            raise NotApplicable(str(error)) from None
        raise


def build(plan: "Plan", device: str) -> None:
    """Make RAVEL's store."""
    from hsae.cache.suites.ravel_store import RavelStore, build_ravel
    from hsae.eval.ravel.config import ravel_spec
    from hsae.eval.ravel.ravel_runs import told

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
    say(told(RavelStore(ravel_spec(plan), plan.cache.dir)))
    say("ravel store: ", (str(path), "bold"))
