"""The Triton kernels against dense products in float64; pairwise different odd sizes. Without a GPU Triton's
interpreter runs them (conftest.py).
"""

import pytest
import torch

from hsae.train.config.run_config import RunConfig
from hsae.train.model import sparse_products
from hsae.train.model.sparse_products import Pattern
from hsae.train.model.trainable_sae import TRAINABLE

pytest.importorskip("triton", reason="triton is not installed (it comes with torch for CUDA)")
from hsae.train.model import sparse_kernels

B, F, WIDTH = 5, 11, 261  # wider than a tile's columns
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def pattern(counts):
    """Each vector's number of active latents, which are the first few of a shuffled order."""
    flat = [
        row * F + torch.randperm(F, generator=torch.Generator().manual_seed(row))[:count].sort().values
        for row, count in enumerate(counts)
    ]
    return Pattern(torch.cat(flat).to(DEVICE), torch.empty(len(counts), F))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [(1,) * B, (3, 0, F, 1, 7), (0,) * B, (2,)], ids=["k=1", "any", "none", "one row"])
def test_kernels_give_what_dense_products_give(counts, dtype):
    at, near = pattern(counts), {"rtol": 1e-5, "atol": 1e-5}
    values, matrix = vectors(len(at.flat), seed=1), vectors(F, WIDTH, seed=2).to(dtype)
    gradient = vectors(len(counts), WIDTH, seed=3).to(dtype)
    code, wide, outer = at.dense(values).double(), matrix.double(), gradient.double()
    decoded = sparse_kernels.weighted_sums(matrix, values, *at.by_vector[:2])
    torch.testing.assert_close(decoded, (code @ wide).float(), **near)
    to_values = sparse_kernels.dots(gradient, matrix, *at.by_vector[:2])
    torch.testing.assert_close(to_values, (outer @ wide.T).flatten()[at.flat].float(), **near)
    to_matrix = sparse_kernels.weighted_sums(gradient, values[at.order], *at.by_latent[:2])
    torch.testing.assert_close(to_matrix, (code.T @ outer).float(), **near)


def test_a_segment_of_many_tiles_is_summed_whole():
    count = 3 * sparse_kernels.MOST_ROWS + 1
    matrix, weights = vectors(7, 3), vectors(count, seed=1)
    rows, starts = torch.arange(count).int().to(DEVICE) % 7, torch.tensor([0, count]).int().to(DEVICE)
    expected = (weights[:, None].double() * matrix.double()[rows.long()]).sum(0, keepdim=True).float()
    torch.testing.assert_close(
        sparse_kernels.weighted_sums(matrix, weights, rows, starts), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.skipif(DEVICE == "cuda", reason="compares with the processor, on it")
@pytest.mark.parametrize("rounds", [False, True])
def test_a_pass_through_the_kernels_is_that_of_the_processor(rounds, monkeypatch):
    run = RunConfig(number=0, name="r", structure="additive", widths=(37, 17), l0=(3, 2), selection="joint")
    gradients = []
    for by_kernels in (False, True):
        monkeypatch.setattr(sparse_products, "uses_kernels", lambda device, answer=by_kernels: answer)
        model = TRAINABLE["additive"](run, 13).train()
        for number in (1, 2):
            model.level(number).sparse = True
        with torch.autocast("cpu", torch.bfloat16, enabled=rounds):
            output = model(vectors(B, 13).cpu())
        sum(part.square().sum() for part in output.reconstructions.values()).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    near = {"rtol": 0.03, "atol": 0.03} if rounds else {"rtol": 1e-4, "atol": 1e-5}  # rows are read in bfloat16
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name, **near)
