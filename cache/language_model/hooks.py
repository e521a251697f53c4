"""Hook points of a transformers model: their names, the modules they lie at, and edits of the residual stream there.

Names are TransformerLens's: `blocks.{L}.hook_resid_post` is the output of decoder layer L,
`blocks.{L}.hook_resid_pre` its input. Shapes: B rows of a batch, T tokens of the pass, D residual width.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hsae.cache.config import parse_hook
from hsae.cache.errors import ModelError

Edit = Tensor | Callable[[Tensor], Tensor]
"""A tensor to add (it broadcasts to [B, T, D]), or a function from the residual to the one in its place."""


def layers_before(hook: str) -> int:
    """How many decoder layers run before the residual at a hook is there."""
    layer, kind = parse_hook(hook)
    return layer + 1 if kind == "post" else layer


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers of a transformers model. Raises ModelError where the model is laid out in another way."""
    layers = getattr(model.get_decoder(), "layers", None) if hasattr(model, "get_decoder") else None
    if not isinstance(layers, nn.ModuleList):
        raise _unknown_layout(model)
    return layers


def final_norm(model: Any) -> str:
    """The name of the final norm in a transformers model's decoder. Raises ModelError where there is none."""
    decoder = model.get_decoder()
    name = next((name for name in ("norm", "final_layernorm", "final_layer_norm") if hasattr(decoder, name)), None)
    if name is None or model.get_output_embeddings() is None:
        raise _unknown_layout(model)
    return name


def _unknown_layout(model: Any) -> ModelError:
    return ModelError(
        f"{type(model).__name__} is laid out in a way hsae can't cut: it needs a decoder with `layers` and a final "
        "`norm`, as Gemma, Llama, Qwen, Mistral and GPT-NeoX have"
    )


def hook_module(model: Any, hook: str) -> tuple[nn.Module, str]:
    """The decoder layer of a hook, and whether the hook is its input (`pre`) or its output (`post`)."""
    layers = decoder_layers(model)
    layer, kind = parse_hook(hook)
    if layer >= len(layers):
        raise ModelError(
            f"hook {hook!r}: the model has layers 0 to {len(layers) - 1}; use for example "
            f"blocks.{len(layers) * 2 // 3}.hook_resid_{kind}"
        )
    return layers[layer], kind


def on_residual(model: Any, hook: str, change: Callable[[Tensor], Tensor | None]) -> torch.utils.hooks.RemovableHandle:
    """Call `change` with the residual [B, T, D] in every pass; what it returns, unless None, replaces it."""
    module, kind = hook_module(model, hook)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        resid = change(args[0] if args else kwargs["hidden_states"])
        if resid is None:
            return None
        return ((resid, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": resid})

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, tuple):
            return change(output)
        resid = change(output[0])
        return None if resid is None else (resid, *output[1:])

    if kind == "post":
        return module.register_forward_hook(after)
    return module.register_forward_pre_hook(before, with_kwargs=True)


class CheckedModel(Protocol):
    """A `LanguageModel`, or what has the same of it."""

    model: Any

    def check_hooks(self, hooks: Sequence[str]) -> None:
        """Raise ModelError unless the model can be cut at every hook."""


@contextlib.contextmanager
def edit_residual(model: CheckedModel | nn.Module, hook: str, edit: Edit) -> Iterator[None]:
    """While it is entered, the residual at a hook is edited in every pass of the model, those of `generate` too.

    `model` is a LanguageModel or a transformers model. A tensor is added: [D] at every token, [B, 1, D] one vector
    for each row. A function takes the residual [B, T, D] and returns the one that goes on in its place; with a
    key-value cache, as in `generate`, T counts the new tokens only: all of the prompt first, then one token a pass.
    The result is rounded to the model's type. Edits nest, also at the same hook, where the outer one comes first, and
    end with the block, whatever happens in it.

    Raises ModelError for a hook or a shape that does not fit the model.

    >>> with edit_residual(lm, "blocks.12.hook_resid_post", 8.0 * direction_D):  # doctest: +SKIP
    ...     lm.generate("The weather is")
    """
    network = model if isinstance(model, nn.Module) else model.model
    if not isinstance(model, nn.Module):
        model.check_hooks([hook])
        # the same residual, as was checked; `prefix` runs no layer after its hook
        if (layers := layers_before(hook)) > 0:
            hook = f"blocks.{layers - 1}.hook_resid_post"

    def change(resid_BTD: Tensor) -> Tensor:
        edited = edit(resid_BTD) if callable(edit) else _sum(resid_BTD, edit)
        if edited.shape != resid_BTD.shape:
            raise ModelError(
                f"the edit at {hook} makes a residual of shape {tuple(edited.shape)}; the model's has "
                f"{tuple(resid_BTD.shape)}"
            )
        return edited.to(resid_BTD)

    with on_residual(network, hook, change):
        yield


def _sum(resid_BTD: Tensor, added: Tensor) -> Tensor:
    """The sum in the wider of both types, on the residual's device."""
    added = added.to(resid_BTD.device)
    try:
        added.expand_as(resid_BTD)
    except RuntimeError:
        raise ModelError(
            f"a tensor of shape {tuple(added.shape)} can't be added to a residual of shape {tuple(resid_BTD.shape)} "
            "(rows, tokens, width)"
        ) from None
    return resid_BTD + added
