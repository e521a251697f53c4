"""A trained hierarchical SAE in the residual's own units: its codes, how its levels compose, and its file.

Levels are numbered 1 (finest, widest) to L (coarsest). Shapes: D residual width, F latents of a level or of all side by
side.
"""

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, overload

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hsae.cache.errors import UserError
from hsae.cache.files import file_sha256, sealed, write_atomically, write_bytes_atomically
from hsae.cache.language_model.hooks import edit_residual
from hsae.cache.language_model.matmul import product
from hsae.train.model.sae import SAE
from hsae.train.model.views import AdditiveView, StackedView, View, gated_codes, placed

CONFIG_FILE, WEIGHTS_FILE = "model.json", "model.safetensors"
FORMAT = 2
FOREIGN_FORMAT = 3
"""Of a model with a level that only other tools make: it leaves b_dec in its input, or rescales its activations."""

Latent = tuple[int, int]
"""(level, latent), the level from 1."""


class CompositionMap(nn.Module):
    """How level `level`'s code is composed of the one below."""

    weight: Tensor
    """[F_l, F_{l-1}] W_l in the codes' own units: h_l is compared with W_l h_{l-1}."""
    contributions: Tensor
    """[F_l, F_{l-1}] w_ij rms(h_j) / rms(h_i): the share of latent i's rms that latent j brings."""

    def __init__(self, *, level: int, weight: Tensor, contributions: Tensor) -> None:
        super().__init__()
        self.level = level
        self.register_buffer("weight", weight)
        self.register_buffer("contributions", contributions)


@dataclass(frozen=True)
class Edge:
    """One end of a connection between a coarse and a fine latent: the latent at the other end, and how strong it is."""

    level: int
    latent: int
    weight: float
    """Of the fine latent's activation in the coarse one's."""
    contribution: float
    """Share of the coarse latent's root mean square that the fine one brings; negative if it takes away."""


