"""Hierarchy measures of the runs of a plan: where results lie, when they are made anew, and what of them depends on other results.

`eval/composition.json` in a run directory holds the result, the named failures and all that it depends on; `eval/composition.safetensors`
the contributions [F_l, F_{l-1}] of every reading, `learned2`, `fitted2`, `fitted3`, ... Both are written atomically, the JSON last.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hsae.cache.errors import StoreError, UserError
from hsae.cache.files import file_sha256
from hsae.cache.reading.store import ActivationStore
from hsae.eval.harness.current import Current, core_results
from hsae.eval.harness.envelope import CoreResult, hsae_version
from hsae.eval.harness.result_files import publish, read_result, write_result
from hsae.eval.harness.targets import is_trained, model_digest
from hsae.eval.hierarchy.composition import SETTINGS, CompositionResult, LevelResult, Progress, evaluate_composition
from hsae.eval.hierarchy.failures import Failure, Verdict, failures
from hsae.eval.hierarchy.measures import Estimate
from hsae.eval.hierarchy.stability import Agreement, Member, stability
from hsae.train.config.plan import Plan
from hsae.train.config.run_config import RunConfig
from hsae.train.model.trained_model import TrainedModel, load_model
from hsae.train.runs.metrics_log import read_metrics
from hsae.train.runs.run_record import check_same_model, command

FORMAT = 1
READ_FROM = ("store", "corpus", "model", "read_from", "settings")  # inputs that maps of several seeds must share
STABILITY_FILE = Path("eval") / "stability.json"
FILE, MAPS_FILE = Path("eval") / "composition.json", Path("eval") / "composition.safetensors"


@dataclass(frozen=True, kw_only=True)
class RunComposition:
    """A run's hierarchy measures and failures."""

    label: str
    path: Path
    result: CompositionResult
    verdict: Verdict
    compared: str | None
    """The run that coarse-hurts-fine was judged against."""
    reused: bool = True
    """Whether the measures had been there."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The stores of an evaluation; `fit` is the training store, where it is there and whole."""

    evaluation: ActivationStore
    fit: ActivationStore | None
    hook: str
    lacking: str | None = None
    """Why there is no training store."""

    @classmethod
    def of(cls, plan: Plan) -> "Sources":
        """The plan's stores. Raises StoreError if there is no evaluation store, or one that can't be trusted."""
        evaluation, hook = ActivationStore.of(plan.store("eval"), plan.cache.dir), plan.hook.names[0]
        lacking = "no training store here"
        if plan.store_path("train").is_dir():
            try:
                fit = ActivationStore.of(plan.store("train"), plan.cache.dir)
                return cls(evaluation=evaluation, fit=fit, hook=hook)
            except StoreError as error:
                lacking = f"the training store can't be used: {error}"
        return cls(evaluation=evaluation, fit=None, hook=hook, lacking=lacking)


def evaluate_runs(
    runs: Sequence[tuple[Plan, RunConfig]],
    sources: Sources,
    *,
    compare: RunConfig | None = None,
    force: bool = False,
    device: str = "cpu",
    progress: Callable[[str], Progress] | None = None,
) -> list[RunComposition]:
    """Measure trained runs, each given with its (seeded) plan, and write their results.

    Measures made of the same inputs are read back unless `force`. `compare` is the flat run that a hierarchy must not fall behind; without it
    the first trained flat run of the same activation. `progress` is given a run's label and hears of its passes. Raises UserError for a run
    that has not been trained, before any compute.
    """
    for plan, config in (*runs, *((plan, compare) for plan, _ in runs if compare is not None)):
        if not is_trained(plan, config):
            raise UserError(
                f"run {plan.label(config)} of plan {plan.name} has not been trained to its end in {plan.run_dir(config)}; "
                f"train it with: {command(plan.run_dir(config))}"
            )
        _check_model(plan, config, sources)
    job = _Job(sources, force, device, progress or (lambda _label: lambda _name, _done, _total: None))
    return [job.run(plan, config, compare) for plan, config in runs]


def _check_model(plan: Plan, config: RunConfig, sources: Sources) -> None:
    """Raise UserError if a run was trained on activations of another model than the stores'."""
    for store in (sources.evaluation, sources.fit):
        if store is not None:
            check_same_model(plan.run_dir(config), store.url, store.header)


