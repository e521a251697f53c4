"""SAEs for tests."""

import itertools

import torch

from hsae.train.model.hierarchical_sae import STRUCTURES, CompositionMap
from hsae.train.model.sae import SAE

HOOK = "blocks.1.hook_resid_post"


def changed(sae, **changes):
    """A copy of an SAE with other weights, or another name."""
    names = ("name", "architecture", "W_enc", "W_dec", "b_enc", "b_dec", "extra", "k", "metadata")
    given = {name: getattr(sae, name) for name in names}
    flags = {name: getattr(sae, name) for name in ("rescale_acts_by_decoder_norm", "apply_b_dec_to_input")}
    return SAE(**(given | flags | changes))


def random_model(structure, d_in=8, widths=(32, 6), *, seed=0, hook_name=HOOK, model_name="tiny"):
    """An untrained model with unit directions, encoders along them, and every latent composed of every finer one."""
    kind, generator = STRUCTURES[structure], torch.Generator().manual_seed(seed)
    widths, levels, maps = widths[:1] if structure == "flat" else widths, [], []
    for number, (width, read) in enumerate(zip(widths, kind.widths_read(d_in, widths), strict=True), 1):
        W_dec = torch.nn.functional.normalize(torch.randn(width, read, generator=generator), dim=1)
        weights = {"W_enc": W_dec.T.contiguous(), "W_dec": W_dec}
        weights |= {"b_enc": torch.zeros(width), "b_dec": torch.randn(read, generator=generator)}
        metadata = {"model_name": model_name, "hook_name": hook_name}
        levels.append(SAE(name=kind.level_name(number), architecture="standard", metadata=metadata, **weights))
    for number, (fine, coarse) in enumerate(itertools.pairwise(widths), 2):
        weight = torch.rand(coarse, fine, generator=generator)
        maps.append(CompositionMap(level=number, weight=weight, contributions=weight / weight.sum(1, keepdim=True)))
    return kind(levels, maps)
