"""SAEBench's core evaluation from an evaluation store: no prefix pass, one suffix pass per SAE and reconstruction row.

The store's first `clean_rows` rows are SAEBench's reconstruction rows, the rest its sparsity and variance rows; batches
are those of the store, because several of SAEBench's numbers depend on them. Every SAE runs in the type of the store,
which is the language model's.

Shapes: B rows of a batch, T context, D residual width, F latents, N = B * T tokens of a batch, V vocabulary.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from hsae.cache.errors import StoreError, UserError
from hsae.cache.language_model.lm import LanguageModel
from hsae.cache.reading.provenance import check_model
from hsae.cache.reading.store import ActivationStore
from hsae.eval.core import corrected_measures
from hsae.eval.core.batches import BatchReader
from hsae.eval.core.core_result import CoreResult, dead_explanation, nan_to_minus_one
from hsae.eval.core.reconstruction import ReconstructionPhase
from hsae.eval.core.saebench_metrics import (
    InputMetrics,
    LatentMetrics,
    frequency_metrics,
    score,
    weight_metrics,
)
from hsae.eval.harness.estimates import LEVEL, RESAMPLES, SEED, Estimate, Resampler
from hsae.eval.harness.fits import check_fits
from hsae.eval.harness.listener import SILENT, Listener
from hsae.eval.harness.options import Options
from hsae.eval.harness.result_files import hsae_version
from hsae.train.model.views import View

DETAIL_DIGITS = 10


class CoreOptions(Options):
    """What a caller may choose; the defaults are SAEBench's standard run."""

    all_tokens: bool = Field(
        default=False, description="Replace the residual of special tokens too (SAEBench's other setting)."
    )
    faithful: bool = Field(
        default=False,
        description="Which numbers to print: SAEBench's with all their quirks, or corrected ones with intervals. "
        "The files hold both.",
        json_schema_extra={"flags": ["--faithful/--corrected"]},
    )
    whole: bool = Field(
        default=False, description="Of a run only all levels together (of a stack level 1), not each level too."
    )
    legacy: bool = Field(default=False, description="Also write each result as SAEBench up to 0.1 did, into legacy/.")


def check(views: Sequence[View], store: ActivationStore, model: LanguageModel | None, hook: str) -> None:
    """Refuse what can't be evaluated, before any compute. Raises UserError or StoreError."""
    if not views:
        raise UserError("there is nothing to evaluate")
    if hook not in store.spec.hooks:
        raise StoreError(f"{store.url} has no activations of {hook}; it has {', '.join(store.spec.hooks)}")
    for view in views:
        check_fits(view, hook, store.header.d_model, store.spec.model.id)
    if store.clean_rows == 0:
        raise StoreError(
            f"{store.url} keeps no clean losses, so it can't serve an evaluation; give the evaluation store (hsae "
            "cache build --split eval)"
        )
    if store.clean_rows >= store.rows:
        raise StoreError(
            f"{store.url} has no rows for the sparsity and variance phase; build it with cache.eval.batches_variance "
            ">= 1"
        )
    if model is not None:
        check_model(store.root, store.header, model)


@torch.no_grad()
def evaluate(
    views: Sequence[View],
    store: ActivationStore,
    model: LanguageModel,
    *,
    hook: str,
    options: CoreOptions | None = None,
    listener: Listener = SILENT,
    device: str = "cpu",
) -> list[CoreResult]:
    """Evaluate SAEs on a store; results in the order of `views`, each as if evaluated alone.

    `model` must lie on `device`. Raises UserError or StoreError for what `check` refuses.
    """
    check(views, store, model, hook)
    job = _Job(views, store, model, hook, options or CoreOptions(), listener, device)
    job.warn_of_dead()
    job.reconstruct()
    job.measure_latents()
    return [job.result(index) for index in range(len(views))]


