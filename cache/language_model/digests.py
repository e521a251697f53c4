"""Digests of a model and a tokenizer that are in memory, from nowhere that is known."""

import hashlib
import json
from typing import Any

import torch

IN_MEMORY = "state:"
"""How digests of this module begin; those of files are bare SHA-256."""
UNESSENTIAL = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache")
"""Keys of a model's configuration that say nothing of what it computes: the tensors have types of their own."""


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
