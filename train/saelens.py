"""Ordinary one-layer SAEs in the folder format of SAELens 6: `cfg.json` + `sae_weights.safetensors`.

The arithmetic follows SAELens, so that a folder gives the same outputs here and there. Shapes: D input width, F latents.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hsae.cache.errors import UserError
from hsae.cache.files import write_atomically
from hsae.cache.numerics import product

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
SAELENS_VERSION = "6.54.12"  # the version whose format is written; its loader migrates anything below 6
EXTRA_WEIGHTS = {"standard": (), "topk": (), "jumprelu": ("threshold",), "gated": ("b_gate", "b_mag", "r_mag")}


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
    """Read a SAELens 6 folder. Raises UserError if it is no such folder or uses something hsae can't evaluate."""
    config_path, weights_path = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    for path in (config_path, weights_path):
        if not path.is_file():
            raise UserError(
                f"{folder} is not a SAELens folder: {path.name} is missing (wanted: cfg.json and sae_weights.safetensors)"
            )
    try:
        config = cast(dict[str, Any], json.loads(config_path.read_text()))
        tensors = load_file(weights_path)
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise UserError(f"{folder} can't be read: {error}") from None
    architecture = config.get("architecture") if isinstance(config, dict) else None
    if architecture not in EXTRA_WEIGHTS:
        raise UserError(f"{config_path}: architecture {architecture!r}; hsae reads {', '.join(EXTRA_WEIGHTS)}")
    for key, allowed in (("normalize_activations", "none"), ("reshape_activations", "none")):
        if config.get(key, allowed) != allowed:
            raise UserError(
                f"{config_path}: {key} is {config[key]!r}; fold it into the weights first (only {allowed!r} can be read)"
            )
    needed = {"W_enc", "W_dec", "b_dec", *EXTRA_WEIGHTS[architecture]} | (
        {"b_enc"} if architecture != "gated" else set()
    )
    if missing := needed - tensors.keys():
        raise UserError(
            f"{weights_path}: tensors missing for architecture {architecture!r}: {', '.join(sorted(missing))}"
        )
    W_enc = tensors["W_enc"]
    if W_enc.ndim != 2 or (W_enc.shape[0], W_enc.shape[1]) != (config.get("d_in"), config.get("d_sae")):
        raise UserError(
            f"{folder}: W_enc has shape {tuple(W_enc.shape)}, cfg.json says d_in={config.get('d_in')}, d_sae={config.get('d_sae')}"
        )
    if any(not torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise UserError(f"{weights_path} has NaN or infinite weights")
    return SAE(
        name=name or folder.name,
        architecture=architecture,
        W_enc=W_enc,
        W_dec=tensors["W_dec"],
        b_enc=tensors.get("b_enc", torch.zeros_like(W_enc[0])),
        b_dec=tensors["b_dec"],
        extra={key: tensors[key] for key in EXTRA_WEIGHTS[architecture]},
        k=config.get("k"),
        rescale_acts_by_decoder_norm=bool(config.get("rescale_acts_by_decoder_norm", False)),
        apply_b_dec_to_input=bool(config.get("apply_b_dec_to_input", True)),
        metadata=dict(config.get("metadata") or {}),
    )