class HierarchicalSAE(View):
    """A trained model with one or more levels, each an SAE of what it reads.

    All levels side by side, finest first, are its latents; `split` takes their code apart.

    >>> import hsae, torch
    >>> x = torch.randn(400, 8)
    >>> settings = {"batch_tokens": 64, "steps": 20, "device": "cpu", "progress": False}
    >>> model = hsae.fit(x, widths=[32, 6], l0=[4, 2], composition="normalised", **settings)
    >>> model
    AdditiveSAE of 8-dimensional residuals, float32 on cpu
      level 1: 32 latents, jumprelu
      level 2: 6 latents, jumprelu, composed of level 1
    >>> codes = model.encode(x[:5])  # of all levels
    >>> x_hat = model.decode(codes)
    >>> fine, coarse = model.split(codes)
    >>> codes.shape, coarse.shape, x_hat.shape
    (torch.Size([5, 38]), torch.Size([5, 6]), torch.Size([5, 8]))
    >>> strongest = model.children(level=2, latent=5)[0]
    >>> strongest.level
    1
    >>> {edge.level for edge in model.parents(strongest.level, strongest.latent)}
    {2}
    >>> model.to("cpu", torch.bfloat16).view("level2").dtype
    torch.bfloat16
    """

    structure: ClassVar[str]
    """`flat`, `additive` or `stacked`."""
    whole_view: ClassVar[str] = "sae"
    """Name of the view that stands for the whole model where there can be only one."""
    is_nested: ClassVar[bool] = True
    """Whether the reconstruction from a level is the sum with all coarser ones; else each level's stands by itself."""

    def __init__(
        self,
        levels: Sequence[SAE],
        compositions: Sequence[CompositionMap] = (),
        *,
        gates: Sequence[Tensor] = (),
        effective_thresholds: Sequence[float] = (),
    ) -> None:
        """Put trained levels together, finest first; `compositions` of levels 2 to L, none if they were not learned.

        `gates` (a child gate) has for levels 1 to L-1 [F_l] the latent of the level above without which a latent can't
        fire, or -1. `effective_thresholds` (stacked, levels 2 to L) are those at which the one-layer form of a level
        has its L0.
        """
        super().__init__("sae", self.structure, levels[0].metadata)
        self.effective_thresholds = tuple(effective_thresholds)
        for number, level in enumerate(levels, 1):
            self.add_module(f"level{number}", level)
        for part in compositions:
            self.add_module(f"composition{part.level}", part)
        for number, parents in enumerate(gates, 1):
            self.register_buffer(f"parents{number}", parents)

    @classmethod
    def reads_code(cls, number: int) -> bool:
        """Whether level `number` reads the code of the level below rather than the residual."""
        return False

    @classmethod
    def widths_read(cls, d_in: int, widths: Sequence[int]) -> list[int]:
        """Width of the vectors that each level reads."""
        return [width if cls.reads_code(n) else d_in for n, width in enumerate((d_in, *widths[:-1]), 1)]

    @classmethod
    def view_from(cls, level: int, levels: int) -> str:
        """Name of the view whose reconstruction is that from `level` of `levels` up; empty if there is none."""
        return cls.whole_view if level == 1 else f"level{level}" if level == levels else ""

    @classmethod
    def calibrated(cls, levels: Sequence[SAE], x_BD: Tensor, l0: Sequence[float]) -> list[float]:
        """The `effective_thresholds` at which one-layer forms have their `l0` on residuals, if such are needed."""
        return []

    @classmethod
    def level_name(cls, number: int) -> str:
        """The name of level `number`'s SAE."""
        return f"level{number}"

    # --- levels --------------------------------------------------------------------------------------------------

    @property
    def levels(self) -> tuple[SAE, ...]:
        """The SAE of each level, finest first."""
        return tuple(module for module in super().children() if isinstance(module, SAE))

    @property
    def level_widths(self) -> tuple[int, ...]:
        """Latents of each level, finest first."""
        return tuple(level.d_sae for level in self.levels)

    @property
    def compositions(self) -> tuple[CompositionMap, ...]:
        """The maps of levels 2 to L; empty if none was learned."""
        return tuple(module for module in super().children() if isinstance(module, CompositionMap))

    @property
    def gates(self) -> tuple[Tensor, ...]:
        """With a child gate, for levels 1 to L-1 [F_l] the parent without which a latent can't fire, or -1."""
        return tuple(self.buffers(recurse=False))

    @property
    def b_dec(self) -> Tensor:
        """[D] bias of the residual."""
        return self.levels[0].b_dec

    @property
    def W_dec(self) -> Tensor:
        """[F, D] `directions` of all levels, finest first."""
        return torch.cat([self.directions(number) for number in range(1, len(self.levels) + 1)])

    @property
    def W_enc(self) -> Tensor:
        """[D, F] encoders of all levels, finest first; in a stack the product of a level's encoder layers."""
        return torch.cat([level.W_enc for level in self.levels], 1)

    @property
    def b_enc(self) -> Tensor:
        """[F]"""
        return torch.cat([level.b_enc for level in self.levels])

    # --- codes ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def codes(self, x: Tensor) -> tuple[Tensor, ...]:
        """The code [..., F_l] of every level, finest first, of residuals [..., D]."""

    @abstractmethod
    def reconstruct(self, codes: Sequence[Tensor], above: int = 1) -> Tensor:
        """[..., D] from the codes of all levels, of which only those of levels >= `above` are used.

        additive: the nested sum. stacked: the cascade of decoders from level `above` down.
        """

    def directions(self, level: int) -> Tensor:
        """[F_l, D] what one unit of each latent of a level adds to the reconstruction; not of unit norm in a stack."""
        return self.levels[level - 1].directions

    def encode(self, x: Tensor, /) -> Tensor:
        """Latent activations [..., F] of all levels side by side, finest first, of residuals [..., D]."""
        if x.shape[-1] != self.d_in:
            raise UserError(f"x has shape {tuple(x.shape)}; this model reads residuals [..., {self.d_in}]")
        return torch.cat(self.codes(x), -1)

    def split(self, codes: Tensor) -> tuple[Tensor, ...]:
        """Take [..., F] of all levels apart: [..., F_l] of each, finest first."""
        if codes.shape[-1] != self.d_sae:
            raise UserError(
                f"the code has {codes.shape[-1]} latents; the levels have {self._widths()}, {self.d_sae} in all"
            )
        return codes.split_with_sizes(list(self.level_widths), -1)

    def decode(self, latents: Tensor, /) -> Tensor:
        """Reconstruction [..., D] from latent activations [..., F] of all levels; in a stack, level 1's alone."""
        return self.reconstruct(self.split(latents))

    # --- views ---------------------------------------------------------------------------------------------------

    @property
    def view_names(self) -> list[str]:
        """The views there are, as `view` takes them."""
        return [level.name for level in self.levels]

    def view(self, name: str) -> View:
        """The model read as one SAE of the residual.

        flat: `sae`. additive: `sae` (all levels side by side, finest first) and `level1`, `level2`, ... alone.
        stacked: `level1`, and `level2`, ... with all encoders below them and the cascade of decoders.
        A view is a module of its own: `.to` on it leaves the model where it is. It may share the model's memory, so its
        weights are not to be changed in place.
        """
        if name not in self.view_names:
            raise UserError(f"this {self.structure} model has no view {name!r}; it has {', '.join(self.view_names)}")
        return self._view(name).copy_to()

    def _view(self, name: str) -> View:
        return self.levels[self.view_names.index(name)]

    def views(self) -> dict[str, View]:
        """Every `view` by its name."""
        return {name: self.view(name) for name in self.view_names}

    def one_layer(self) -> dict[str, SAE]:
        """The SAEs written for other tools, by folder name.

        flat: `sae`. additive: `sae` and each level, unless a child gate or a top-k per level leaves a view without a
        one-layer form. stacked: `level1`; for each higher level `levelN`, which reads the code of the level below, and
        `levelN-effective`, a one-layer SAE of the residual: the cascade of decoders is exact, the encoder is the
        product of the encoder layers with a threshold of its own, because two layers with an activation between them
        have no exact one-layer form.
        """
        return {name: view for name, view in self.views().items() if isinstance(view, SAE)}

    # --- hierarchy -----------------------------------------------------------------------------------------------

    @overload
    def children(self) -> Iterator[nn.Module]: ...

    @overload
    def children(self, level: int, latent: int) -> list[Edge]: ...

    def children(self, level: int | None = None, latent: int | None = None) -> Iterator[nn.Module] | list[Edge]:
        """The latents one level below that a coarse latent is composed of, by falling absolute contribution.

        Those that bring nothing are left out. Without arguments: the submodules, as of any torch module.
        Raises UserError for the finest level, an unknown latent, or a model whose composition was not learned.
        """
        if level is None and latent is None:
            return super().children()
        if level is None or latent is None:
            raise UserError("give both: children(level=2, latent=17)")
        if level == 1:
            raise UserError(
                f"level 1 is the finest and has no children; {self._allowed(range(2, len(self.levels) + 1))}"
            )
        self.check_latent((level, latent))
        part = self._composition(level)
        return _edges(level - 1, part.weight[latent], part.contributions[latent])

    def parents(self, level: int, latent: int) -> list[Edge]:
        """The latents one level above that a fine latent is part of, by falling absolute contribution to them.

        Raises UserError for the coarsest level, an unknown latent, or a model whose composition was not learned.
        """
        if level == len(self.levels):
            raise UserError(f"level {level} is the coarsest and has no parents; {self._allowed(range(1, level))}")
        self.check_latent((level, latent))
        part = self._composition(level + 1)
        return _edges(level + 1, part.weight[:, latent], part.contributions[:, latent])

    def direction(self, latent: Latent) -> Tensor:
        """[D] what one unit of a latent, given as (level, latent), adds to the reconstruction. Raises UserError."""
        self.check_latent(latent)
        return self.directions(latent[0])[latent[1]]

    def _composition(self, level: int) -> CompositionMap:
        for part in self.compositions:
            if part.level == level:
                return part
        raise UserError(
            f"this {self.structure} model has no learned composition of level {level}; train it with a "
            "composition mode (composition = { mode = 'normalised' }), or fit a map with `hsae eval composition`"
        )

    def check_latent(self, latent: Latent) -> None:
        """Raise UserError unless there is such a latent, given as (level, latent)."""
        level, number = latent
        if level not in range(1, len(self.levels) + 1):
            raise UserError(f"there is no level {level}; {self._allowed(range(1, len(self.levels) + 1))}")
        if number not in range(width := self.level_widths[level - 1]):
            raise UserError(f"level {level} has no latent {number}; it has latents 0 to {width - 1}")

    def _allowed(self, levels: range) -> str:
        return f"this {self.structure} model has level{'s' * (len(self.levels) > 1)} {self._widths()}" + (
            f"; give a level from {levels[0]} to {levels[-1]}" if levels else ""
        )

    def _widths(self) -> str:
        """`1 (1792 latents), 2 (512 latents)`."""
        return ", ".join(f"{number} ({width} latents)" for number, width in enumerate(self.level_widths, 1))

    # --- the language model --------------------------------------------------------------------------------------

    def steer(self, lm: Any, strengths: Mapping[Latent, float]) -> AbstractContextManager[None]:
        """While it is entered, add latents' directions to the residual of a language model at this model's hook.

        `strengths` gives for each (level, latent) how many times its direction (`directions`, in the residual's own
        units) is added, at every position of every pass. `lm` is a LanguageModel or a transformers model. The hook is
        the metadata's `hook_name`. Raises UserError for unknown latents, a model of another width, or metadata without
        hook.

        >>> with model.steer(lm, {(2, 17): 4.0}):  # doctest: +SKIP
        ...     lm.generate("The weather is")
        """
        hook = self.metadata.get("hook_name")
        if not isinstance(hook, str):
            raise UserError("the model's metadata name no hook_name, so there is no place to steer at")
        change = sum(
            (strength * self.direction(latent) for latent, strength in strengths.items()), torch.zeros_like(self.b_dec)
        )
        return edit_residual(lm, hook, change)

    # --- files ---------------------------------------------------------------------------------------------------

    def save(self, folder: Path | str, provenance: Mapping[str, Any] | None = None) -> None:
        """Write `model.safetensors` and `model.json` into a folder, each atomically; `hsae.load` reads it.

        `provenance` names the configuration and data that the model was trained with.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_atomically(folder / WEIGHTS_FILE, lambda path: save_file(tensors, path))
        content = {
            "format": FOREIGN_FORMAT if any(level.is_foreign for level in self.levels) else FORMAT,
            "structure": self.structure,
            "levels": [_described(level) for level in self.levels],
            "compositions": [part.level for part in self.compositions],
            "effective_thresholds": list(self.effective_thresholds),
            "child_gate": bool(self.gates),
            "run": None if provenance is None else dict(provenance),
            "weights": file_sha256(folder / WEIGHTS_FILE),
        }
        write_bytes_atomically(folder / CONFIG_FILE, json.dumps(sealed(content), indent=2).encode())

    def __repr__(self) -> str:
        about = " at ".join(str(self.metadata[key]) for key in ("model_name", "hook_name") if self.metadata.get(key))
        origin = f", made for {about}" if about else ""
        lines = [f"{type(self).__name__} of {self.d_in}-dimensional residuals, {placed(self)}{origin}"]
        maps = {part.level for part in self.compositions}
        for number, level in enumerate(self.levels, 1):
            composed = f", composed of level {number - 1}" if number in maps else ""
            lines.append(f"  level {number}: {level.d_sae} latents, {level.architecture}{composed}")
        return "\n".join(lines)


class AdditiveSAE(HierarchicalSAE):
    """Every level reads the residual; the reconstruction is the sum of all levels'."""

    structure = "additive"

    @property
    def view_names(self) -> list[str]:
        """The views there are, as `view` takes them."""
        return ["sae", *super().view_names]

    def codes(self, x: Tensor) -> tuple[Tensor, ...]:
        """The code [..., F_l] of every level, finest first, of residuals [..., D]."""
        return gated_codes(self.levels, self.gates, x)

    def reconstruct(self, codes: Sequence[Tensor], above: int = 1) -> Tensor:
        """[..., D] from the levels >= `above`: the nested sum."""
        nested = list(zip(codes, self.levels, strict=True))[above - 1 :]
        return sum((product(code, level.W_dec) for code, level in nested), self.b_dec)

    def _view(self, name: str) -> View:
        levels, gates = self.levels, self.gates
        if name == "sae":
            if gates or levels[0].architecture == "topk":
                return AdditiveView(name, levels, gates, len(levels))
            return _side_by_side(levels)
        first = self.view_names.index(name) - 1
        return AdditiveView(name, levels[first:], gates[first:], 1) if gates[first:] else levels[first]


