"""What an evaluator, a report or another tool sees of a trained model: encode, decode, and SAELens-shaped weights.

Shapes: D width of the vectors read, F latents.
"""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class View(Protocol):
    """One way of reading a trained model as an ordinary SAE (weights in SAELens's orientation)."""

    @property
    def name(self) -> str:
        """Short name, unique within a model: `sae`, `level1`, `level2`, ..."""

    @property
    def architecture(self) -> str:
        """`standard`, `jumprelu`, `topk`, `gated`, or `stacked` (an encoder of several layers)."""

    @property
    def metadata(self) -> dict[str, Any]:
        """SAELens metadata: `model_name`, `hook_name`, `context_size`, `prepend_bos`, `dataset_path`, ..."""

    @property
    def W_enc(self) -> Tensor:
        """[D, F]; for `stacked` the product of the encoder layers, a linear summary used by weight metrics only."""

    @property
    def W_dec(self) -> Tensor:
        """[F, D]"""

    @property
    def b_enc(self) -> Tensor:
        """[F]"""

    @property
    def b_dec(self) -> Tensor:
        """[D]"""

    @property
    def d_in(self) -> int:
        """Width D of the vectors read and reconstructed."""

    @property
    def d_sae(self) -> int:
        """Number F of latents."""

    @property
    def config(self) -> dict[str, Any]:
        """JSON-ready description in the keys of SAELens's cfg.json."""

    def encode(self, x: Tensor, /) -> Tensor:
        """Latent activations [..., F] of vectors [..., D]."""

    def decode(self, latents: Tensor, /) -> Tensor:
        """Reconstruction [..., D] from latent activations [..., F]."""

    def to(self, *, dtype: torch.dtype | None = None, device: str | None = None) -> "View":
        """A copy with its weights in another type or place."""
