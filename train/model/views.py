"""What an evaluator, a report or another tool sees of a model: encode, decode, and weights in SAELens's orientation.

Shapes: D width of the vectors read, F latents.
"""

import copy
import re
from collections.abc import Sequence
from functools import cached_property
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from hsae.cache.language_model.matmul import product

NO_PARENT = -1
"""In place of a parent's number, for a latent that no parent gates."""


class View(nn.Module):
    """A dictionary of latents that encodes and decodes vectors: an SAE, or a hierarchical one read as an SAE.

    It has the interface of SAEBench's custom SAEs, and is an ordinary module: `.to("cuda", torch.bfloat16)`, `.half()`
    and `.state_dict()` work. Weights take no gradients unless `requires_grad_()` asks for them.
    """

    if TYPE_CHECKING:  # an SAE registers its weights as parameters, other views compute them

        @property
        def W_enc(self) -> Tensor:
            """[D, F]; where the encoder has several layers their product, a linear summary for weight metrics."""

        @property
        def W_dec(self) -> Tensor:
            """[F, D] what one unit of each latent adds to the reconstruction."""

        @property
        def b_enc(self) -> Tensor:
            """[F]"""

        @property
        def b_dec(self) -> Tensor:
            """[D]"""

    def __init__(self, name: str, architecture: str, metadata: dict[str, Any]) -> None:
        super().__init__()
        self.name = name
        """Unique within a model: `sae`, `level1`, `level2`, ..."""
        self.architecture = architecture
        """`standard`, `jumprelu`, `topk`, `gated`; `additive` and `stacked` have several levels, no one-layer form."""
        self.metadata = metadata
        """SAELens metadata: `model_name`, `hook_name`, `context_size`, `prepend_bos`, `dataset_path`, ..."""

    @property
    def d_in(self) -> int:
        """Width D of the vectors read and reconstructed."""
        return self.b_dec.shape[0]

    @property
    def d_sae(self) -> int:
        """Number F of latents."""
        return self.b_enc.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.b_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.b_dec.dtype

    @property
    def config(self) -> dict[str, Any]:
        """JSON-ready description in the keys of SAELens's cfg.json: the finest level's, with the size of the whole."""
        finest = next(part for part in self.modules() if isinstance(part, View) and part is not self)
        return {**finest.config, "d_sae": self.d_sae, "architecture": self.architecture}

    @cached_property
    def cfg(self) -> "SAEBenchConfig":
        """The configuration that SAEBench asks a custom SAE for; its type and device follow the weights."""
        return SAEBenchConfig(self)

    def encode(self, x: Tensor, /) -> Tensor:
        """Latent activations [..., F] of vectors [..., D]."""
        raise NotImplementedError

    def decode(self, latents: Tensor, /) -> Tensor:
        """Reconstruction [..., D] from latent activations [..., F]."""
        return product(latents, self.W_dec) + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction [..., D] of vectors [..., D]."""
        return self.decode(self.encode(x))

    def copy_to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Return a copy in another place or type and leave this one as it is; what needs no change is shared."""
        shared: dict[int, Any] = {}
        for parameter in self.parameters():
            moved = parameter.detach().to(device, dtype)
            shared[id(parameter)] = nn.Parameter(moved, requires_grad=parameter.requires_grad)
        for buffer in self.buffers():
            shared[id(buffer)] = buffer.to(device, dtype if buffer.is_floating_point() else None)
        return copy.deepcopy(self, shared)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take along: all but `cfg`, which follows this view's weights."""
        return {name: value for name, value in self.__dict__.items() if name != "cfg"}

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """What `.to`, `.half`, `.cuda` and the like go through."""
        moved: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if "cfg" in self.__dict__:
            self.cfg.follow(self)
        return moved

    def __repr__(self) -> str:
        kind = f"{type(self).__name__} {self.name!r}: {self.architecture}"
        return f"{kind}, {self.d_in} -> {self.d_sae} latents, {placed(self)}"


class SAEBenchConfig(SimpleNamespace):
    """The attributes that SAEBench reads, and writes, on a custom SAE's `cfg` and on `cfg.metadata`."""

    def __init__(self, view: View) -> None:
        layer = re.search(r"\d+", str(view.metadata.get("hook_name")))
        fields: dict[str, Any] = {
            "hook_layer": int(layer[0]) if layer else None,
            "hook_head_index": None,
            "seqpos_slice": (None,),
        }
        fields |= {"model_from_pretrained_kwargs": {}, "dataset_trust_remote_code": False, **view.metadata}
        described = {key: value for key, value in view.config.items() if key != "metadata"}
        super().__init__(**described, **fields, metadata=SimpleNamespace(**fields))
        self.follow(view)

    def follow(self, view: View) -> None:
        """Take over the type and the place of a view's weights."""
        self.dtype, self.device = type_name(view.dtype), str(view.device)

    def to_dict(self) -> dict[str, Any]:
        """A copy as a dictionary."""
        return {**vars(self), "metadata": dict(vars(self.metadata))}


