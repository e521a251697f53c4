"""SAELens's folder format for one-layer SAEs: `cfg.json` + `sae_weights.safetensors`, written as version 6 does.

Shapes: F latents.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hsae.cache.errors import UserError
from hsae.cache.files import write_atomically, write_bytes_atomically
from hsae.train.model.sae import SAE
from hsae.train.model.saelens_config import DTYPES, EXTRA_WEIGHTS, Described, read_config
from hsae.train.run_record import check_files

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"


def save(sae: SAE, folder: Path) -> None:
    """Write `folder/cfg.json` and `folder/sae_weights.safetensors`, each atomically."""
    tensors = {"W_enc": sae.W_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec, **sae.extra}
    if sae.architecture != "gated":
        tensors["b_enc"] = sae.b_enc
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(folder / WEIGHTS_FILE, lambda path: save_file(plain, path))
    write_bytes_atomically(folder / CONFIG_FILE, json.dumps(sae.config, indent=2).encode())


def load(folder: Path, name: str | None = None) -> SAE:
    """Read a SAELens folder. Raises UserError if it is no such folder or uses something hsae can't evaluate."""
    config_path, weights_path = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    for path in (config_path, weights_path):
        if not path.is_file():
            raise UserError(f"{folder} is not a SAELens folder: {_why_not(folder, path.name)}")
    config = read_config(config_path)
    architecture = config.architecture
    try:
        tensors = load_file(weights_path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{weights_path} can't be read: {error}") from None
    scale = _scaling(weights_path, tensors, config)
    check_files(folder, (CONFIG_FILE, WEIGHTS_FILE))
    needed = {"W_enc", "W_dec", "b_dec", *EXTRA_WEIGHTS[architecture]}
    if architecture != "gated":
        needed.add("b_enc")
    if missing := needed - tensors.keys():
        raise UserError(
            f"{weights_path}: tensors missing for architecture {architecture!r}: {', '.join(sorted(missing))}"
        )
    if unknown := tensors.keys() - needed:
        raise UserError(
            f"{weights_path}: tensors that architecture {architecture!r} has no use for: {', '.join(sorted(unknown))}"
        )
    if odd := [key for key, tensor in tensors.items() if str(tensor.dtype).removeprefix("torch.") not in DTYPES]:
        raise UserError(f"{weights_path}: {odd[0]} is of type {tensors[odd[0]].dtype}; allowed: {', '.join(DTYPES)}")
    W_enc = tensors["W_enc"]
    if tuple(W_enc.shape) != (config.d_in, config.d_sae):
        raise UserError(
            f"{folder}: W_enc has shape {tuple(W_enc.shape)}, cfg.json says d_in={config.d_in}, d_sae={config.d_sae}"
        )
    dtype = getattr(torch, config.dtype) if config.dtype is not None else W_enc.dtype
    tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    if any(not torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise UserError(f"{weights_path} has NaN or infinite weights")
    return SAE(
        name=name or folder.name,
        architecture=architecture,
        W_enc=tensors["W_enc"],
        W_dec=tensors["W_dec"] if scale is None else tensors["W_dec"] * scale.to(dtype)[:, None],
        b_enc=tensors.get("b_enc", torch.zeros_like(tensors["W_enc"][0])),
        b_dec=tensors["b_dec"],
        extra={key: tensors[key] for key in EXTRA_WEIGHTS[architecture]},
        k=config.k,
        rescale_acts_by_decoder_norm=config.rescale_acts_by_decoder_norm,
        apply_b_dec_to_input=config.apply_b_dec_to_input,
        metadata=config.metadata,
        remarks=config.remarks,
    )


def _why_not(folder: Path, missing: str) -> str:
    """What a folder without SAE is, and what to give instead."""
    if not folder.is_dir():
        return "there is no such folder"
    if (folder / "run.json").is_file():
        return "it is a run of hsae; evaluate it with --run, or give a folder in its saelens/"
    inner = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_FILE}"))
    if inner:
        return f"SAEs lie in folders in it ({', '.join(inner[:5])}); give one of those"
    return f"{missing} is missing (wanted: {CONFIG_FILE} and {WEIGHTS_FILE})"


def _scaling(path: Path, tensors: dict[str, Tensor], config: Described) -> Tensor | None:
    """Take the factors [F] of the latents out of the tensors; None where all are 1, as SAELens reads it."""
    names = [key for key in ("scaling_factor", "finetuning_scaling_factor") if key in tensors]
    scales = [tensors.pop(key) for key in names]
    if not scales or torch.equal(scales[0], torch.ones_like(scales[0])):
        return None
    if not config.scaled:
        raise UserError(f"{path} has a {names[0]} that is not 1, but cfg.json has no finetuning_scaling_factor true")
    if len(scales) > 1 or tuple(scales[0].shape) != (config.d_sae,) or not torch.isfinite(scales[0]).all():
        raise UserError(f"{path}: scaling_factor must be one tensor of shape {(config.d_sae,)} with finite numbers")
    if config.rescale_acts_by_decoder_norm:
        raise UserError(f"{path}: scaling_factor does not go with rescale_acts_by_decoder_norm")
    return scales[0]
