"""`hsae.build`, and the activation stores that a plan asks for: what they take, and building them."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

from hsae.cache.building.build import build as build_specs
from hsae.cache.building.build import check
from hsae.cache.building.estimate import Estimate, check_space, estimate
from hsae.cache.building.in_memory import build_in_memory
from hsae.cache.config import Codec, Split
from hsae.cache.device import pick_device
from hsae.cache.errors import CorpusError, UserError
from hsae.cache.format.spec import StoreSpec
from hsae.cache.launcher import ALONE, Share
from hsae.cache.progress import Progress, shown, silent
from hsae.cache.reading.store import ActivationStore
from hsae.cache.storage.paths import Place
from hsae.train.config.plan import Plan, load_plan

LOG = logging.getLogger("hsae")


@overload
def build(
    plan: Plan | str | None = None,
    *,
    split: Split = "train",
    overrides: Sequence[str] = (),
    device: str = "auto",
    progress: bool | Progress = True,
) -> ActivationStore: ...


@overload
def build(
    *,
    model: Any,
    tokenizer: Any = None,
    texts: Iterable[str],
    hook: str | Sequence[str],
    folder: str | Place = "activations",
    split: Split = "train",
    context: int = 128,
    rows: int | None = None,
    clean_rows: int | None = None,
    prepend_bos: bool = True,
    batch_rows: int = 16,
    forward_rows: int | None = None,
    compile: bool | None = None,
    chunk_mib: float = 32,
    codec: Codec | None = None,
    progress: bool | Progress = True,
) -> ActivationStore: ...


def build(plan: Plan | str | None = None, *, model: Any = None, **options: Any) -> ActivationStore:
    """Run a language model once over text, write its activations into a store, and open that.

    From a plan: a packaged name, a TOML file, or a `Plan`; `overrides` are as `--set` takes them. `split` says which
    of the plan's stores: "train", "eval", or an evaluation's own ("forget", "retain", "autointerp").

    >>> store = hsae.build("gemma-3-270m", split="eval")  # doctest: +SKIP

    From a model in memory: a causal language model of transformers with its tokenizer, and texts; see
    `hsae.cache.build_in_memory` for what the other arguments say.

    >>> store = hsae.build(  # doctest: +SKIP
    ...     model=model, tokenizer=tokenizer, texts=texts, hook="blocks.3.hook_resid_post"
    ... )

    A store that was begun is finished, one that is there is opened. `progress` shows bars in a terminal or a notebook;
    False shows nothing, a function is called with each `Step`. Raises UserError, before anything is computed, for what
    can't be built.
    """
    if model is None:
        return _build_planned(plan, **options)
    if plan is not None:
        raise UserError("give a plan or a model, not both")
    return build_in_memory(model, **options)


def _build_planned(
    plan: Plan | str | None,
    *,
    split: Split = "train",
    overrides: Sequence[str] = (),
    device: str = "auto",
    progress: bool | Progress = True,
) -> ActivationStore:
    if isinstance(plan, Plan) and overrides:
        raise UserError(
            "overrides change a plan that is named; a Plan was given: load it with load_plan(name, overrides)"
        )
    loaded = plan if isinstance(plan, Plan) else load_plan(plan, overrides)
    planned = plan_stores(loaded, [split], pick_device(device))
    for warning in planned.warnings:
        LOG.warning(warning)
    with shown(progress) as report:
        (store,) = planned.build(progress=report, say=LOG.info)
    return store


@dataclass(frozen=True)
class PlannedStores:
    """Activation stores that a plan asks for, and what they take."""

    plan: Plan
    device: str
    estimates: list[Estimate]
    warnings: list[str]
    """Which of them share text with the training store."""

    @property
    def specs(self) -> list[StoreSpec]:
        """Their descriptions."""
        return [item.spec for item in self.estimates]

    def check(self, say: Callable[[str], None] = lambda text: None) -> None:
        """Refuse what `build` would refuse before it loads the model, writing nothing. Raises UserError."""
        check_space(self.estimates)
        check(self.specs, self.plan.cache.dir, say)

    def build(
        self,
        *,
        progress: Progress = silent,
        say: Callable[[str], None] = lambda text: None,
        share: Share = ALONE,
    ) -> list[ActivationStore]:
        """Make the stores, or finish them. With a `share`, workers make them together. Raises UserError."""
        check_space(self.estimates)
        folder = self.plan.cache.dir
        paths = build_specs(self.specs, folder, device=self.device, progress=progress, say=say, share=share)
        return [ActivationStore.open(path, require_complete=share.world == 1) for path in paths]


def plan_stores(plan: Plan, splits: Sequence[Split], device: str) -> PlannedStores:
    """What the plan's stores of these splits take.

    Raises UserError if they can't be made, or share text that they may not.
    """
    specs = [plan.store(split, device) for split in splits]
    evaluated = [split for split in splits if split != "train"] or ["eval"]
    warnings = common_texts(plan, evaluated, refuse=any(spec.split == "eval" for spec in specs))
    return PlannedStores(plan, device, [estimate(spec, plan.cache.dir, device) for spec in specs], warnings)


def common_texts(plan: Plan, splits: Iterable[Split], *, refuse: bool = False) -> list[str]:
    """For each of a plan's stores that shares text with the training store, what it shares.

    With `refuse` an evaluation store may share none, unless the plan allows it: raises CorpusError. A window without an
    end that begins before the other one is only reported: its rows may end before that.
    """
    shared = []
    for split in splits:
        try:
            common = plan.common_text(split)
        except CorpusError:
            continue  # the text is not here, or not whole: whoever needs it says so
        if not common:
            continue
        if refuse and not plan.cache.eval.training_text:
            first, second = sorted(
                (plan.requested(name).corpus for name in (split, "train")), key=lambda text: text.first_document
            )
            if first.first_document == second.first_document or first.last_document is not None:
                raise CorpusError(f"{common}, or allow it with --set cache.eval.training_text=true")
        shared.append(common)
    return shared