class AdditiveView(View):
    """Levels of an additive model that have no one-layer form: a child gate, or a top-k in every level."""

    def __init__(self, name: str, levels: Sequence[View], gates: Sequence[Tensor], count: int) -> None:
        """`levels` are those shown and all coarser ones, finest first; the first `count` make up the code."""
        super().__init__(name, "additive", levels[0].metadata)
        self.levels, self.count = nn.ModuleList(levels), count
        for number, parents in enumerate(gates, 1):
            self.register_buffer(f"parents{number}", parents)

    def _side_by_side(self, weight: str, dimension: int) -> Tensor:
        return torch.cat([getattr(level, weight) for level in self.levels[: self.count]], dimension)

    @property
    def W_enc(self) -> Tensor:
        """[D, F]"""
        return self._side_by_side("W_enc", 1)

    @property
    def W_dec(self) -> Tensor:
        """[F, D]"""
        return self._side_by_side("W_dec", 0)

    @property
    def b_enc(self) -> Tensor:
        """[F]"""
        return self._side_by_side("b_enc", 0)

    @property
    def b_dec(self) -> Tensor:
        """[D]"""
        return self.get_parameter("levels.0.b_dec")

    def encode(self, x: Tensor, /) -> Tensor:
        """Latent activations [..., F] of vectors [..., D]."""
        return torch.cat(gated_codes(list(self.levels), list(self.buffers(recurse=False)), x)[: self.count], -1)


def gated_codes(levels: Sequence[Any], gates: Sequence[Tensor], x: Tensor) -> tuple[Tensor, ...]:
    """The code of every level, finest first; latents whose parent is silent are put out, coarsest level first.

    `gates` holds [F_l] parents for each level but the coarsest, or nothing if latents are free.
    """
    codes = [level.encode(x) for level in levels]
    for index in reversed(range(len(gates))):
        codes[index] = codes[index] * parent_fires(codes[index + 1], gates[index])
    return tuple(codes)


def parent_fires(coarse_BF: Tensor, parents_G: Tensor) -> Tensor:
    """[B, G] whether each fine latent's parent is in the coarse code; true for a latent without one."""
    fires = coarse_BF.index_select(-1, parents_G.clamp_min(0)) > 0
    return fires | (parents_G == NO_PARENT)


class StackedView(View):
    """The top level of a stack seen from the residual: all encoders up, the cascade of decoders down.

    The cascade is linear; its rows are given unit norm and the code is scaled to match.
    """

    norms: Tensor
    """[F] norms of the cascade's rows; the code is the top level's times these."""

    def __init__(self, levels: Sequence[View]) -> None:
        """The view of the last of `levels`, given finest first."""
        super().__init__(levels[-1].name, "stacked", levels[0].metadata)
        self.levels = nn.ModuleList(levels)
        finest = levels[0].W_enc
        wide = [level.copy_to(dtype=torch.promote_types(finest.dtype, torch.float32)) for level in levels]
        rows, bias = wide[-1].W_dec, wide[-1].b_dec
        for level in reversed(wide[:-1]):
            rows, bias = rows @ level.W_dec, bias @ level.W_dec + level.b_dec
        product, offset = torch.eye(len(finest)).to(rows), torch.zeros(len(finest)).to(rows)
        for level in wide:
            product, offset = product @ level.W_enc, (offset - level.b_dec) @ level.W_enc + level.b_enc
        norms = rows.norm(dim=1).clamp_min(1e-12)
        weights = {"W_enc": product * norms, "W_dec": rows / norms[:, None], "b_enc": offset * norms, "b_dec": bias}
        for name, weight in weights.items():
            self.register_parameter(name, constant(weight.to(finest.dtype)))
        self.register_buffer("norms", norms.to(finest.dtype))

    def encode(self, x: Tensor, /) -> Tensor:
        """Latent activations [..., F] of vectors [..., D]."""
        for level in self.levels:
            x = level.encode(x)  # type: ignore[operator]
        return x * self.norms


def constant(tensor: Tensor) -> nn.Parameter:
    """A parameter that takes no gradient."""
    return nn.Parameter(tensor.detach(), requires_grad=False)


def type_name(dtype: torch.dtype) -> str:
    """`float32` of torch.float32."""
    return str(dtype).removeprefix("torch.")


def placed(view: View) -> str:
    """`float32 on cpu`."""
    return f"{type_name(view.dtype)} on {view.device}"
