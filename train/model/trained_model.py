"""Trained models in the residual's own units: saved as safetensors + JSON, and seen through views.

Shapes: D residual width, I width of what a level reads, F latents of a level.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hsae.cache.errors import UserError
from hsae.cache.files import check_seal, file_sha256, parse_json, sealed, write_atomically
from hsae.cache.language_model.matmul import product
from hsae.train.model.saelens_config import EXTRA_WEIGHTS
from hsae.train.model.saelens_folder import SAE
from hsae.train.model.trainable_sae import parent_fires
from hsae.train.model.views import View
from hsae.train.runs.run_record import check_files, command, harmed

CONFIG_FILE, WEIGHTS_FILE = "model.json", "model.safetensors"
FORMAT = 2
STRUCTURES = ("flat", "additive", "stacked")


@dataclass(frozen=True, kw_only=True)
class CompositionMap:
    """How level `level`'s code is composed of the one below."""

    level: int
    weight: Tensor
    """[F_l, F_{l-1}] W_l in the codes' own units: h_l is compared with W_l h_{l-1}."""
    contributions: Tensor
    """[F_l, F_{l-1}] w_ij rms(h_j) / rms(h_i): the share of latent i's rms that latent j brings."""


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A trained model in the residual's units. Each level is an SAE of what it reads (I = D unless stacked)."""

    structure: str
    levels: tuple[SAE, ...]
    """Finest first."""
    compositions: tuple[CompositionMap, ...]
    """For levels 2 to L; empty if none was learned."""
    effective_thresholds: tuple[float, ...] = ()
    """stacked, levels 2 to L: the threshold at which the one-layer form of a level has the level's L0."""
    parents: tuple[Tensor, ...] = ()
    """With a child gate, for levels 1 to L-1: [F_l] the latent of the level above without which a latent can't fire, or -1."""

    @property
    def level_widths(self) -> tuple[int, ...]:
        """Latents of each level, finest first."""
        return tuple(level.d_sae for level in self.levels)

    def codes(self, x: Tensor) -> tuple[Tensor, ...]:
        """The code [..., F_l] of every level, finest first, of residuals [..., D]."""
        if self.structure == "stacked":
            codes = []
            for level in self.levels:
                x = level.encode(x)
                codes.append(x)
            return tuple(codes)
        return additive_codes(self.levels, self.parents, x)

    def reconstruct(self, codes: Sequence[Tensor], above: int = 1) -> Tensor:
        """[..., D] from the levels >= `above` only: additive the nested sum, stacked the cascade of decoders from level `above`."""
        if self.structure == "stacked":
            decoded = codes[above - 1]
            for level in reversed(self.levels[:above]):
                decoded = level.decode(decoded)
            return decoded
        kept = list(zip(codes, self.levels, strict=True))[above - 1 :]
        return sum((product(code, level.W_dec) for code, level in kept), self.levels[0].b_dec)

    def directions(self, number: int) -> Tensor:
        """[F_l, D] what one unit of each latent of level `number` adds to the reconstruction; not of unit norm in a stack."""
        rows = self.levels[number - 1].W_dec
        if self.structure == "stacked":
            for level in reversed(self.levels[: number - 1]):
                rows = rows @ level.W_dec
        return rows

    def to(self, *, dtype: torch.dtype | None = None, device: str | None = None) -> "TrainedModel":
        """A copy with its weights and maps in another type or place."""
        maps = (
            replace(part, weight=part.weight.to(device, dtype), contributions=part.contributions.to(device, dtype))
            for part in self.compositions
        )
        return replace(
            self,
            levels=tuple(level.to(dtype=dtype, device=device) for level in self.levels),
            compositions=tuple(maps),
            parents=tuple(parents.to(device) for parents in self.parents),
        )

    def views(self) -> dict[str, View]:
        """Every way to read the model as one SAE of the residual.

        flat: `sae`. additive: `sae` (all levels side by side, finest first) and `level1`, `level2`, ... alone.
        stacked: `level1`, and `level2`, ... with all encoders below them and the cascade of decoders.
        """
        if self.structure == "flat":
            return {"sae": replace(self.levels[0], name="sae")}
        if self.structure == "stacked":
            numbers = range(2, len(self.levels) + 1)
            stacks = {f"level{number}": StackedView.of(self.levels[:number]) for number in numbers}
            return {"level1": self.levels[0], **stacks}
        one_layer = not self.parents and self.levels[0].architecture != "topk"
        whole = _concatenated(self.levels) if one_layer else AdditiveView.of(self, 1, len(self.levels))
        views: dict[str, View] = {"sae": whole}
        for number, level in enumerate(self.levels, 1):
            gated = bool(self.parents) and number < len(self.levels)
            views[level.name] = AdditiveView.of(self, number, number) if gated else level
        return views

    def one_layer(self) -> dict[str, SAE]:
        """The SAEs written for other tools, by folder name.

        flat: `sae`. additive: `sae` and each level, unless a child gate or a top-k per level leaves a view without a one-layer
        form. stacked: `level1`; for each higher level `levelN`, which reads the code of
        the level below, and `levelN-effective`, a one-layer SAE of the residual: the cascade of decoders is exact, the
        encoder is the product of the encoder layers with a threshold of its own, because two layers with an activation
        between them have no exact one-layer form.
        """
        if self.structure != "stacked":
            return {name: view for name, view in self.views().items() if isinstance(view, SAE)}
        folders = {level.name: level for level in self.levels}
        for number, threshold in enumerate(self.effective_thresholds, 2):
            stack = StackedView.of(self.levels[:number])
            limits = threshold * stack.norms
            folders[f"level{number}-effective"] = SAE(
                name=f"level{number}-effective",
                architecture="jumprelu",
                W_enc=stack.W_enc,
                W_dec=stack.W_dec,
                b_enc=stack.b_enc,
                b_dec=stack.b_dec,
                extra={"threshold": limits},
                apply_b_dec_to_input=False,
                metadata={**stack.metadata, "hsae_note": "encoder linearised; the decoder is exact"},
            )
        return folders


