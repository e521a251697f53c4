"""Synthetic worlds, the scores against their truth, and the command: oracles in plain loops, pairwise different
sizes.
"""

import json
import math
from dataclasses import replace

import pytest
import torch
from models import changed
from typer.testing import CliRunner

from hsae.cache.errors import UserError
from hsae.cli.main import app
from hsae.eval.harness.listener import Listener
from hsae.eval.synthetic import scores, synthetic_evaluation
from hsae.eval.synthetic.compared_runs import load_arms, split_widths
from hsae.eval.synthetic.synthetic_evaluation import evaluate_synthetic, fingerprint, read_results
from hsae.eval.synthetic.worlds import HELD_OUT, TIERS, World, _raise
from hsae.train.model.hierarchical_sae import AdditiveSAE, CompositionMap
from hsae.train.model.sae import SAE

SMALL = replace(
    TIERS["T2"],
    name="small",
    width=11,
    roots=3,
    branching=2,
    singles=4,
    directions="orthogonal",
    latents=17,
    spread=0.0,
)  # 13 features in 11 dimensions would not be orthogonal
SMALL = replace(SMALL, width=19)
SMALL_ZIPF = replace(TIERS["T3"], name="small-zipf", width=11, roots=2, branching=3, depth=2, singles=5, latents=9)