class _Job:
    """Measures that several runs need are made once."""

    def __init__(self, sources: Sources, force: bool, device: str, progress: Callable[[str], Progress]) -> None:
        self.sources, self.force, self.device, self.progress = sources, force, device, progress
        self.done: dict[Path, tuple[CompositionResult, dict[str, Any], bool]] = {}

    def run(self, plan: Plan, config: RunConfig, compare: RunConfig | None) -> RunComposition:
        run_dir = plan.run_dir(config)
        result, inputs, reused = self.measured(plan, config)
        result = replace(result, levels=_with_core(result, run_dir, inputs["sae"], self.sources.evaluation))
        other = compare or _flat_like(plan, config, self.sources)
        comparison = None
        if other is not None and len(result.levels) > 1:
            comparison = plan.label(other), self.measured(plan, other)[0].levels[0].explained_variance
        verdict = failures(result, config, read_metrics(run_dir), comparison)
        content = {
            "format": FORMAT,
            "inputs": inputs,
            "run": {"number": config.number, "name": config.name, "label": plan.label(config)},
            "compared": comparison[0] if comparison else None,
            "failures": [asdict(failure) for failure in verdict.failures],
            "unchecked": verdict.unchecked,
            "result": result.json(),
            **_maps(run_dir),
        }
        write_result(run_dir / FILE, content)
        return RunComposition(
            label=plan.label(config),
            path=run_dir / FILE,
            result=result,
            verdict=verdict,
            compared=comparison[0] if comparison else None,
            reused=reused,
        )

    def measured(self, plan: Plan, config: RunConfig) -> tuple[CompositionResult, dict[str, Any], bool]:
        """(a run's measures, all that they depend on, whether they had been there)."""
        run_dir = plan.run_dir(config)
        if run_dir not in self.done:
            wanted = [
                _inputs(self.sources, run_dir, config, fit)
                for fit in ([self.sources.fit] if self.sources.fit is not None else [plan, None])
            ]
            held = None if self.force else _held(run_dir, wanted)
            self.done[run_dir] = (
                (*held, True) if held is not None else (*self._compute(plan, config, wanted[-1]), False)
            )
        return self.done[run_dir]

    def _compute(
        self, plan: Plan, config: RunConfig, inputs: dict[str, Any]
    ) -> tuple[CompositionResult, dict[str, Any]]:
        run_dir = plan.run_dir(config)
        result = evaluate_composition(
            load_model(run_dir / "model"),
            self.sources.evaluation,
            self.sources.hook,
            fit_store=self.sources.fit if config.levels > 1 else None,
            device=self.device,
            progress=self.progress(plan.label(config)),
        )
        tensors = {
            f"{name}{pair.level}": reading.contributions.contiguous()
            for pair in result.pairs
            for name, reading in pair.readings.items()
            if reading.contributions is not None
        }
        (run_dir / FILE).unlink(missing_ok=True)  # never beside maps of another model
        publish(run_dir / MAPS_FILE, lambda path: save_file(tensors, path))
        write_result(run_dir / FILE, {"format": FORMAT, "inputs": inputs, "result": result.json(), **_maps(run_dir)})
        return result, inputs


def _inputs(sources: Sources, run_dir: Path, config: RunConfig, fit: ActivationStore | Plan | None) -> dict[str, Any]:
    """All that measures depend on. A plan stands for its training store, of which only the name is known."""
    store = sources.evaluation
    read_from: Any = "reconstruction rows"
    if config.levels == 1:
        read_from = None
    elif isinstance(fit, ActivationStore):
        read_from = fit.spec.fingerprint
    elif fit is not None:
        read_from = fit.store("train").fingerprint
    return {
        "hsae": hsae_version(),
        "sae": model_digest(run_dir / "model"),
        "hook": sources.hook,
        "store": store.spec.fingerprint,
        "model": store.header.model_digest,
        "tokenizer": store.header.tokenizer_digest,
        "corpus": store.header.corpus_digest,
        "read_from": read_from,
        "settings": SETTINGS,
    }


def _held(run_dir: Path, wanted: Sequence[dict[str, Any]]) -> tuple[CompositionResult, dict[str, Any]] | None:
    """The measures that lie there and their inputs, if those are among `wanted` and nothing is damaged."""
    content = read_composition(run_dir)
    if content is None or content["inputs"] not in wanted or read_maps(run_dir) is None:
        return None
    return content["parsed"], content["inputs"]


