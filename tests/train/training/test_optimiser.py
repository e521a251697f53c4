"""Adam, and the clipping of gradients in its own pass."""

import pytest
import torch
from torch import nn

from hsae.train.parallel.latent_sharding import UNDIVIDED
from hsae.train.training.optimiser import Adam


@pytest.mark.parametrize("limit", [0.5, 100.0])
def test_gradients_are_clipped_as_torch_clips_them(limit):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(size, generator=generator) for size in ((5, 3), (7,))]
    ours, torchs = ([nn.Parameter(value.clone()) for value in values] for _ in range(2))
    adam, other = Adam(ours, lr=0.1, fused=True), torch.optim.Adam(torchs, lr=0.1, fused=True)
    for _ in range(4):
        for one, two in zip(ours, torchs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            two.grad = one.grad.clone()
        adam.grad_scale = UNDIVIDED.gradient_scale(ours, (), limit)
        adam.step()
        nn.utils.clip_grad_norm_(torchs, limit)
        other.step()
    torch.testing.assert_close(ours, torchs)
