"""The evaluations of labelled texts and words, from their probe stores: sparse probing, SCR, TPP, absorption. No
language model is run.

What no SAE changes (sums of residuals, probes on them, words) is computed once for all targets; each SAE then costs one
encoding of the store's tokens in the model's type and, where that is not float32, one in float32 for the measures with
intervals.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from hsae.cache.suites.probe_store import ProbeStore, TaskEntry
from hsae.cache.suites.specs import Suite
from hsae.cache.suites.suite_files import PART_TEXTS
from hsae.eval.harness.evaluation import Evaluation, Result, cached_method
from hsae.eval.harness.options import DrawOptions
from hsae.eval.harness.result_files import hsae_version
from hsae.eval.harness.saebench_file import Part, SaebenchFile
from hsae.eval.harness.targets import Target
from hsae.eval.probing import absorption, scr_tpp, sparse_probing
from hsae.eval.probing.config import probe_spec
from hsae.eval.probing.saebench_files import (
    AbsorptionConfig,
    AbsorptionFile,
    ScrFile,
    ScrTppConfig,
    SparseProbingConfig,
    SparseProbingFile,
    TppFile,
)
from hsae.eval.probing.sparse_probing import RANDOM_SEED, Outcome
from hsae.eval.probing.text_probes import Task, sum_latents, sum_texts
from hsae.train.config.plan import Plan
from hsae.train.model.views import View

StoreT = TypeVar("StoreT")


class SuiteEvaluation(Evaluation[StoreT, Target]):
    """An evaluation of SAEBench's suite: its result is SAEBench's file with hsae's block."""

    options_kind = DrawOptions
    file_kind: ClassVar[type[SaebenchFile]]

    @property
    def seeds(self) -> list[int]:
        """Seeds of the evaluation's own draws."""
        return list(range(self.options.draws))

    def title(self, results: Sequence[Result[Target]]) -> str:
        """Title of the table."""
        return f"{self.name}; ± spans the 95 % interval over {self.options.draws} draws"

    def inputs(self, target: Target) -> dict[str, Any]:
        """All that a result depends on."""
        store: Any = self.store
        own = {"store": store.spec.fingerprint, "state": store.digest, "seeds": len(self.seeds)}
        return {**target.inputs, **own}

    def notes(self, results: Sequence[Result[Target]]) -> list[str]:
        """Which store was read, and which SAEs can't be told apart."""
        stores = dict.fromkeys(result.content["hsae"]["store"]["path"] for result in results)
        return [*(f"on {name}" for name in stores), *super().notes(results)]


