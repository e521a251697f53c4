"""The language model: prefix up to a hook, suffix after it, unembedding; bit-equal to the full forward pass.

Shapes: B rows of a batch, T context length, D residual width, V vocabulary. Hook points use TransformerLens names:
`blocks.{L}.hook_resid_post` is the output of decoder layer L, `blocks.{L}.hook_resid_pre` its input.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hsae.cache import weights
from hsae.cache.config import HOOK_PATTERN, ModelConfig
from hsae.cache.errors import ModelError
from hsae.cache.numerics import WidenedProducts, bfloat16_is_slow

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
OVERFLOWING = ("gemma",)  # families whose residual exceeds float16's largest number, 65,504


class _PassThrough(nn.Module):
    """Stands in for a decoder layer: gives back its input, or what it was told to."""

    def __init__(self, layer: nn.Module, injected: Tensor | None = None) -> None:
        super().__init__()
        self.injected = injected
        if hasattr(layer, "attention_type"):
            self.attention_type = layer.attention_type

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states if self.injected is None else self.injected


class LanguageModel:
    """A causal language model cut in three: prefix, suffix, unembedding. Its weights take no gradients."""

    def __init__(self, model: Any, tokenizer: Any, folder: Path, device: str) -> None:
        self.model, self.tokenizer, self.folder, self.device = model, tokenizer, folder, device
        self.config = model.config.get_text_config()
        self._layers, self._norm_owner, self._norm_name = _find_layers(model)
        self.layers = len(self._layers)
        self.d_model = int(self.config.hidden_size)
        self.vocab_size = int(model.get_output_embeddings().weight.shape[0])
        self.dtype: torch.dtype = model.dtype
        self._widens = self.dtype == torch.bfloat16 and bfloat16_is_slow(device)
        self._wide_head: Tensor | None = None
        self.bos_id, self.special_ids = special_tokens(tokenizer)

    @classmethod
    def load(cls, config: ModelConfig, *, device: str = "cpu", say: weights.Say = lambda text: None) -> "LanguageModel":
        """Load a model for inference. Raises ModelError before reading weights if it can't be used as asked."""
        check_dtype(config)
        folder = weights.model_folder(config, say)
        with weights.quiet():
            from transformers import AutoConfig, AutoModelForCausalLM

            try:
                described = AutoConfig.from_pretrained(folder).get_text_config()
                check_dtype(config, described.model_type)
                attention = config.attention
                if attention == "auto":
                    attention = "eager" if getattr(described, "attn_logit_softcapping", None) else "sdpa"
                model = AutoModelForCausalLM.from_pretrained(
                    folder, dtype=DTYPES[config.dtype], attn_implementation=attention, use_safetensors=True
                )
            except ModelError:
                raise
            except (ValueError, OSError) as error:
                raise ModelError(f"{config.id} can't be loaded: {error}") from None
        moved: Any = model
        moved = moved.to(device).eval().requires_grad_(False)
        return cls(moved, load_tokenizer(config), folder, device)

    @property
    def model_digest(self) -> str:
        """SHA-256 of the weights."""
        return weights.weights_digest(self.folder)

    @property
    def tokenizer_digest(self) -> str:
        """SHA-256 of the tokenizer's files."""
        return weights.tokenizer_digest(self.folder)

    def check_hooks(self, hooks: Sequence[str]) -> None:
        """Raise ModelError unless every hook is a layer this model has."""
        for hook in hooks:
            layer, kind = hook_layer(hook)
            if layer >= self.layers:
                raise ModelError(
                    f"hook {hook!r}: the model has layers 0 to {self.layers - 1}; use for example "
                    f"blocks.{self.layers * 2 // 3}.hook_resid_{kind}"
                )

    @torch.no_grad()
    def prefix(self, tokens_BT: Tensor, hooks: Sequence[str]) -> dict[str, Tensor]:
        """The residual [B, T, D] at each hook; nothing after the deepest hook is computed."""
        self.check_hooks(hooks)
        after = {hook: _boundary(hook) for hook in hooks}  # boundary n: before layer n runs
        deepest = max(after.values())
        caught: dict[int, Tensor] = {}
        handles = [
            self._layers[boundary].register_forward_pre_hook(_catch(caught, boundary), with_kwargs=True)
            for boundary in set(after.values())
            if boundary < deepest
        ]
        try:
            with self._replaced(range(deepest, self.layers)), self._without_norm():
                caught[deepest] = self._run(input_ids=tokens_BT.to(self.device).long())
        finally:
            for handle in handles:
                handle.remove()
        return {hook: caught[boundary] for hook, boundary in after.items()}

    def suffix(self, hook: str, resid_BTD: Tensor, *, grad: bool = False) -> Tensor:
        """The final vector [B, T, D], normed and ready to unembed, that follows from a residual at `hook`; with `grad`, differentiable."""
        self.check_hooks([hook])
        boundary = _boundary(hook)
        resid = resid_BTD.to(self.device, self.dtype)
        if boundary == 0:
            raise ModelError(
                f"hook {hook!r} lies before the first layer; evaluate at blocks.0.hook_resid_post or later"
            )
        with torch.set_grad_enabled(grad), self._replaced(range(boundary), injected=resid):
            return self._run(inputs_embeds=resid)

    def unembed(self, final: Tensor, *, grad: bool = False) -> Tensor:
        """Logits [..., V] in the model's type, with the soft cap where the model has one; with `grad`, differentiable."""
        with torch.set_grad_enabled(grad):
            return self._unembed(final.to(self.device, self.dtype))

    def _unembed(self, vectors: Tensor) -> Tensor:
        head = self.model.get_output_embeddings()
        if (
            self._widens and getattr(head, "bias", None) is None
        ):  # the largest matrix by far: widened once, not at each call
            if self._wide_head is None:
                self._wide_head = head.weight.float()
            logits: Tensor = nn.functional.linear(vectors.float(), self._wide_head).to(self.dtype)
        else:
            logits = head(vectors)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    @torch.no_grad()
    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Logits [B, T, V] of the whole model, the ordinary way."""
        with self.products():
            result: Tensor = self.model(input_ids=tokens_BT.to(self.device).long(), use_cache=False).logits
        return result

    def _run(self, **inputs: Tensor) -> Tensor:
        with self.products():
            output: Tensor = self.model.get_decoder()(**inputs, use_cache=False).last_hidden_state
        return output

    def products(self) -> contextlib.AbstractContextManager[object]:
        """How this model multiplies matrices on its device: enter it around other calls of `model`."""
        return WidenedProducts() if self._widens else contextlib.nullcontext()

    @contextlib.contextmanager
    def _replaced(self, indices: range, injected: Tensor | None = None) -> Iterator[None]:
        """Pass-through modules in the place of some layers; every other layer keeps its own index."""
        kept = {index: self._layers[index] for index in indices}
        for index, layer in kept.items():
            self._layers[index] = _PassThrough(layer, injected if index == indices[-1] else None)
        try:
            yield
        finally:
            for index, layer in kept.items():
                self._layers[index] = layer

    @contextlib.contextmanager
    def _without_norm(self) -> Iterator[None]:
        norm = getattr(self._norm_owner, self._norm_name)
        setattr(self._norm_owner, self._norm_name, nn.Identity())
        try:
            yield
        finally:
            setattr(self._norm_owner, self._norm_name, norm)


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's tokenizer, without its weights. Raises ModelError if there is none."""
    folder = weights.model_folder(config)
    with weights.quiet():
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(folder)
        except (ValueError, OSError) as error:
            raise ModelError(f"the tokenizer of {config.id} can't be loaded: {error}") from None


