"""Each hierarchy measure against a naive loop on different sizes (N=211, F=5, G=13, D=7); nulls near theory."""

import math

import pytest
import torch

from hsae.eval.core.corrected_measures import Resampler
from hsae.eval.harness.estimates import UnitMean
from hsae.eval.hierarchy import maps, pairs
from hsae.eval.hierarchy.fitted import CodeMoments, nonnegative
from hsae.eval.hierarchy.maps import EDGE_SHARE, CodeScale, LevelMap
from hsae.eval.hierarchy.measures import SIBLINGS, PairGeometry, matthews, measures
from hsae.eval.hierarchy.pairs import CONTRIBUTES, MapSums, PairCounts
from hsae.eval.hierarchy.probes import TOP, Probes, train_probes

N, F, G, D, ROWS = 211, 5, 13, 7, 17


@pytest.fixture(scope="module")
def data():
    """Sparse codes, of which fine latent 4 and coarse latent 3 never fire, residuals, rows and directions."""
    generator = torch.Generator().manual_seed(3)

    def code(width, silent):
        on = torch.rand(N, width, generator=generator) < 0.3
        on[:, silent] = False
        return torch.rand(N, width, generator=generator).add(0.1) * on

    fine, coarse = code(G, 4), code(F, 3)
    coarse[:, 0] = (fine[:, 0] + fine[:, 1]) * (torch.rand(N, generator=generator) < 0.9)
    x = torch.randn(N, D, generator=generator) + fine @ torch.randn(G, D, generator=generator)
    row = torch.randint(ROWS, (N,), generator=generator).sort().values
    directions = (torch.randn(G, D, generator=generator), torch.randn(F, D, generator=generator))
    return fine, coarse, x, row, directions


@pytest.fixture(scope="module")
def contributions():
    generator = torch.Generator().manual_seed(4)
    values = torch.rand(F, G, generator=generator) * (torch.rand(F, G, generator=generator) < 0.5)
    values[:, 4], values[3] = 0, 0
    return values


@pytest.fixture(scope="module")
def counted(data, contributions):
    """(counts, sums of the map, sums of the best single input, geometry, alive), taken in three unequal batches."""
    fine, coarse, x, row, directions = data
    moments = CodeMoments(F, G, "cpu")
    moments.add(fine, coarse)
    part = LevelMap.of_contributions(contributions, moments.scale())
    resampler = Resampler(ROWS, "cpu")
    own, single = MapSums(part, resampler), MapSums(moments.best_single(), resampler)
    counts = PairCounts(F, G, D, {"own": [own], "single": [single]}, "cpu")
    for first, last in ((0, 4), (4, 5), (5, ROWS)):
        kept = (row >= first) & (row < last)
        counts.add(x[kept], fine[kept], coarse[kept], first, row[kept] - first, last - first)
    children = torch.tensor([0, 5, 9])
    probes = Probes(
        children_C=children,
        directions_CD=directions[0][children] + 0.3 * directions[1][[0, 1, 2]],
        accuracy_C=torch.tensor([0.9, 0.6, 0.8]),
        candidates=8,
    )
    geometry = PairGeometry.of(counts, directions, 2, probes)
    return counts, own, single, geometry, moments.scale().fine_G > 0


def values_of(counted):
    return {name: part.value() for name, part in measures(*counted).items()}


def naive_edges(C):
    edges = {}
    for i in range(F):
        largest = max(float(C[i, j]) for j in range(G))
        edges[i] = [j for j in range(G) if C[i, j] > 0 and float(C[i, j]) >= EDGE_SHARE * largest]
    return edges