def additive_codes(levels: Sequence[SAE], parents: Sequence[Tensor], x: Tensor) -> tuple[Tensor, ...]:
    """The code of every level, finest first; with `parents`, latents whose parent is silent are put out, coarsest level first."""
    codes = [level.encode(x) for level in levels]
    for index in reversed(range(len(parents))):
        codes[index] = codes[index] * parent_fires(codes[index + 1], parents[index])
    return tuple(codes)


@dataclass(frozen=True, kw_only=True)
class AdditiveView:
    """Levels of an additive model that have no one-layer form: a child gate, or a top-k in every level."""

    name: str
    levels: tuple[SAE, ...]
    """The levels shown, and all coarser ones, which their gates need; finest first."""
    parents: tuple[Tensor, ...]
    """Gates between `levels`; empty without a child gate."""
    shown: int
    """How many of `levels`, from the finest, make up the code."""
    architecture: str = "additive"

    @classmethod
    def of(cls, model: "TrainedModel", first: int, last: int) -> "AdditiveView":
        """The view of the levels `first` (fine) to `last` (coarse) of `model`."""
        name = "sae" if first != last else f"level{first}"
        return cls(
            name=name, levels=model.levels[first - 1 :], parents=model.parents[first - 1 :], shown=last - first + 1
        )

    def _parts(self, part: str, dimension: int) -> Tensor:
        return torch.cat([getattr(level, part) for level in self.levels[: self.shown]], dimension)

    @property
    def W_enc(self) -> Tensor:
        """[D, F]"""
        return self._parts("W_enc", 1)

    @property
    def W_dec(self) -> Tensor:
        """[F, D]"""
        return self._parts("W_dec", 0)

    @property
    def b_enc(self) -> Tensor:
        """[F]"""
        return self._parts("b_enc", 0)

    @property
    def b_dec(self) -> Tensor:
        """[D]"""
        return self.levels[0].b_dec

    @property
    def metadata(self) -> dict[str, Any]:
        """SAELens metadata."""
        return self.levels[0].metadata

    @property
    def d_in(self) -> int:
        """Width D of the vectors read and reconstructed."""
        return self.levels[0].d_in

    @property
    def d_sae(self) -> int:
        """Number F of latents."""
        return sum(level.d_sae for level in self.levels[: self.shown])

    @property
    def config(self) -> dict[str, Any]:
        """JSON-ready description in the keys of SAELens's cfg.json."""
        return {**self.levels[0].config, "d_sae": self.d_sae, "architecture": self.architecture}

    def encode(self, x: Tensor) -> Tensor:
        """Latent activations [..., F] of vectors [..., D]."""
        return torch.cat(additive_codes(self.levels, self.parents, x)[: self.shown], -1)

    def decode(self, latents: Tensor) -> Tensor:
        """Reconstruction [..., D] from latent activations [..., F]."""
        return product(latents, self.W_dec) + self.b_dec

    def to(self, *, dtype: torch.dtype | None = None, device: str | None = None) -> "AdditiveView":
        """A copy with its weights in another type or place."""
        levels = tuple(level.to(dtype=dtype, device=device) for level in self.levels)
        return replace(self, levels=levels, parents=tuple(part.to(device) for part in self.parents))


