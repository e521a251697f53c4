"""Reading trained models back: a run's, one that was saved, or one in SAELens's format."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hsae.cache.errors import UserError
from hsae.cache.files import check_seal, file_sha256, parse_json
from hsae.train import run_record
from hsae.train.model import saelens_folder
from hsae.train.model.hierarchical_sae import (
    CONFIG_FILE,
    FOREIGN_FORMAT,
    FORMAT,
    STRUCTURES,
    WEIGHTS_FILE,
    CompositionMap,
    FlatSAE,
    HierarchicalSAE,
)
from hsae.train.model.sae import SAE
from hsae.train.model.saelens_config import EXTRA_WEIGHTS
from hsae.train.run_record import check_files, damage_error, train_command


def load(path: Path | str) -> HierarchicalSAE:
    """Load a trained model: a run directory, a folder that `HierarchicalSAE.save` wrote, or a SAELens folder.

    A SAELens folder gives a model with one level. Raises UserError if there is no model, or it is damaged.

    >>> import hsae, torch
    >>> model = hsae.fit(torch.randn(4000, 8), widths=[32], l0=[4], steps=5, device="cpu", progress=False)
    >>> model.save("my-sae")
    >>> hsae.load("my-sae")
    FlatSAE of 8-dimensional residuals, float32 on cpu
      level 1: 32 latents, jumprelu
    """
    folder = Path(path).expanduser()
    if (folder / saelens_folder.CONFIG_FILE).is_file():
        return FlatSAE([saelens_folder.load(folder, "sae")])
    if (folder / CONFIG_FILE).is_file() or (folder / WEIGHTS_FILE).is_file():
        return load_model(folder)
    if (folder / run_record.FILE).is_file() or (folder / "model").is_dir():
        return load_model(folder / "model")
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give a run (such as runs/3), a saved model, or a SAELens folder")
    inner = sorted(part.parent.name for part in folder.glob(f"*/{saelens_folder.CONFIG_FILE}"))
    hint = f"; SAEs lie in folders in it ({', '.join(inner[:5])}), give one of those" if inner else ""
    raise UserError(
        f"{folder} is no trained model: a run has {run_record.FILE}, a saved model {CONFIG_FILE}, a SAELens folder "
        f"{saelens_folder.CONFIG_FILE}{hint}"
    )


def load_model(folder: Path | str) -> HierarchicalSAE:
    """Read a model that `HierarchicalSAE.save` wrote. Raises UserError if it is missing, damaged, or another one."""
    folder = Path(folder)
    described, tensors = _read_model(folder)
    try:
        levels = tuple(_level(level, number, tensors) for number, level in enumerate(described["levels"], 1))
        structure = STRUCTURES.get(described["structure"])
        names = [structure.level_name(number) for number in range(1, len(levels) + 1)] if structure is not None else []
        if structure is None or [level.name for level in levels] != names:
            raise ValueError(f"structure {described['structure']!r} with levels {[level.name for level in levels]}")
        maps = tuple(
            CompositionMap(
                level=level,
                weight=tensors[f"composition{level}.weight"],
                contributions=tensors[f"composition{level}.contributions"],
            )
            for level in described["compositions"]
        )
        gated = range(1, len(levels)) if described["child_gate"] else ()
        return structure(
            levels,
            maps,
            gates=[tensors[f"parents{number}"] for number in gated],
            effective_thresholds=[float(threshold) for threshold in described["effective_thresholds"]],
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise damage_error(folder / CONFIG_FILE, folder.parent, f"does not describe a model ({error!r})") from None


def load_provenance(folder: Path) -> dict[str, Any] | None:
    """What a model says it was trained with; None if it does not say so, is missing or damaged."""
    try:
        provenance = _read_model(folder, recorded=False)[0].get("run")
    except UserError:
        return None
    return provenance if isinstance(provenance, dict) else None


def _read_model(folder: Path, *, recorded: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What model.json says, and the weights; both compared with their checksums, and with those that are `recorded`."""
    run_dir = folder.resolve().parent
    for path in (folder, folder / CONFIG_FILE, folder / WEIGHTS_FILE):
        if not path.exists():
            name = f"{path.name} is missing" if path != folder else "there is no such folder"
            raise UserError(f"no trained model in {folder}: {name}; train the run with: {train_command(run_dir)}")
    if recorded:
        check_files(folder, [CONFIG_FILE])
    try:
        described = parse_json((folder / CONFIG_FILE).read_bytes())
        if not isinstance(described, dict):
            raise ValueError("not a JSON object")
        check_seal(described, required=False)
    except ValueError as error:
        raise damage_error(folder / CONFIG_FILE, run_dir, f"can't be read ({error})") from None
    if described.get("format") not in (FORMAT, FOREIGN_FORMAT):
        raise UserError(f"{folder}: model format {described.get('format')!r}; this hsae reads format {FORMAT}")
    weights = folder / WEIGHTS_FILE
    if described.get("weights", digest := file_sha256(weights)) != digest:
        raise damage_error(weights, run_dir, "fails its checksum")
    try:
        return described, load_file(weights)
    except (SafetensorError, ValueError, TypeError) as error:
        raise damage_error(weights, run_dir, f"can't be read ({error})") from None


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
        apply_b_dec_to_input=described.get("apply_b_dec_to_input", True),
        rescale_acts_by_decoder_norm=described.get("rescale_acts_by_decoder_norm", False),
    )
