"""Every loss against a naive computation and float64 autograd, on pairwise different sizes (B=11, D=7, F1=13, F2=5)."""

import functools
import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from hsae.train.config.run_config import CompositionConfig, RunConfig
from hsae.train.model.composition_map import Composition
from hsae.train.model.fused import Compiled
from hsae.train.model.levels import GatedLevel, ReLULevel, TopKLevel
from hsae.train.model.trainable_sae import TRAINABLE
from hsae.train.parallel.workers import ALONE
from hsae.train.training.scaling import Scaling
from hsae.train.training.training_losses import (
    Dead,
    LevelStep,
    SparsityController,
    auxiliary,
    explained_variance,
    fraction_unexplained,
    gate,
)
from hsae.train.training.training_run import TrainingRun, map_failures

B, D, F1, F2 = 11, 7, 13, 5


def config(**changes):
    values = {"number": 3, "name": "r", "structure": "additive", "widths": (F1, F2), "l0": (3, 2)}
    return RunConfig(**{**values, **changes})


def vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def double(module):
    return module.double()


def test_fraction_unexplained_and_explained_variance():
    x, reconstruction = vectors(B, D), vectors(B, D, seed=1)
    squared = sum(float((a - b) ** 2) for a, b in zip(x.flatten(), reconstruction.flatten(), strict=True))
    assert fraction_unexplained(x, reconstruction, 2.5).item() == pytest.approx(squared / B / 2.5, rel=1e-6)
    centred = sum(float(((x[:, d] - x[:, d].mean()) ** 2).sum()) for d in range(D))
    assert explained_variance(x, reconstruction.float().double()).item() == pytest.approx(
        1 - squared / centred, rel=1e-5
    )


def trainable(**changes):
    settings = config(**changes)
    return TRAINABLE[settings.structure](settings, D)


def step(level, output, x, decoded, bias, dead=None, **changes):
    """One level's step with variance 1.7."""
    return LevelStep(
        config=config(aux_weight=1, **changes), number=1, level=level, output=output, bias_I=bias, x_BD=x,
        dead=Dead.of(torch.zeros(F1) > 0 if dead is None else dead),
        reconstruction_BD=decoded, target_BI=x, decoded_BI=decoded, variance=1.7, coefficient=torch.tensor(1.0),
    )  # fmt: skip


@pytest.mark.parametrize("structure", ["additive", "stacked"])
@pytest.mark.parametrize("activation", ["relu", "batchtopk"])
def test_forward_is_the_formula(structure, activation):
    model = double(trainable(structure=structure, activation=activation)).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * vectors(*parameter.shape, seed=parameter.numel()))
    x = vectors(B, D)

    def code(level, pre):
        acts = pre.relu()
        if activation == "batchtopk":
            kept = acts.flatten().sort(descending=True).values[: round(B * level.l0)].min()
            acts = torch.where(acts >= kept, acts, 0.0)
        return acts

    one, two, output = model.level(1), model.level(2), model(x)
    h1 = code(one, (x - model.bias(1)) @ one.W_enc + one.b_enc)
    if structure == "additive":
        h2 = code(two, (x - model.bias(1)) @ two.W_enc + two.b_enc)
        coarse = model.bias(1) + h2 @ two.W_dec
        fine = coarse + h1 @ one.W_dec
    else:
        h2 = code(two, (h1 - model.bias(2)) @ two.W_enc + two.b_enc)
        fine = h1 @ one.W_dec + model.bias(1)
        coarse = (h2 @ two.W_dec + model.bias(2)) @ one.W_dec + model.bias(1)
    torch.testing.assert_close(output.levels[1].acts, h1)
    torch.testing.assert_close(output.levels[2].acts, h2)
    torch.testing.assert_close(output.reconstructions[1], fine)
    torch.testing.assert_close(output.reconstructions[2], coarse)


def test_batchtopk_keeps_exactly_k_a_token_on_average_and_tracks_its_threshold():
    model = trainable().train()
    acts = model(vectors(B, D).float()).levels[1].acts
    assert (acts > 0).sum() == B * 3
    assert model.level(1).threshold == acts[acts > 0].min()
    model.eval()
    evaluated = model(vectors(B, D).float()).levels[1]
    assert torch.equal(evaluated.acts > 0, evaluated.pre > model.level(1).threshold)