def _concatenated(levels: tuple[SAE, ...]) -> SAE:
    """Levels that read the same vectors, side by side: their common bias once, their latents one after the other."""
    architecture = levels[0].architecture
    return SAE(
        name="sae",
        architecture=architecture,
        W_enc=torch.cat([level.W_enc for level in levels], 1),
        W_dec=torch.cat([level.W_dec for level in levels]),
        b_enc=torch.cat([level.b_enc for level in levels]),
        b_dec=levels[0].b_dec,
        extra={key: torch.cat([level.extra[key] for level in levels]) for key in levels[0].extra},
        metadata=levels[0].metadata,
    )


@dataclass(frozen=True, kw_only=True)
class StackedView:
    """The top level of a stack seen from the residual: all encoders up, the cascade of decoders down.

    The cascade is linear; its rows are given unit norm and the code is scaled to match.
    """

    name: str
    levels: tuple[SAE, ...]
    W_enc: Tensor
    """[D, F] product of the encoder layers, scaled like the code: a linear summary for weight metrics."""
    W_dec: Tensor
    """[F, D] cascade of decoders, unit rows."""
    b_enc: Tensor
    """[F] what the product of the encoder layers gives at a zero residual."""
    b_dec: Tensor
    """[D]"""
    norms: Tensor
    """[F] norms of the cascade's rows; the code is the top level's times these."""
    metadata: dict[str, Any]
    architecture: str = "stacked"

    @classmethod
    def of(cls, levels: tuple[SAE, ...]) -> "StackedView":
        """The view of the last of `levels`, given finest first."""
        given = levels[0].W_enc
        wide = [level.to(dtype=torch.promote_types(given.dtype, torch.float32)) for level in levels]
        rows, bias = wide[-1].W_dec, wide[-1].b_dec
        for level in reversed(wide[:-1]):
            rows, bias = rows @ level.W_dec, bias @ level.W_dec + level.b_dec
        product, offset = torch.eye(len(given)).to(rows), torch.zeros(len(given)).to(rows)
        for level in wide:
            product, offset = product @ level.W_enc, (offset - level.b_dec) @ level.W_enc + level.b_enc
        norms = rows.norm(dim=1).clamp_min(1e-12)
        return cls(
            name=levels[-1].name,
            levels=levels,
            W_enc=product * norms,
            W_dec=rows / norms[:, None],
            b_enc=offset * norms,
            b_dec=bias,
            norms=norms,
            metadata=levels[0].metadata,
        ).to(dtype=given.dtype)

    @property
    def d_in(self) -> int:
        """Width D of the vectors read and reconstructed."""
        return self.levels[0].d_in

    @property
    def d_sae(self) -> int:
        """Number F of latents."""
        return self.levels[-1].d_sae

    @property
    def config(self) -> dict[str, Any]:
        """JSON-ready description in the keys of SAELens's cfg.json."""
        return {**self.levels[0].config, "d_sae": self.d_sae, "architecture": self.architecture}

    def encode(self, x: Tensor) -> Tensor:
        """Latent activations [..., F] of vectors [..., D]."""
        for level in self.levels:
            x = level.encode(x)
        return x * self.norms

    def decode(self, latents: Tensor) -> Tensor:
        """Reconstruction [..., D] from latent activations [..., F]."""
        return product(latents, self.W_dec) + self.b_dec

    def to(self, *, dtype: torch.dtype | None = None, device: str | None = None) -> "StackedView":
        """A copy with its weights in another type or place."""
        moved = {name: getattr(self, name).to(device, dtype) for name in ("W_enc", "W_dec", "b_enc", "b_dec", "norms")}
        return replace(self, levels=tuple(level.to(dtype=dtype, device=device) for level in self.levels), **moved)


