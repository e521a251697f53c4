"""Models and tokenizers in memory, from nowhere that is known: what is wrong with them, and digests of them."""

import hashlib
import json
from typing import Any

import torch
from torch import nn

from hsae.cache.errors import ModelError
from hsae.cache.language_model.loading import check_dtype

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
IN_MEMORY = "state:"
"""How digests of this module begin; those of files are bare SHA-256."""
UNESSENTIAL = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache")
"""Keys of a model's configuration that say nothing of what it computes: the tensors have types of their own."""


def check_in_memory(model: Any, tokenizer: Any) -> None:
    """Raise ModelError for what is no causal language model on one device, in one of DTYPES, with its tokenizer."""
    name = type(model).__name__
    if not isinstance(model, nn.Module) or not hasattr(model, "get_output_embeddings"):
        raise ModelError(f"{name} is no model of transformers; give what AutoModelForCausalLM.from_pretrained returns")
    if not hasattr(tokenizer, "get_vocab") or not hasattr(tokenizer, "bos_token_id"):
        kind = type(tokenizer).__name__
        raise ModelError(f"{kind} is no tokenizer of transformers; give what AutoTokenizer.from_pretrained returns")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ModelError(f"{name} is quantised; hsae needs weights in bfloat16, float16 or float32")
    weights = [weight for weight in model.parameters() if weight.is_floating_point()]
    dtypes, devices = {weight.dtype for weight in weights}, {str(weight.device) for weight in weights}
    if len(devices) != 1 or devices == {"meta"}:
        raise ModelError(f"{name} lies on {', '.join(sorted(devices))}; hsae needs it on one device: model.to('cpu')")
    if len(dtypes) != 1 or not dtypes <= set(DTYPES.values()):
        kinds = ", ".join(sorted(map(dtype_name, dtypes)))
        raise ModelError(
            f"{name} has weights of type {kinds}; hsae needs one of {', '.join(DTYPES)}: model.to(torch.float32)"
        )
    config: Any = model.config
    check_dtype(dtype_name(dtypes.pop()), config.get_text_config().model_type)


def dtype_name(dtype: torch.dtype) -> str:
    """As torch calls it, without the module."""
    return str(dtype).removeprefix("torch.")


def state_digest(model: Any) -> str:
    """SHA-256 over a transformers model's configuration and the names, types, shapes and bytes of its tensors."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in UNESSENTIAL}
    total = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        total.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return IN_MEMORY + total.hexdigest()


def tokenizer_state_digest(tokenizer: Any) -> str:
    """SHA-256 over a tokenizer.json, or else its class and vocabulary; and the special tokens."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        content = json.loads(backend.to_str())
        content.update(padding=None, truncation=None)  # the state of its last call
    else:
        content = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return IN_MEMORY + hashlib.sha256(json.dumps([content, special], sort_keys=True).encode()).hexdigest()