def test_stacked_losses_of_level_two_reach_level_one_only_without_stop_gradient():
    for stop in (True, False):
        model = trainable(structure="stacked", stop_gradient=stop).train()
        model(vectors(B, D).float()).reconstructions[2].square().sum().backward()
        touched = model.level(1).W_enc.grad is not None or model.level(1).W_dec.grad is not None
        assert touched is not stop
        assert model.level(2).W_dec.grad is not None


def test_gradients_of_the_reconstruction_and_sparsity_losses_match_finite_differences():
    level = double(ReLULevel(D, F1, config(activation="relu"), 3.0, torch.Generator().manual_seed(0)))
    x, bias = vectors(B, D), vectors(D, seed=2)

    def losses(W_enc, W_dec, b_enc):
        output = torch.func.functional_call(level, {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc}, (x, bias))
        return fraction_unexplained(x, output.decoded + bias, 1.7) + 0.3 * output.acts.sum(1).mean()

    inputs = tuple(tensor.detach().clone().requires_grad_() for tensor in (level.W_enc, level.W_dec, level.b_enc))
    assert torch.autograd.gradcheck(losses, inputs)


def test_gradients_of_the_auxiliary_loss_match_finite_differences():
    level = double(ReLULevel(D, F1, config(activation="relu"), 3.0, torch.Generator().manual_seed(0)))
    x, bias, dead = vectors(B, D), vectors(D, seed=2), torch.arange(F1) % 3 == 1

    def loss(W_enc, W_dec):
        changed = {"W_enc": W_enc, "b_enc": level.b_enc, "W_dec": W_dec, "latents": level.latents, "workers": ALONE}
        stand_in = SimpleNamespace(**changed, revives_dead=True)
        return auxiliary(step(stand_in, level(x, bias), x, x * 0.3, bias, dead, aux_latents=2))

    inputs = tuple(tensor.detach().clone().requires_grad_() for tensor in (level.W_enc, level.W_dec))
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("mode", ["normalised", "literal"])
def test_gradients_of_the_composition_losses_match_finite_differences(mode):
    module = composition(mode=mode, commitment=0.0).double()
    fine, coarse = vectors(B, F1).abs().requires_grad_(), vectors(B, F2, seed=1).abs().requires_grad_()
    module.track(fine, coarse)

    target = (
        coarse if mode == "literal" else coarse.detach()
    )  # normalised: W and the fine code learn, the coarse one stands

    def loss(W, fine, *rest):
        return torch.func.functional_call(SimpleModule(module), {"inner.W": W}, (fine, *(rest or (target,))))

    W = vectors(F2, F1, seed=3).abs().requires_grad_()
    assert torch.autograd.gradcheck(loss, (W, fine, coarse) if mode == "literal" else (W, fine))


class SimpleModule(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, fine, coarse):
        return self.inner.loss(fine, coarse)


def test_auxiliary_is_the_dead_latents_reconstruction_of_what_is_left():
    level = TopKLevel(D, F1, config(), 3.0, torch.Generator().manual_seed(0))
    x, bias = vectors(B, D).float(), torch.zeros(D)
    output, dead = level(x, bias), torch.zeros(F1, dtype=torch.bool)
    assert auxiliary(step(level, output, x, output.decoded, bias, dead, aux_latents=4)).item() == 0
    dead[[1, 4, 6, 9, 12]] = True
    loss = auxiliary(step(level, output, x, output.decoded, bias, dead, aux_latents=512))
    residual, k = (x - output.decoded).detach(), D // 2
    naive = 0.0
    for row in range(B):
        chosen = sorted((i for i in range(F1) if dead[i]), key=lambda i, row=row: -output.pre[row, i].item())[:k]
        rebuilt = sum((output.pre[row, i].clamp_min(0) * level.W_dec[i] for i in chosen), torch.zeros(D))
        naive += (residual[row] - rebuilt).square().sum().item()
    assert loss.item() == pytest.approx(naive / residual.square().sum().item(), rel=1e-5)
    loss.backward()
    assert level.W_dec.grad is not None and level.W_dec.grad[dead].abs().sum() > 0
    assert level.W_dec.grad[~dead].abs().sum() == 0


def composition(**changes):
    return Composition(
        F1, F2, CompositionConfig(**{"mode": "normalised", "l1": 0.5, **changes}), torch.Generator().manual_seed(0)
    )