class _Job:
    """One evaluation: the views in the store's type, and every accumulator."""

    def __init__(
        self,
        views: Sequence[View],
        store: ActivationStore,
        model: LanguageModel,
        hook: str,
        options: CoreOptions,
        listener: Listener,
        device: str,
    ) -> None:
        self.configs, self.store, self.hook = [view.config for view in views], store, hook
        self.options, self.listener, self.device = options, listener, device
        self.dtype = getattr(torch, store.spec.model.dtype)
        self.views = [view.copy_to(dtype=self.dtype, device=device) for view in views]
        self.reader = BatchReader(store, hook, device)
        self.reconstruction = ReconstructionPhase(
            self.views, store, model, hook, exclude_special_tokens=not options.all_tokens, device=device
        )
        resampler = Resampler(store.rows - store.clean_rows, device)
        self.inputs = InputMetrics(self.dtype, device)
        self.latents = [LatentMetrics(view.d_sae, self.dtype, device) for view in views]
        self.input_moments = corrected_measures.InputMoments(resampler, store.header.d_model)
        self.moments = [corrected_measures.ReconstructionMoments(resampler) for _ in views]

    def warn_of_dead(self) -> None:
        """Say before the long part if an SAE is silent on the first batch."""
        store, rows = self.store, min(self.store.spec.batch_rows, self.store.clean_rows)
        kept_BT = ~store.special_mask(store.tokens(0, rows))
        x_ND = store.acts(self.hook, 0, rows)[kept_BT].to(self.device)
        for view in self.views:
            if not (view.encode(x_ND) != 0).any():
                self.listener.warn(
                    f"{view.name}: no latent fires on the first {rows} rows: the SAE looks dead; its scores "
                    "will be those of a constant vector in place of the residual",
                )

    def reconstruct(self) -> None:
        """The reconstruction phase."""
        self.reconstruction.run(self.reader, partial(self.listener.progress, "reconstruction"))

    def measure_latents(self) -> None:
        """The sparsity and variance phase."""
        first, last, done = self.store.clean_rows, self.store.rows, 0
        for batches in self.reader.variance(first, last):
            self.inputs.add(batches)
            self.input_moments.add(batches, first)
            for view, latents, moments in zip(self.views, self.latents, self.moments, strict=True):
                acts_BTF = view.encode(batches.x_BTD)
                out_BTD = view.decode(acts_BTF)
                active_BT = (acts_BTF != 0).sum(-1)
                latents.add(batches, acts_BTF, active_BT, out_BTD)
                moments.add(batches, first, active_BT, out_BTD)
            done += len(batches.counts)
            self.listener.progress("variance", done, self.reader.count(first, last))

    def result(self, index: int) -> CoreResult:
        """SAEBench's numbers and hsae's for one view."""
        view = self.views[index]
        weights = weight_metrics(view)
        metrics = self._metrics(index, weights)
        return CoreResult(
            name=view.name,
            eval_config=self._eval_config(),
            metrics=metrics,
            details=self._details(index, weights),
            sae_config={**self.configs[index], "dtype": self.store.spec.model.dtype, "device": self.device},
            hsae=self._own(index, metrics),
        )

    def _metrics(self, index: int, weights: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        latents = self.latents[index]
        shared = {name: mean.value() for name, mean in self.reconstruction.shared_means.items()}
        own = {name: mean.value() for name, mean in self.reconstruction.sae_means[index].items()}
        means = {name: mean.value() for name, mean in latents.means.items()}
        metrics: dict[str, dict[str, float]] = {
            "model_behavior_preservation": {
                "kl_div_score": score(shared["kl_ablation"], own["kl"], 0.0),
                "kl_div_with_ablation": shared["kl_ablation"],
                "kl_div_with_sae": own["kl"],
            },
            "model_performance_preservation": {
                "ce_loss_score": score(shared["ce_ablation"], own["ce"], shared["ce_clean"]),
                "ce_loss_with_ablation": shared["ce_ablation"],
                "ce_loss_with_sae": own["ce"],
                "ce_loss_without_sae": shared["ce_clean"],
            },
            "reconstruction_quality": {
                "explained_variance": latents.explained_variance(self.inputs),
                "explained_variance_legacy": means["legacy_variance"],
                "mse": means["mse"],
                "cossim": means["cosine"],
            },
            "shrinkage": {
                "l2_norm_in": self.inputs.norm.value(),
                "l2_norm_out": means["norm_out"],
                "l2_ratio": means["ratio"],
                "relative_reconstruction_bias": means["bias"],
            },
            "sparsity": {"l0": latents.l0.value(), "l1": means["l1"]},
            "token_stats": {
                "total_tokens_eval_reconstruction": self.store.clean_rows * self.store.context,
                "total_tokens_eval_sparsity_variance": (self.store.rows - self.store.clean_rows) * self.store.context,
            },
            "misc_metrics": frequency_metrics(latents.density_F()),
        }
        for side in ("encoder", "decoder"):
            cosines_F = weights[f"max_{side}_cosine_sim"].float()
            metrics["misc_metrics"][f"average_max_{side}_cosine_sim"] = cosines_F.mean().item()
        return {
            category: {name: nan_to_minus_one(value) for name, value in values.items()}
            for category, values in metrics.items()
        }

    def _details(self, index: int, weights: dict[str, Tensor]) -> list[dict[str, float]]:
        latents = self.latents[index]
        columns = {
            "feature_density": latents.density_F(),
            "consistent_activation_heuristic": latents.firings_per_row_F(),
            **weights,
        }
        lists = {
            name: [round(nan_to_minus_one(value), DETAIL_DIGITS) for value in column.tolist()]
            for name, column in columns.items()
        }
        rows = zip(*lists.values(), strict=True)
        return [{"index": number, **dict(zip(lists, row, strict=True))} for number, row in enumerate(rows)]

    def _own(self, index: int, metrics: dict[str, dict[str, float]]) -> dict[str, Any]:
        silent = int((self.latents[index].firings_F == 0).sum())
        measures = {
            **self.moments[index].measures(self.input_moments, self.store.header.d_model),
            "dead_fraction": Estimate(silent / self.views[index].d_sae),
            **corrected_measures.loss_measures(self.reconstruction.shared_sums, self.reconstruction.sae_sums[index]),
        }
        tokens = {
            "reconstruction": int(self.reconstruction.shared_sums.sums_SC[0, 3]),
            "reconstruction_losses": int(self.reconstruction.shared_sums.sums_SC[0, 0]),
            "variance": self.latents[index].tokens,
        }
        dead = silent == self.views[index].d_sae
        return {
            "version": hsae_version(),
            "dead": dead,
            "explanation": dead_explanation(metrics) if dead else None,
            "measures": {name: measure.to_dict() for name, measure in measures.items()},
            "tokens": tokens,
            "bootstrap": {"unit": "row", "resamples": RESAMPLES, "seed": SEED, "level": LEVEL},
            "differences": corrected_measures.differences(metrics, measures, self.store.spec.model.dtype, tokens),
            "store": self.store.spec.name,
        }

    def _eval_config(self) -> dict[str, Any]:
        spec = self.store.spec
        return {
            "model_name": spec.model.id,
            "llm_dtype": spec.model.dtype,
            "batch_size_prompts": spec.batch_rows,
            "n_eval_reconstruction_batches": self.reader.count(0, self.store.clean_rows),
            "n_eval_sparsity_variance_batches": self.reader.count(self.store.clean_rows, self.store.rows),
            "dataset": spec.corpus.corpus,
            "context_size": spec.context,
            "compute_kl": True,
            "compute_ce_loss": True,
            "compute_l2_norms": True,
            "compute_sparsity_metrics": True,
            "compute_variance_metrics": True,
            "compute_featurewise_density_statistics": True,
            "compute_featurewise_weight_based_metrics": True,
            "exclude_special_tokens_from_reconstruction": not self.options.all_tokens,
            "verbose": False,
        }
