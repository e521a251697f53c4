"""The reconstruction phase of core: losses and KL with each SAE's reconstruction in the residual's place.

Batches are the outer loop and SAEs the inner one: clean logits (one matrix product from the stored final vector) and
the clean distribution are made once for all SAEs, a slice of tokens at a time, so that no [tokens, V] matrix of a whole
batch exists.

Shapes: B rows of a batch, T context, D residual width, N = B * T tokens of a batch, V vocabulary, S SAEs.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hsae.cache.language_model import token_losses
from hsae.cache.language_model.lm import LanguageModel
from hsae.cache.reading.store import ActivationStore
from hsae.eval.core import corrected_measures
from hsae.eval.core.batches import BatchReader, CleanBatches
from hsae.eval.core.saebench_metrics import Mean
from hsae.eval.harness.estimates import ResampledSums, Resampler
from hsae.train.model.views import View

SLICE_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}  # of logits at a time


class ReconstructionPhase:
    """Means as SAEBench rounds them and hsae's own sums, over the store's first `clean_rows` rows."""

    def __init__(
        self,
        views: Sequence[View],
        store: ActivationStore,
        model: LanguageModel,
        hook: str,
        *,
        exclude_special_tokens: bool,
        device: str,
    ) -> None:
        self.views, self.store, self.model, self.hook = views, store, model, hook
        self.exclude_special_tokens, self.device = exclude_special_tokens, device
        self.dtype = getattr(torch, store.spec.model.dtype)
        self.shared_means = {name: Mean(self.dtype, device) for name in ("kl_ablation", "ce_ablation", "ce_clean")}
        self.sae_means = [{name: Mean(self.dtype, device) for name in ("kl", "ce")} for _ in views]
        resampler = Resampler(store.clean_rows, device)
        self.shared_sums = ResampledSums(resampler, len(corrected_measures.RECONSTRUCTION_COLUMNS))
        self.sae_sums = [ResampledSums(resampler, len(corrected_measures.SAE_COLUMNS)) for _ in views]
        self._memory: tuple[token_losses.Distribution, Tensor] | tuple[None, None] = (None, None)

    def run(self, reader: BatchReader, progress: Callable[[int, int], None]) -> None:
        """Go through the batches."""
        # A zero residual stays the same at every position and after every token, so one token stands for all.
        zero_11D = torch.zeros(1, 1, self.store.header.d_model, dtype=self.dtype, device=self.device)
        zero_logits_V = self.model.unembed(self.model.suffix(self.hook, zero_11D)[0])[0]
        last, done = self.store.clean_rows, 0
        for batches in reader.reconstruction(0, last):
            finals = [self._final(view, batches) for view in self.views]
            self._losses(batches, finals, zero_logits_V)
            done += len(batches.counts)
            progress(done, reader.count(0, last))

    def _final(self, view: View, batches: CleanBatches) -> Tensor:
        """[B * T, D] final vectors with the SAE's reconstruction in the residual's place."""
        x_BTD = batches.x_BTD
        out_BTD = view.decode(view.encode(x_BTD)).to(x_BTD.dtype)
        if self.exclude_special_tokens:
            out_BTD = torch.where(batches.mask_BT[..., None], out_BTD, x_BTD)
        return self.model.suffix(self.hook, out_BTD).flatten(0, 1)

    def _losses(self, batches: CleanBatches, finals: list[Tensor], zero_logits_V: Tensor) -> None:
        final_ND, targets_N = batches.final_BTD.flatten(0, 1), batches.targets_N
        shape = (len(finals), 2, len(targets_N))  # of loss and KL of each SAE
        rounded_S2N = torch.empty(shape, dtype=self.dtype, device=self.device)
        exact_S2N = torch.empty(shape, device=self.device)
        clean_N, ablated_N, ablated_kl_N = torch.empty(3, len(targets_N), device=self.device)
        row_bytes = self.model.vocab_size * final_ND.element_size()
        for part in token_losses.slices(len(targets_N), row_bytes, SLICE_BYTES[torch.device(self.device).type]):
            targets = targets_N[part]
            logits_NV = self.model.unembed(final_ND[part])
            rounded = token_losses.distribution(logits_NV, self._memory[0])
            exact = token_losses.stable_distribution(logits_NV, targets, self._memory[1])
            if self._memory[0] is None or len(exact.probs) > len(self._memory[0].probs):
                self._memory = (rounded, exact.probs)
            clean_N[part] = exact.losses
            ablated_N[part], ablated_kl_N[part] = token_losses.constant_losses(exact, zero_logits_V, targets)
            for index, sae_final_ND in enumerate(finals):
                logits_NV = self.model.unembed(sae_final_ND[part])
                rounded_S2N[index, 0, part] = token_losses.cross_entropy(logits_NV, targets)
                rounded_S2N[index, 1, part] = token_losses.kl_divergence(*rounded, logits_NV)
                exact_S2N[index, 0, part], exact_S2N[index, 1, part] = token_losses.stable_losses(
                    exact, logits_NV, targets
                )
        with_loss_N, kept_N = batches.with_loss_N, batches.kept_N
        self.shared_means["ce_clean"].add(batches.ce_clean_BT.flatten()[with_loss_N])
        self.shared_means["ce_ablation"].add(batches.ce_ablation_BT.flatten()[with_loss_N])
        self.shared_means["kl_ablation"].add(batches.kl_ablation_BT.flatten()[kept_N])
        ce, kl = _RowSums(batches.loss_mask_BT), _RowSums(batches.mask_BT)
        columns = [ce.count, ce(clean_N), ce(ablated_N), kl.count, kl(ablated_kl_N)]
        self.shared_sums.add(batches.start, torch.stack(columns, 1))
        for means, sums, rounded_2N, exact_2N in zip(
            self.sae_means, self.sae_sums, rounded_S2N, exact_S2N, strict=True
        ):
            means["ce"].add(rounded_2N[0, with_loss_N])
            means["kl"].add(rounded_2N[1, kept_N])
            sums.add(batches.start, torch.stack([ce(exact_2N[0]), kl(exact_2N[1])], 1))


class _RowSums:
    """Sums over the selected tokens of each row."""

    def __init__(self, mask_BT: Tensor) -> None:
        self.mask_BT = mask_BT
        self.count = mask_BT.sum(1).double()

    def __call__(self, values_N: Tensor) -> Tensor:
        """[B] float64."""
        return torch.where(self.mask_BT, values_N.view(self.mask_BT.shape).double(), 0.0).sum(1)