def test_sparsity_against_loops(counted, contributions):
    found, alive = values_of(counted), [j for j in range(G) if j != 4]
    ratios, hoyers, copies = [], [], []
    for i in range(F):
        row = [float(contributions[i, j]) for j in alive]
        if not any(row):
            continue
        one, two = sum(abs(value) for value in row), sum(value**2 for value in row)
        ratios.append(one**2 / two)
        hoyers.append((math.sqrt(len(row)) - one / math.sqrt(two)) / (math.sqrt(len(row)) - 1))
        copies.append(max(value**2 for value in row) / two)
    edges = naive_edges(contributions)
    parents = {j: sum(j in edges[i] for i in range(F)) for j in alive}
    with_parent = [count for count in parents.values() if count]
    assert found["participation_ratio"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-5)
    assert found["hoyer"] == pytest.approx(sum(hoyers) / len(hoyers), rel=1e-5)
    assert found["copy_index"] == pytest.approx(sum(copies) / len(copies), rel=1e-5)
    assert found["children_per_parent"] == sum(len(found) for found in edges.values()) / 4
    assert found["parents_per_child"] == sum(with_parent) / len(with_parent)
    assert found["orphan_rate"] == (len(alive) - len(with_parent)) / len(alive)


def test_composition_against_loops(counted, data, contributions):
    fine, coarse, _, _, _ = data
    found = values_of(counted)
    rms = lambda code: [math.sqrt(sum(float(v) ** 2 for v in column) / N) for column in code.T]  # noqa: E731
    rms_fine, rms_coarse = rms(fine), rms(coarse)
    weight = [
        [float(contributions[i, j]) * rms_coarse[i] / rms_fine[j] if rms_fine[j] else 0.0 for j in range(G)]
        for i in range(F)
    ]
    error = energy = firing = contributing = 0.0
    for n in range(N):
        for i in range(F):
            h = float(coarse[n, i])
            brought = [weight[i][j] * float(fine[n, j]) for j in range(G)]
            error += (sum(brought) - h) ** 2
            energy += h**2
            if h > 0:
                firing += 1
                contributing += sum(value > CONTRIBUTES * h for value in brought)
    alone = 0.0
    for i in range(F):
        left = []
        for j in range(G):
            cross = sum(float(coarse[n, i] * fine[n, j]) for n in range(N))
            square = sum(float(fine[n, j]) ** 2 for n in range(N))
            left.append(sum(float(v) ** 2 for v in coarse[:, i]) - (cross**2 / square if square else 0.0))
        alone += min(left)
    assert found["composition_fvu"] == pytest.approx(error / energy, rel=1e-4)
    assert found["runtime_l0"] == pytest.approx(contributing / firing)
    assert found["gain_over_best_input"] == pytest.approx((alone - error) / energy, rel=1e-4)


def test_counting_in_pieces_gives_the_same(counted, data, contributions, monkeypatch):
    fine, coarse, _, _, _ = data
    codes = pairs.ActiveCodes(fine, coarse)
    whole = codes.contributing(contributions)
    monkeypatch.setattr(pairs, "GATHERED", 11)
    assert torch.equal(pairs.ActiveCodes(fine, coarse).contributing(contributions), whole)
    assert whole.sum() > 0


