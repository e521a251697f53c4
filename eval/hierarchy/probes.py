"""Linear probes of fine latents' firing, and whether child and parent point where the probe does.

After Tree SAE, arXiv 2605.07922, section 5.2. For each sampled child a logistic regression from the residual to whether
the child fires gives the direction of its concept. A pair counts if parent and child are both among the TOP latents, of
all levels, whose directions are closest to it by cosine. Positives are weighted up to balance; a probe must tell
held-out tokens apart, else its child is left out.

The cost is one matrix product of TOKENS x D x CHILDREN a step and direction, CHILDREN at most, whatever the size of the
model.

Shapes: N sampled tokens, D residual width, C children, A latents of all levels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, normalize

TOP = 5
CHILDREN = 48
TOKENS = 8192
HELD_OUT = 0.2
POSITIVES = 40  # firings a child needs in the sample, of which the held-out share is for the check
BALANCED_ACCURACY = 0.7  # on held-out tokens; 0.5 is chance
STEPS = 150
RATE = 0.05
DECAY = 1e-4
SEED = 0


@dataclass(frozen=True, kw_only=True)
class Probes:
    """Trained probes of sampled children."""

    children_C: Tensor
    """[C] fine latents."""
    directions_CD: Tensor
    accuracy_C: Tensor
    """[C] balanced accuracy on held-out tokens."""
    candidates: int
    """Fine latents that fired often enough to be sampled."""

    @property
    def valid_C(self) -> Tensor:
        """[C] probes that pass the held-out check."""
        return self.accuracy_C >= BALANCED_ACCURACY

    def hits(
        self, parent_G: Tensor, directions_AD: Tensor, fine_offset: int, coarse_offset: int
    ) -> tuple[Tensor, Tensor]:
        """([C] child and parent are both among the TOP, [C] the probe is valid and the child no orphan).

        `directions_AD` holds the latents of all levels; those of the two levels begin at the offsets.
        """
        nearest_CT = (
            (normalize(self.directions_CD) @ normalize(directions_AD).T).topk(min(TOP, len(directions_AD))).indices
        )
        parent_C = parent_G[self.children_C]
        child_in_C = (nearest_CT == (self.children_C + fine_offset)[:, None]).any(1)
        parent_in_C = (nearest_CT == (parent_C + coarse_offset)[:, None]).any(1)
        return child_in_C & parent_in_C, self.valid_C & (parent_C >= 0)


def train_probes(x_ND: Tensor, fires_NG: Tensor) -> Probes:
    """Probes of up to CHILDREN fine latents, drawn with a fixed seed among those that fire often enough in the sample.

    The last HELD_OUT of the tokens, given in the order of the text, are for the check: they are of other rows.
    """
    split = round(len(x_ND) * (1 - HELD_OUT))
    trained_G, test_G = fires_NG[:split].sum(0), fires_NG[split:].sum(0)
    enough_G = (trained_G >= POSITIVES * (1 - HELD_OUT)) & (test_G >= POSITIVES * HELD_OUT / 2)
    enough_G &= (trained_G < split) & (test_G < len(x_ND) - split)  # one that always fires has nothing to tell apart
    candidates = enough_G.nonzero().squeeze(1)
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(SEED)).to(candidates.device)
    children_C = candidates[order[:CHILDREN]].sort().values
    centred_ND = x_ND - x_ND[:split].mean(0)
    scale = centred_ND[:split].square().sum(1).mean().sqrt().clamp_min(1e-30) / x_ND.shape[1] ** 0.5
    scaled_ND, target_NC = centred_ND / scale, fires_NG[:, children_C].float()
    weight_DC, bias_C = _fit(scaled_ND[:split], target_NC[:split])
    guess_NC, truth_NC = scaled_ND[split:] @ weight_DC + bias_C > 0, target_NC[split:] > 0
    right_C = (guess_NC & truth_NC).sum(0) / truth_NC.sum(0), (~guess_NC & ~truth_NC).sum(0) / (~truth_NC).sum(0)
    return Probes(
        children_C=children_C,
        directions_CD=weight_DC.T.contiguous(),
        accuracy_C=(right_C[0] + right_C[1]) / 2,
        candidates=len(candidates),
    )


@torch.enable_grad()
def _fit(x_ND: Tensor, target_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [D, C] and biases [C] of balanced logistic regressions: STEPS steps of Adam on all tokens, from zero."""
    positive_C = target_NC.sum(0)
    balance_C = (len(target_NC) - positive_C) / positive_C
    weight = torch.zeros(x_ND.shape[1], target_NC.shape[1], device=x_ND.device, requires_grad=True)
    bias = torch.zeros(target_NC.shape[1], device=x_ND.device, requires_grad=True)
    if not target_NC.shape[1]:
        return weight.detach(), bias.detach()
    optimiser = torch.optim.Adam([weight, bias], lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    for _ in range(STEPS):
        optimiser.zero_grad()
        loss = binary_cross_entropy_with_logits(x_ND @ weight + bias, target_NC, pos_weight=balance_C, reduction="none")
        torch.autograd.backward(loss.mean(0).sum() + DECAY * weight.square().sum())
        optimiser.step()
        schedule.step()
    return weight.detach(), bias.detach()
