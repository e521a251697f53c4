"""Building the stores of evaluation suites: what `hsae cache build --suite` does."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from hsae.cache.files import JUST_MADE, sweep
from hsae.cache.language_model.lm import LanguageModel
from hsae.cache.reading.provenance import pin_commit
from hsae.cache.storage.paths import Place, check_writable, locked
from hsae.cache.suites.entities import read_entities
from hsae.cache.suites.probe_store import make_probe_header
from hsae.cache.suites.ravel_store import make_ravel_header
from hsae.cache.suites.residual_sets import Progress, SetBuilder
from hsae.cache.suites.specs import RavelSpec, SuiteSpec, suites_folder
from hsae.cache.suites.suite_files import write_header


def build_suites(
    specs: Sequence[SuiteSpec],
    root: str | Place,
    *,
    device: str = "cpu",
    progress: Progress = lambda name, done, total: None,
    say: Callable[[str], None] = lambda text: None,
    model: LanguageModel | None = None,
) -> list[Place]:
    """Make the suites' stores in folder or at URL `root`, or finish or mend them, and return each one's file.

    All are of one language model, which is loaded once unless it is given. Interrupted, the same call goes on where
    it was. Raises UserError if a store can't be made: before the model is loaded where nothing can be written or
    RAVEL's entities can't be had.
    """
    paths = [spec.path(root) for spec in specs]
    with contextlib.ExitStack() as stack:
        locks = [stack.enter_context(contextlib.ExitStack()) for _ in paths]  # each is released with its own store
        for spec, path, lock in zip(specs, paths, locks, strict=True):
            check_writable(suites_folder(root) / spec.suite)
            lock.enter_context(locked(path))
        entities = [read_entities(spec.data) if isinstance(spec, RavelSpec) else [] for spec in specs]
        if isinstance(folder := suites_folder(root), Path):
            sweep(folder, youngest=JUST_MADE)  # what killed builds left half-written; what others are writing stays
        if model is None:
            say(f"loading {specs[0].model.id}")
            model = LanguageModel.load(pin_commit(specs[0].model, root), device=device, say=say)
        for spec, path, kinds, lock in zip(specs, paths, entities, locks, strict=True):
            model.check_hooks(spec.hooks)
            say(f"reading the texts of {spec.suite}")
            builder = SetBuilder(root=root, spec=spec, model=model, progress=progress)
            if isinstance(spec, RavelSpec):
                write_header(path, make_ravel_header(spec, kinds, builder))
            else:
                write_header(path, make_probe_header(spec, builder))
            lock.close()
    return paths
