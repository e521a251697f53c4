"""Ordinary one-layer SAEs in the folder format of SAELens: `cfg.json` + `sae_weights.safetensors`, written as version 6 does.

The arithmetic follows SAELens, so that a folder gives the same outputs here and there. Shapes: D input width, F latents.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hsae.cache.errors import UserError
from hsae.cache.files import write_atomically
from hsae.cache.language_model.matmul import product
from hsae.train.model.saelens_config import DTYPES, EXTRA_WEIGHTS, Described, read_config
from hsae.train.runs.run_record import check_files

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
SAELENS_VERSION = "6.54.12"  # the version whose format is written; its loader migrates anything below 6


@dataclass(frozen=True, kw_only=True)
class SAE:
    """A sparse autoencoder with one encoder layer, as SAELens defines it."""

    name: str
    architecture: str
    W_enc: Tensor
    """[D, F]"""
    W_dec: Tensor
    """[F, D]"""
    b_enc: Tensor
    """[F]; zeros for `gated`, which has `b_gate` and `b_mag` instead."""
    b_dec: Tensor
    """[D]"""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """[F] each: `threshold` of jumprelu; `b_gate`, `b_mag`, `r_mag` of gated."""
    k: int | None = None
    """Latents kept per vector, for `topk`."""
    rescale_acts_by_decoder_norm: bool = False
    apply_b_dec_to_input: bool = True
    metadata: dict[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    """What was ignored when it was read, for people."""

    def __post_init__(self) -> None:
        d_in, d_sae = self.W_enc.shape
        wanted = {"W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,)}
        for name, shape in wanted.items():
            given = tuple(getattr(self, name).shape)
            if given != shape:
                raise UserError(f"{name} has shape {given}; W_enc {(d_in, d_sae)} needs {shape}")
        for name in EXTRA_WEIGHTS[self.architecture]:
            if name not in self.extra or tuple(self.extra[name].shape) != (d_sae,):
                raise UserError(f"architecture {self.architecture!r} needs a tensor {name!r} of shape {(d_sae,)}")
        if self.architecture == "topk" and (self.k is None or not 0 < self.k <= d_sae):
            raise UserError(f"architecture 'topk' needs k between 1 and {d_sae}, not {self.k!r}")

    @property
    def d_in(self) -> int:
        """Width D of the vectors read and reconstructed."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number F of latents."""
        return self.W_enc.shape[1]

    @property
    def config(self) -> dict[str, Any]:
        """The content of cfg.json (SAELens 6)."""
        config: dict[str, Any] = {
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "dtype": str(self.W_enc.dtype).removeprefix("torch."),
            "device": "cpu",
            "apply_b_dec_to_input": self.apply_b_dec_to_input,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "architecture": self.architecture,
            "metadata": {**self.metadata, "sae_lens_version": SAELENS_VERSION, "sae_lens_training_version": None},
        }
        if self.architecture == "topk":
            config |= {"k": self.k, "rescale_acts_by_decoder_norm": self.rescale_acts_by_decoder_norm}
        return config

    def encode(self, x: Tensor) -> Tensor:
        """Latent activations [..., F] of vectors [..., D]; x is cast to the weights' type first."""
        x = x.to(self.W_enc.dtype)
        centred = x - self.b_dec if self.apply_b_dec_to_input else x
        if self.architecture == "gated":
            gate = (product(centred, self.W_enc) + self.extra["b_gate"] > 0).to(x.dtype)
            return gate * torch.relu(product(centred, self.W_enc * self.extra["r_mag"].exp()) + self.extra["b_mag"])
        pre = product(centred, self.W_enc) + self.b_enc
        if self.architecture == "jumprelu":
            return torch.relu(pre) * (pre > self.extra["threshold"])
        if self.architecture == "topk":
            assert self.k is not None
            if self.rescale_acts_by_decoder_norm:
                pre = pre * self.W_dec.norm(dim=-1)
            values, indices = torch.topk(pre, k=self.k, dim=-1, sorted=False)
            return torch.zeros_like(pre).scatter_(-1, indices, values.relu())
        return torch.relu(pre)

    def decode(self, latents: Tensor) -> Tensor:
        """Reconstruction [..., D] from latent activations [..., F]."""
        if self.rescale_acts_by_decoder_norm:
            latents = latents / self.W_dec.norm(dim=-1)
        return product(latents, self.W_dec) + self.b_dec

    def to(self, *, dtype: torch.dtype | None = None, device: str | None = None) -> "SAE":
        """A copy with its weights in another type or place."""
        return replace(
            self,
            W_enc=self.W_enc.to(device, dtype),
            W_dec=self.W_dec.to(device, dtype),
            b_enc=self.b_enc.to(device, dtype),
            b_dec=self.b_dec.to(device, dtype),
            extra={name: tensor.to(device, dtype) for name, tensor in self.extra.items()},
        )


def save(sae: SAE, folder: Path) -> None:
    """Write `folder/cfg.json` and `folder/sae_weights.safetensors`, each atomically."""
    tensors = {"W_enc": sae.W_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec, **sae.extra}
    if sae.architecture != "gated":
        tensors["b_enc"] = sae.b_enc
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(folder / WEIGHTS_FILE, lambda path: save_file(plain, path))
    text = json.dumps(sae.config, indent=2)
    write_atomically(folder / CONFIG_FILE, lambda path: path.write_text(text))


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
    needed = {"W_enc", "W_dec", "b_dec", *EXTRA_WEIGHTS[architecture]} | (
        {"b_enc"} if architecture != "gated" else set()
    )
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
    """Take the factors [F] of the latents out of the tensors; None where they are all 1, which SAELens takes for none."""
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