# --- worlds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", [SMALL, TIERS["T1"], TIERS["T2"], SMALL_ZIPF], ids=lambda tier: tier.name)
def test_a_world_is_a_pure_function_of_tier_seed_and_step(tier):
    world, again, other = World(tier, 3), World(tier, 3), World(tier, 4)
    batch = next(again.batches(5))  # steps taken before don't matter
    assert torch.equal(world.batch(7, 31).x, again.batch(7, 31).x)
    assert torch.equal(batch.features, world.batch(0, 5).features)
    assert not torch.equal(world.batch(7, 31).x, world.batch(8, 31).x)
    assert not torch.equal(world.directions, other.directions)
    assert not torch.equal(world.batch(7, 31).features, other.batch(7, 31).features)
    batch = world.batch(2, 31)
    expected = [sum(a * d for a, d in zip(row, world.directions, strict=True)) + world.bias for row in batch.features]
    torch.testing.assert_close(batch.x, torch.stack(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(world.directions.norm(dim=1), torch.ones(tier.features))


@pytest.mark.parametrize("tier", [SMALL, TIERS["T1"], TIERS["T2"], SMALL_ZIPF], ids=lambda tier: tier.name)
def test_children_fire_only_under_their_parent_and_one_at_a_time(tier):
    world = World(tier, 0)
    on = world.batch(1, 4001).features > 0
    for parent in range(tier.features):
        children = [child for child in range(tier.features) if world.parents[child] == parent]
        assert len(children) in (0, tier.branching)
        if children:
            assert not (on[:, children].any(1) & ~on[:, parent]).any()
            assert on[:, children].sum(1).max() == 1
    assert sum(parent >= 0 for parent in world.parents.tolist()) == tier.features - tier.roots - tier.singles


@pytest.mark.parametrize("name", ["T1", "T2"])
def test_frequencies_are_those_of_the_tier(name):
    tier = TIERS[name]
    world, vectors = World(tier, 1), 60_000
    on = torch.cat([batch.features > 0 for batch in world.held_out(vectors)]).float().mean(0)
    root, child, single = tier.frequencies
    wanted = [root] * tier.roots + [root * child] * (tier.roots * tier.branching) + [single] * tier.singles
    for found, probability in zip(on.tolist(), wanted, strict=True):
        assert abs(found - probability) < 5 * math.sqrt(probability * (1 - probability) / vectors)
    assert (name, tier.width, tier.features) in {("T1", 28, 20), ("T2", 48, 60)}


def test_a_child_is_scaled_by_its_parent_where_the_tier_says_so():
    scaled = replace(SMALL, spread=0.2)
    batch = World(scaled, 0).batch(0, 20_000).features
    plain = World(replace(scaled, scaled_children=False), 0).batch(0, 20_000).features
    parents = World(scaled, 0).parents
    for child in (3, 8):
        parent = int(parents[child])
        on = batch[:, child] > 0
        torch.testing.assert_close(batch[on, child], plain[on, child] * batch[on, parent])


def test_directions_are_orthogonal_random_or_repelled():
    rows = World(TIERS["T1"], 0).directions
    torch.testing.assert_close(rows @ rows.T, torch.eye(20), rtol=0, atol=1e-6)
    cosines = {}
    for kind in ("random", "repelled"):
        rows = World(replace(SMALL_ZIPF, directions=kind), 0).directions
        cosines[kind] = (rows @ rows.T - torch.eye(len(rows))).square().mean().item()
    assert cosines["repelled"] < 0.98 * cosines["random"]


def test_zipf_probabilities_are_raise_for_gating_and_siblings():
    wanted = torch.tensor([0.4, 0.1, 0.05, 0.02, 0.3])
    parents = torch.tensor([-1, 0, 0, 0, -1])
    expected = []
    for feature, parent in enumerate(parents.tolist()):
        if parent < 0:
            expected.append(wanted[feature].item())
            continue
        siblings = sum(wanted[other].item() for other in range(5) if parents[other] == parent and other != feature)
        above = wanted[parent].item()
        expected.append(wanted[feature].item() / above * (1 + siblings / above))
    torch.testing.assert_close(_raise(wanted, parents), torch.tensor(expected))


def test_t3_full_has_the_size_of_its_recipe():
    tier = TIERS["T3-full"]
    assert (tier.features, tier.width, tier.roots, tier.branching, tier.depth) == (16_384, 768, 128, 4, 3)
    assert tier.features - tier.singles == 128 * (1 + 4 + 16 + 64)
    with pytest.raises(UserError, match=r"^no tier 'T4'; there are T1, T2, T3, T3-full$"):
        load_arms("T4")


def test_scaling_is_that_of_the_vectors():
    world = World(SMALL_ZIPF, 0)
    scaling = world.scaling()
    x = torch.cat([batch.x for batch in world.held_out(8192)]).double() * scaling.scale
    assert x.square().sum(1).mean().item() == pytest.approx(11, rel=1e-6)
    assert scaling.variance == pytest.approx(x.var(0, correction=0).sum().item(), rel=1e-6)
    distances = [(x - point).norm(dim=1).sum().item() for point in (scaling.median.double(), x.mean(0), x[0])]
    assert distances[0] == min(distances)
    assert torch.equal(next(world.held_out(50)).x, world.batch(HELD_OUT, 50).x)


# --- scores ------------------------------------------------------------------------------------------------------


def perfect(world, fine, coarse, contributions=True):
    """An additive model whose latents are the given true features, and its map the true tree."""
    rows = [world.directions[features] for features in (fine, coarse)]
    levels = tuple(
        SAE(
            name=f"level{number}", architecture="jumprelu", W_enc=part.T.contiguous(), W_dec=part,
            b_enc=torch.zeros(len(part)), b_dec=torch.zeros(world.tier.width),
            extra={"threshold": torch.full((len(part),), 0.1)},
        )
        for number, part in enumerate(rows, 1)
    )  # fmt: skip
    weight = torch.tensor([[float(world.parents[child] == parent) * 0.4 for child in fine] for parent in coarse])
    maps = (CompositionMap(level=2, weight=weight, contributions=weight),) if contributions else ()
    return AdditiveSAE(levels, maps)


def test_the_truth_scores_one_by_either_reading():
    world = World(SMALL, 0)
    fine, coarse = [*range(3, 9), 11, 12], [0, 1, 2, 9, 10]
    result = scores.score(perfect(world, fine, coarse), world, vectors=5000)
    ones = ("parent_f1", "child_f1", "single_f1", "mmc", "edge_precision", "edge_recall", "edge_f1", "firing_edge_f1")
    assert {name: result[name] for name in ones} == pytest.approx(dict.fromkeys(ones, 1.0), abs=1e-6)
    assert result["ev"] == pytest.approx(1, abs=1e-5) and result["absorption"] == 0
    assert result["edge_reading"] == "composition" and result["unmapped_latents"] == 0
    assert 0 < result["edge_f1_permuted"] < 0.5 and 0 < result["edge_f1_random"] < 0.5
    without = scores.score(perfect(world, fine, coarse, contributions=False), world, vectors=5000)
    assert without["edge_reading"] == "firing" and without["edge_f1"] == 1 and without["edge_f1_random"] is None


def test_a_latent_that_absorbs_a_child_shows_as_absorption_and_as_a_lost_edge():
    world = World(SMALL, 0)
    model = perfect(world, [*range(3, 9), 11, 12], [0, 1, 2, 9, 10])
    W_enc = model.levels[1].W_enc.clone()
    W_enc[:, 0] -= 2 * world.directions[3]  # parent 0 is silent where its child 3 fires
    absorbed = AdditiveSAE([model.levels[0], changed(model.levels[1], W_enc=W_enc)])
    result = scores.score(absorbed, world, vectors=5000)
    assert result["absorption"] == pytest.approx(1 / 6)
    assert result["firing_edge_recall"] == pytest.approx(5 / 6) and result["firing_edge_precision"] == 1
    assert result["parent_f1"] < 1 and result["child_f1"] == 1


def random_model(world, seed, levels=(7, 4)):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number, width in enumerate(levels, 1):
        chosen = torch.randint(world.tier.features, (width,), generator=generator)
        rows = world.directions[chosen] + 0.3 * torch.randn(width, world.tier.width, generator=generator)
        made.append(
            SAE(
                name=f"level{number}", architecture="standard", W_enc=rows.T.contiguous(), W_dec=rows,
                b_enc=-0.5 * torch.rand(width, generator=generator),
                b_dec=0.1 * torch.randn(world.tier.width, generator=generator) if number == 1 else made[0].b_dec,
            )
        )  # fmt: skip
    shares = torch.rand(levels[1], levels[0], generator=generator) ** 3
    maps = (CompositionMap(level=2, weight=shares, contributions=shares),)
    return AdditiveSAE(tuple(made), maps)


@pytest.mark.parametrize("seed", range(3))
def test_every_score_is_that_of_plain_loops(seed):
    world = World(SMALL, seed)
    model = random_model(world, seed)
    result = scores.score(model, world, vectors=700)
    batch = next(world.held_out(700))
    codes = torch.cat(model.codes(batch.x), 1)
    latents, features = codes.shape[1], world.tier.features
    fires, on = [set((codes[:, i] > 0).nonzero().flatten().tolist()) for i in range(latents)], []
    on = [set((batch.features[:, f] > 0).nonzero().flatten().tolist()) for f in range(features)]
    f1 = [[2 * len(a & b) / max(1, len(a) + len(b)) for b in on] for a in fires]
    best = [max(range(latents), key=lambda i: f1[i][f]) for f in range(features)]
    parents = world.parents.tolist()
    is_parent = [f in parents for f in range(features)]

    def average(values):
        values = list(values)
        return sum(values) / len(values)

    children = [f for f in range(features) if parents[f] >= 0]
    assert result["parent_f1"] == pytest.approx(average(f1[best[f]][f] for f in range(features) if is_parent[f]))
    assert result["child_f1"] == pytest.approx(average(f1[best[f]][f] for f in children))
    off = [len(on[c] - fires[best[parents[c]]]) / len(on[c]) for c in children]
    assert result["absorption"] == pytest.approx(average(off))
    rows = torch.cat([level.W_dec for level in model.levels])
    cosine = torch.nn.functional.cosine_similarity(rows[:, None], world.directions[None], dim=-1)
    assert result["mmc"] == pytest.approx(cosine.max(0).values.mean().item(), abs=1e-6)
    x = batch.x.double()
    rebuilt = model.levels[0].b_dec + codes @ rows
    unexplained = (x - rebuilt).square().sum() / (x - x.mean(0)).square().sum()
    assert result["ev"] == pytest.approx(1 - unexplained.item(), abs=1e-5)
    assert result["l0"] == pytest.approx([sum(map(len, fires[:7])) / 700, sum(map(len, fires[7:])) / 700])
    assert result["dead_latents"] == sum(not where for where in fires)

    stands = [max(range(features), key=lambda f: f1[i][f]) for i in range(latents)]
    stands = [f if f1[i][f] > 0.5 else None for i, f in enumerate(stands)]
    assert result["unmapped_latents"] == stands.count(None)

    def edge_f1(edges):
        right = [(p, c) for p, c in edges if None not in (stands[p], stands[c]) and parents[stands[c]] == stands[p]]
        if not right:
            return 0.0, 0.0, 0.0
        precision, recall = len(right) / len(edges), len({stands[c] for _, c in right}) / len(children)
        return precision, recall, 2 * precision * recall / (precision + recall)

    shares = model.compositions[0].contributions.tolist()
    edges = [(7 + i, j) for i in range(4) for j in range(7) if shares[i][j] >= max(0.1, 0.1 * max(shares[i]))]
    assert [result[f"edge_{name}"] for name in ("precision", "recall", "f1")] == pytest.approx(edge_f1(edges))
    edges = []
    for child in range(latents):
        above = [p for p in range(latents) if len(fires[p]) > len(fires[child]) > 0]
        given = {p: len(fires[p] & fires[child]) / len(fires[child]) for p in above}
        given = {p: share for p, share in given.items() if share >= 2 * len(fires[p]) / 700}
        if given and max(given.values()) >= 0.5:
            edges.append((max(given, key=given.get), child))
    assert [result[f"firing_edge_{name}"] for name in ("precision", "recall", "f1")] == pytest.approx(edge_f1(edges))


def test_an_unmapped_or_misplaced_edge_counts_as_wrong_and_a_doubled_one_not_twice_in_recall():
    parents = torch.tensor([-1, -1, 0, 0, 1])
    mapped = torch.tensor([0, 1, 2, 2, 3, 4, -1])
    edges = torch.tensor([[0, 2], [0, 3], [0, 6], [1, 4], [1, 5]])
    f1 = 2 * 0.6 * (2 / 3) / (0.6 + 2 / 3)
    assert scores.edge_scores(edges, mapped, parents) == pytest.approx({"precision": 3 / 5, "recall": 2 / 3, "f1": f1})
    nothing = scores.edge_scores(torch.empty(0, 2, dtype=torch.int64), mapped, parents)
    assert nothing == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


def test_speck_of_noise_is_no_edge():
    shares = torch.tensor([[0.5, 0.04, 0.2], [0.05, 0.01, 0.0], [0.0, 0.0, 0.0], [2.0, 0.15, 0.3]])
    assert scores.cut(shares).tolist() == [[True, False, True], [False] * 3, [False] * 3, [True, False, True]]


# --- arms and results -------------------------------------------------------------------------------------------


def test_the_arms_are_the_plans_runs_with_the_tiers_size_and_matched_l0():
    arms = load_arms("T2")
    assert list(arms.runs) == list(range(14))
    assert [arms.runs[number].name for number in (0, 3, 6, 7, 11, 12, 13)] == [
        "baseline", "full", "frozen-w", "probe-w", "batchtopk", "matryoshka", "literal",
    ]  # fmt: skip
    for run in arms.runs.values():
        assert sum(run.widths) == 64 and sum(run.l0) == pytest.approx(3.2)
        assert run.structure == "flat" or (run.widths, run.l0) == ((48, 16), (1.6, 1.6))
    assert split_widths(64, 3) == [48, 12, 4] and split_widths(17, 1) == [17]
    changed = load_arms("T1", ["train.tokens=5000", "runs.3.composition.weight=0.7"])
    assert changed.train.tokens == 5000 and changed.runs[3].composition.weight == 0.7
    with pytest.raises(UserError, match=r"--set 'cache.dir=x': write it as table\.key=value"):
        load_arms("T1", ["cache.dir=x"])
    with pytest.raises(UserError, match=r"^no run 'nonsense' in the synthetic arms; it has 0 \(baseline\), 1 "):
        arms.select("nonsense")


def small_run(folder, names="full,batchtopk", seeds=(0, 1), overrides=(), **options):
    arms = load_arms("T1", ["train.tokens=6000", "train.batch_tokens=200", *overrides])
    result = evaluate_synthetic(arms, arms.select(names), seeds, folder=folder, vectors=900, device="cpu", **options)
    return result.content


@pytest.fixture
def trained(monkeypatch):
    """(run, seed) of everything that is trained."""
    began, real = [], synthetic_evaluation.train_and_score

    def record(config, world, *rest):
        began.append((config.name, world.seed))
        return real(config, world, *rest)

    monkeypatch.setattr(synthetic_evaluation, "train_and_score", record)
    return began


class Recorder(Listener):
    def __init__(self):
        self.last = {}

    def progress(self, phase, done, total):
        assert done >= self.last.get(phase, (0, total))[0]
        self.last[phase] = done, total


def test_results_are_kept_seed_by_seed_and_not_computed_again(tmp_path, trained):
    recorder = Recorder()
    small_run(tmp_path, seeds=[0])
    first = (tmp_path / "T1.json").read_text()
    content = small_run(tmp_path, listener=recorder)
    assert trained == [("full", 0), ("batchtopk", 0), ("full", 1), ("batchtopk", 1)]
    assert recorder.last == {"3 full": (60, 60), "11 batchtopk": (60, 60)}
    assert read_results(tmp_path / "T1.json") == content
    full = content["arms"]["full"]
    assert full["seeds"][0] == json.loads(first)["arms"]["full"]["seeds"][0]
    values = [row["parent_f1"] for row in full["seeds"]]
    assert full["mean"]["parent_f1"] == pytest.approx(sum(values) / 2)
    assert full["sd"]["parent_f1"] == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2))
    assert json.loads(first)["arms"]["full"]["sd"]["parent_f1"] is None
    assert "random" in json.dumps(list(full["mean"])) and "edge_f1_random" not in content["arms"]["batchtopk"]["mean"]
    again = small_run(tmp_path / "again", seeds=[1, 0])
    assert again["arms"] == content["arms"]  # neither order nor history changes a bit
    trained.clear()
    small_run(tmp_path, names="full", force=True)
    assert trained == [("full", 0), ("full", 1)]
    assert read_results(tmp_path / "T1.json")["arms"] == content["arms"]


