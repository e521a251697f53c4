"""What a build will take, before anything is computed."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsae.cache.config import ModelConfig, parse_hook
from hsae.cache.errors import ModelError, StoreError
from hsae.cache.format.layout import is_finished, total_bytes
from hsae.cache.format.spec import StoreSpec
from hsae.cache.language_model import sources
from hsae.cache.language_model.loading import check_dtype, positions, read_description
from hsae.cache.reading.provenance import pin_commit
from hsae.cache.storage.paths import Place, existing_folder, exists, place, sizes

CPU_FLOPS, GPU_FLOPS = 1e11, 1e14  # sustained, per machine: only for the estimate before the first batch is timed
SPARE_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Sizes and time of one store."""

    spec: StoreSpec
    state: str
    """`complete`, `to be finished` or `new`."""
    path: Place
    bytes: int
    """Bytes on disk of the finished store."""
    free_bytes: int | None
    """Free on the disk; None on a remote store."""
    model_bytes: int | None
    """Bytes of the model's weights; None if unknown."""
    seconds: float | None
    """Rough time to build all of it; None if the model's size is unknown."""


def estimate(spec: StoreSpec, root: str | Place, device: str) -> Estimate:
    """Sizes and time for `spec` in folder `root`. Raises UserError if the request can't be met."""
    path = place(root) / spec.name
    config, model_bytes = model_config(pin_commit(spec.model, root))
    check_dtype(spec.model.dtype, config.model_type)
    layers, d_model = config.num_hidden_layers, config.hidden_size
    if (longest := positions(config)) is not None and spec.context > longest:
        raise ModelError(
            f"rows of {spec.context} tokens were asked for; {spec.model.id} has positions for {longest}: --set "
            f"cache.context={longest} or fewer"
        )
    for hook in spec.hooks:
        layer, kind = parse_hook(hook)
        if spec.clean_rows and (layer, kind) == (0, "pre"):
            raise ModelError(
                f"hook {hook!r} lies before the first layer, where nothing can be put in its place; evaluate at "
                "blocks.0.hook_resid_post or later"
            )
        if layer >= layers:
            raise ModelError(
                f"hook {hook!r}: {spec.model.id} has layers 0 to {layers - 1}; use for example "
                f"--set hook.names=['blocks.{layers * 2 // 3}.hook_resid_{kind}']"
            )
    state = "new" if not exists(path) else "complete" if is_finished(path, spec) else "to be finished"
    return Estimate(
        spec=spec,
        state=state,
        path=path,
        bytes=total_bytes(spec, d_model),
        free_bytes=shutil.disk_usage(existing_folder(path)).free if isinstance(path, Path) else None,
        model_bytes=model_bytes,
        seconds=_seconds(spec, config, device),
    )


def _seconds(spec: StoreSpec, config: Any, device: str) -> float:
    """Two operations a weight and token: prefix layers for all rows, the rest for the clean ones."""
    width, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    groups = _number(config, "num_key_value_heads", heads)
    layer = width * _number(config, "head_dim", width // heads) * (2 * heads + 2 * groups)
    layer += 3 * width * _number(config, "intermediate_size", 4 * width)
    deepest = max(parse_hook(hook)[0] for hook in spec.hooks) + 1
    after = (layers - deepest) * layer + width * config.vocab_size
    weights_used = deepest * layer * spec.rows + after * spec.clean_rows
    return 2.0 * float(weights_used) * spec.context / (GPU_FLOPS if device.startswith("cuda") else CPU_FLOPS)


def _number(config: Any, name: str, otherwise: int) -> int:
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # "a per-layer attribute", of gemma4
        return otherwise
    return value if isinstance(value, int) else otherwise  # some families have one for each layer


def model_config(model: ModelConfig) -> tuple[Any, int | None]:
    """(transformers' description of the model, bytes of weights). Raises ModelError without such a model."""
    size = sources.weight_bytes(model)
    path = sources.config_file(model)
    if path is None:  # a GGUF file that was not converted yet: its metadata is read when it is
        path = sources.model_folder(model) / "config.json"
    config = read_description(model.id, path.parent).get_text_config()
    sizes = ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads")
    if missing := [name for name in sizes if _number(config, name, 0) < 1]:
        raise ModelError(f"{model.id}: config.json has no {', '.join(missing)}; is it a decoder-only language model?")
    return config, size


def check_space(estimates: list[Estimate]) -> None:
    """Raise StoreError if the stores that are still to be written don't fit on the disk."""
    free = min((item.free_bytes for item in estimates if item.free_bytes is not None), default=None)
    if free is None:  # remote: there is no limit to compare with, and what is written already would take a long listing
        return
    needed = sum(item.bytes - sum(sizes(item.path).values()) for item in estimates if item.state != "complete")
    if needed + SPARE_BYTES > free:
        raise StoreError(
            f"not enough disk: {needed / 1e9:.2f} GB are to be written and {free / 1e9:.2f} GB are free at "
            f"{estimates[0].path}; lower cache.train.rows, or build elsewhere with --set cache.dir=FOLDER"
        )
