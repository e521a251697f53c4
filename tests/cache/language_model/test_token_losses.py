"""Cross-entropy and KL divergence: float64 oracles, SAEBench's rounding, and independence of slicing."""

import math

import pytest
import torch

from hsae.cache.language_model import token_losses

N, V = 23, 611


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(3)
    clean = torch.randn(N, V, generator=generator, dtype=torch.float64) * 4
    return clean, clean + torch.randn(N, V, generator=generator, dtype=torch.float64)


@pytest.fixture
def targets():
    return torch.arange(N) * 7 % V


def oracle_kl(clean, modified):
    return (clean.softmax(-1) * (clean.log_softmax(-1) - modified.log_softmax(-1))).sum(-1)


def oracle_ce(logits, targets):
    return -logits.log_softmax(-1)[torch.arange(len(targets)), targets]


def test_faithful_losses_agree_with_float64(logits, targets):
    clean, modified = (part.float() for part in logits)
    ce = token_losses.cross_entropy(modified, targets)
    kl = token_losses.kl_divergence(*token_losses.distribution(clean), modified)
    assert ce.dtype == kl.dtype == torch.float32
    torch.testing.assert_close(ce.double(), oracle_ce(modified.double(), targets), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(kl.double(), oracle_kl(clean.double(), modified.double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_faithful_losses_round_every_step_as_saebench_does(logits, targets, dtype):
    clean, modified = (part.to(dtype) for part in logits)
    p0 = clean.softmax(-1)
    expected_kl = (p0 * (p0.log() - modified.softmax(-1).log())).sum(-1)
    expected_ce = -modified.log_softmax(-1)[torch.arange(N), targets]
    assert torch.equal(token_losses.kl_divergence(*token_losses.distribution(clean), modified), expected_kl)
    assert torch.equal(token_losses.cross_entropy(modified, targets), expected_ce)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stable_losses_agree_with_float64(logits, targets, dtype):
    clean, modified = (part.to(dtype) for part in logits)
    ce, kl = token_losses.stable_losses(token_losses.stable_distribution(clean, targets), modified, targets)
    assert ce.dtype == kl.dtype == torch.float32
    torch.testing.assert_close(ce.double(), oracle_ce(modified.double(), targets), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(kl.double(), oracle_kl(clean.double(), modified.double()), rtol=1e-5, atol=1e-5)


def test_a_constant_in_place_of_the_logits_and_the_clean_logits_themselves(logits, targets):
    clean = logits[0].float()
    exact, constant_V = token_losses.stable_distribution(clean, targets), logits[1][0].float()
    constant = token_losses.constant_losses(exact, constant_V, targets)
    for one, other in zip(constant, token_losses.stable_losses(exact, constant_V.expand(N, V), targets), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    losses, divergence = token_losses.stable_losses(exact, clean, targets)
    assert torch.equal(losses, exact.losses) and not divergence.any()


def test_underflow_gives_nan_as_in_saebench_and_a_number_when_stable():
    clean = torch.tensor([[0.0, -200.0, 0.0], [0.0, 1.0, 2.0]])
    modified = torch.tensor([[0.0, -200.0, 1.0], [0.0, -200.0, 0.0]])
    targets = torch.tensor([0, 1])
    kl = token_losses.kl_divergence(*token_losses.distribution(clean), modified)
    assert math.isnan(kl[0]) and kl[1] == math.inf
    _, stable = token_losses.stable_losses(token_losses.stable_distribution(clean, targets), modified, targets)
    torch.testing.assert_close(stable.double(), oracle_kl(clean.double(), modified.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows_per_slice", [2, 5, 22])
def test_slicing_does_not_change_a_bit(logits, targets, dtype, rows_per_slice, monkeypatch):
    clean, modified = (part.to(dtype) for part in logits)

    def everything():
        rounded, exact = token_losses.distribution(clean), token_losses.stable_distribution(clean, targets)
        kl, ce = token_losses.kl_divergence(*rounded, modified), token_losses.cross_entropy(modified, targets)
        return [*rounded, *exact, kl, ce, *token_losses.stable_losses(exact, modified, targets)]

    whole = everything()
    monkeypatch.setattr(token_losses, "SLICE_BYTES", rows_per_slice * V * clean.element_size())
    assert len(list(token_losses._row_slices(clean))) > 1
    assert all(torch.equal(one, other) for one, other in zip(whole, everything(), strict=True))


@pytest.mark.parametrize(("rows", "wanted"), [(1, 1), (2, 1), (3, 1), (7, 2), (129, 64), (128, 64), (5, 100)])
def test_slices_cover_every_row_once_and_leave_none_alone(rows, wanted):
    parts = list(token_losses.slices(rows, 10, 10 * wanted))
    assert [row for part in parts for row in range(rows)[part]] == list(range(rows))
    assert rows == 1 or all(part.stop - part.start >= 2 for part in parts)
    assert all(part.stop - part.start <= max(3, wanted + 1) for part in parts)


def test_memory_is_used_again_when_it_is_large_enough(logits):
    clean = logits[0].float()
    first = token_losses.distribution(clean)
    again = token_losses.distribution(clean[:9] + 1, first)
    assert again.probs.data_ptr() == first.probs.data_ptr() and again.probs.shape == (9, V)
    assert torch.equal(again.probs, (clean[:9] + 1).softmax(-1))
    assert token_losses.distribution(clean, token_losses.Distribution(*(part[:5] for part in first))).probs.shape == (
        N,
        V,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_distribution_that_all_tokens_share_gives_the_bits_of_as_many_copies(logits, targets, dtype):
    clean = token_losses.distribution(logits[0].to(dtype))
    copies = logits[1][:1].to(dtype).expand(N, -1)
    shared = copies[:2]
    found = token_losses.divergence(clean, token_losses.distribution(shared).log_probs[:1])
    assert torch.equal(found, token_losses.kl_divergence(*clean, copies))
    assert torch.equal(-shared.log_softmax(-1)[0][targets], token_losses.cross_entropy(copies, targets))
