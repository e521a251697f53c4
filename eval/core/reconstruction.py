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
        self.shared_means = {name: Mean(self.dtype) for name in ("kl_ablation", "ce_ablation", "ce_clean")}
        self.sae_means = [{name: Mean(self.dtype) for name in ("kl", "ce")} for _ in views]
        resampler = Resampler(store.clean_rows, device)
        self.shared_sums = ResampledSums(resampler, len(corrected_measures.RECONSTRUCTION_COLUMNS))
        self.sae_sums = [ResampledSums(resampler, len(corrected_measures.SAE_COLUMNS)) for _ in views]
        self.memory: tuple[token_losses.Distribution, token_losses.Distribution] | tuple[None, None] = (None, None)

    def run(
        self,
        batches: Sequence[tuple[int, int]],
        rows: Callable[[int, int], tuple[Tensor, Tensor, Tensor]],
        progress: Callable[[int, int], None],
    ) -> None:
        """Go through the batches, given as (first row, row after the last); `rows` reads tokens, residuals and mask."""
        # A zero residual stays the same at every position and after every token, so one token stands for all.
        zero_11D = torch.zeros(1, 1, self.store.header.d_model, dtype=self.dtype, device=self.device)
        zero_logits_1V = self.model.unembed(self.model.suffix(self.hook, zero_11D)[0])
        for done, (start, stop) in enumerate(batches, 1):
            tokens_BT, x_BTD, mask_BT = rows(start, stop)
            finals = [self._final(view, x_BTD, mask_BT) for view in self.views]
            self._losses(start, stop, tokens_BT, mask_BT, finals, zero_logits_1V)
            progress(done, len(batches))

    def _final(self, view: View, x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """Final vectors with the SAE's reconstruction in the residual's place."""
        out_BTD = view.decode(view.encode(x_BTD)).to(x_BTD.dtype)
        if self.exclude_special_tokens:
            out_BTD = torch.where(mask_BT[..., None], out_BTD, x_BTD)
        return self.model.suffix(self.hook, out_BTD)

    def _losses(
        self, start: int, stop: int, tokens_BT: Tensor, mask_BT: Tensor, finals: list[Tensor], zero_logits_1V: Tensor
    ) -> None:
        final_ND = self.store.clean("final", start, stop).to(self.device).flatten(0, 1)
        targets_N = tokens_BT.roll(-1, dims=1).flatten()
        shape = (len(finals), 2, len(targets_N))  # of loss and KL of each SAE
        rounded_S2N = torch.empty(shape, dtype=self.dtype, device=self.device)
        exact_S2N = torch.empty(shape, device=self.device)
        clean_N, ablated_N, ablated_kl_N = torch.empty(3, len(targets_N), device=self.device)
        row_bytes = self.model.vocab_size * final_ND.element_size()
        for part in token_losses.slices(len(targets_N), row_bytes, SLICE_BYTES[torch.device(self.device).type]):
            targets = targets_N[part]
            logits_NV = self.model.unembed(final_ND[part])
            rounded = token_losses.distribution(logits_NV, self.memory[0])
            exact = token_losses.stable_distribution(logits_NV, self.memory[1])
            if self.memory[0] is None or len(rounded.probs) > len(self.memory[0].probs):
                self.memory = (rounded, exact)
            clean_N[part] = -exact.log_probs.gather(-1, targets.long()[:, None])[:, 0]
            zero_logits_NV = zero_logits_1V.expand(len(targets), -1)
            ablated_N[part], ablated_kl_N[part] = token_losses.stable_losses(exact, zero_logits_NV, targets)
            for index, sae_final_BTD in enumerate(finals):
                logits_NV = self.model.unembed(sae_final_BTD.flatten(0, 1)[part])
                rounded_S2N[index, 0, part] = token_losses.cross_entropy(logits_NV, targets)
                rounded_S2N[index, 1, part] = token_losses.kl_divergence(*rounded, logits_NV)
                exact_S2N[index, 0, part], exact_S2N[index, 1, part] = token_losses.stable_losses(
                    exact, logits_NV, targets
                )
        loss_mask_BT = mask_BT.clone()
        loss_mask_BT[:, -1] = False
        stored = {
            "ce_clean": (self.store.clean("loss", start, stop), loss_mask_BT),
            "ce_ablation": (self.store.ablation(self.hook, "loss", start, stop), loss_mask_BT),
            "kl_ablation": (self.store.ablation(self.hook, "kl", start, stop), mask_BT),
        }
        for name, (values_BT, selected_BT) in stored.items():
            self.shared_means[name].add(values_BT.to(self.device)[selected_BT])
        ce, kl = _RowSums(loss_mask_BT), _RowSums(mask_BT)
        columns = [ce.count, ce(clean_N), ce(ablated_N), kl.count, kl(ablated_kl_N)]
        self.shared_sums.add(start, torch.stack(columns, 1))
        for means, sums, rounded_2N, exact_2N in zip(
            self.sae_means, self.sae_sums, rounded_S2N, exact_S2N, strict=True
        ):
            means["ce"].add(rounded_2N[0].view_as(mask_BT)[loss_mask_BT])
            means["kl"].add(rounded_2N[1].view_as(mask_BT)[mask_BT])
            sums.add(start, torch.stack([ce(exact_2N[0]), kl(exact_2N[1])], 1))


class _RowSums:
    """Sums over the selected tokens of each row."""

    def __init__(self, mask_BT: Tensor) -> None:
        self.mask_BT = mask_BT
        self.count = mask_BT.sum(1).double()

    def __call__(self, values_N: Tensor) -> Tensor:
        """[B] float64."""
        return torch.where(self.mask_BT, values_N.view(self.mask_BT.shape).double(), 0.0).sum(1)