def test_normalised_composition_loss_and_where_its_gradients_go():
    module = composition(commitment=0.25).double()
    fine, coarse = vectors(B, F1).relu().requires_grad_(), vectors(B, F2, seed=1).relu().requires_grad_()
    module.track(fine, coarse)
    rms_fine, rms_coarse = fine.square().mean(0).sqrt().detach(), coarse.square().mean(0).sqrt().detach()
    torch.testing.assert_close(module.rms_fine.double(), rms_fine, rtol=1e-5, atol=1e-7)
    difference = (fine / rms_fine) @ module.W.T - coarse / rms_coarse
    loss = module.loss(fine, coarse)
    assert loss.item() == pytest.approx(1.25 * difference.square().mean().item(), rel=1e-5)
    loss.backward()
    scale = 2 / difference.numel()
    torch.testing.assert_close(fine.grad, scale * (difference @ module.W.detach()) / rms_fine, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(coarse.grad, -0.25 * scale * difference.detach() / rms_coarse, rtol=1e-4, atol=1e-9)


def test_literal_composition_loss():
    module = composition(mode="literal").double()
    fine, coarse = vectors(B, F1), vectors(B, F2, seed=1)
    naive = (
        sum(((module.W @ fine[b] - coarse[b]) ** 2).sum().item() for b in range(B)) / B
        + 0.5 * module.W.abs().sum().item()
    )
    assert module.loss(fine, coarse).item() == pytest.approx(naive, rel=1e-5)


def test_a_probe_reads_codes_that_do_not_feel_it():
    module = composition(mode="probe", commitment=0.25).double()
    fine, coarse = vectors(B, F1).relu().requires_grad_(), vectors(B, F2, seed=1).relu().requires_grad_()
    module.track(fine, coarse)
    loss = module.loss(fine, coarse)
    naive = (fine / module.rms_fine) @ module.W.T - coarse / module.rms_coarse
    assert loss.item() == pytest.approx(naive.square().mean().item(), rel=1e-5)
    loss.backward()
    assert fine.grad is None and coarse.grad is None
    scale = 2 / naive.numel()
    torch.testing.assert_close(
        module.W.grad, (scale * naive.T @ (fine / module.rms_fine)).detach(), rtol=1e-4, atol=1e-9
    )


def test_a_frozen_map_has_random_unit_rows_and_never_learns():
    frozen = config(composition={"mode": "frozen", "l1": 0.5}, precision="float32", warmup_steps=1)
    run = training(frozen, steps=30)
    before = run.composition(2).W.detach().clone()
    torch.testing.assert_close(before.norm(dim=1), torch.ones(F2))
    assert (before >= 0).all()
    others = [run.model.level(number).W_enc.detach().clone() for number in (1, 2)]
    for _ in range(30):
        parts = run.step(vectors(B, D).float())
    assert torch.equal(run.composition(2).W.detach(), before)
    assert parts["composition2"] > 0
    assert all(not torch.equal(run.model.level(n).W_enc, old) for n, old in zip((1, 2), others, strict=True))


def training(settings, steps=40):
    return TrainingRun(
        settings, Scaling(scale=1.0, median=torch.zeros(D), variance=float(D)), steps=steps, seed=0, device="cpu"
    )


def test_gate_and_sparsity_losses_are_the_formulas():
    level = double(GatedLevel(D, F1, config(), 3.0, torch.Generator().manual_seed(0)))
    x, bias = vectors(B, D), vectors(D, seed=2)
    with torch.no_grad():
        level.r_mag.copy_(0.3 * vectors(F1, seed=4))
        level.b_mag.copy_(0.3 * vectors(F1, seed=5))
        level.b_enc.copy_(0.3 * vectors(F1, seed=6))
    output = level(x, bias)
    for row in range(B):
        for i in range(F1):
            product = ((x[row] - bias) @ level.W_enc[:, i]).item()
            magnitude = max(product * level.r_mag[i].exp().item() + level.b_mag[i].item(), 0.0)
            expected = magnitude if product + level.b_enc[i].item() > 0 else 0.0
            assert output.acts[row, i].item() == pytest.approx(expected, abs=1e-12)
    assert level.penalty(output).item() == pytest.approx(output.pre.clamp_min(0).sum().item() / B, rel=1e-6)
    loss = gate(step(level, output, x, x, bias))
    naive = ((x - (output.pre.clamp_min(0) @ level.W_dec + bias)) ** 2).sum().item() / B / 1.7
    assert loss.item() == pytest.approx(naive, rel=1e-5)
    loss.backward()
    assert level.W_dec.grad is None and level.r_mag.grad is None and level.W_enc.grad.abs().sum() > 0


def test_gradients_of_the_gated_losses_match_finite_differences():
    level = double(GatedLevel(D, F1, config(), 3.0, torch.Generator().manual_seed(0)))
    x, bias = vectors(B, D), vectors(D, seed=2)

    def losses(W_enc, b_enc):
        output = torch.func.functional_call(level, {"W_enc": W_enc, "b_enc": b_enc}, (x, bias))
        return gate(step(level, output, x, x, bias)) + 0.3 * level.penalty(output)

    inputs = tuple(tensor.detach().clone().requires_grad_() for tensor in (level.W_enc, level.b_enc))
    assert torch.autograd.gradcheck(losses, inputs)

    def reconstruction(W_enc, W_dec, r_mag, b_mag):
        weights = {"W_enc": W_enc, "W_dec": W_dec, "r_mag": r_mag, "b_mag": b_mag}
        return fraction_unexplained(x, torch.func.functional_call(level, weights, (x, bias)).decoded + bias, 1.7)

    names = (level.W_enc, level.W_dec, level.r_mag, level.b_mag)
    assert torch.autograd.gradcheck(reconstruction, tuple(t.detach().clone().requires_grad_() for t in names))


def test_jump_relu_begins_at_the_target_l0_of_its_first_batch():
    run = training(config(activation="jumprelu", precision="float32"))
    run.step(vectors(B, D).float())
    for number, l0 in ((1, 3), (2, 2)):
        assert (
            run.last_output.levels[number].acts > 0
        ).sum().item() == B * l0 - 1  # the smallest is the threshold itself


def test_a_stage_can_make_the_optimiser_forget_a_level():
    stages = (
        {"name": "a", "until": 0.5, "levels": [1, 2]},
        {"name": "b", "until": 1.0, "levels": [1, 2], "refresh": [2]},
    )
    run = training(config(curriculum=stages, precision="float32"), steps=10)
    for _ in range(6):
        run.step(vectors(B, D).float())
    steps = [int(run.optimiser.state[run.model.level(number).W_dec]["step"]) for number in (1, 2)]
    assert steps == [6, 1]


def test_projection_and_proximal_step():
    module = composition()
    with torch.no_grad():
        module.W.copy_(torch.linspace(-1, 1, F1 * F2).view(F2, F1))
    before = module.W.detach().clone()
    module.project(0.2, sparsify=False)
    torch.testing.assert_close(module.W.detach(), before.clamp_min(0))
    module.project(0.2, sparsify=True)
    torch.testing.assert_close(module.W.detach(), (before.clamp_min(0) - 0.1).clamp_min(0))


@pytest.mark.parametrize("mode", ["normalised", "literal"])
def test_weight_and_contributions_agree_with_the_codes_scales(mode):
    module = composition(mode=mode)
    fine, coarse = vectors(B, F1).float().abs(), 3 * vectors(B, F2, seed=1).float().abs()
    module.track(fine, coarse)
    rms_fine, rms_coarse = fine.square().mean(0).sqrt(), coarse.square().mean(0).sqrt()
    torch.testing.assert_close(module.contributions(), module.weight() * rms_fine / rms_coarse[:, None])
    expected = (fine / rms_fine) @ module.W.T * rms_coarse if mode == "normalised" else fine @ module.W.T
    torch.testing.assert_close(fine @ module.weight().T, expected)


def test_sparsity_controller_leads_a_sluggish_l0_to_its_target_without_overshoot():
    controller, l0, seen = SparsityController(8.0, 1e-3, 100), torch.tensor(400.0), []
    for _ in range(600):  # an L0 that follows the coefficient with a delay, as an SAE's does
        l0 *= (min(400.0, 0.5 / controller.coefficient) / l0) ** 0.05
        controller.update(l0)
        seen.append(l0)
    assert seen[-1] == pytest.approx(8.0, rel=0.02)
    assert min(seen) > 6.5


def test_sparsity_controller_goes_on_from_its_state():
    one, other = SparsityController(8.0, 1e-3, 50), SparsityController(8.0, 1e-3, 50)
    for step in range(30):
        one.update(torch.tensor(300.0 / (step + 1)))
    other.restore(json.loads(json.dumps(one.state())))
    one.update(torch.tensor(20.0)), other.update(torch.tensor(20.0))
    assert one.coefficient == other.coefficient


# --- known ways to fail, by name -----------------------------------------------------------------------------------


def provoked(mode, fine, coarse, W, **changes):
    """What is said of a map W after it has seen codes with these statistics."""
    module = composition(mode=mode, **changes)
    with torch.no_grad():
        module.W.copy_(W)
    module.track(fine, coarse)
    return list(map_failures(2, module.health(fine, coarse)))


def test_bad_maps_are_called_by_name():
    fine = vectors(97, F1).float().relu()
    W = vectors(F2, F1, seed=3).float().abs()
    coarse = fine @ W.T
    module = composition()
    module.track(fine, coarse)
    normalised = W * module.rms_fine / module.rms_coarse[:, None]
    assert provoked("normalised", fine, coarse, normalised) == []
    assert provoked("literal", fine, coarse, W) == []
    assert provoked("normalised", fine, coarse, 0 * W) == ["W-collapsed"]
    assert provoked("literal", fine, coarse, 1e-4 * W) == ["scale-drain"]
    assert provoked("literal", 1e-4 * fine, coarse, W) == ["scale-drain"]
    assert provoked("normalised", fine, fine[:, :F2], torch.eye(F2, F1)) == ["copy"]


def test_health_is_what_it_says():
    module = composition()
    fine, coarse = vectors(B, F1).float().relu(), vectors(B, F2, seed=1).float().relu()
    module.track(fine, coarse)
    with torch.no_grad():
        module.W[0] = 0
        module.W[1] = torch.eye(1, F1)[0]
    health = module.health(fine, coarse)
    f, c, W = fine / module.rms_fine, coarse / module.rms_coarse, module.W.detach()
    wrong = sum(float((sum(W[i, j] * f[b, j] for j in range(F1)) - c[b, i]) ** 2) for b in range(B) for i in range(F2))
    assert health["unexplained"] == pytest.approx(wrong / c.square().sum().item(), rel=1e-4)
    assert health["nonzero"] == pytest.approx((W != 0).float().mean().item())
    ratios = sorted(float(W[i].sum() ** 2 / W[i].square().sum()) for i in range(1, F2))
    assert health["participation"] == pytest.approx(ratios[(len(ratios) - 1) // 2], rel=1e-5)


# --- compiled against eager ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own parts
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
@pytest.mark.parametrize(
    ("backend", "changes"),
    [
        pytest.param("inductor", {"composition": {"mode": "normalised"}}, marks=pytest.mark.slow),
        pytest.param("aot_eager", {"activation": "topk"}, marks=pytest.mark.slow),
        *(("aot_eager", {"activation": activation}) for activation in ("relu", "jumprelu")),
        pytest.param(
            "aot_eager",
            {"structure": "flat", "widths": (F1,), "l0": (3,), "activation": "gated"},
            marks=pytest.mark.slow,
        ),
        ("aot_eager", {"structure": "stacked", "stop_gradient": False, "precision": "bfloat16"}),
        ("aot_eager", {"selection": "joint", "curriculum": "fine-first", "composition": {"mode": "literal"}}),
        ("aot_eager", {"child_gate": True, "composition": {"mode": "normalised"}}),
    ],
)
def test_a_compiled_run_is_the_eager_one(backend, changes, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(Compiled, "failed", False)
    settings = config(warmup_steps=1, dead_after_tokens=2 * B, aux_latents=3, **{"precision": "float32", **changes})
    scaling = Scaling(scale=1.0, median=torch.zeros(D), variance=float(D))
    eager, compiled = (
        TrainingRun(settings, scaling, steps=40, seed=0, device="cpu", compiled=choice) for choice in (False, True)
    )
    with torch.no_grad():
        for run in (eager, compiled):  # some latents die, and AuxK has something to do
            run.model.level(1).b_enc[::3] = -20.0
    rounds_otherwise = backend == "inductor" or eager.rounds  # which choices between latents magnify, step by step
    for number in range(3 if rounds_otherwise else 20):
        x = vectors(B, D, seed=number).float()
        one, other = eager.step(x), compiled.step(x)
        assert one.keys() == other.keys()
        for name in one:
            tolerance = 5e-3 if rounds_otherwise else 1e-4
            torch.testing.assert_close(other[name], one[name], rtol=tolerance, atol=1e-6)
    assert not Compiled.failed
    if rounds_otherwise:
        return
    if eager.model.level(1).revives_dead:
        assert one["auxiliary1"] > 0
    for one, other in zip(eager.tokens_since_fired, compiled.tokens_since_fired, strict=True):
        assert torch.equal(one, other)