def test_consistency_against_loops(counted, data, contributions):
    fine, coarse, x, _, directions = data
    found, edges = values_of(counted), naive_edges(contributions)
    on_fine = [{n for n in range(N) if fine[n, j] > 0} for j in range(G)]
    on_coarse = [{n for n in range(N) if coarse[n, i] > 0} for i in range(F)]
    coverages, bases, agreements, overlaps, cosines = [], [], [], [], []
    mean = [sum(float(x[n, d]) for n in range(N)) / N for d in range(D)]
    for i in range(F):
        children = [j for j in edges[i] if on_fine[j]]
        for j in children:
            coverages.append(len(on_fine[j] & on_coarse[i]) / len(on_fine[j]))
            bases.append(len(on_coarse[i]) / N)
            concept = torch.tensor(
                [sum(float(x[n, d]) for n in on_fine[j]) / len(on_fine[j]) - mean[d] for d in range(D)]
            )
            unit = directions[0][j] / directions[0][j].norm()
            left = concept - (concept @ unit) * unit
            cosines.append(float(left @ directions[1][i] / left.norm() / directions[1][i].norm()))
        if children and on_coarse[i]:
            either = set().union(*(on_fine[j] for j in children))
            tp, fp, fn = len(either & on_coarse[i]), len(either - on_coarse[i]), len(on_coarse[i] - either)
            tn = N - tp - fp - fn
            spread = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
            agreements.append((tp * tn - fp * fn) / spread if spread else 0.0)
        strongest = sorted(children, key=lambda j: -float(contributions[i, j]))[:SIBLINGS]
        both = [
            len(on_fine[a] & on_fine[b]) / len(on_fine[a] | on_fine[b])
            for place, a in enumerate(strongest)
            for b in strongest[place + 1 :]
        ]
        if both:
            overlaps.append(sum(both) / len(both))
    assert found["coverage"] == pytest.approx(sum(coverages) / len(coverages))
    assert found["coverage_lift"] == pytest.approx(sum(coverages) / sum(bases))
    assert found["or_agreement"] == pytest.approx(sum(agreements) / len(agreements), rel=1e-5)
    assert found["sibling_iou"] == pytest.approx(sum(overlaps) / len(overlaps), rel=1e-5)
    assert found["residual_cosine"] == pytest.approx(sum(cosines) / len(cosines), rel=1e-4)


def test_only_the_strongest_siblings_are_compared(counted, data, contributions, monkeypatch):
    monkeypatch.setattr("hsae.eval.hierarchy.measures.SIBLINGS", 2)
    fine, found = data[0] > 0, values_of(counted)
    overlaps = []
    for i in range(F):
        a, b = contributions[i].topk(2).indices.tolist()
        if contributions[i, b] > 0 and i != 3:
            overlaps.append(float((fine[:, a] & fine[:, b]).sum() / (fine[:, a] | fine[:, b]).sum()))
    assert found["sibling_iou"] == pytest.approx(sum(overlaps) / len(overlaps), rel=1e-5)


def test_probe_hits_against_loops(counted, data, contributions):
    _, _, _, geometry, _ = counted
    directions, probes = torch.cat(data[4]), geometry.probes
    hits = []
    for place, child in enumerate(probes.children_C.tolist()):
        shares = [float(contributions[i, child]) if child in naive_edges(contributions)[i] else 0.0 for i in range(F)]
        if probes.accuracy_C[place] < 0.7 or not any(shares):
            continue
        parent = shares.index(max(shares))
        cosines = [float(torch.cosine_similarity(probes.directions_CD[place], row, dim=0)) for row in directions]
        nearest = sorted(range(len(directions)), key=lambda place: -cosines[place])[:TOP]
        hits.append(child in nearest and G + parent in nearest)
    assert 0 < len(hits) < 3
    assert values_of(counted)["probe_top5"] == sum(hits) / len(hits)


