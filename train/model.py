"""Trained models: folded to the residual's own units, saved as safetensors + JSON, and seen through views.

Shapes: D residual width, I width of what a level reads, F latents of a level.

Folding: training works on x = scale * vector. relu, top-k and a threshold are homogeneous, so the same model in raw units
has the same weight matrices, with every bias and threshold divided by the scale; codes come out divided by it too.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hsae.cache.errors import UserError
from hsae.train import saelens
from hsae.train.files import write_atomically
from hsae.train.run import TrainingRun
from hsae.train.saelens import SAE
from hsae.train.views import View

CONFIG_FILE, WEIGHTS_FILE = "model.json", "model.safetensors"
FORMAT = 1


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

    @property
    def level_widths(self) -> tuple[int, ...]:
        """Latents of each level, finest first."""
        return tuple(level.d_sae for level in self.levels)

    def views(self) -> dict[str, View]:
        """Every way to read the model as one SAE of the residual.

        flat: `sae`. additive: `sae` (all levels side by side, finest first) and `level1`, `level2`, ... alone.
        stacked: `level1`, and `level2`, ... with all encoders below them and the cascade of decoders.
        """
        if self.structure == "flat":
            return {"sae": replace(self.levels[0], name="sae")}
        views: dict[str, View] = {} if self.structure == "stacked" else {"sae": _concatenated(self.levels)}
        for number, level in enumerate(self.levels, 1):
            stacked = self.structure == "stacked" and number > 1
            views[f"level{number}"] = StackedView.of(self.levels[:number]) if stacked else level
        return views

    def one_layer(self) -> dict[str, SAE]:
        """The SAEs written for other tools, by folder name.

        flat: `sae`. additive: `sae` and each level. stacked: `level1`; for each higher level `levelN`, which reads the code of
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
        rows, bias = levels[-1].W_dec, levels[-1].b_dec
        for level in reversed(levels[:-1]):
            rows, bias = rows @ level.W_dec, bias @ level.W_dec + level.b_dec
        product, offset = torch.eye(levels[0].d_in), torch.zeros(levels[0].d_in)
        for level in levels:
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
        )

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
        return latents @ self.W_dec + self.b_dec

    def to(self, *, dtype: torch.dtype | None = None, device: str | None = None) -> "StackedView":
        """A copy with its weights in another type or place."""
        moved = {name: getattr(self, name).to(device, dtype) for name in ("W_enc", "W_dec", "b_enc", "b_dec", "norms")}
        return replace(self, levels=tuple(level.to(dtype=dtype, device=device) for level in self.levels), **moved)


@torch.no_grad()
def folded(run: TrainingRun, metadata: dict[str, Any], sample_BD: Tensor) -> TrainedModel:
    """The run's model in raw units. `metadata` goes into SAELens folders; `sample_BD` (scaled) calibrates stacked one-layer forms."""
    config, scale = run.config, run.scaling.scale
    levels = []
    for number in range(1, config.levels + 1):
        level = run.model.level(number)
        d_sae = level.W_dec.shape[0]
        architecture = {"relu": "standard", "topk": "topk", "batchtopk": "jumprelu"}[config.activation]
        threshold = torch.full((d_sae,), level.threshold.item()) / scale
        inner = config.structure == "stacked" and number > 1
        place = {"hook_name": f"code of level {number - 1} at {metadata['hook_name']}"} if inner else {}
        levels.append(
            SAE(
                name="sae" if config.structure == "flat" else f"level{number}",
                architecture=architecture,
                W_enc=level.W_enc.detach().cpu().clone(),
                W_dec=level.W_dec.detach().cpu().clone(),
                b_enc=level.b_enc.detach().cpu() / scale,
                b_dec=run.model.bias(number).detach().cpu() / scale,
                extra={"threshold": threshold} if architecture == "jumprelu" else {},
                k=int(level.l0) if architecture == "topk" else None,
                metadata={**metadata, **place},
            )
        )
    maps = tuple(
        CompositionMap(level=number, weight=module.weight().cpu(), contributions=module.contributions().cpu())
        for number, module in ((number, run.composition(number)) for number in range(2, len(run.compositions) + 2))
    )
    model = TrainedModel(structure=config.structure, levels=tuple(levels), compositions=maps)
    if config.structure != "stacked":
        return model
    thresholds = []
    for number in range(2, config.levels + 1):
        stack = StackedView.of(model.levels[:number])
        pre = (sample_BD.cpu() / scale) @ (stack.W_enc / stack.norms) + stack.b_enc / stack.norms
        kept = max(1, round(len(sample_BD) * config.l0[number - 1]))
        thresholds.append(max(0.0, torch.topk(pre.flatten(), kept).values[-1].item()))
    return replace(model, effective_thresholds=tuple(thresholds))


def save_model(model: TrainedModel, folder: Path) -> None:
    """Write `model.json` and `model.safetensors`, each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for number, level in enumerate(model.levels, 1):
        parts = {"W_enc": level.W_enc, "W_dec": level.W_dec, "b_enc": level.b_enc, "b_dec": level.b_dec, **level.extra}
        tensors |= {f"level{number}.{name}": tensor.contiguous() for name, tensor in parts.items()}
    for part in model.compositions:
        tensors[f"composition{part.level}.weight"] = part.weight.contiguous()
        tensors[f"composition{part.level}.contributions"] = part.contributions.contiguous()
    described = {
        "format": FORMAT,
        "structure": model.structure,
        "levels": [
            {"name": level.name, "architecture": level.architecture, "k": level.k, "metadata": level.metadata}
            for level in model.levels
        ],
        "compositions": [part.level for part in model.compositions],
        "effective_thresholds": list(model.effective_thresholds),
    }
    write_atomically(folder / WEIGHTS_FILE, lambda path: save_file(tensors, path))
    write_atomically(folder / CONFIG_FILE, lambda path: path.write_text(json.dumps(described, indent=2)))


def load_model(folder: Path) -> TrainedModel:
    """Read a model that `save_model` wrote. Raises UserError if it is missing or damaged."""
    try:
        described = json.loads((folder / CONFIG_FILE).read_text())
        tensors = load_file(folder / WEIGHTS_FILE)
        if described["format"] != FORMAT:
            raise UserError(f"{folder}: model format {described['format']!r}; this hsae reads format {FORMAT}")
        levels = tuple(_level(level, number, tensors) for number, level in enumerate(described["levels"], 1))
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
            effective_thresholds=tuple(described["effective_thresholds"]),
        )
    except FileNotFoundError as error:
        raise UserError(
            f"no trained model in {folder}: {Path(str(error.filename)).name} is missing; train the run first"
        ) from None
    except (KeyError, TypeError, json.JSONDecodeError, SafetensorError) as error:
        raise UserError(f"the model in {folder} is damaged ({error!r}); train the run again") from None


def _level(described: dict[str, Any], number: int, tensors: dict[str, Tensor]) -> SAE:
    part = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"level{number}.")}
    return SAE(
        name=described["name"],
        architecture=described["architecture"],
        k=described["k"],
        metadata=described["metadata"],
        extra={name: part[name] for name in saelens.EXTRA_WEIGHTS[described["architecture"]]},
        W_enc=part["W_enc"],
        W_dec=part["W_dec"],
        b_enc=part["b_enc"],
        b_dec=part["b_dec"],
    )
