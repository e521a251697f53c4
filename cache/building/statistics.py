"""Moments of the residual at a hook: mean, mean square norm and geometric median over a bounded sample of chunks.

Shapes: D residual width, S sampled vectors.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hsae.cache.errors import StoreError
from hsae.cache.format.arrays import ArraySpec
from hsae.cache.format.layout import HookSummary
from hsae.cache.reading.mapped_chunks import MappedArray
from hsae.cache.storage.paths import Place

MOST_CHUNKS = 64  # evenly spaced: bounds the time and, for a remote store, the traffic
MEDIAN_SAMPLE = 8192
WEISZFELD_STEPS = 50


def summarise(
    root: Place,
    specs: Mapping[str, ArraySpec],
    hook: str,
    special_ids: Sequence[int],
    checks: Mapping[str, NDArray[np.uint32]],
) -> tuple[HookSummary, dict[str, Tensor]]:
    """The scalars of a hook, and its `mean` and `geometric_median` [D]. Special tokens are left out."""
    acts, tokens = (MappedArray(root, specs[path], checks.get(path)) for path in (f"acts/{hook}", "tokens"))
    sampled = min(acts.spec.count, MOST_CHUNKS)
    chosen = sorted({index * (acts.spec.count - 1) // max(1, sampled - 1) for index in range(sampled)})
    total, squares, seen = torch.zeros(acts.spec.shape[-1], dtype=torch.float64), 0.0, 0
    sample = []
    special = torch.tensor(special_ids, dtype=torch.int32)
    for index in chosen:
        mask = ~torch.isin(tokens.chunk(index), special)
        vectors = acts.chunk(index)[mask]
        for first in range(0, len(vectors), 4096):
            wide = vectors[first : first + 4096].double()
            total += wide.sum(0)
            squares += float(wide.square().sum())
        seen += len(vectors)
        stride = max(1, -(-len(vectors) * len(chosen) // MEDIAN_SAMPLE))
        sample.append(vectors[::stride].clone())
    if not seen:
        raise StoreError(f"{root} holds special tokens only")
    moments = {"mean": total / seen, "geometric_median": geometric_median(torch.cat(sample).double())}
    return HookSummary(mean_square_norm=squares / seen, tokens=seen), moments


def geometric_median(sample_SD: Tensor) -> Tensor:
    """The point [D] with the least summed distance to the sample (Weiszfeld's iteration)."""
    point: Tensor = sample_SD.mean(0)
    floor = 1e-9 * float((sample_SD - point).norm(dim=1).mean()) + 1e-30
    for _ in range(WEISZFELD_STEPS):
        weights = 1 / (sample_SD - point).norm(dim=1).clamp_min(floor)
        moved: Tensor = (weights @ sample_SD) / weights.sum()
        if float((moved - point).norm()) < floor:
            return moved
        point = moved
    return point
