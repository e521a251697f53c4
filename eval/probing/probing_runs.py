"""The evaluations of labelled texts and words, from their probe stores: sparse probing, SCR, TPP, absorption. No language model is run.

A `Bench` holds what no SAE changes (sums of residuals, probes on them, words); each SAE then costs one encoding of the store's
tokens in the model's type and, where that is not float32, one in float32 for the measures with intervals.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hsae.cache.suites.probe_store import ProbeStore, TaskEntry
from hsae.cache.suites.store_files import PART_TEXTS
from hsae.eval.harness.envelope import envelope, hsae_version, write_result
from hsae.eval.harness.fits import check_fits
from hsae.eval.harness.result_files import told_changes
from hsae.eval.harness.saebench_schema import LAYOUTS, read_suite
from hsae.eval.harness.targets import Found, Target, find
from hsae.eval.probing import absorption, scr_tpp, sparse_probing
from hsae.eval.probing.scr_tpp import Kind
from hsae.eval.probing.sparse_probing import RANDOM_SEED, Outcome
from hsae.eval.probing.text_probes import Task, need_sklearn, sum_latents, sum_texts, within_noise
from hsae.train.model.views import View
from hsae.train.runs.run_record import check_same_model

HEADLINES = {
    "sparse-probing": ("top_1_test_accuracy", "top_5_test_accuracy", "test_accuracy"),
    "scr": ("scr_metric_threshold_10", "scr_metric_threshold_20", "scr_metric_threshold_50"),
    "tpp": ("tpp_threshold_10_total_metric", "tpp_threshold_20_total_metric", "tpp_threshold_50_total_metric"),
    "absorption": ("mean_absorption_fraction_score", "mean_full_absorption_score", "mean_num_split_features"),
    "autointerp": ("balanced_accuracy", "sensitivity", "specificity"),
    "ravel": ("disentanglement_score", "cause_score", "isolation_score"),
}
"""Measures that are shown of each evaluation; the first one decides what is said about noise."""
FOLDERS = {suite: layout.eval_type_id.removesuffix("_first_letter") for suite, layout in LAYOUTS.items()}
"""Name of each evaluation's folder of results."""


@dataclass(frozen=True, kw_only=True)
class SuiteResult:
    """A target's result file, as JSON."""

    target: Target
    content: dict[str, Any]
    reused: bool

    @property
    def measures(self) -> dict[str, dict[str, Any]]:
        """Measures with intervals over seeds."""
        held: dict[str, dict[str, Any]] = self.content["hsae"]["measures"]
        return held

    def metric(self, name: str) -> float | None:
        """One of SAEBench's numbers by its key."""
        return next((values[name] for values in self.content["eval_result_metrics"].values() if name in values), None)


class Evaluator(Protocol):
    """An evaluation at one hook."""

    @property
    def suite(self) -> str:
        """Its name."""

    @property
    def store(self) -> Any:
        """The store it is made from."""

    def check(self, view: View) -> None:
        """Refuse an SAE that can't be evaluated. Raises UserError."""

    def inputs(self, target: Target) -> dict[str, Any]:
        """All that a result depends on."""

    def content(self, target: Target) -> dict[str, Any]:
        """A target's result as JSON."""


