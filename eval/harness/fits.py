"""Whether an SAE belongs to the activations it is to be evaluated on: width, hook and language model."""

import re
from pathlib import Path

from hsae.cache.config import HOOK_PATTERN
from hsae.cache.errors import UserError
from hsae.train.model.views import View


def check_fits(view: View, hook: str, d_model: int, model: str) -> None:
    """Refuse an SAE that does not belong to activations of a hook and a language model. Raises UserError."""
    if view.d_in != d_model:
        raise UserError(f"SAE {view.name!r} reads vectors of width {view.d_in}; {hook} of {model} has width {d_model}")
    made_for = view.metadata.get("hook_name")
    if made_for is not None and not same_hook(made_for, hook):
        raise UserError(f"SAE {view.name!r} was made for {made_for}; this evaluation is of {hook}")
    named = view.metadata.get("model_name")
    if named is not None and same_model(named, model) is False:
        raise UserError(
            f"SAE {view.name!r} was made for the model {named}; these are activations of {model} "
            "(if that is the same model, write this name as model_name into the SAE's cfg.json)"
        )


def doubts(view: View, hook: str, model: str) -> list[str]:
    """What can't be told of an SAE that `check_fits` lets pass."""
    texts = []
    if (named := view.metadata.get("model_name")) is not None and same_model(named, model) is None:
        texts.append(f"made for {named}; whether that is {model} can't be told from the name")
    if view.metadata.get("hook_name") is None:
        texts.append(f"its cfg.json names no hook; evaluated at {hook}")
    return texts


def same_hook(first: str, second: str) -> bool:
    """Whether two TransformerLens names are of the same vectors: what enters a layer is what left the one before."""
    return _place(first) == _place(second)


def _place(hook: str) -> str:
    match = HOOK_PATTERN.fullmatch(hook)
    if match is None or match[2] == "post" or int(match[1]) == 0:
        return hook
    return f"blocks.{int(match[1]) - 1}.hook_resid_post"


def same_model(first: str, second: str) -> bool | None:
    """Whether two names mean one language model: `gemma-2-2b` and `google/gemma-2-2b` do. None: a path."""
    if _plain(first) == _plain(second):
        return True
    return None if _is_path(first) or _is_path(second) else False


def _plain(name: str) -> str:
    """The last part of a name without what TransformerLens and the hub write differently."""
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower().removesuffix(".gguf").removesuffix("-hf")
    last = re.sub(r"^meta-(?=llama)|(?<=^gpt2)-small$|(?<=^mistral-7b)-v0\.1$", "", last)
    return re.sub(r"[^a-z0-9]", "", last)


def _is_path(name: str) -> bool:
    return (
        name.startswith(("/", ".", "~"))
        or name.endswith(".gguf")
        or "\\" in name
        or name.count("/") > 1
        or Path(name).exists()
    )