def read_composition(run_dir: Path) -> dict[str, Any] | None:
    """The content of composition.json with the result itself as `parsed`; None if there is none or it can't be understood."""
    try:
        content = read_result(run_dir / FILE, "hsae eval composition")
        if content["format"] != FORMAT:
            return None
        return {**content, "inputs": dict(content["inputs"]), "parsed": CompositionResult.of_json(content["result"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def read_maps(run_dir: Path) -> dict[str, Tensor] | None:
    """Contributions of every reading, `learned2`, `fitted2`, ...; None if there are none or the file is damaged."""
    try:
        known = read_result(run_dir / FILE, "hsae eval composition").get("maps")
        if known is not None and _maps(run_dir)["maps"] != known:
            return None
        return load_file(run_dir / MAPS_FILE)
    except (OSError, UserError, SafetensorError):
        return None


def _maps(run_dir: Path) -> dict[str, str]:
    """The digest of the file of maps, which stands in composition.json."""
    return {"maps": file_sha256(run_dir / MAPS_FILE)}


def read_verdict(content: dict[str, Any]) -> Verdict | None:
    """The failures in the content of composition.json; None while they have not been judged."""
    if "failures" not in content:
        return None
    return Verdict([Failure(**entry) for entry in content["failures"]], content["unchecked"])


def _flat_like(plan: Plan, config: RunConfig, sources: Sources) -> RunConfig | None:
    """The first trained run without levels, with the same activation, and of the stores' model."""
    for other in plan.runs.values():
        if other.levels == 1 and other.activation == config.activation and is_trained(plan, other):
            with suppress(UserError):
                _check_model(plan, other, sources)
                return other
    return None


def _with_core(result: CompositionResult, run_dir: Path, digest: str, store: ActivationStore) -> list[LevelResult]:
    """The levels with the CE scores of core results of this very model and store, where a view reads exactly the levels >= l."""
    found = core_results(run_dir, digest, Current.of(store.spec, store))
    return [replace(level, ce_loss_score=_ce_score(found, result, level.level)) for level in result.levels]


def _ce_score(found: dict[str, CoreResult], result: CompositionResult, level: int) -> Estimate:
    alone = result.structure == "stacked" or level == len(result.levels) > 1
    name = f"level{level}" if alone else "sae" if level == 1 else ""
    measure = found[name].measure("ce_loss_score") if name in found else None
    if measure is None:
        return Estimate(None)
    return Estimate(measure.value, measure.low, measure.high, "rows" if measure.low is not None else None)


def readings_of(model: TrainedModel, run_dir: Path, weights: str) -> tuple[dict[str, Tensor], tuple[str, ...] | None]:
    """(contributions by reading and level, as in `read_maps`; what they were read from, by READ_FROM).

    Without a composition.json of this very model, whose digest is `weights` (only the learned ones, as trained; None).
    """
    content, maps = read_composition(run_dir), read_maps(run_dir)
    if content is not None and maps is not None and content["inputs"].get("sae") == weights:
        return maps, tuple(str(content["inputs"].get(key)) for key in READ_FROM)
    return {f"learned{part.level}": part.contributions for part in model.compositions}, None


def stability_of(plan: Plan, config: RunConfig, seeds: int) -> tuple[Path, list[Agreement]]:
    """Compare the first `seeds` seeds of a run and write `eval/stability.json` into the first one's directory.

    Raises UserError if a seed has not been trained.
    """
    members: list[Member] = []
    digests, sources = [], set()
    for seeded in (plan.seeded(index) for index in range(seeds)):
        run_dir = seeded.run_dir(config)
        if not is_trained(seeded, config):
            raise UserError(
                f"run {seeded.label(config)} of plan {plan.name} has not been trained to its end in {run_dir}; "
                f"train it with: hsae train --run {config.number} --seeds {seeds}"
            )
        model = load_model(run_dir / "model")
        directions = [model.directions(level) for level in range(1, config.levels + 1)]
        digests.append(model_digest(run_dir / "model"))
        maps, read_from = readings_of(model, run_dir, digests[-1])
        members.append((directions, maps))
        sources.add(read_from)
    if len(sources) > 1 and config.levels > 1:
        raise UserError(
            f"the maps of the seeds of run {plan.label(config)} were read off on different stores or settings, or not of every seed; "
            f"make them alike with: hsae eval composition --run {config.number} --seeds {seeds} --force"
        )
    found = stability(members)
    path = plan.run_dir(config) / STABILITY_FILE
    content = {
        "format": FORMAT,
        "hsae": hsae_version(),
        "models": digests,
        "agreement": [asdict(agreement) for agreement in found],
    }
    write_result(path, content)
    return path, found
