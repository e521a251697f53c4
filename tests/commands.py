"""What the tests of commands on the tiny model share."""

import torch
from typer.testing import CliRunner

from hsae.cli.main import app
from hsae.train import saelens

HOOK, D = "blocks.2.hook_resid_post", 48


def settings(overrides):
    return ["--plan", "tiny", "--device", "cpu", *(part for value in overrides for part in ("--set", value))]


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "160"})


def an_sae(latents, seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(D, latents, generator=generator)
    W /= W.norm(dim=0)
    parts = {"W_enc": W, "W_dec": W.T.clone(), "b_enc": torch.zeros(latents), "b_dec": torch.zeros(D)}
    return saelens.SAE(
        **({"name": "sae", "architecture": "standard", "metadata": {"hook_name": HOOK}} | parts | changes)
    )
