"""Models and tokenizers of a local folder, as transformers loads them."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hsae.cache.errors import ModelError
from hsae.cache.language_model.model_files import (
    TOKENIZER_FILES,
    VOCABULARIES,
    check_weights,
    one_line,
    read_object,
    refuse_pointer,
    vocabulary_files,
)

OVERFLOWING = ("gemma",)  # families whose residual exceeds float16's largest number, 65,504
HARMLESS = re.compile(r"(rotary_emb\.inv_freq|(^|\.)position_ids|(attn|attention)\.(bias|masked_bias))$")
"""Buffers of older transformers: made from the configuration alone."""
OTHER_PARTS = re.compile(
    r"(^|\.)(visual|vision_\w+|audio_\w+|embed_vision|embed_audio|multi_modal_projector|mm_projector|mtp)\."
)
"""Parts of a checkpoint that its language model does without: for seeing, hearing, and later tokens."""
WRAPPINGS = {
    "_orig_mod.": "torch.compile does; save the module inside it (model._orig_mod)",
    "module.": "DataParallel and DistributedDataParallel do; save the module inside it (model.module)",
    "base_model.model.": "peft does; merge the adapter first (merge_and_unload) and save the result",
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and notices off the user's screen."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers.utils import logging as untyped

    logging: Any = untyped
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def read_description(name: str, folder: Path) -> Any:
    """transformers' description of a model, from config.json. Raises ModelError if it can't be read as it is."""
    content = read_object(folder / "config.json")
    for part in (content, content.get("text_config")):
        if isinstance(part, dict) and (how := part.get("quantization_config")):
            method = how.get("quant_method", "an unnamed method") if isinstance(how, dict) else how
            raise ModelError(
                f"{name} is quantised ({method}); hsae reads weights in bfloat16, float16 or float32, and .gguf files: "
                "give the original model"
            )
    kind = content.get("model_type")
    with quiet():
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            known = type(config) in AutoModelForCausalLM._model_mapping
        except Exception as error:  # whatever a file that others wrote makes transformers raise
            if "auto_map" in content:
                raise ModelError(
                    f"{name} brings code of its own (auto_map in config.json), which hsae never runs, and its type "
                    f"{kind!r} is none that transformers has"
                ) from None
            raise ModelError(f"{name}: transformers can't read config.json: {one_line(error)}") from None
    if getattr(config, "is_encoder_decoder", False) or not known:
        raise ModelError(
            f"{name} is of type {kind!r}, which is no decoder-only language model; "
            "hsae needs one that predicts the next token"
        )
    return config


def pick_attention(config: Any) -> str:
    """eager where a model caps its attention logits or has no fused attention in transformers, sdpa elsewhere."""
    from transformers import AutoModelForCausalLM

    has_sdpa = getattr(AutoModelForCausalLM._model_mapping[type(config)], "_supports_sdpa", True)
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return "sdpa" if has_sdpa and not capped else "eager"


def load_causal(name: str, folder: Path, **options: Any) -> Any:
    """The model of a folder, every weight read from its files. Raises ModelError if one is missing."""
    check_weights(folder)
    with quiet():
        from transformers import AutoModelForCausalLM

        try:
            options |= {"use_safetensors": True, "trust_remote_code": False, "ignore_mismatched_sizes": True}
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
        except Exception as error:  # foreign code on a file that others wrote
            raise ModelError(f"{name} can't be loaded: {one_line(error)}") from None
    model, info = loaded
    _refuse_other_keys(name, info)
    return model


def _refuse_other_keys(name: str, info: dict[str, Any]) -> None:
    missing, unexpected = (
        sorted(key for key in info[f"{kind}_keys"] if not HARMLESS.search(key)) for kind in ("missing", "unexpected")
    )
    unexpected = [key for key in unexpected if not OTHER_PARTS.search(key)]
    mismatched = [f"{key} {tuple(shape)} for {tuple(wanted)}" for key, shape, wanted in sorted(info["mismatched_keys"])]
    kinds = {"missing": missing, "that the model has no place for": unexpected, "of another shape": mismatched}
    problems = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
        for what, keys in kinds.items()
        if keys
    ]
    if not problems and not info["error_msgs"]:
        return
    hint = "it would run with random numbers: give the folder that save_pretrained of the whole language model wrote"
    for prefix, who in WRAPPINGS.items():
        if unexpected and all(key.startswith(prefix) for key in unexpected):
            hint = f"its tensors are named {prefix}…, as {who}"
    if any("lora_" in key for key in unexpected):
        hint = "an adapter lies among them: merge it first (merge_and_unload) and save the result"
    if missing and all(key.split(".")[0] in ("lm_head", "embed_out", "output") for key in missing):
        hint = "it has no output layer, as AutoModel saves it: save it from AutoModelForCausalLM"
    raise ModelError(
        f"the weights of {name} don't fit its config.json: tensors {', '.join(problems or info['error_msgs'][:1])}; "
        f"{hint}"
    )


def read_tokenizer(name: str, folder: Path) -> Any:
    """The tokenizer of a folder. Raises ModelError for one that knows no words, or has only a part of its files."""
    for path in (folder / file for file in (*TOKENIZER_FILES, *VOCABULARIES) if "*" not in file):
        refuse_pointer(path)
    none = (
        f"{name} has no tokenizer: {{}} missing in {folder}; copy the tokenizer's files there "
        "(AutoTokenizer.from_pretrained(ORIGINAL).save_pretrained(FOLDER))"
    )
    whole = (folder / "tokenizer.json").is_file()
    with quiet():
        from transformers import AutoTokenizer

        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            words = set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab())
        except Exception as error:  # foreign code on files that others wrote
            if not whole and not vocabulary_files(folder):
                raise ModelError(none.format("tokenizer.json is")) from None
            raise ModelError(f"the tokenizer of {name} can't be loaded: {one_line(error)}") from None
    files = {file for key, file in tokenizer.vocab_files_names.items() if key in ("vocab_file", "merges_file")}
    absent = sorted(file for file in files if not (folder / file).is_file())
    if not whole and absent and len(absent) < len(files):
        raise ModelError(none.format(f"{' and '.join(absent)} is"))
    if len(words) <= 1:  # a lone word: the space of sentencepiece
        raise ModelError(none.format("tokenizer.json is" if not whole else "a vocabulary is"))
    return tokenizer


def special_tokens(tokenizer: Any) -> tuple[int, tuple[int, ...]]:
    """(BOS id, ids of pad, EOS and BOS without doubles); BOS falls back to EOS, as SAEBench's model wrapper does."""
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if bos is None:
        raise ModelError("the tokenizer has neither a BOS nor an EOS token; rows can't be packed")
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, bos)
    return int(bos), tuple(sorted({int(token) for token in ids if token is not None}))


def check_dtype(dtype: str, family: str) -> None:
    """Refuse float16 for models whose residual overflows it. Raises ModelError."""
    if dtype == "float16" and any(part in family.lower() for part in OVERFLOWING):
        raise ModelError(
            "model.dtype is float16, but Gemma's residual at BOS is about 1e5 and float16 ends at 65,504: "
            "it would overflow; use bfloat16 or float32"
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
