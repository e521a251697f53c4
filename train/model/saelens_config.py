"""`cfg.json` of a SAELens folder, of any version, read as SAELens 6 reads it; what hsae can't compute is refused.

Before version 6 the hook and the model stood at the top level, under changing names, and the activation function made
the architecture.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from hsae.cache.errors import UserError
from hsae.cache.files import parse_json

EXTRA_WEIGHTS = {"standard": (), "topk": (), "jumprelu": ("threshold",), "gated": ("b_gate", "b_mag", "r_mag")}
DTYPES = ("float32", "float64", "float16", "bfloat16")
NORMALIZED = {
    "expected_average_only_in": "the factor is not in the folder; "
    "fold it in with SAELens's fold_activation_norm_scaling_factor first",
    "covariance_whitening": "fold it in with SAELens's fold_activation_whitening first",
}
RENAMED = {
    "hook_point": "hook_name",
    "hook_point_layer": "hook_layer",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
ABOUT = (
    "model_name", "model_class_name", "model_from_pretrained_kwargs", "hook_name", "hook_layer", "hook_head_index",
    "hook_name_out", "hf_hook_name", "prepend_bos", "context_size", "seqpos_slice", "exclude_special_tokens",
    "dataset_path", "dataset_trust_remote_code",
    "neuronpedia_id", "sae_lens_version", "sae_lens_training_version",
)  # fmt: skip
"""Keys of `metadata` that stood at the top level before version 6."""


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole), Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class _Metadata(_Strict):
    model_name: str | None = None
    model_from_pretrained_kwargs: dict[str, Any] | None = None
    hook_name: str | None = None
    hook_layer: int | None = None
    hook_head_index: int | None = None
    hook_name_out: str | None = None
    sae_lens_version: str | None = None


class _Config(_Strict):
    architecture: str | None = None
    d_in: Whole
    d_sae: Whole
    dtype: str | None = None
    device: str | None = None
    k: Whole | None = None
    apply_b_dec_to_input: bool = True
    rescale_acts_by_decoder_norm: bool = False
    normalize_activations: bool | str | None = None
    reshape_activations: str | None = None
    activation_fn: str | None = None
    activation_fn_kwargs: dict[str, Any] | None = None
    finetuning_scaling_factor: bool = False
    metadata: _Metadata | None = None


@dataclass(frozen=True, kw_only=True)
class Described:
    """What a cfg.json comes to."""

    architecture: str
    d_in: int
    d_sae: int
    dtype: str | None
    """Type the weights are cast to, as SAELens casts them; None keeps that of the file."""
    k: int | None
    apply_b_dec_to_input: bool
    rescale_acts_by_decoder_norm: bool
    scaled: bool
    """Whether latents are multiplied by the weights' `scaling_factor` [F] before they are decoded."""
    metadata: dict[str, Any]
    """In version 6's names."""
    remarks: tuple[str, ...]
    """What is ignored, for people."""


def read_config(path: Path) -> Described:
    """Read a cfg.json. Raises UserError naming the file, the key, what was given and what is allowed."""
    try:
        content = parse_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    settings = _renamed(path, content, content)
    nested = settings.get("metadata")
    about = {key: settings.pop(key) for key in ABOUT if key in settings}
    if nested is None or isinstance(nested, dict):
        settings["metadata"] = _renamed(path, {**about, **(nested or {})}, about)
    try:
        config = _Config.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"] if part not in ("bool", "str"))
        value = "" if first["type"] == "missing" else f", not {first['input']!r:.60}"
        wrong = first["msg"].partition(" or instance")[0]
        raise UserError(f"{path}: {key}: {wrong}{value}") from None
    try:
        return _described(config, dict(settings["metadata"]))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _renamed(path: Path, content: dict[str, Any], fixed: dict[str, Any]) -> dict[str, Any]:
    """The same under version 6's names; `fixed` are values that must not be contradicted."""
    renamed: dict[str, Any] = {}
    for key, value in content.items():
        name = RENAMED.get(key, key)
        for other in (renamed, fixed):
            if value is not None and other.get(name) not in (None, value):
                raise UserError(f"{path}: two values for {name}: {other[name]!r} and {value!r}")
        if value is not None or name not in renamed:
            renamed[name] = value
    return renamed