class FlatSAE(HierarchicalSAE):
    """One level: an ordinary SAE."""

    structure = "flat"

    @classmethod
    def level_name(cls, number: int) -> str:
        """The name of level `number`'s SAE."""
        return "sae"

    def codes(self, x: Tensor) -> tuple[Tensor, ...]:
        """The code [..., F], alone in a tuple, of residuals [..., D]."""
        return (self.levels[0].encode(x),)

    def reconstruct(self, codes: Sequence[Tensor], above: int = 1) -> Tensor:
        """[..., D] from the code of the only level."""
        return self.levels[0].decode(codes[above - 1])


class StackedSAE(HierarchicalSAE):
    """Level 1 reads the residual, each higher level the code below; every level reconstructs the residual by itself."""

    structure = "stacked"
    whole_view, is_nested = "level1", False

    @classmethod
    def reads_code(cls, number: int) -> bool:
        """Whether level `number` reads the code of the level below: all but the first do."""
        return number > 1

    @classmethod
    def view_from(cls, level: int, levels: int) -> str:
        """Name of the view that decodes from `level`."""
        return f"level{level}"

    @classmethod
    def calibrated(cls, levels: Sequence[SAE], x_BD: Tensor, l0: Sequence[float]) -> list[float]:
        """The thresholds at which the linear encoders of levels 2 to L have their `l0` on residuals."""
        thresholds = []
        for stack, target in zip(_stacks(levels), l0[1:], strict=True):
            pre_BF = x_BD @ (stack.W_enc / stack.norms) + stack.b_enc / stack.norms
            count = max(1, round(len(x_BD) * target))
            thresholds.append(max(0.0, torch.topk(pre_BF.flatten(), count).values[-1].item()))
        return thresholds

    @property
    def W_enc(self) -> Tensor:
        """[D, F] products of the encoder layers up to each level, finest first: a linear summary."""
        return torch.cat([self.levels[0].W_enc, *(stack.W_enc / stack.norms for stack in _stacks(self.levels))], 1)

    @property
    def b_enc(self) -> Tensor:
        """[F] what the products of the encoder layers give at a zero residual."""
        return torch.cat([self.levels[0].b_enc, *(stack.b_enc / stack.norms for stack in _stacks(self.levels))])

    @property
    def d_sae(self) -> int:
        """Number F of latents."""
        return sum(self.level_widths)

    def codes(self, x: Tensor) -> tuple[Tensor, ...]:
        """The code [..., F_l] of every level, finest first, of residuals [..., D]."""
        codes = []
        for level in self.levels:
            x = level.encode(x)
            codes.append(x)
        return tuple(codes)

    def reconstruct(self, codes: Sequence[Tensor], above: int = 1) -> Tensor:
        """[..., D] from the code of level `above`, through the cascade of decoders."""
        decoded = codes[above - 1]
        for level in reversed(self.levels[:above]):
            decoded = level.decode(decoded)
        return decoded

    def directions(self, level: int) -> Tensor:
        """[F_l, D] what one unit of each latent of a level adds to its reconstruction; not of unit norm."""
        rows = self.levels[level - 1].W_dec
        for lower in reversed(self.levels[: level - 1]):
            rows = rows @ lower.W_dec
        return rows

    def _view(self, name: str) -> View:
        levels = self.levels[: self.view_names.index(name) + 1]
        return StackedView(levels) if len(levels) > 1 else levels[0]

    def one_layer(self) -> dict[str, SAE]:
        """The SAEs written for other tools, by folder name: see `HierarchicalSAE.one_layer`."""
        folders = {level.name: level for level in self.levels}
        for threshold, stack in zip(self.effective_thresholds, _stacks(self.levels), strict=False):
            name = f"{stack.name}-effective"
            folders[name] = SAE(
                name=name,
                architecture="jumprelu",
                W_enc=stack.W_enc,
                W_dec=stack.W_dec,
                b_enc=stack.b_enc,
                b_dec=stack.b_dec,
                extra={"threshold": threshold * stack.norms},
                apply_b_dec_to_input=False,
                metadata={**stack.metadata, "hsae_note": "encoder linearised; the decoder is exact"},
            )
        return folders


