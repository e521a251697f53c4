"""The sparse step against the dense one in float64, values and gradients; pairwise different sizes (B=11, I=7,
F=13).
"""

import pytest
import torch

from hsae.train.config.run_config import CompositionConfig, RunConfig
from hsae.train.model import sparse_products
from hsae.train.model.composition_map import Composition
from hsae.train.model.trainable_sae import TRAINABLE
from hsae.train.training.scaling import Scaling
from hsae.train.training.training_run import TrainingRun

B, D, F1, F2 = 11, 7, 83, 31


def vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def config(**changes):
    values = {
        "number": 3,
        "name": "r",
        "structure": "additive",
        "widths": (F1, F2),
        "l0": (3, 2),
        "precision": "float32",
    }
    return RunConfig(**{**values, **changes})


def test_a_pattern_lists_the_active_entries_by_row_and_by_column():
    code = vectors(B, F1) * (vectors(B, F1, seed=1) > 1.6)
    at = sparse_products.pattern_of(code)
    values = code.flatten()[at.flat]
    assert torch.equal(at.dense(values), code)
    by_latent = [row.nonzero().squeeze(1) for row in code.T]
    assert torch.equal(at.by_latent.rows, torch.cat(by_latent).int())
    assert at.by_latent.starts.diff().tolist() == [len(vectors) for vectors in by_latent]
    torch.testing.assert_close(values[at.order], torch.cat([code[vectors, i] for i, vectors in enumerate(by_latent)]))
    torch.testing.assert_close(at.sum_by_latent(values), code.sum(0))
    assert sparse_products.pattern_of(vectors(B, F1)) is None  # dense
    empty = sparse_products.pattern_of(torch.zeros(B, F1, dtype=torch.float64))
    assert torch.equal(
        sparse_products.decode(torch.zeros(0, dtype=torch.float64), vectors(F1, D), empty), torch.zeros(B, D).double()
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation": "topk"},
        {"activation": "relu"},
        {"selection": "joint"},
        {"child_gate": True, "composition": {"mode": "normalised"}},
        {"structure": "stacked"},
        {"structure": "stacked", "stop_gradient": False},
    ],
)
def test_the_sparse_pass_has_the_values_and_gradients_of_the_dense_one(changes, monkeypatch):
    results = []
    for fast in (False, True):
        settings = config(**changes)
        model = TRAINABLE[settings.structure](settings, D).double().train()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * vectors(*parameter.shape, seed=parameter.numel()))
            if changes.get("activation") == "relu":
                for number in (1, 2):
                    model.level(number).b_enc -= 1.3
            if changes.get("child_gate"):
                model.parents(1).copy_(torch.arange(F1) % (F2 + 1) - 1)
        if fast:
            monkeypatch.setitem(sparse_products.SMALLEST, "cpu", 0)
            model.use_sparse()
            assert model.level(1).sparse
        x = vectors(B, D).requires_grad_(changes.get("stop_gradient") is False)
        output = model(x)
        loss = sum((vectors(*part.shape, seed=5) * part).square().sum() for part in output.reconstructions.values())
        loss = loss + sum((vectors(*level.acts.shape, seed=6) * level.acts).sum() for level in output.levels.values())
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append((loss, output.levels[1].acts.detach(), output.levels[2].acts.detach(), x.grad, gradients))
    for dense, fast in zip(results[0][:4], results[1][:4], strict=True):
        torch.testing.assert_close(fast, dense, rtol=1e-9, atol=1e-10)
    assert results[0][4].keys() == results[1][4].keys()
    for name, dense in results[0][4].items():
        torch.testing.assert_close(results[1][4][name], dense, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("mode", ["normalised", "probe", "literal", "frozen"])
def test_the_composition_loss_of_a_sparse_code_is_the_dense_ones(mode):
    results = []
    for fast in (False, True):
        module = Composition(
            F1, F2, CompositionConfig(mode=mode, commitment=0.25), torch.Generator().manual_seed(0)
        ).double()
        fine = (vectors(B, F1).relu() * (vectors(B, F1, seed=1) > 1.5)).requires_grad_()
        coarse = vectors(B, F2, seed=2).relu().requires_grad_()
        module.track(fine, coarse)
        at = sparse_products.pattern_of(fine.detach())
        loss = module.loss(sparse_products.Active(at, fine.flatten()[at.flat]) if fast else fine, coarse)
        loss.backward()
        on = (fine > 0) if fine.grad is not None else None
        results.append((loss.detach(), fine.grad * on if on is not None else None, coarse.grad, module.W.grad))
    for dense, fast in zip(*results, strict=True):
        assert (dense is None) == (fast is None)
        if dense is not None:
            torch.testing.assert_close(fast, dense, rtol=1e-9, atol=1e-12)


def test_a_run_trained_sparsely_is_the_run_trained_densely():
    x = vectors(97, D).float()
    scaling = Scaling(scale=1.0, median=torch.zeros(D), variance=float(D))
    settings = config(
        composition={"mode": "normalised"}, curriculum="coarse-first", dead_after_tokens=300, warmup_steps=2
    )
    runs = [TrainingRun(settings, scaling, steps=30, seed=0, device="cpu") for _ in range(2)]
    assert not any(run.model.level(1).sparse for run in runs)  # so small a level is computed densely
    for number in (1, 2):
        runs[0].model.level(number).sparse = False
        runs[1].model.level(number).sparse = True
    for _ in range(30):
        losses = [run.step(x)["loss"].item() for run in runs]
        assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert runs[1].tokens_since_fired[0].max() > 0


def test_under_autocast_only_the_encoders_product_is_rounded(monkeypatch):
    monkeypatch.setitem(sparse_products.SMALLEST, "cpu", 0)
    model = TRAINABLE["flat"](config(structure="flat", widths=(F1,), l0=(3,)), D).train()
    model.use_sparse()
    x, level, outer = vectors(B, D).float(), model.level(1), vectors(B, D, seed=1).float()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
        (output.reconstructions[1] * outer).sum().backward()
    values, at = output.levels[1].code.values.detach(), output.levels[1].code.at
    assert values.dtype == torch.float32 and torch.equal(values, output.levels[1].pre.flatten()[at.flat].float())
    torch.testing.assert_close(output.levels[1].pre.float(), x @ level.W_enc, rtol=0.02, atol=0.02)
    torch.testing.assert_close(output.reconstructions[1], at.dense(values) @ level.W_dec)
    torch.testing.assert_close(level.W_dec.grad, at.dense(values).T @ outer)
    to_code = (outer @ level.W_dec.T) * (at.dense(values) > 0)
    torch.testing.assert_close(level.W_enc.grad, x.T @ to_code)
    torch.testing.assert_close(level.b_enc.grad, to_code.sum(0))


@pytest.mark.parametrize("rounds", [False, True])
def test_a_code_too_dense_is_computed_densely(rounds, monkeypatch):
    monkeypatch.setitem(sparse_products.SMALLEST, "cpu", 0)
    gradients = []
    for is_fast in (False, True):
        model = TRAINABLE["flat"](config(structure="flat", widths=(F1,), l0=(3,), activation="relu"), D).train()
        if is_fast:
            model.use_sparse()
        with torch.autocast("cpu", torch.bfloat16, enabled=rounds):
            output = model(vectors(B, D).float())
            (output.reconstructions[1] * vectors(B, D, seed=1).float()).sum().backward()
        assert isinstance(output.levels[1].code, torch.Tensor)
        gradients.append([parameter.grad for parameter in model.parameters()])
    for dense, fast in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, dense, rtol=0.03 if rounds else 1e-5, atol=0.03 if rounds else 1e-6)
