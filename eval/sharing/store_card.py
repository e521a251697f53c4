"""The card of an activation store on the hub."""

import json

from hsae.cache.reading.store import ActivationStore


def store_card(store: ActivationStore, repository: str) -> str:
    """README.md of a store's repository."""
    spec, header = store.spec, store.header
    front = {"tags": ["hsae", "activations", "mechanistic-interpretability"], "viewer": False}
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]
    lines += [
        f"# {repository.rpartition('/')[2]}",
        "",
        f"Residual activations of {spec.model.id} at {', '.join(f'`{hook}`' for hook in spec.hooks)}: "
        f"{store.rows:,} rows of {store.context} tokens, {header.d_model}-dimensional, {spec.model.dtype}, of the "
        f"corpus {spec.corpus.corpus}. The tokens are in the store too: the text's own licence holds for it.",
        "",
        f"A zarr v3 store of hsae ({spec.split} split). Fetch it with `hsae pull datasets/{repository} activations`.",
        "",
        f"Digests: weights `{header.model_digest[:16]}`, tokenizer `{header.tokenizer_digest[:16]}`, corpus "
        f"`{header.corpus_digest[:16]}`.",
    ]
    return "\n".join(lines) + "\n"