STRUCTURES: dict[str, type[HierarchicalSAE]] = {kind.structure: kind for kind in (FlatSAE, AdditiveSAE, StackedSAE)}


def _stacks(levels: Sequence[SAE]) -> Iterator[StackedView]:
    """The views of levels 2 to L of a stack."""
    return (StackedView(levels[:number]) for number in range(2, len(levels) + 1))


def _side_by_side(levels: Sequence[SAE]) -> SAE:
    """Levels that read the same vectors, side by side: their common bias once, their latents one after the other."""
    return SAE(
        name="sae",
        architecture=levels[0].architecture,
        W_enc=torch.cat([level.W_enc for level in levels], 1),
        W_dec=torch.cat([level.W_dec for level in levels]),
        b_enc=torch.cat([level.b_enc for level in levels]),
        b_dec=levels[0].b_dec,
        extra={key: torch.cat([level.extra[key] for level in levels]) for key in levels[0].extra},
        metadata=levels[0].metadata,
    )


def _edges(level: int, weights_N: Tensor, contributions_N: Tensor) -> list[Edge]:
    """The latents of `level` that contribute anything, by falling absolute contribution."""
    pairs = zip(weights_N.tolist(), contributions_N.tolist(), strict=True)
    edges = [Edge(level, latent, *values) for latent, values in enumerate(pairs) if values[1] != 0]
    return sorted(edges, key=lambda edge: (-abs(edge.contribution), edge.latent))


def _described(level: SAE) -> dict[str, Any]:
    """What model.json says of a level."""
    described = {"name": level.name, "architecture": level.architecture, "k": level.k, "metadata": level.metadata}
    if level.is_foreign:
        keys = ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm")
        described |= {key: getattr(level, key) for key in keys}
    return described