def test_results_of_other_settings_are_neither_mixed_nor_lost(tmp_path):
    small_run(tmp_path, names="batchtopk", seeds=[0])
    before = (tmp_path / "T1.json").read_text()
    with pytest.raises(UserError, match=r"T1.json holds results of other settings \(tokens 6000, now 8000\); --force"):
        small_run(tmp_path, seeds=[0], overrides=["train.tokens=8000"])
    with pytest.raises(UserError, match=r"T1.json holds results of another configuration of batchtopk; --force"):
        small_run(tmp_path, seeds=[0], overrides=["runs.11.aux_weight=0.5"])
    assert (tmp_path / "T1.json").read_text() == before
    (tmp_path / "T1.json").write_text(before[:200])
    with pytest.raises(UserError, match=r"T1.json is not a result file.*remove the file first"):
        small_run(tmp_path, seeds=[0])
    arms = load_arms("T1")
    marks = {fingerprint(run, {"tokens": tokens}) for run in (arms.runs[3], arms.runs[4]) for tokens in (1, 2)}
    assert len(marks) == 4


def test_an_arm_that_diverges_is_recorded_and_the_others_go_on(tmp_path):
    content = small_run(tmp_path, overrides=["runs.3.learning_rate=1e30", "runs.3.gradient_clip=1e30"], seeds=[0])
    assert "became nan" in content["arms"]["full"]["seeds"][0]["failure"] and content["arms"]["full"]["mean"] == {}
    assert content["arms"]["batchtopk"]["mean"]["ev"] > 0