def special_tokens(tokenizer: Any) -> tuple[int, tuple[int, ...]]:
    """(BOS id, ids of pad, EOS and BOS without doubles); BOS falls back to EOS, as SAEBench's model wrapper does."""
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if bos is None:
        raise ModelError("the tokenizer has neither a BOS nor an EOS token; rows can't be packed")
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, bos)
    return int(bos), tuple(sorted({int(token) for token in ids if token is not None}))


def hook_layer(hook: str) -> tuple[int, str]:
    """(layer, `pre` or `post`) of a hook name. Raises ModelError for a name hsae doesn't know."""
    match = HOOK_PATTERN.fullmatch(hook)
    if match is None:
        raise ModelError(
            f"{hook!r} is not a hook hsae knows; use blocks.<layer>.hook_resid_post or blocks.<layer>.hook_resid_pre"
        )
    return int(match[1]), match[2]


def check_dtype(config: ModelConfig, family: str | None = None) -> None:
    """Refuse float16 for models whose residual overflows it. Raises ModelError."""
    name = (family or config.id).lower()
    if config.dtype == "float16" and any(part in name for part in OVERFLOWING):
        raise ModelError(
            "model.dtype is float16, but Gemma's residual at BOS is about 1e5 and float16 ends at 65,504: it would overflow; "
            "use bfloat16 or float32"
        )


def _boundary(hook: str) -> int:
    layer, kind = hook_layer(hook)
    return layer + 1 if kind == "post" else layer


def _catch(caught: dict[int, Tensor], boundary: int) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught[boundary] = args[0] if args else kwargs["hidden_states"]

    return hook


def _find_layers(model: Any) -> tuple[nn.ModuleList, nn.Module, str]:
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    norm = next((name for name in ("norm", "final_layernorm", "final_layer_norm") if hasattr(decoder, name)), None)
    if not isinstance(layers, nn.ModuleList) or norm is None:
        raise ModelError(
            f"{type(model).__name__} is laid out in a way hsae can't cut: it needs a decoder with `layers` and a final `norm`, "
            "as Gemma, Llama, Qwen, Mistral and GPT-NeoX have"
        )
    return layers, decoder, norm
