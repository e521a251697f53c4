"""Resampling against a naive loop, for every level of both structures, all sizes different (B=29, D=7, F1=13, F2=5,
F3=3).
"""

import pytest
import torch

from hsae.train.config.run_config import RunConfig
from hsae.train.training.resampling import resample
from hsae.train.training.scaling import Scaling
from hsae.train.training.training_run import TrainingRun

B, D, WIDTHS = 29, 7, (13, 5, 3)
DEAD = {1: (2, 5, 12), 2: (0, 4), 3: (1,)}


def trained(structure, activation="batchtopk", **changes):
    flat = structure == "flat"
    values = {
        "number": 4, "name": "r", "structure": structure, "activation": activation, "precision": "float32",
        "warmup_steps": 1,
        "widths": WIDTHS[:1] if flat else WIDTHS, "l0": (4,) if flat else (4, 2, 1),
    }  # fmt: skip
    config = RunConfig(**{**values, **changes})
    x = torch.randn(B, D, generator=torch.Generator().manual_seed(1)) + 0.5
    run = TrainingRun(
        config, Scaling(scale=1.0, median=x.median(0).values, variance=float(D)), steps=40, seed=3, device="cpu"
    )
    for _ in range(4):
        run.step(x)
    return run, x


@pytest.mark.parametrize(
    ("structure", "activation"),
    [("flat", "gated"), ("flat", "relu"), ("additive", "jumprelu"), ("additive", "batchtopk"),
        ("stacked", "batchtopk"), ("stacked", "topk")],
)  # fmt: skip
def test_resampling_is_the_recipe_for_every_level(structure, activation):
    run, x = trained(structure, activation)
    for number in range(1, run.config.levels + 1):
        level, output = run.model.level(number), run.last_output
        read, bias = output.levels[number].read, run.model.bias(number).detach()
        assert read.shape[1] == (D if number == 1 or structure != "stacked" else WIDTHS[number - 2])
        target, reconstruction = run.model.target(number, x, output)
        loss = (target - reconstruction).square().sum(1)
        dead = torch.zeros(WIDTHS[number - 1], dtype=torch.bool)
        dead[list(DEAD[number])] = True
        before = {name: parameter.detach().clone() for name, parameter in level.named_parameters()}
        moments = {
            (name, key): run.optimiser.state[parameter][key].clone()
            for name, parameter in level.named_parameters()
            for key in ("exp_avg", "exp_avg_sq")
        }
        assert resample(level, read, bias, loss, dead, run.optimiser, torch.Generator().manual_seed(6)) == len(
            DEAD[number]
        )

        drawn = torch.multinomial(
            loss.square().double(), len(DEAD[number]), replacement=True, generator=torch.Generator().manual_seed(6)
        )
        living = [i for i in range(len(dead)) if i not in DEAD[number]]
        norm = sum(before["W_enc"][:, i].norm().item() for i in living) / len(living)
        expected = {name: tensor.clone() for name, tensor in before.items()}
        for i, row in zip(DEAD[number], drawn.tolist(), strict=True):
            direction = read[row] - bias
            direction = direction / direction.norm()
            expected["W_dec"][i] = direction
            expected["W_enc"][:, i] = 0.2 * norm * direction
            for name in expected.keys() - {"W_dec", "W_enc"}:
                mean = sum(before[name][j].item() for j in living) / len(living)
                expected[name][i] = mean if name == "log_threshold" else 0.0
        for name, parameter in level.named_parameters():
            torch.testing.assert_close(parameter.detach(), expected[name])
            for key in ("exp_avg", "exp_avg_sq"):
                wanted = moments[name, key]
                for i in DEAD[number]:
                    wanted[(slice(None), i) if name == "W_enc" else i] = 0
                assert torch.equal(run.optimiser.state[parameter][key], wanted), (number, name, key)


def test_each_level_has_a_counter_of_its_own_and_resamples_by_it():
    run, x = trained("stacked", dead_after_tokens=100, resample_steps=8, aux_weight=0)
    with torch.no_grad():
        for number, dead in DEAD.items():
            run.model.level(number).b_enc[list(dead)] = -50.0
    before = {number: run.model.level(number).W_dec.detach().clone() for number in DEAD}
    resampled = {}
    for _ in range(4):
        run.step(x)
        resampled[run.step_number] = dict(run.resampled)
    assert [tuple(counter.shape) for counter in run.tokens_since_fired] == [(13,), (5,), (3,)]
    assert resampled[7] == {1: 0, 2: 0, 3: 0}
    for number, dead in DEAD.items():
        assert resampled[8][number] >= len(dead)
        assert all(not torch.allclose(run.model.level(number).W_dec[i], before[number][i], atol=0.05) for i in dead)
        assert all(run.tokens_since_fired[number - 1][i] == 0 for i in dead)


def test_nothing_dead_changes_nothing_and_a_perfect_reconstruction_draws_nothing():
    run, x = trained("flat", "topk")
    level, bias = run.model.level(1), run.model.bias(1).detach()
    before = level.W_dec.detach().clone()
    none, every = torch.zeros(13, dtype=torch.bool), torch.ones(13, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    assert resample(level, x, bias, torch.ones(B), none, run.optimiser, generator) == 0
    assert resample(level, x, bias, torch.zeros(B), every, run.optimiser, generator) == 0
    assert torch.equal(level.W_dec, before)
    assert resample(level, x, bias, torch.ones(B), every, run.optimiser, generator) == 13
    torch.testing.assert_close(level.W_enc.norm(dim=0), torch.full((13,), 0.2))


def test_resampling_stops_when_the_learning_rate_falls_and_repeats_bit_by_bit():
    first, second = (trained("additive", dead_after_tokens=60, resample_steps=3, aux_weight=0) for _ in range(2))
    counts = []
    for run, x in (first, second):
        for _ in range(36):
            with torch.no_grad():
                run.model.level(1).b_enc[3] = -50.0
            run.step(x)
            counts.append((run.step_number, run.resampled[1]))
    assert counts[:36] == counts[36:]
    assert any(count for step, count in counts if step <= 32) and not any(count for step, count in counts if step > 32)
    for one, other in zip(first[0].model.parameters(), second[0].model.parameters(), strict=True):
        assert torch.equal(one, other)
