"""The language model: prefix up to a hook, suffix after it, unembedding; bit-equal to the full forward pass.

Shapes: B rows of a batch, T context length, D residual width, V vocabulary. Hook points use TransformerLens names:
`blocks.{L}.hook_resid_post` is the output of decoder layer L, `blocks.{L}.hook_resid_pre` its input.
"""

import contextlib
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hsae.cache.config import ModelConfig, at_commit
from hsae.cache.errors import ModelError
from hsae.cache.language_model import in_memory, loading, sources
from hsae.cache.language_model.hooks import decoder_layers, final_norm, hook_module, layers_before, on_residual
from hsae.cache.language_model.matmul import WidenedProducts, bfloat16_is_slow
from hsae.cache.language_model.model_files import one_line, tokenizer_digest, weights_digest

LIBRARIES = ("torch", "transformers", "tokenizers")
CHECKED_TOKENS = 12
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Relative error of a token's vector up to which the cut agrees with the model's own pass.

Both run the same operations on the same shapes, and on a processor all families that agree do so to the last bit. A
graphics card may sum in another order: of the size of one rounding in the narrow types, of some hundred in float32.
What is cut wrongly differs by far more, or by less than the type can tell apart.
"""

COMPILED_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2**-3, torch.float16: 2**-6}
"""Median relative error of a token's vector up to which compiled layers agree with eager ones.

