"""An ordinary SAE with one encoder layer, with SAELens's arithmetic, so that both give the same outputs.

Shapes: D input width, F latents.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hsae.cache.errors import UserError
from hsae.cache.language_model.matmul import product
from hsae.train.model.saelens_config import EXTRA_WEIGHTS
from hsae.train.model.views import View, constant, type_name

SAELENS_VERSION = "6.54.12"  # the version whose format is written; its loader migrates anything below 6


class SAE(View):
    """A sparse autoencoder with one encoder layer, as SAELens defines it."""

    W_enc: Tensor
    """[D, F]"""
    W_dec: Tensor
    """[F, D]"""
    b_enc: Tensor
    """[F]; zeros for `gated`, which has `b_gate` and `b_mag` instead."""
    b_dec: Tensor
    """[D]"""

    def __init__(
        self,
        *,
        name: str,
        architecture: str,
        W_enc: Tensor,
        W_dec: Tensor,
        b_enc: Tensor,
        b_dec: Tensor,
        extra: Mapping[str, Tensor] | None = None,
        k: int | None = None,
        rescale_acts_by_decoder_norm: bool = False,
        apply_b_dec_to_input: bool = True,
        metadata: dict[str, Any] | None = None,
        remarks: tuple[str, ...] = (),
    ) -> None:
        """Weights as SAELens names them. Raises UserError for shapes that don't belong together.

        `extra` holds what the architecture has besides, [F] each: `threshold` of jumprelu; `b_gate`, `b_mag` and
        `r_mag` of gated. `k` is the number of latents kept per vector, for topk. `remarks` say what was ignored when it
        was read.
        """
        super().__init__(name, architecture, metadata if metadata is not None else {})
        self.k, self.remarks = k, remarks
        self.rescale_acts_by_decoder_norm = rescale_acts_by_decoder_norm
        self.apply_b_dec_to_input = apply_b_dec_to_input
        extra, (d_in, d_sae) = extra or {}, W_enc.shape
        shapes = {"W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,)}
        weights = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec, **extra}
        for weight, shape in shapes.items():
            actual = tuple(weights[weight].shape)
            if actual != shape:
                raise UserError(f"{weight} has shape {actual}; W_enc {(d_in, d_sae)} needs {shape}")
        for weight in EXTRA_WEIGHTS[architecture]:
            if weight not in extra or tuple(extra[weight].shape) != (d_sae,):
                raise UserError(f"architecture {architecture!r} needs a tensor {weight!r} of shape {(d_sae,)}")
        if architecture == "topk" and (k is None or not 0 < k <= d_sae):
            raise UserError(f"architecture 'topk' needs k between 1 and {d_sae}, not {k!r}")
        for weight, tensor in weights.items():
            self.register_parameter(weight, constant(tensor))

    @property
    def extra(self) -> dict[str, Tensor]:
        """[F] each: the weights that the architecture has besides W_enc, W_dec, b_enc and b_dec."""
        return {name: self.get_parameter(name) for name in EXTRA_WEIGHTS[self.architecture]}

    @property
    def is_foreign(self) -> bool:
        """Whether it does what no model trained here does: leave b_dec in its input, or rescale activations."""
        return self.rescale_acts_by_decoder_norm or not self.apply_b_dec_to_input

    @property
    def directions(self) -> Tensor:
        """[F, D] what one unit of each latent adds to the reconstruction: W_dec, unless activations are rescaled."""
        return self.W_dec / self.W_dec.norm(dim=-1)[:, None] if self.rescale_acts_by_decoder_norm else self.W_dec

    @property
    def config(self) -> dict[str, Any]:
        """The content of cfg.json (SAELens 6)."""
        config: dict[str, Any] = {
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "dtype": type_name(self.dtype),
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

    def encode(self, x: Tensor, /) -> Tensor:
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

    def decode(self, latents: Tensor, /) -> Tensor:
        """Reconstruction [..., D] from latent activations [..., F]."""
        if self.rescale_acts_by_decoder_norm:
            latents = latents / self.W_dec.norm(dim=-1)
        return product(latents, self.W_dec) + self.b_dec