class Bench:
    """One probe store at one hook, ready to evaluate SAEs."""

    def __init__(self, store: ProbeStore, hook: str, seeds: int, device: str = "cpu") -> None:
        need_sklearn(f"the evaluation {store.spec.suite}")
        self.store, self.hook, self.device = store, hook, device
        self.suite = store.spec.suite
        self.seeds = list(range(seeds))
        self.dtype: torch.dtype = getattr(torch, store.spec.model.dtype)
        self.entries = {entry.name: entry for entry in store.header.tasks}

    # --- what all SAEs share ---------------------------------------------------------------------------------------------

    @cached_property
    def tasks(self) -> list[Task]:
        """The tasks of labelled texts, with the sums of their residuals in the model's type."""
        return self._tasks(None)

    @cached_property
    def exact_tasks(self) -> list[Task]:
        """The same with float32 sums."""
        return self.tasks if self.dtype == torch.float32 else self._tasks(torch.float32)

    def _tasks(self, dtype: torch.dtype | None) -> list[Task]:
        return [
            Task(
                name=entry.name,
                sums_UD=sum_texts(self.store.ragged(entry, self.hook), dtype),
                lengths_U=self.store.lengths(entry),
                context=self.store.spec.tasks.context,
                train={name: torch.tensor(rows) for name, rows in entry.lists["train"].items()},
                test={name: torch.tensor(rows) for name, rows in entry.lists["test"].items()},
            )
            for entry in self.entries.values()
        ]

    @cached_property
    def residual(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Sparse probing on the residual itself: SAEBench's accuracies, and measures."""
        return sparse_probing.baselines(self.tasks), sparse_probing.ideal(
            self.exact_tasks, lambda task: task.sums_UD, self.seeds
        )

    @cached_property
    def probes(self) -> tuple[dict[str, scr_tpp.Trained], dict[tuple[str, int], scr_tpp.Seeded]]:
        """SCR's or TPP's probes: SAEBench's, and those of each seed."""
        kind = self._kind()
        return scr_tpp.train_probes(kind, self.tasks), scr_tpp.ideal_probes(kind, self.exact_tasks, self.seeds)

    @cached_property
    def words(self) -> absorption.Words:
        """Absorption's words and the ground-truth probe on them."""
        vectors = {name: sum_texts(self.store.ragged(entry, self.hook)) for name, entry in self.entries.items()}
        letters = {name: torch.tensor(entry.lists[name]["letters"]) for name, entry in self.entries.items()}
        weight, bias = absorption.ground_truth(vectors["train"].float(), letters["train"])
        return absorption.Words(
            train=vectors["train"].float(),
            train_letters=letters["train"],
            test=vectors["test"].float(),
            test_letters=letters["test"],
            weight=weight,
            bias=bias,
            prompts=vectors["prompts"],
            prompt_words=torch.arange(len(vectors["prompts"])),
        )

    def _kind(self) -> Kind:
        return "scr" if self.suite == "scr" else "tpp"

    # --- one SAE ---------------------------------------------------------------------------------------------------------

    def check(self, view: View) -> None:
        """Refuse an SAE that does not belong to the store's hook. Raises UserError."""
        check_fits(view, self.hook, self.store.header.d_model, self.store.spec.model.id)

    def evaluate(self, view: View) -> tuple[Outcome, dict[str, Any]]:
        """SAEBench's result fields, and measures with intervals over seeds."""
        self.check(view)
        plain, exact = view.to(dtype=self.dtype), view.to(dtype=torch.float32)
        if self.suite == "absorption":
            settings = absorption.Settings(min_letters=self.store.spec.tasks.min_letters)
            return absorption.faithful(plain, self.words, settings), absorption.ideal(
                exact, self.words, settings, self.seeds
            )
        n_values = [n for n in scr_tpp.N_VALUES if n <= view.d_sae]
        latents = self._latents(plain)
        if self.suite == "sparse-probing":
            llm, measured = self.residual
            outcome = sparse_probing.faithful(self.tasks, latents, llm)
            own = sparse_probing.ideal(self.exact_tasks, self._latents(exact), self.seeds)
            return outcome, {**own, "residual": measured["measures"]}
        trained, seeded = self.probes
        outcome, _ = scr_tpp.faithful(self._kind(), self.tasks, plain, latents, trained, n_values)
        return outcome, scr_tpp.ideal(self._kind(), self.exact_tasks, exact, self._latents(exact), seeded, n_values)

    def _latents(self, view: View) -> Callable[[Task], Tensor]:
        placed = view.to(device=self.device)

        def parts(entry: TaskEntry) -> Iterator[tuple[Tensor, list[int]]]:
            for vectors_ND, lengths in self.store.ragged(entry, self.hook):
                yield vectors_ND.to(self.device), lengths

        return lambda task: sum_latents(placed, parts(self.entries[task.name])).cpu()

    def content(self, target: Target) -> dict[str, Any]:
        """A target's result as SAEBench's JSON object with hsae's block."""
        outcome, own = self.evaluate(target.view)
        return envelope(
            LAYOUTS[self.suite].eval_type_id,
            eval_config=self.config(),
            metrics=outcome.metrics,
            details=outcome.details,
            sae_config={**target.view.config, "dtype": self.store.spec.model.dtype, "device": self.device},
            unstructured=outcome.unstructured,
            hsae={
                "version": hsae_version(),
                **own,
                "interval": "mean over seeds +- Student's t times the standard deviation over seeds, 95 %",
                "lm_passes": 0,
                "store": {"path": self.store.path.name, "passes": self.store.header.passes},
                "sources": {entry.name: entry.source for entry in self.entries.values()},
                "inputs": self.inputs(target),
            },
            release=target.release,
            sae_id=target.sae_id,
        )

    def inputs(self, target: Target) -> dict[str, Any]:
        """All that a result depends on."""
        return {
            **target.inputs,
            "store": self.store.spec.fingerprint,
            "state": self.store.digest,
            "seeds": len(self.seeds),
        }

    def config(self) -> dict[str, Any]:
        """SAEBench's `eval_config`."""
        spec, tasks = self.store.spec, self.store.spec.tasks
        model = {"llm_batch_size": tasks.batch_rows, "llm_dtype": spec.model.dtype}
        if self.suite == "absorption":
            settings = absorption.Settings(min_letters=tasks.min_letters)
            return {
                "model_name": spec.model.id,
                "random_seed": RANDOM_SEED,
                "f1_jump_threshold": settings.f1_jump,
                "max_k_value": settings.max_k,
                "prompt_template": tasks.prompt_template,
                "prompt_token_pos": self.store.header.prompt_token_pos,
                **model,
                "k_sparse_probe_l1_decay": settings.l1_decay,
                "k_sparse_probe_batch_size": settings.batch,
                "k_sparse_probe_num_epochs": settings.epochs,
                "min_GT_probe_f1": settings.min_f1,
                "min_feats_for_eval": settings.min_letters,
                "eval_k_sparse_probe_batch_size": absorption.ENCODED_AT_ONCE,
                "precalc_k_sparse_probe_sae_acts": False,
            }
        names = list(dict.fromkeys(name.partition("_scr_")[0] for name in self.entries))
        if self.suite == "sparse-probing":
            return {
                "random_seed": RANDOM_SEED,
                "dataset_names": names,
                "probe_train_set_size": 2 * tasks.train_per_class,
                "probe_test_set_size": 2 * tasks.test_per_class,
                "context_length": tasks.context,
                "sae_batch_size": PART_TEXTS,
                **model,
                "model_name": spec.model.id,
                "k_values": list(sparse_probing.K_VALUES),
                "lower_vram_usage": False,
            }
        scr, training = self.suite == "scr", scr_tpp.TRAINING
        train = 4 * tasks.train_per_quadrant if scr else 2 * tasks.train_per_class
        test = 4 * tasks.test_per_quadrant if scr else 2 * tasks.test_per_class
        return {
            "random_seed": RANDOM_SEED,
            "dataset_names": names,
            "perform_scr": scr,
            "early_stopping_patience": training.patience,
            "train_set_size": train,
            "test_set_size": test,
            "context_length": tasks.context,
            "probe_train_batch_size": training.batch,
            "probe_test_batch_size": test,
            "probe_epochs": training.epochs,
            "probe_lr": training.lr,
            "probe_l1_penalty": training.l1,
            "sae_batch_size": PART_TEXTS,
            **model,
            "lower_vram_usage": False,
            "model_name": spec.model.id,
            "n_values": list(scr_tpp.N_VALUES),
            "column1_vals_lookup": {
                name: [
                    list(entry.pair)
                    for entry in self.entries.values()
                    if entry.pair and entry.name.startswith(f"{name}_scr_")
                ]
                for name in names
            },
        }


def evaluate_suite(
    targets: Sequence[Target],
    open_store: Callable[[], ProbeStore],
    *,
    seeds: int,
    force: bool = False,
    device: str = "cpu",
    say: Callable[[str], None] = lambda text: None,
    warn: Callable[[str], None] = lambda text: None,
) -> list[SuiteResult]:
    """Evaluate targets and write their results; results made of the same inputs are read back unless `force`.

    `say` is told what is under way, `warn` which earlier results will give way and in what they differ. Raises UserError before any
    compute if a target can't be evaluated.
    """
    store = open_store()
    return evaluate_with(lambda hook: Bench(store, hook, seeds, device), targets, force=force, say=say, warn=warn)


def evaluate_with(
    bench_at: Callable[[str], Evaluator],
    targets: Sequence[Target],
    *,
    force: bool = False,
    say: Callable[[str], None] = lambda text: None,
    warn: Callable[[str], None] = lambda text: None,
) -> list[SuiteResult]:
    """The same with any evaluator of a hook."""
    benches = {hook: bench_at(hook) for hook in dict.fromkeys(target.hook for target in targets)}
    for target in targets:
        bench = benches[target.hook]
        bench.check(target.view)
        check_same_model(target.run_dir, str(bench.store.path), bench.store.header)

    def look(target: Target) -> Found[dict[str, Any]]:
        bench = benches[target.hook]
        return find(target, bench.inputs(target), partial(read_measured, suite=bench.suite))

    places = [look(target) for target in targets]
    for text in told_changes([(target.label, found.changed) for target, found in zip(targets, places, strict=True)]):
        warn(text)
    results = []
    for target, found in zip(targets, places, strict=True):
        bench = benches[target.hook]
        content = None if force else found.result
        if content is None and not force:  # somebody else may have made it by now
            content = look(target).result
        if reused := content is not None:
            assert content is not None
        else:
            say(f"{bench.suite}: {target.label}")
            content = bench.content(target)
            write_result(content, target.folder, found.path.name)
        results.append(SuiteResult(target=target, content=content, reused=reused))
    return results


def read_measured(path: Path, suite: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A result and what it was made of, nothing if hsae did not make it. Raises UserError."""
    content = read_suite(path, suite)
    hsae = content.get("hsae")
    inputs = hsae.get("inputs") if isinstance(hsae, dict) and isinstance(hsae.get("measures"), dict) else None
    if not isinstance(hsae, dict) or not isinstance(inputs, dict):
        return content, {}
    store = hsae.get("store")
    if (
        "state" not in inputs and isinstance(store, dict) and isinstance(store.get("path"), str)
    ):  # made by an older hsae
        inputs = {**inputs, "store": Path(store["path"]).stem.rpartition("-")[2], "state": inputs.get("store")}
    return content, inputs


def noise_note(results: Sequence[SuiteResult], suite: str) -> str | None:
    """Which SAEs can't be told from the one with the highest headline measure; None with fewer than two SAEs."""
    name = HEADLINES[suite][0]
    measured = [result for result in results if result.measures.get(name, {}).get("value") is not None]
    if len(measured) < 2:
        return None
    best = max(measured, key=lambda result: float(result.measures[name]["value"]))
    verdicts = {
        result.target.label: within_noise(best.measures[name], result.measures[name])
        for result in measured
        if result is not best
    }
    text = f"{name}: the highest is {best.target.label}"
    if same := [label for label, verdict in verdicts.items() if verdict]:
        text += f"; within noise of it: {', '.join(same)}"
    if apart := [label for label, verdict in verdicts.items() if verdict is False]:
        text += f"; apart from it: {', '.join(apart)}"
    if None in verdicts.values():
        text += "; one draw gives no measure of noise, use --draws 2 or more"
    return text