class ProbeEvaluation(SuiteEvaluation[ProbeStore]):
    """An evaluation from a probe store."""

    suite: ClassVar[Suite]

    @classmethod
    def packages(cls, options: DrawOptions) -> tuple[tuple[str, str, str], ...]:
        """SAEBench's probes are scikit-learn's."""
        return (("scikit-learn", "sklearn", "suite"),)

    @classmethod
    def open_store(cls, plan: Plan) -> ProbeStore:
        """The probe store of the suite."""
        return ProbeStore(probe_spec(plan, cls.suite), plan.cache.dir)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The language model's type."""
        dtype: torch.dtype = getattr(torch, self.store.spec.model.dtype)
        return dtype

    @cached_property
    def entries(self) -> dict[str, TaskEntry]:
        """The store's tasks by name."""
        return {entry.name: entry for entry in self.store.header.tasks}

    @abstractmethod
    def outcome(self, hook: str, view: View) -> tuple[Outcome, dict[str, Any]]:
        """SAEBench's result fields, and measures with intervals over seeds."""

    @abstractmethod
    def eval_config(self) -> Part:
        """SAEBench's `eval_config`."""

    def measure(self, target: Target) -> dict[str, Any]:
        """A target's result as SAEBench's JSON object with hsae's block."""
        outcome, own = self.outcome(target.hook, target.view)
        return self.file_kind.content(
            eval_config=self.eval_config(),
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

    def model_config(self) -> dict[str, Any]:
        """What `eval_config` says of the language model."""
        return {"llm_batch_size": self.store.spec.tasks.batch_rows, "llm_dtype": self.store.spec.model.dtype}


class TextEvaluation(ProbeEvaluation):
    """An evaluation of labelled texts, from sums over each text's tokens."""

    def tasks(self, hook: str) -> list[Task]:
        """The tasks with the sums of their residuals in the model's type."""
        return self._tasks(hook, None)

    def exact_tasks(self, hook: str) -> list[Task]:
        """The same with float32 sums."""
        return self._tasks(hook, None if self.dtype == torch.float32 else torch.float32)

    @cached_method
    def _tasks(self, hook: str, dtype: torch.dtype | None) -> list[Task]:
        return [
            Task(
                name=entry.name,
                sums_UD=sum_texts(self.store.ragged(entry, hook), dtype),
                lengths_U=self.store.lengths(entry),
                context=self.store.spec.tasks.context,
                train={name: torch.tensor(rows) for name, rows in entry.lists["train"].items()},
                test={name: torch.tensor(rows) for name, rows in entry.lists["test"].items()},
            )
            for entry in self.entries.values()
        ]

    def latents(self, hook: str, view: View) -> Callable[[Task], Tensor]:
        """Gives the sums [U, F] of the view's latents over each text of a task."""
        placed = view.copy_to(device=self.device)

        def parts(entry: TaskEntry) -> Iterator[tuple[Tensor, list[int]]]:
            for vectors_ND, lengths in self.store.ragged(entry, hook):
                yield vectors_ND.to(self.device), lengths

        return lambda task: sum_latents(placed, parts(self.entries[task.name])).cpu()

    def dataset_names(self) -> list[str]:
        """Names of the data sets behind the tasks."""
        return list(dict.fromkeys(name.partition("_scr_")[0] for name in self.entries))


class SparseProbing(TextEvaluation):
    """How much of a labelled class a few latents tell."""

    name = suite = "sparse-probing"
    file_kind = SparseProbingFile
    headlines: ClassVar[dict[str, str]] = {
        "top 1": "top_1_test_accuracy",
        "top 5": "top_5_test_accuracy",
        "all": "test_accuracy",
    }

    @cached_method
    def residual(self, hook: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Sparse probing on the residual itself: SAEBench's accuracies, and measures."""
        tasks = self.exact_tasks(hook)
        return sparse_probing.baselines(self.tasks(hook)), sparse_probing.ideal(
            tasks, lambda task: task.sums_UD, self.seeds
        )

    def outcome(self, hook: str, view: View) -> tuple[Outcome, dict[str, Any]]:
        """SAEBench's result fields, and measures with intervals over seeds."""
        latents = self.latents(hook, view.copy_to(dtype=self.dtype))
        llm, residual = self.residual(hook)
        outcome = sparse_probing.faithful(self.tasks(hook), latents, llm)
        exact = self.latents(hook, view.copy_to(dtype=torch.float32))
        own = sparse_probing.ideal(self.exact_tasks(hook), exact, self.seeds)
        return outcome, {**own, "residual": residual["measures"]}

    def eval_config(self) -> SparseProbingConfig:
        """SAEBench's `eval_config`."""
        spec, tasks = self.store.spec, self.store.spec.tasks
        return SparseProbingConfig(
            random_seed=RANDOM_SEED,
            dataset_names=self.dataset_names(),
            probe_train_set_size=2 * tasks.train_per_class,
            probe_test_set_size=2 * tasks.test_per_class,
            context_length=tasks.context,
            sae_batch_size=PART_TEXTS,
            **self.model_config(),
            model_name=spec.model.id,
            k_values=list(sparse_probing.K_VALUES),
            lower_vram_usage=False,
        )


class _ClassAblation(TextEvaluation):
    """SCR and TPP: what ablating the latents of one class does to the probes of the others."""

    kind: ClassVar[scr_tpp.Kind]

    @cached_method
    def probes(self, hook: str) -> tuple[dict[str, scr_tpp.Trained], dict[tuple[str, int], scr_tpp.Seeded]]:
        """The probes: SAEBench's, and those of each seed."""
        plain = scr_tpp.train_probes(self.kind, self.tasks(hook))
        return plain, scr_tpp.ideal_probes(self.kind, self.exact_tasks(hook), self.seeds)

    def outcome(self, hook: str, view: View) -> tuple[Outcome, dict[str, Any]]:
        """SAEBench's result fields, and measures with intervals over seeds."""
        plain, exact = view.copy_to(dtype=self.dtype), view.copy_to(dtype=torch.float32)
        n_values = [n for n in scr_tpp.N_VALUES if n <= view.d_sae]
        latents = self.latents(hook, plain)
        trained, seeded = self.probes(hook)
        outcome, _ = scr_tpp.faithful(self.kind, self.tasks(hook), plain, latents, trained, n_values)
        tasks, exact_latents = self.exact_tasks(hook), self.latents(hook, exact)
        return outcome, scr_tpp.ideal(self.kind, tasks, exact, exact_latents, seeded, n_values)

    @abstractmethod
    def set_sizes(self) -> tuple[int, int]:
        """Texts that a probe is trained on, and tested on."""

    def eval_config(self) -> ScrTppConfig:
        """SAEBench's `eval_config`."""
        spec, training, names = self.store.spec, scr_tpp.TRAINING, self.dataset_names()
        train, test = self.set_sizes()
        return ScrTppConfig(
            random_seed=RANDOM_SEED,
            dataset_names=names,
            perform_scr=self.kind == "scr",
            early_stopping_patience=training.patience,
            train_set_size=train,
            test_set_size=test,
            context_length=spec.tasks.context,
            probe_train_batch_size=training.batch,
            probe_test_batch_size=test,
            probe_epochs=training.epochs,
            probe_lr=training.lr,
            probe_l1_penalty=training.l1,
            sae_batch_size=PART_TEXTS,
            **self.model_config(),
            lower_vram_usage=False,
            model_name=spec.model.id,
            n_values=list(scr_tpp.N_VALUES),
            column1_vals_lookup={
                name: [
                    list(entry.pair)
                    for entry in self.entries.values()
                    if entry.pair and entry.name.startswith(f"{name}_scr_")
                ]
                for name in names
            },
        )


class SCR(_ClassAblation):
    """Whether ablating a few latents removes a spurious correlation."""

    name = suite = kind = "scr"
    file_kind = ScrFile
    headlines: ClassVar[dict[str, str]] = {f"threshold {n}": f"scr_metric_threshold_{n}" for n in (10, 20, 50)}

    def set_sizes(self) -> tuple[int, int]:
        """Four quadrants each."""
        tasks = self.store.spec.tasks
        return 4 * tasks.train_per_quadrant, 4 * tasks.test_per_quadrant


class TPP(_ClassAblation):
    """Whether ablating a few latents hurts one class's probe and no other."""

    name = suite = kind = "tpp"
    file_kind = TppFile
    headlines: ClassVar[dict[str, str]] = {
        f"threshold {n} total": f"tpp_threshold_{n}_total_metric" for n in (10, 20, 50)
    }

    def set_sizes(self) -> tuple[int, int]:
        """A class and as many texts of the others."""
        tasks = self.store.spec.tasks
        return 2 * tasks.train_per_class, 2 * tasks.test_per_class


class Absorption(ProbeEvaluation):
    """Whether a letter's latents stay silent on words where others speak for it."""

    name = suite = "absorption"
    file_kind = AbsorptionFile
    headlines: ClassVar[dict[str, str]] = {
        "absorption fraction": "mean_absorption_fraction_score",
        "full absorption": "mean_full_absorption_score",
        "num split features": "mean_num_split_features",
    }

    @property
    def settings(self) -> absorption.Settings:
        """SAEBench's settings but for how many letters must be tested."""
        return absorption.Settings(min_letters=self.store.spec.tasks.min_letters)

    @cached_method
    def words(self, hook: str) -> absorption.Words:
        """The words and the ground-truth probe on them."""
        vectors = {name: sum_texts(self.store.ragged(entry, hook)) for name, entry in self.entries.items()}
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

    def outcome(self, hook: str, view: View) -> tuple[Outcome, dict[str, Any]]:
        """SAEBench's result fields, and measures with intervals over seeds."""
        plain, exact, words = view.copy_to(dtype=self.dtype), view.copy_to(dtype=torch.float32), self.words(hook)
        own = absorption.faithful(plain, words, self.settings)
        return own, absorption.ideal(exact, words, self.settings, self.seeds)

    def eval_config(self) -> AbsorptionConfig:
        """SAEBench's `eval_config`."""
        spec, settings = self.store.spec, self.settings
        return AbsorptionConfig(
            model_name=spec.model.id,
            random_seed=RANDOM_SEED,
            f1_jump_threshold=settings.f1_jump,
            max_k_value=settings.max_k,
            prompt_template=spec.tasks.prompt_template,
            prompt_token_pos=self.store.header.prompt_token_pos,
            **self.model_config(),
            k_sparse_probe_l1_decay=settings.l1_decay,
            k_sparse_probe_batch_size=settings.batch,
            k_sparse_probe_num_epochs=settings.epochs,
            min_GT_probe_f1=settings.min_f1,
            min_feats_for_eval=settings.min_letters,
            eval_k_sparse_probe_batch_size=absorption.ENCODED_AT_ONCE,
            precalc_k_sparse_probe_sae_acts=False,
        )
