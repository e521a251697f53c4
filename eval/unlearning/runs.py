"""`hsae eval unlearning` for the runs of a plan: what must be there, where results go, and when they are made anew.

A run's result is `runs/<N>/eval/unlearning.json`, with `unlearning.png` beside it where matplotlib is installed; while a sweep is under
way, what was measured lies in `unlearning.partial.json`.
"""

import hashlib
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hsae.cache.errors import StoreError, UserError
from hsae.cache.language_model.lm import LanguageModel
from hsae.cache.language_model.provenance import check_model
from hsae.cache.reading.store import ActivationStore
from hsae.eval.harness.envelope import hsae_version
from hsae.eval.harness.result_files import changes, describe_changes, publish, read_result, write_result
from hsae.eval.harness.targets import model_digest, need_trained
from hsae.eval.unlearning import pareto
from hsae.eval.unlearning.config import SIDES, Side, UnlearningConfig
from hsae.eval.unlearning.intervention import of_model
from hsae.eval.unlearning.passes import Rows
from hsae.eval.unlearning.sweep import Pieces, Progress, Texts, evaluate
from hsae.train.config.plan import Plan
from hsae.train.config.run_config import RunConfig
from hsae.train.model.model_files import load_model
from hsae.train.runs.run_record import check_same_model

FILE, PARTIAL, FIGURE = "unlearning.json", "unlearning.partial.json", "unlearning.png"
LIBRARIES = ("torch", "transformers")


@dataclass(frozen=True, kw_only=True)
class Unlearned:
    """A run and its result."""

    plan: Plan
    run: RunConfig
    result: dict[str, Any]
    reused: bool
    """Whether the result had been there."""

    @property
    def folder(self) -> Path:
        """Where the result lies."""
        return self.plan.run_dir(self.run) / "eval"


def open_texts(plan: Plan) -> dict[Side, ActivationStore]:
    """The forget and the retain store. Raises UserError with what to run if they are missing or don't belong together."""
    for side in SIDES:
        if not (path := plan.store_path(side)).is_dir():
            named = plan.source.removeprefix("packaged plan ")
            raise StoreError(
                f"no {side} store at {path}; make it with: hsae cache build --plan {named} --suite unlearning"
            )
    stores: dict[Side, ActivationStore] = {side: ActivationStore.of(plan.store(side), plan.cache.dir) for side in SIDES}
    digests = {(store.header.model_digest, store.header.tokenizer_digest) for store in stores.values()}
    if len(digests) > 1:
        raise StoreError(
            f"{stores['forget'].url} and {stores['retain'].url} were made with different weights or tokenizers; move them away and build "
            "them again"
        )
    return stores


def check_trained(runs: Sequence[tuple[Plan, RunConfig]], store: ActivationStore) -> None:
    """Raise UserError unless all runs have been trained, on activations of the store's model."""
    for seeded, run in runs:
        need_trained(seeded, run)
        check_same_model(seeded.run_dir(run), store.url, store.header)


def evaluate_runs(
    runs: Sequence[tuple[Plan, RunConfig]],
    load: Callable[[ActivationStore], LanguageModel],
    *,
    force: bool = False,
    device: str = "cpu",
    progress: Callable[[str], Progress] = lambda label: lambda arm, done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Unlearned]:
    """Evaluate runs of one plan and write their results; what was made of the same inputs is read back unless `force`.

    `load` gives the language model, and is called only if something has to be computed; `progress` makes a listener for a run;
    `say` is told which earlier results give way and in what they differ. Raises UserError before any compute.
    """
    plan = runs[0][0]
    stores = open_texts(plan)
    hook = plan.hook.names[0]
    check_trained(runs, stores["forget"])
    done = []
    language: LanguageModel | None = None
    for seeded, run in runs:
        folder = seeded.run_dir(run) / "eval"
        inputs = inputs_of(seeded, run, stores)
        result = None if force else found_at(folder / FILE, inputs, seeded.label(run), say)
        if (reused := result is not None) is False:
            if language is None:
                language = load(stores["forget"])
                for store in stores.values():
                    check_model(store.root, store.header, language)
            if force:
                (folder / PARTIAL).unlink(missing_ok=True)
            config = plan.table(UnlearningConfig)
            rows = [Rows.all_of(stores[side], hook) for side in SIDES]
            texts = Texts.of(rows[0], rows[1], language, config)
            model = load_model(seeded.run_dir(run) / "model")
            pieces = Pieces(folder / PARTIAL, inputs)
            found = evaluate(model, of_model(model, device), texts, pieces, progress=progress(seeded.label(run)))
            result = {
                "eval_type_id": "hsae_unlearning",
                "run": {"plan": plan.name, "number": run.number, "name": run.name, "seed": seeded.train.seed},
                **found,
                "passes": {**asdict(texts.passes), "measured_before": pieces.found},
                "inputs": inputs,
                "versions": versions(),
            }
            _write(folder, result, seeded.label(run), max(config.budgets))
        assert result is not None
        done.append(Unlearned(plan=seeded, run=run, result=result, reused=reused))
    return done


def _write(folder: Path, result: dict[str, Any], label: str, most: float) -> None:
    write_result(folder / FILE, result, allow_nan=True)
    try:
        publish(folder / FIGURE, lambda path: pareto.draw(path, result["arms"], most, f"unlearning, run {label}"))
    except UserError:
        (folder / FIGURE).unlink(missing_ok=True)  # no matplotlib: numbers only, and no picture of another result
    (folder / PARTIAL).unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """What a result was computed with."""
    return {"hsae": hsae_version(), "python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def inputs_of(plan: Plan, run: RunConfig, stores: dict[Side, ActivationStore]) -> dict[str, Any]:
    """All that a result depends on, by content."""
    model_dir = plan.run_dir(run) / "model"
    headers = {side: store.header for side, store in stores.items()}
    return {
        "hsae": hsae_version(),
        "sae": model_digest(model_dir),
        "hook": plan.hook.names[0],
        "config": config_digest(plan),
        "model": headers["forget"].model_digest,
        "tokenizer": headers["forget"].tokenizer_digest,
        **{f"{side}_store": store.spec.fingerprint for side, store in stores.items()},
        **{f"{side}_corpus": header.corpus_digest for side, header in headers.items()},
    }


def config_digest(plan: Plan) -> str:
    """What a plan's settings of unlearning are known by in results."""
    config = plan.table(UnlearningConfig).model_dump(mode="json", exclude={"qa", *SIDES})
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def found_at(path: Path, inputs: dict[str, Any], label: str, say: Callable[[str], None]) -> dict[str, Any] | None:
    """The result that lies there, if it was made of the same inputs; `say` is told in what others differ."""
    try:
        content = read_result(path, "hsae eval unlearning")
        if content["inputs"] == inputs and "arms" in content:
            return content
        for text in describe_changes([(label, changes(inputs, content["inputs"]))]):
            say(text)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # not there or damaged: made anew
    return None
