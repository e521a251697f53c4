"""Activations and their gradients against loops; pairwise different sizes (B=11, F=13)."""

import pytest
import torch

from hsae.train.model.activations import batch_top_k, batch_top_k_entries, jump_relu, step_count, top_k, top_k_entries

B, F = 11, 13


def vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_top_k_keeps_each_vectors_largest():
    pre = vectors(B, F)
    code = top_k(pre, 3)
    for row in range(B):
        kept = sorted(range(F), key=lambda i, row=row: -pre[row, i].item())[:3]
        for i in range(F):
            assert code[row, i] == (max(pre[row, i].item(), 0.0) if i in kept else 0.0)


def test_batch_top_k_keeps_the_batchs_largest_and_says_the_smallest():
    pre = vectors(B, F)
    code, smallest = batch_top_k(pre, 2.5)
    ordered = sorted(pre.flatten().tolist(), reverse=True)[: round(B * 2.5)]
    assert sorted(code[code > 0].tolist(), reverse=True) == [value for value in ordered if value > 0]
    assert smallest.item() == pytest.approx(min(value for value in ordered if value > 0))
    assert batch_top_k(-pre.abs(), 2)[1].item() == 0
    for bound in (0.0, 0.5 * smallest.item(), smallest.item(), 99.0):
        again, lowest = batch_top_k(pre, 2.5, torch.tensor(bound))
        assert torch.equal(again, code) and lowest == smallest


def test_the_first_of_equal_values_are_kept_whatever_the_bound():
    pre = torch.tensor([[2.0, 1.0, 1.0], [1.0, 3.0, 1.0]])
    for bound in (torch.tensor(0.0), torch.tensor(0.5), torch.tensor(1.5)):
        (entries,), smallest = batch_top_k_entries([pre], 2, bound)
        assert entries.tolist() == [0, 1, 2, 4] and smallest == 1
    first, second = batch_top_k_entries([pre, pre], 2.5)[0]
    assert first.tolist() == [0, 1, 4] and second.tolist() == [0, 4]  # level after level


def test_selection_at_the_edges():
    ones = torch.ones(1, F)
    assert top_k_entries(ones, F + 1).sort().values.tolist() == list(range(F))
    assert torch.equal(batch_top_k(ones, F + 1)[0], ones)
    zeros = torch.zeros(B, F)
    assert len(top_k_entries(zeros, 3)) == 0 and not top_k(zeros, 3).any()
    code, smallest = batch_top_k(zeros, 3)
    assert not code.any() and smallest == 0
    broken = vectors(B, F)
    broken[1, 2] = torch.nan
    for code in (top_k(broken, 3), batch_top_k(broken, 3)[0], batch_top_k(broken, 3, torch.tensor(0.1))[0]):
        assert code[1, 2].isnan()  # a loss must show it


def test_jump_relu_and_its_gradients_are_the_papers():
    pre, threshold, bandwidth = vectors(B, F).requires_grad_(), (0.2 + vectors(F, seed=1).abs()).requires_grad_(), 0.9
    outer = vectors(B, F, seed=2)
    (jump_relu(pre, threshold, bandwidth) * outer).sum().backward()
    for i in range(F):
        to_threshold = 0.0
        for row in range(B):
            z, t = pre[row, i].item(), threshold[i].item()
            assert jump_relu(pre, threshold, bandwidth)[row, i].item() == (z if z > t else 0.0)
            assert pre.grad[row, i].item() == (outer[row, i].item() if z > t else 0.0)
            inside = abs(max(z, 0.0) - t) < bandwidth / 2
            to_threshold -= t / bandwidth * inside * outer[row, i].item()
        assert threshold.grad[i].item() == pytest.approx(to_threshold)


def test_step_count_is_the_mean_l0_and_moves_thresholds_only():
    pre, threshold, bandwidth = vectors(B, F).requires_grad_(), (0.2 + vectors(F, seed=1).abs()).requires_grad_(), 0.9
    count = step_count(pre, threshold, bandwidth)
    assert count.item() == pytest.approx((pre > threshold).sum().item() / B)
    count.backward()
    assert pre.grad is None or not pre.grad.any()
    for i in range(F):
        inside = sum(abs(max(pre[row, i].item(), 0.0) - threshold[i].item()) < bandwidth / 2 for row in range(B))
        assert threshold.grad[i].item() == pytest.approx(-inside / bandwidth / B)


def test_the_threshold_gradient_is_that_of_the_expected_l0():
    """Over many smooth pre-activations the kernel estimate approaches d E[L0] / d threshold = -density at the
    threshold.
    """
    pre = vectors(200_000, 1, seed=3)
    threshold = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    step_count(pre, threshold, 0.1).backward()
    density = torch.exp(torch.tensor(-0.5 * 0.7**2)).item() / (2 * torch.pi) ** 0.5
    assert threshold.grad.item() == pytest.approx(-density, rel=0.03)