They round less often. In bfloat16 that came to 2 % after twenty layers with random weights.
"""


class _PassThrough(nn.Module):
    """Stands in for a decoder layer: returns its input, or an injected residual."""

    def __init__(self, layer: nn.Module, injected: Tensor | None = None) -> None:
        super().__init__()
        self.injected = injected
        if hasattr(layer, "attention_type"):
            self.attention_type = layer.attention_type

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states if self.injected is None else self.injected


class LanguageModel:
    """A causal language model cut in three: prefix, suffix, unembedding. Its weights take no gradients."""

    folder: Path | None = None
    """Where its files lie; None for a model that was given in memory."""
    commit: str | None = None
    """The hub's commit of its files."""

    def __init__(
        self, model: Any, read_tokenizer: Callable[[], Any], *, model_digest: str, tokenizer_digest: str
    ) -> None:
        self.model, self._read_tokenizer = model, read_tokenizer
        self.model_digest, self.tokenizer_digest = model_digest, tokenizer_digest
        self.config = model.config.get_text_config()
        self._layers = decoder_layers(model)
        self._norm_name = final_norm(model)
        self.layers = len(self._layers)
        self.d_model = int(self.config.hidden_size)
        self.vocab_size = int(model.get_output_embeddings().weight.shape[0])
        self.known_ids = int(model.get_input_embeddings().weight.shape[0])
        self._checked: set[str] = set()
        self.device, self.dtype = str(model.device), model.dtype
        self._widens = self.dtype == torch.bfloat16 and bfloat16_is_slow(self.device)

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer, read when it is first used: reading takes seconds, and most evaluations need none."""
        return self._read_tokenizer()

    @cached_property
    def bos_id(self) -> int:
        """Id of the token that begins a row."""
        return loading.special_tokens(self.tokenizer)[0]

    @cached_property
    def special_ids(self) -> tuple[int, ...]:
        """Ids of pad, EOS and BOS."""
        return loading.special_tokens(self.tokenizer)[1]

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        *,
        device: str = "cpu",
        say: Callable[[str], None] = lambda text: None,
        late_tokenizer: bool = False,
    ) -> "LanguageModel":
        """Load a model for inference. Raises ModelError before reading weights if it can't be used as asked.

        With `late_tokenizer` the tokenizer is only read once it is used, and what is wrong with it is found then: for
        whoever has the digest of its files to compare with that of a store.
        """
        tokenizer_folder = sources.tokenizer_folder(config)
        commit = sources.commit_of(config, tokenizer_folder)
        description = loading.read_description(config.id, tokenizer_folder)
        loading.check_dtype(config.dtype, description.get_text_config().model_type)
        read_tokenizer = cache(partial(loading.read_tokenizer, config.id, tokenizer_folder))
        if not late_tokenizer:
            loading.special_tokens(read_tokenizer())
        folder = sources.model_folder(at_commit(config, commit), say)
        attention = loading.pick_attention(description) if config.attention == "auto" else config.attention
        dtype = in_memory.DTYPES[config.dtype]
        model = loading.load_causal(config.id, folder, dtype=dtype, attn_implementation=attention)
        language = cls(
            model.to(device).eval().requires_grad_(False),
            read_tokenizer,
            model_digest=weights_digest(folder, anew=True),
            tokenizer_digest=tokenizer_digest(folder, anew=True),
        )
        language.folder, language.commit = folder, commit
        return language

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> "LanguageModel":
        """A transformers model and its tokenizer that are in memory already, where they are and in the type they have.

        The model is the same object: it is put into evaluation mode, and its weights take no gradients any more. Its
        digest is of its tensors. Raises ModelError for what is no causal language model on one device, in one type of
        bfloat16, float32 and float16.

        >>> lm = LanguageModel.of(model, tokenizer)  # doctest: +SKIP
        """
        in_memory.check_in_memory(model, tokenizer)
        loading.special_tokens(tokenizer)
        return cls(
            model.eval().requires_grad_(False),
            lambda: tokenizer,
            model_digest=in_memory.state_digest(model),
            tokenizer_digest=in_memory.tokenizer_state_digest(tokenizer),
        )

    def digest_like(self, what: Literal["model", "tokenizer"], other: str) -> str:
        """The digest of the weights or the tokenizer, of the kind (files or memory) that `other` is of."""
        if other.startswith(in_memory.IN_MEMORY) and self.folder is not None:
            digest = in_memory.tokenizer_state_digest
            return in_memory.state_digest(self.model) if what == "model" else digest(self.tokenizer)
        return self.model_digest if what == "model" else self.tokenizer_digest

    def versions(self, *more: str) -> dict[str, str]:
        """What its numbers are computed with: Python, the kind of device, and libraries, of which `more` are added."""
        libraries = {name: version(name) for name in (*LIBRARIES, *more)}
        return {"python": platform.python_version(), "device": torch.device(self.device).type, **libraries}

    def generate(self, prompt: str, *, max_new_tokens: int = 40, **options: Any) -> str:
        """The text written after a prompt (BOS before it), greedily unless transformers' `options` say otherwise."""
        ids = self.tokenizer(prompt)["input_ids"]
        if ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        tokens = torch.tensor([ids], device=self.device)
        self.check_ids(tokens)
        options = {"do_sample": False, "pad_token_id": self.special_ids[0], **options}
        with torch.no_grad(), self.products(), loading.quiet():
            written = self.model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=max_new_tokens, **options
            )
        text: str = self.tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True)
        return text

    def check_hooks(self, hooks: Sequence[str]) -> None:
        """Raise ModelError unless every hook is a layer of the model and the cut there is right (tried once)."""
        for hook in hooks:
            hook_module(self.model, hook)
            if hook not in self._checked:
                self._checked.add(hook)  # first: the check itself runs prefix and suffix
                try:
                    self._check_cut(hook)
                except BaseException:
                    self._checked.remove(hook)
                    raise

    @torch.no_grad()
    def _check_cut(self, hook: str) -> None:
        """Prefix, suffix and unembedding against the model's own pass and the layer's own output. Raises ModelError."""
        seeded = torch.Generator().manual_seed(0)
        ids = torch.randint(min(self.known_ids, self.vocab_size), (1, CHECKED_TOKENS), generator=seeded)
        tokens = ids.repeat(2, 1)
        tokens[1, -1] = (tokens[1, -1] + 1) % self.vocab_size  # which no earlier token may see
        own: list[Tensor] = []
        try:
            with on_residual(self.model, hook, own.append):
                logits = self.logits(tokens)
                again = logits if self.device == "cpu" else self.logits(tokens)  # only others sum in another order
            tolerance = max(TOLERANCE[self.dtype], 4 * _distance(again, logits), 4 * _distance(own[-1], own[0]))
            resid = self.prefix(tokens, [hook])[hook]
            if not torch.isfinite(logits).all():
                raise ModelError(
                    f"its logits are not finite in {in_memory.dtype_name(self.dtype)}; use --set model.dtype=float32"
                )
            _check_close(resid, own[0], tolerance, "the residual it gives there is not the layer's")
            _check_close(logits[1, :-1], logits[0, :-1], 8 * tolerance, "its tokens see later ones")
            if layers_before(hook):
                what = "what follows from the residual there is not the model's logits"
                _check_close(self.unembed(self.suffix(hook, resid)), logits, tolerance, what)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # foreign code, run in a way that was not foreseen
            reason = str(error) if isinstance(error, ModelError) else f"its code ends in {one_line(error)}"
            raise ModelError(
                f"models of type {self.config.model_type!r} can't be cut at {hook} as hsae does: {reason}; "
                "docs/results/families.md names the families that can"
            ) from None

    @torch.no_grad()
    def check_ablation(self, hooks: Sequence[str]) -> None:
        """Raise ModelError unless zeroing the residual at a hook gives the same final vector at every token."""
        for hook in hooks:
            final = self.suffix(hook, torch.zeros(1, CHECKED_TOKENS, self.d_model, dtype=self.dtype))
            alone = self.suffix(hook, torch.zeros(1, 1, self.d_model, dtype=self.dtype))
            if (error := _distance(final, alone.expand_as(final))) > 8 * TOLERANCE[self.dtype]:
                raise ModelError(
                    f"models of type {self.config.model_type!r} can't be evaluated at {hook}: what follows from a "
                    f"zeroed residual depends on the position (relative error {error:.2g}), and hsae keeps one for all"
                )

    @torch.inference_mode()  # for which layers are compiled anew
    def check_compiled(self, hooks: Sequence[str], rows: int, context: int) -> None:
        """Compile the layers up to the deepest hook for passes of this shape, and compare them with the layers as they
        are. Raises ModelError if they can't be compiled, or give something else.
        """
        advice = "build with --set cache.compile=false"
        if self._widens:
            raise ModelError(f"layers in bfloat16 can't be compiled for a processor without such products; {advice}")
        seeded = torch.Generator().manual_seed(0)
        tokens = torch.randint(min(self.known_ids, self.vocab_size), (rows, context), generator=seeded)
        try:
            found = self.prefix(tokens, hooks, compiled=True)
        except (ModelError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of torch.compile, Triton or a C compiler
            raise ModelError(
                f"layers of type {self.config.model_type!r} can't be compiled here ({one_line(error)}); {advice}"
            ) from None
        for hook, wanted in self.prefix(tokens, hooks).items():
            distances = (found[hook].float() - wanted.float()).norm(dim=-1)
            distance = float((distances / wanted.float().norm(dim=-1).clamp_min(1e-30)).median())
            if not distance <= COMPILED_TOLERANCE[self.dtype]:
                raise ModelError(
                    f"compiled layers give another residual at {hook} (relative error {distance:.2g}); {advice}"
                )

    def check_ids(self, tokens: Tensor) -> None:
        """Raise ModelError for rows that are longer than the model's positions, or ids beyond its embedding."""
        if (longest := loading.positions(self.config)) is not None and tokens.shape[-1] > longest:
            raise ModelError(
                f"rows of {tokens.shape[-1]} tokens were given; the model has positions for {longest}: "
                "lower cache.context"
            )
        if tokens.numel() and int(tokens.max()) >= self.known_ids:
            raise ModelError(
                f"the tokenizer gives id {int(tokens.max())}, and the model's embedding ends at {self.known_ids - 1}: "
                "they don't belong together; give the tokenizer that the model was trained with (or "
                "resize_token_embeddings, train, and save the model)"
            )

    def padded(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Token ids [B, T] of rows of several lengths, with padding behind, which causal attention never sees."""
        width = max(map(len, rows))
        return torch.tensor([[*row, *[self.special_ids[0]] * (width - len(row))] for row in rows])

    @torch.no_grad()
    def prefix(self, tokens_BT: Tensor, hooks: Sequence[str], *, compiled: bool = False) -> dict[str, Tensor]:
        """The residual [B, T, D] at each hook; nothing after the deepest hook is computed.

        With `compiled` the decoder layers run through torch.compile, once for each shape: faster on a GPU, and equal
        but for rounding. See `check_compiled`.
        """
        self.check_hooks(hooks)
        self.check_ids(tokens_BT)
        after = {hook: layers_before(hook) for hook in hooks}  # boundary n: before layer n runs
        deepest = max(after.values())
        layers = list(self._layers)[:deepest]
        forwards = dict(zip(layers, self._compiled_forwards[:deepest], strict=True)) if compiled else {}
        resid: dict[int, Tensor] = {}
        rest = {str(index): _PassThrough(self._layers[index]) for index in range(deepest, self.layers)}
        with contextlib.ExitStack() as stack:
            for boundary in set(after.values()) - {deepest}:
                hook = f"blocks.{boundary}.hook_resid_pre"
                stack.enter_context(on_residual(self.model, hook, partial(resid.__setitem__, boundary)))
            stack.enter_context(_replaced(self._layers, rest))
            stack.enter_context(_replaced(self.model.get_decoder(), {self._norm_name: nn.Identity()}))
            stack.enter_context(_forwarding(forwards))
            # a copy that blocks would wait for all that the GPU has still to do
            tokens = tokens_BT.to(self.device, non_blocking=True).long()
            resid[deepest] = self._run(input_ids=tokens)
        return {hook: resid[boundary] for hook, boundary in after.items()}

    def suffix(self, hook: str, resid_BTD: Tensor, *, grad: bool = False) -> Tensor:
        """The final vector [B, T, D], normed, that follows from a residual at `hook`; `grad` for gradients."""
        self.check_hooks([hook])
        if layers_before(hook) == 0:
            raise ModelError(
                f"hook {hook!r} lies before the first layer; evaluate at blocks.0.hook_resid_post or later"
            )
        resid = resid_BTD.to(self.device, self.dtype)
        done = {str(index): _PassThrough(self._layers[index], resid) for index in range(layers_before(hook))}
        with torch.set_grad_enabled(grad), _replaced(self._layers, done):
            return self._run(inputs_embeds=resid)

    def unembed(self, final: Tensor, *, grad: bool = False) -> Tensor:
        """Logits [..., V] as the model itself makes them, scaled and capped; `grad` for gradients.

        It is the model's own forward pass, in which the decoder gives these vectors.
        """
        with torch.set_grad_enabled(grad), self.products():
            vectors = final.to(self.device, self.dtype)
            flat = vectors.reshape(1, -1, vectors.shape[-1])
            head = self.model.get_output_embeddings()
            forwards: dict[nn.Module, Any] = {self.model.get_decoder(): lambda *args, **kwargs: _Final(flat)}
            if self._widens and getattr(head, "bias", None) is None:
                # the largest matrix by far: widened once, not at each call
                wide = self._wide_head
                forwards[head] = lambda inputs: nn.functional.linear(inputs.float(), wide).to(self.dtype)
            with _forwarding(forwards):
                logits: Tensor = self.model(inputs_embeds=flat, use_cache=False).logits
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

    @cached_property
    def _wide_head(self) -> Tensor:
        with torch.inference_mode(False):  # gradients may go through it later
            wide: Tensor = self.model.get_output_embeddings().weight.float()
            return wide

    @cached_property
    def _compiled_forwards(self) -> list[Callable[..., Any]]:
        """Each layer's forward, compiled when it is first called with a shape; an error if it can't be as a whole."""
        return [torch.compile(layer.forward, dynamic=False, fullgraph=True) for layer in self._layers]

    def products(self) -> contextlib.AbstractContextManager[object]:
        """How this model multiplies matrices on its device: enter it around other calls of `model`."""
        return WidenedProducts() if self._widens else contextlib.nullcontext()


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's tokenizer, without its weights. Raises ModelError if there is none."""
    return loading.read_tokenizer(config.id, sources.tokenizer_folder(config))


class _Final:
    """What the decoder gives to the rest of the model: final vectors, and nothing else that it might give."""

    def __init__(self, vectors: Tensor) -> None:
        self.last_hidden_state = vectors

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]


@contextlib.contextmanager
def _replaced(owner: nn.Module, stand_ins: Mapping[str, nn.Module]) -> Iterator[None]:
    """Other modules in the place of some of a module's children; every other child keeps its own name."""
    originals = {name: getattr(owner, name) for name in stand_ins}
    for name, module in stand_ins.items():
        setattr(owner, name, module)
    try:
        yield
    finally:
        for name, module in originals.items():
            setattr(owner, name, module)


@contextlib.contextmanager
def _forwarding(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Other functions in the place of some modules' forward passes; hooks stay where they are."""
    own = {module: module.__dict__["forward"] for module in forwards if "forward" in module.__dict__}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module in forwards:
            module.__dict__.pop("forward", None)
        for module, forward in own.items():
            module.forward = forward


def _check_close(vectors: Tensor, wanted: Tensor, tolerance: float, problem: str) -> None:
    if (error := _distance(vectors, wanted)) > tolerance:
        raise ModelError(f"{problem} (relative error {error:.2g})")


def _distance(vectors: Tensor, wanted: Tensor) -> float:
    """Largest relative error of a vector; infinite where the shapes differ or there is something not finite."""
    if vectors.shape != wanted.shape:
        return float("inf")
    error = (vectors.float() - wanted.float()).norm(dim=-1) / wanted.float().norm(dim=-1).clamp_min(1e-30)
    return float(error.max()) if torch.isfinite(error).all() else float("inf")
