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

from hsae.cache.errors import ModelError, StoreError
from hsae.cache.format.layout import read_header
from hsae.cache.format.spec import HOOK_PATTERN, ModelConfig
from hsae.cache.language_model import sources
from hsae.cache.language_model.matmul import WidenedProducts, bfloat16_is_slow
from hsae.cache.storage.paths import Place, children, place

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
OVERFLOWING = ("gemma",)  # families whose residual exceeds float16's largest number, 65,504
CHECKED_TOKENS = 12
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Relative error of a token's vector up to which the cut agrees with the model's own pass.

Both run the same operations on the same shapes, and on a processor all families that agree do so to the last bit. A graphics card may sum
in another order: of the size of one rounding in the narrow types, of some hundred in float32. What is cut wrongly differs by far more, or by
less than the type can tell apart.
"""


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
        self.known_ids = int(model.get_input_embeddings().weight.shape[0])
        self.commit: str | None = None
        self.model_digest = sources.weights_digest(folder, anew=True)
        self.tokenizer_digest = sources.tokenizer_digest(folder, anew=True)
        self._checked: set[str] = set()
        self.dtype: torch.dtype = model.dtype
        self._widens = self.dtype == torch.bfloat16 and bfloat16_is_slow(device)
        self._wide_head: Tensor | None = None
        self.bos_id, self.special_ids = special_tokens(tokenizer)

    @classmethod
    def load(cls, config: ModelConfig, *, device: str = "cpu", say: sources.Say = lambda text: None) -> "LanguageModel":
        """Load a model for inference. Raises ModelError before reading weights if it can't be used as asked."""
        tokenizer_folder = sources.tokenizer_folder(config)
        commit = sources.commit_of(config, tokenizer_folder)
        described = sources.described(config.id, tokenizer_folder)
        text = described.get_text_config()
        check_dtype(config, text.model_type)
        tokenizer = sources.load_tokenizer(config.id, tokenizer_folder)
        special_tokens(tokenizer)
        folder = sources.model_folder(sources.at_commit(config, commit), say)
        attention = config.attention
        if attention == "auto":
            capped = getattr(text, "attn_logit_softcapping", None) or not sources.has_sdpa(described)
            attention = "eager" if capped else "sdpa"
        model = sources.load_causal(config.id, folder, dtype=DTYPES[config.dtype], attn_implementation=attention)
        language = cls(model.to(device).eval().requires_grad_(False), tokenizer, folder, device)
        language.commit = commit
        return language

    def check_hooks(self, hooks: Sequence[str]) -> None:
        """Raise ModelError unless every hook is a layer this model has, and the cut there is right (tried once, on a few tokens)."""
        for hook in hooks:
            layer, kind = hook_layer(hook)
            if layer >= self.layers:
                raise ModelError(
                    f"hook {hook!r}: the model has layers 0 to {self.layers - 1}; use for example "
                    f"blocks.{self.layers * 2 // 3}.hook_resid_{kind}"
                )
            if hook not in self._checked:
                self._check_cut(hook)
                self._checked.add(hook)

    @torch.no_grad()
    def _check_cut(self, hook: str) -> None:
        """Prefix, suffix and unembedding against the model's own pass and the layer's own output. Raises ModelError."""
        layer, kind = hook_layer(hook)
        ids = torch.randint(min(self.known_ids, self.vocab_size), (1, CHECKED_TOKENS), generator=_seeded())
        tokens = ids.repeat(2, 1)
        tokens[1, -1] = (tokens[1, -1] + 1) % self.vocab_size  # which no earlier token may see
        found: list[Tensor] = []
        register = (
            self._layers[layer].register_forward_hook
            if kind == "post"
            else self._layers[layer].register_forward_pre_hook
        )
        handle = register(_keep(found), with_kwargs=True)
        try:
            logits, again = self.logits(tokens), self.logits(tokens)
            handle.remove()
            tolerance = max(TOLERANCE[self.dtype], 4 * _distance(again, logits), 4 * _distance(found[1], found[0]))
            resid = self._prefix(tokens, [hook])[hook]
            if not torch.isfinite(logits).all():
                raise ModelError(
                    f"its logits are not finite in {str(self.dtype).removeprefix('torch.')}; use --set model.dtype=float32"
                )
            if (error := _distance(resid, found[0])) > tolerance:
                raise ModelError(f"the residual it gives there is not the layer's (relative error {error:.2g})")
            if (error := _distance(logits[1, :-1], logits[0, :-1])) > 8 * tolerance:
                raise ModelError(f"its tokens see later ones (relative error {error:.2g})")
            if _boundary(hook) and (error := _distance(self.unembed(self._suffix(hook, resid)), logits)) > tolerance:
                raise ModelError(
                    f"what follows from the residual there is not the model's logits (relative error {error:.2g})"
                )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # foreign code, run in a way that was not foreseen
            what = str(error) if isinstance(error, ModelError) else f"its code ends in {sources.in_a_line(error)}"
            raise ModelError(
                f"models of type {self.config.model_type!r} can't be cut at {hook} as hsae does: {what}; "
                "docs/results/families.md names the families that can"
            ) from None
        finally:
            handle.remove()

    @torch.no_grad()
    def check_ablation(self, hooks: Sequence[str]) -> None:
        """Raise ModelError unless zeroing the residual at a hook gives the same final vector at every token."""
        for hook in hooks:
            final = self.suffix(hook, torch.zeros(1, CHECKED_TOKENS, self.d_model, dtype=self.dtype))
            alone = self.suffix(hook, torch.zeros(1, 1, self.d_model, dtype=self.dtype))
            if (error := _distance(final, alone.expand_as(final))) > 8 * TOLERANCE[self.dtype]:
                raise ModelError(
                    f"models of type {self.config.model_type!r} can't be evaluated at {hook}: what follows from a zeroed residual depends on "
                    f"the position (relative error {error:.2g}), and hsae keeps one for all"
                )

    def check_ids(self, tokens: Tensor) -> None:
        """Raise ModelError for rows that are longer than the model's positions, or ids beyond its embedding."""
        if (longest := positions(self.config)) is not None and tokens.shape[-1] > longest:
            raise ModelError(
                f"rows of {tokens.shape[-1]} tokens were given; the model has positions for {longest}: lower cache.context"
            )
        if tokens.numel() and int(tokens.max()) >= self.known_ids:
            raise ModelError(
                f"the tokenizer gives id {int(tokens.max())}, and the model's embedding ends at {self.known_ids - 1}: they don't belong "
                "together; give the tokenizer that the model was trained with (or resize_token_embeddings, train, and save the model)"
            )

    def prefix(self, tokens_BT: Tensor, hooks: Sequence[str]) -> dict[str, Tensor]:
        """The residual [B, T, D] at each hook; nothing after the deepest hook is computed."""
        self.check_hooks(hooks)
        return self._prefix(tokens_BT, hooks)

    @torch.no_grad()
    def _prefix(self, tokens_BT: Tensor, hooks: Sequence[str]) -> dict[str, Tensor]:
        self.check_ids(tokens_BT)
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
        if _boundary(hook) == 0:
            raise ModelError(
                f"hook {hook!r} lies before the first layer; evaluate at blocks.0.hook_resid_post or later"
            )
        return self._suffix(hook, resid_BTD, grad=grad)

    def _suffix(self, hook: str, resid_BTD: Tensor, *, grad: bool = False) -> Tensor:
        resid = resid_BTD.to(self.device, self.dtype)
        with torch.set_grad_enabled(grad), self._replaced(range(_boundary(hook)), injected=resid):
            return self._run(inputs_embeds=resid)

    def unembed(self, final: Tensor, *, grad: bool = False) -> Tensor:
        """Logits [..., V] as the model itself makes them, scaled and capped where it does so; with `grad`, differentiable."""
        with torch.set_grad_enabled(grad):
            return self._unembed(final.to(self.device, self.dtype))

    def _unembed(self, vectors: Tensor) -> Tensor:
        """The model's own forward pass, in which the decoder gives these vectors."""
        given = vectors.reshape(1, -1, vectors.shape[-1])
        head = self.model.get_output_embeddings()
        made: dict[nn.Module, Any] = {self.model.get_decoder(): lambda *args, **kwargs: _Final(given)}
        if (
            self._widens and getattr(head, "bias", None) is None
        ):  # the largest matrix by far: widened once, not at each call
            if self._wide_head is None:
                self._wide_head = head.weight.float()
            wide = self._wide_head
            made[head] = lambda inputs: nn.functional.linear(inputs.float(), wide).to(self.dtype)
        try:
            for module, forward in made.items():
                module.forward = forward
            with self.products():
                logits: Tensor = self.model(inputs_embeds=given, use_cache=False).logits
        finally:
            for module in made:
                module.__dict__.pop("forward", None)
        return logits.view(*vectors.shape[:-1], -1)

    @torch.no_grad()
    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Logits [B, T, V] of the whole model, the ordinary way."""
        self.check_ids(tokens_BT)
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
    return sources.load_tokenizer(config.id, sources.tokenizer_folder(config))


def pinned(config: ModelConfig, root: str | Place) -> ModelConfig:
    """A model of the hub at the commit that stores in folder `root` were made with, whatever its branch has become since."""
    if sources.on_hub(config):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for store in children(place(root)):
                with contextlib.suppress(StoreError):
                    header = read_header(store) if store.name.endswith(".zarr") else None
                    if header is not None and header.spec.model == config and header.model_commit is not None:
                        return sources.at_commit(config, header.model_commit)
    return config


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


def check_dtype(config: ModelConfig, family: str) -> None:
    """Refuse float16 for models whose residual overflows it. Raises ModelError."""
    if config.dtype == "float16" and any(part in family.lower() for part in OVERFLOWING):
        raise ModelError(
            "model.dtype is float16, but Gemma's residual at BOS is about 1e5 and float16 ends at 65,504: it would overflow; "
            "use bfloat16 or float32"
        )


def positions(config: Any) -> int | None:
    """Tokens that a row may have, of transformers' description of a model; None where nothing limits them."""
    longest = getattr(config, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest < 1:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    if not isinstance(rope.get("factor"), (int, float)):
        return longest
    return max(longest, int(rope["factor"] * (rope.get("original_max_position_embeddings") or longest)))


class _Final:
    """What the decoder gives to the rest of the model: final vectors, and nothing else that it might give."""

    def __init__(self, vectors: Tensor) -> None:
        self.last_hidden_state = vectors

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _distance(found: Tensor, wanted: Tensor) -> float:
    """Largest relative error of a vector; infinite where the shapes differ or there is something not finite."""
    if found.shape != wanted.shape:
        return float("inf")
    error = (found.float() - wanted.float()).norm(dim=-1) / wanted.float().norm(dim=-1).clamp_min(1e-30)
    return float(error.max()) if torch.isfinite(error).all() else float("inf")


def _keep(found: list[Tensor]) -> Any:
    """A hook, before or after a layer, that keeps the residual it is given."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> None:
        kept = output[0] if output else args[0] if args else kwargs["hidden_states"]
        found.append(kept[0] if isinstance(kept, tuple) else kept)

    return hook


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
    if not isinstance(layers, nn.ModuleList) or norm is None or model.get_output_embeddings() is None:
        raise ModelError(
            f"{type(model).__name__} is laid out in a way hsae can't cut: it needs a decoder with `layers` and a final `norm`, "
            "as Gemma, Llama, Qwen, Mistral and GPT-NeoX have"
        )
    return layers, decoder, norm