def test_a_stack_is_scored_from_its_cascade(tmp_path):
    content = small_run(tmp_path, names="stacked,literal", seeds=[0])
    for arm in content["arms"].values():
        row = arm["seeds"][0]
        assert len(row["l0"]) == 2 and row["edge_reading"] == "composition" and 0 < row["mmc"] <= 1


def test_the_command_prints_a_table_and_says_where_the_results_are(tmp_path):
    arguments = [
        "eval",
        "synthetic",
        "--tier",
        "T1",
        "--run",
        "3,11",
        "--seeds",
        "2",
        "--tokens",
        "4096",
        "--out",
        str(tmp_path),
    ]
    result = CliRunner().invoke(app, [*arguments, "--set", "train.batch_tokens=256", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    tables = result.output[result.output.index("T1: 20 features in 28 dimensions, 4,096 vectors; mean ±") :]
    held = json.loads((tmp_path / "T1.json").read_text())
    assert held["settings"]["tokens"] == 4096 and list(held["arms"]) == ["full", "batchtopk"]
    for name, arm in held["arms"].items():
        lines = [line for line in tables.splitlines() if f" {name} " in line]
        assert [line.split()[2].split("±")[0] for line in lines] == [
            f"{arm['mean'][score]:.3f}".removeprefix("0") for score in ("parent_f1", "edge_precision")
        ]
    assert result.output.splitlines()[-1] == f"results in {tmp_path / 'T1'}.json"
