"""Stability over seeds: known matchings, edges under them, and nulls. Sizes differ pairwise."""

import itertools
import sys

import pytest
import torch

from hsae.cache.errors import UserError
from hsae.eval.hierarchy.stability import jaccard, matching, stability

D, F1, F2, F3 = 41, 9, 5, 3


def a_seed(order, noise=0.0, seed=0):
    """One dictionary and its maps with their latents in another order."""
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(width, D, generator=generator) for width in (F1, F2, F3)]
    maps = {f"learned{n}": torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.4)
            for n, shape in ((2, (F2, F1)), (3, (F3, F2)))}  # fmt: skip
    shuffle = torch.Generator().manual_seed(order)
    places = [torch.randperm(width, generator=shuffle) for width in (F1, F2, F3)]
    jitter = torch.Generator().manual_seed(seed)
    moved = [
        part[place] + noise * torch.randn(part.shape, generator=jitter)
        for part, place in zip(directions, places, strict=True)
    ]
    reordered = {key: part[places[int(key[-1]) - 1]][:, places[int(key[-1]) - 2]] for key, part in maps.items()}
    return moved, reordered


def test_the_same_dictionary_in_another_order_is_the_same():
    found = {(item.name, item.level): item for item in stability([a_seed(0), a_seed(3), a_seed(7)])}
    assert set(found) == {
        *(("mean_max_correlation", level) for level in (1, 2, 3)),
        *(("edge_jaccard, learned", level) for level in (2, 3)),
    }
    for item in found.values():
        assert item.value == pytest.approx(1) and len(item.pairs) == 3 and item.sd == pytest.approx(0, abs=1e-9)
        assert item.null.mean < 0.7
    assert found["mean_max_correlation", 1].null.z > 10


def test_noise_lowers_the_correlation_and_unrelated_dictionaries_are_at_chance():
    noisy = stability([a_seed(0), a_seed(3, noise=1.0)])[0]
    assert 0.5 < noisy.value < 0.9 and noisy.sd is None
    generator = torch.Generator().manual_seed(5)
    others = [([torch.randn(F1, D, generator=generator)], {}) for _ in range(2)]
    (apart,) = stability(others)
    assert abs(apart.value - apart.null.mean) < 4 * apart.null.sd


def test_the_matching_is_the_best_of_all():
    one, other = (torch.randn(6, D, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    cosines = torch.nn.functional.normalize(one) @ torch.nn.functional.normalize(other).T
    best = max(
        itertools.permutations(range(6)), key=lambda order: sum(float(cosines[i, j]) for i, j in enumerate(order))
    )
    match, mean = matching(one, other)
    assert match.tolist() == list(best)
    assert mean == pytest.approx(sum(float(cosines[i, j]) for i, j in enumerate(best)) / 6, rel=1e-5)


def test_jaccard_against_sets():
    generator = torch.Generator().manual_seed(2)
    one, other = torch.rand(2, F2, F1, generator=generator) < 0.3
    coarse, fine = torch.randperm(F2, generator=generator), torch.randperm(F1, generator=generator)
    first = {(int(coarse[i]), int(fine[j])) for i in range(F2) for j in range(F1) if one[i, j]}
    second = {(i, j) for i in range(F2) for j in range(F1) if other[i, j]}
    assert jaccard(one, other, coarse, fine) == len(first & second) / len(first | second)
    nothing = torch.zeros(F2, F1, dtype=torch.bool)
    assert jaccard(nothing, nothing, coarse, fine) == 0


def test_a_reading_that_only_some_seeds_have_is_left_out():
    first, second = a_seed(0), a_seed(3)
    del second[1]["learned3"]
    assert [item.level for item in stability([first, second]) if "jaccard" in item.name] == [2]


def test_what_is_missing_is_said(monkeypatch):
    with pytest.raises(UserError, match="stability compares two seeds or more, not 1"):
        stability([a_seed(0)])
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(UserError, match=r"matching latents needs scipy; run: pip install 'hsae\[eval\]'"):
        stability([a_seed(0), a_seed(1)])