def test_intervals_are_percentiles_over_resampled_rows(counted, data):
    """Composition FVU of each resample, by drawing rows with the same seed and adding up anew."""
    fine, coarse, _, row, _ = data
    own = counted[1]
    estimate = measures(*counted)["composition_fvu"].estimate()
    weight = own.map.weight_FG
    error = torch.stack([(fine[row == r] @ weight.T - coarse[row == r]).square().sum() for r in range(ROWS)])
    energy = torch.stack([coarse[row == r].square().sum() for r in range(ROWS)])
    generator, drawn = torch.Generator().manual_seed(0), []
    for _ in range(1000):
        picked = torch.randint(ROWS, (ROWS,), generator=generator)
        drawn.append(float(error[picked].sum() / energy[picked].sum()))
    wanted = torch.tensor(drawn, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    assert (estimate.low, estimate.high) == pytest.approx(tuple(wanted.tolist()), rel=1e-4)
    assert estimate.over == "rows" and estimate.low < estimate.value < estimate.high


def test_intervals_over_units_hold_the_mean_and_narrow_with_units():
    widths = []
    for units in (20, 2000):
        values = torch.rand(units, generator=torch.Generator().manual_seed(units))
        estimate = UnitMean(values, torch.ones(units), "coarse latents").estimate()
        assert estimate.low < estimate.value < estimate.high and estimate.over == "coarse latents"
        widths.append(estimate.high - estimate.low)
    assert widths[1] == pytest.approx(2 * 1.96 / math.sqrt(12 * 2000), rel=0.1) and widths[0] > 5 * widths[1]
    alone = UnitMean(torch.tensor([0.5, 9.0]), torch.tensor([1, 0]), "coarse latents").estimate()
    assert (alone.value, alone.low, alone.over) == (0.5, None, None)
    assert UnitMean(torch.zeros(3), torch.zeros(3), "coarse latents").estimate().value is None


def test_matthews_is_the_correlation_of_two_firings():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 97, generator=generator) < 0.4
    wanted = torch.corrcoef(torch.stack([first, second]).double())[0, 1]
    counts = [part.sum().double() for part in (first & second, first, second)]
    assert float(matthews(*counts, 97)) == pytest.approx(float(wanted))
    assert float(matthews(torch.tensor(5.0), torch.tensor(5.0), torch.tensor(97.0), 97)) == 0


# ---- nulls ---------------------------------------------------------------------------------------------------------


def test_nulls_keep_what_they_say_and_leave_dead_latents_alone():
    generator = torch.Generator().manual_seed(1)
    given = torch.rand(9, 31, generator=generator) * (torch.rand(9, 31, generator=generator) < 0.4)
    alive = torch.ones(31, dtype=torch.bool)
    alive[[2, 30]] = False
    given[:, ~alive] = 0
    seen = {"permuted": [], "random": []}
    for name, drawn in maps.nulls(given, alive, draws=3):
        assert not drawn[:, ~alive].any()
        assert torch.equal((drawn != 0).sum(1), (given > maps.VISIBLE).sum(1))
        if name == "permuted":
            assert torch.equal(drawn.sort(1).values, given.sort(1).values) and not torch.equal(drawn, given)
        seen[name].append(drawn)
    for name, draws in seen.items():
        assert len(draws) == 3 and not torch.equal(draws[0], draws[1])
        again = [drawn for which, drawn in maps.nulls(given, alive, draws=3) if which == name]
        assert all(torch.equal(a, b) for a, b in zip(draws, again, strict=True))


def test_random_maps_have_the_participation_ratio_of_half_normal_weights():
    """(E|c|)^2 / E c^2 = 2 / pi of the entries."""
    given = torch.rand(300, 997).add(0.1)
    given[:, 500:] = 0
    drawn = maps.half_normal(given, torch.ones(997, dtype=torch.bool), torch.Generator().manual_seed(0))
    assert float(maps.participation_ratio(drawn).mean()) == pytest.approx(2 * 500 / math.pi, rel=0.01)
    ratio = drawn.square().sum(1) / given.square().sum(1)
    assert float(ratio.mean()) == pytest.approx(1, abs=0.02)


def test_permuted_maps_have_chance_coverage_and_no_or_agreement():
    """With codes that fire independently, the lift of any map is 1 and its OR agreement 0 on average."""
    generator = torch.Generator().manual_seed(5)
    tokens, coarse, fine = 4000, 11, 37
    codes = [torch.rand(tokens, width, generator=generator) * (torch.rand(tokens, width, generator=generator) < 0.1)
             for width in (fine, coarse)]  # fmt: skip
    given = torch.rand(coarse, fine, generator=generator) * (torch.rand(coarse, fine, generator=generator) < 0.2)
    moments = CodeMoments(coarse, fine, "cpu")
    moments.add(*codes)
    alive, lifts, agreements = torch.ones(fine, dtype=torch.bool), [], []
    for _, drawn in maps.nulls(given, alive, draws=8):
        part = MapSums(LevelMap.of_contributions(drawn, moments.scale()), None)
        counts = PairCounts(coarse, fine, D, {"own": [part]}, "cpu")
        counts.add(torch.zeros(tokens, D), *codes, 0, torch.zeros(tokens, dtype=torch.long), 1)
        geometry = PairGeometry.of(counts, (torch.ones(fine, D), torch.ones(coarse, D)), 2, None)
        found = measures(counts, part, part, geometry, alive)
        lifts.append(found["coverage_lift"].value())
        agreements.append(found["or_agreement"].value())
    assert sum(lifts) / len(lifts) == pytest.approx(1, abs=0.03)
    assert sum(agreements) / len(agreements) == pytest.approx(0, abs=0.01)


