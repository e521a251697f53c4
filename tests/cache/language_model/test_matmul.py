"""bfloat16 products through float32: the same numbers as exact products rounded once."""

import pytest
import torch

from hsae.cache.language_model import matmul


def rounded(left, right):
    return (left.double() @ right.double()).bfloat16()


@pytest.mark.parametrize("slow", [True, False])
def test_product_is_the_exact_product_rounded_once(slow, monkeypatch):
    monkeypatch.setattr(matmul, "bfloat16_is_slow", lambda device: slow)
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(5, 7, generator=generator), torch.randn(7, 3, generator=generator)
    assert torch.equal(matmul.product(left, right), left @ right)
    result = matmul.product(left.bfloat16(), right.bfloat16())
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result, rounded(left.bfloat16(), right.bfloat16()), rtol=2**-7, atol=0)


def test_products_of_a_module_are_widened_and_nothing_else_is():
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(7, 3).bfloat16().requires_grad_(False)
    x = torch.randn(5, 7, generator=generator).bfloat16()
    with matmul.WidenedProducts():
        linear, product, gelu = layer(x), x @ x.T, torch.nn.functional.gelu(x)
        mixed = torch.nn.functional.linear(x.float(), layer.weight.float())
    assert linear.dtype == product.dtype == gelu.dtype == torch.bfloat16 and mixed.dtype == torch.float32
    exact = x.double() @ layer.weight.double().T + layer.bias.double()
    torch.testing.assert_close(linear, exact.bfloat16(), rtol=2**-7, atol=2**-9)
    torch.testing.assert_close(product, rounded(x, x.T), rtol=2**-7, atol=0)
    assert torch.equal(gelu, torch.nn.functional.gelu(x))


def test_a_gpu_multiplies_bfloat16_fast():
    assert matmul.bfloat16_is_slow("cuda") is False