def save_model(model: TrainedModel, folder: Path, mark: Mapping[str, Any] | None = None) -> None:
    """Write `model.safetensors` and `model.json`, each atomically; `mark` names the configuration and data that it was trained with."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for number, level in enumerate(model.levels, 1):
        parts = {"W_enc": level.W_enc, "W_dec": level.W_dec, "b_enc": level.b_enc, "b_dec": level.b_dec, **level.extra}
        tensors |= {f"level{number}.{name}": tensor.contiguous() for name, tensor in parts.items()}
    for part in model.compositions:
        tensors[f"composition{part.level}.weight"] = part.weight.contiguous()
        tensors[f"composition{part.level}.contributions"] = part.contributions.contiguous()
    tensors |= {f"parents{number}": part.contiguous() for number, part in enumerate(model.parents, 1)}
    write_atomically(folder / WEIGHTS_FILE, lambda path: save_file(tensors, path))
    described = {
        "format": FORMAT,
        "structure": model.structure,
        "levels": [
            {"name": level.name, "architecture": level.architecture, "k": level.k, "metadata": level.metadata}
            for level in model.levels
        ],
        "compositions": [part.level for part in model.compositions],
        "effective_thresholds": list(model.effective_thresholds),
        "child_gate": bool(model.parents),
        "run": None if mark is None else dict(mark),
        "weights": file_sha256(folder / WEIGHTS_FILE),
    }
    text = json.dumps(sealed(described), indent=2)
    write_atomically(folder / CONFIG_FILE, lambda path: path.write_text(text))


def load_model(folder: Path | str) -> TrainedModel:
    """Read a model that `save_model` wrote. Raises UserError if it is missing, damaged, or not the one that was written."""
    folder = Path(folder)
    described, tensors = _read_model(folder)
    try:
        levels = tuple(_level(level, number, tensors) for number, level in enumerate(described["levels"], 1))
        names = ["sae"] if described["structure"] == "flat" else [f"level{number + 1}" for number in range(len(levels))]
        if described["structure"] not in STRUCTURES or [level.name for level in levels] != names:
            raise ValueError(f"structure {described['structure']!r} with levels {[level.name for level in levels]}")
        maps = tuple(
            CompositionMap(
                level=level,
                weight=tensors[f"composition{level}.weight"],
                contributions=tensors[f"composition{level}.contributions"],
            )
            for level in described["compositions"]
        )
        return TrainedModel(
            structure=described["structure"],
            levels=levels,
            compositions=maps,
            effective_thresholds=tuple(map(float, described["effective_thresholds"])),
            parents=tuple(tensors[f"parents{number}"] for number in range(1, len(levels)))
            if described["child_gate"]
            else (),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise harmed(folder / CONFIG_FILE, folder.parent, f"does not describe a model ({error!r})") from None


def load_mark(folder: Path) -> dict[str, Any] | None:
    """What a model says it was trained with; None if it does not say so, is missing or damaged."""
    try:
        found = _read_model(folder, recorded=False)[0].get("run")
    except UserError:
        return None
    return found if isinstance(found, dict) else None


def _read_model(folder: Path, *, recorded: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What model.json says, and the weights; both compared with their checksums, and with what run.json has `recorded`, if they have them."""
    run_dir = folder.resolve().parent
    for path in (folder, folder / CONFIG_FILE, folder / WEIGHTS_FILE):
        if not path.exists():
            name = f"{path.name} is missing" if path != folder else "there is no such folder"
            raise UserError(f"no trained model in {folder}: {name}; train the run with: {command(run_dir)}")
    if recorded:
        check_files(folder, [CONFIG_FILE])
    try:
        described = parse_json((folder / CONFIG_FILE).read_bytes())
        if not isinstance(described, dict):
            raise ValueError("not a JSON object")
        check_seal(described, required=False)
    except ValueError as error:
        raise harmed(folder / CONFIG_FILE, run_dir, f"can't be read ({error})") from None
    if described.get("format") != FORMAT:
        raise UserError(f"{folder}: model format {described.get('format')!r}; this hsae reads format {FORMAT}")
    weights = folder / WEIGHTS_FILE
    if described.get("weights", digest := file_sha256(weights)) != digest:
        raise harmed(weights, run_dir, "fails its checksum")
    try:
        return described, load_file(weights)
    except (SafetensorError, ValueError, TypeError) as error:
        raise harmed(weights, run_dir, f"can't be read ({error})") from None


def _level(described: dict[str, Any], number: int, tensors: dict[str, Tensor]) -> SAE:
    part = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"level{number}.")}
    return SAE(
        name=described["name"],
        architecture=described["architecture"],
        k=described["k"],
        metadata=described["metadata"],
        extra={name: part[name] for name in EXTRA_WEIGHTS[described["architecture"]]},
        W_enc=part["W_enc"],
        W_dec=part["W_dec"],
        b_enc=part["b_enc"],
        b_dec=part["b_dec"],
    )