def _described(config: _Config, metadata: dict[str, Any]) -> Described:
    about = config.metadata or _Metadata()
    new = re.match(r"\d+", about.sae_lens_version or "0")
    if new is None:
        raise UserError(f"sae_lens_version {about.sae_lens_version!r} is no version, such as '6.5.0'")
    architecture, k = _architecture(config, int(new.group()) >= 6)
    normalize = config.normalize_activations
    if normalize is True:
        normalize = "expected_average_only_in"  # what it meant while it was a switch
    if normalize not in (None, False, "none"):
        reason = NORMALIZED.get(str(normalize), "hsae does not compute it")
        raise UserError(f"normalize_activations is {normalize!r}: {reason}; only 'none' can be read")
    if config.reshape_activations not in (None, "none"):
        raise UserError(f"reshape_activations is {config.reshape_activations!r}; only 'none' can be read")
    if about.hook_head_index is not None:
        raise UserError(f"hook_head_index is {about.hook_head_index}: hsae has no activations of single heads")
    if about.hook_name_out not in (None, about.hook_name):
        raise UserError(
            f"a transcoder, from {about.hook_name} to {about.hook_name_out}; "
            "hsae evaluates SAEs, which write where they read"
        )
    dtype = config.dtype.removeprefix("torch.") if config.dtype is not None else None
    if dtype not in (None, *DTYPES):
        raise UserError(f"dtype is {config.dtype!r}; allowed: {', '.join(DTYPES)}")
    if about.hook_name is not None and "{layer}" in about.hook_name:
        metadata["hook_name"] = about.hook_name.replace("{layer}", str(about.hook_layer))
    remarks = []
    if unknown := sorted(config.model_extra or ()):
        remarks.append(f"ignored, as SAELens does: {', '.join(unknown[:8])}{', ...' if len(unknown) > 8 else ''}")
    if about.model_from_pretrained_kwargs:
        remarks.append(
            f"made for a model loaded with {about.model_from_pretrained_kwargs}; "
            "the activations here are of one loaded without"
        )
    return Described(
        architecture=architecture,
        d_in=config.d_in,
        d_sae=config.d_sae,
        dtype=dtype,
        k=k,
        apply_b_dec_to_input=config.apply_b_dec_to_input,
        rescale_acts_by_decoder_norm=config.rescale_acts_by_decoder_norm,
        scaled=config.finetuning_scaling_factor,
        metadata=metadata,
        remarks=tuple(remarks),
    )


def _architecture(config: _Config, new: bool) -> tuple[str, int | None]:
    """(architecture, k): before version 6 the activation function `topk` made a `standard` SAE a `topk` one."""
    architecture, function = config.architecture, config.activation_fn
    if architecture is None:
        if new:
            raise UserError("architecture is missing")
        architecture = "standard"
    if architecture not in EXTRA_WEIGHTS:
        raise UserError(f"architecture {architecture!r}; hsae reads {', '.join(EXTRA_WEIGHTS)}")
    k, options = config.k, dict(config.activation_fn_kwargs or {})
    if function == "topk" and architecture == "standard" and not new:
        architecture = "topk"
    if function not in (None, "topk" if architecture == "topk" else "relu"):
        raise UserError(f"activation_fn {function!r} in the architecture {architecture!r}, which hsae does not compute")
    if architecture == "topk":
        number = _whole(options.pop("k", k))
        if k not in (None, number):
            raise UserError(f"two values for k: {k!r} and {number!r}")
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise UserError(f"architecture 'topk' needs a whole number k of 1 or more, not {number!r}")
        k = number
    if options:
        raise UserError(f"activation_fn_kwargs has {sorted(options)[0]!r}, which hsae does not compute")
    if config.rescale_acts_by_decoder_norm and architecture != "topk":
        raise UserError(f"rescale_acts_by_decoder_norm goes with the architecture 'topk', not {architecture!r}")
    return architecture, k