# ---- fitted maps and probes ----------------------------------------------------------------------------------------


def test_the_fit_is_the_optimum_that_coordinate_descent_finds():
    generator = torch.Generator().manual_seed(6)
    fine, coarse = torch.rand(401, G, generator=generator).pow(3), torch.rand(401, F, generator=generator)
    M, N_FG, l1 = fine.T @ fine / 401, coarse.T @ fine / 401, 0.02
    found = nonnegative(M, N_FG, l1)
    W = torch.zeros(F, G, dtype=torch.float64)
    for _ in range(400):
        for j in range(G):
            rest = W @ M[:, j].double() - W[:, j] * M[j, j]
            W[:, j] = ((N_FG[:, j] - rest - l1) / M[j, j]).clamp_min(0)
    torch.testing.assert_close(found.double(), W, rtol=0, atol=2e-3)
    assert (found == 0).any() and (found > 0.1).any()


def test_moments_in_pieces_and_scales(data):
    fine, coarse, _, _, _ = data
    moments = CodeMoments(F, G, "cpu")
    for start, stop in ((0, 50), (50, 51), (51, N)):
        moments.add(fine[start:stop], coarse[start:stop])
    torch.testing.assert_close(moments.cross_FG, coarse.T @ fine)
    torch.testing.assert_close(moments.scale().fine_G, fine.square().mean(0).sqrt())
    torch.testing.assert_close(moments.scale().coarse_F, coarse.square().mean(0).sqrt())
    fitted = moments.fit()
    assert not fitted.contributions_FG[3].any() and not fitted.contributions_FG[:, 4].any()
    torch.testing.assert_close(moments.scale().contributions(fitted.weight_FG), fitted.contributions_FG)


def test_contributions_and_weights_are_inverse_where_latents_fire():
    scale = CodeScale(coarse_F=torch.tensor([0.5, 0.0, 2.0]), fine_G=torch.tensor([1.0, 3.0, 0.0, 0.2]))
    weight = torch.rand(3, 4)
    given = scale.contributions(weight)
    assert float(given[2, 1]) == pytest.approx(float(weight[2, 1]) * 3 / 2)
    back = scale.weight(given)
    assert not back[1].any() and not back[:, 2].any()
    torch.testing.assert_close(back[0, [0, 1, 3]], weight[0, [0, 1, 3]])


def test_probes_find_the_directions_that_decide_and_fail_where_nothing_does():
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(3000, 11, generator=generator)
    true = torch.nn.functional.normalize(torch.randn(3, 11, generator=generator))
    fires = torch.zeros(3000, 6, dtype=torch.bool)
    fires[:, [0, 2, 5]] = x @ true.T > 1.2
    fires[:, 1] = torch.rand(3000, generator=generator) < 0.2  # has nothing to do with x
    fires[:5, 3] = True  # fires too seldom
    fires[:, 4] = True  # has nothing to tell apart
    probes = train_probes(x, fires)
    assert probes.children_C.tolist() == [0, 1, 2, 5] and probes.candidates == 4
    assert probes.valid_C.tolist() == [True, False, True, True]
    cosines = torch.cosine_similarity(probes.directions_CD[[0, 2, 3]], true)
    assert float(cosines.min()) > 0.95
    again = train_probes(x, fires)
    assert torch.equal(again.directions_CD, probes.directions_CD)
