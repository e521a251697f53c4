"""A new activation and a new loss, each registered in one place: the worked example of CONTRIBUTING.md."""

import inspect

import pytest
import torch

import hsae
from hsae.registry import ACTIVATIONS, LOSSES, Activation, Loss
from hsae.train.model.levels import Level

X = torch.randn(600, 8, generator=torch.Generator().manual_seed(0))
SETTINGS = {"l0": [4, 2], "steps": 20, "batch_tokens": 64, "device": "cpu", "progress": False}


class Shrink(Level):
    """ReLU of what exceeds a threshold of 0.1, less it; trained, a standard SAE with lower encoder biases."""

    architecture, is_controlled = "standard", True

    def activate(self, pre_BF):
        return torch.relu(pre_BF - 0.1)

    def folded(self, scale):
        return {"b_enc": (self.b_enc - 0.1) / scale}


def decorrelation(step):
    """Mean squared product of different directions of a level's decoder."""
    return (step.level.W_dec @ step.level.W_dec.T).triu(1).square().mean()


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(ACTIVATIONS, "shrink", Activation(Shrink))
    monkeypatch.setitem(LOSSES, "decorrelation", Loss(decorrelation))


@pytest.mark.parametrize("structure", ["additive", "stacked"])
def test_an_activation_is_a_class_and_a_line(structure, tmp_path):
    model = hsae.fit(X, widths=[32, 6], structure=structure, activation="shrink", folder=tmp_path / "run", **SETTINGS)
    assert [level.architecture for level in model.levels] == ["standard", "standard"]
    assert 0 < (model.codes(X)[0] > 0).float().mean() < 1
    assert torch.equal(hsae.load(tmp_path / "run")(X), model(X))
    assert len(inspect.getsource(Shrink).splitlines()) <= 10


def test_a_loss_is_a_function_and_a_line():
    lines = []
    settings = {**SETTINGS, "progress": lines.append, "log_steps": 10}
    plain, other = (hsae.fit(X, widths=[32, 6], losses=losses, **settings) for losses in ({}, {"decorrelation": 50}))
    parts = [line["parts"] for line in lines]
    assert all("decorrelation1" not in part for part in parts[:2])
    assert all(part["decorrelation1"] > 0 < part["decorrelation2"] for part in parts[2:])
    similar = [(model.directions(1) @ model.directions(1).T).triu(1).square().mean() for model in (plain, other)]
    assert similar[1] < similar[0]
    assert len(inspect.getsource(decorrelation).splitlines()) <= 3


def test_what_is_not_registered_is_refused_by_name():
    with pytest.raises(
        hsae.UserError, match=r"activation: Input should be 'relu', .*'gated' or 'shrink' \(given: 'swish'\)"
    ):
        hsae.fit(X, widths=[32, 6], activation="swish", **SETTINGS)
    with pytest.raises(hsae.UserError, match=r"there is no loss 'entropy'; there are reconstruction, .*decorrelation"):
        hsae.fit(X, widths=[32, 6], losses={"entropy": 1}, **SETTINGS)
