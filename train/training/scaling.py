"""How vectors are scaled for training: x = scale * vector, so that E||x||^2 = D, whatever units a model computes in.

Shapes: N vectors, D width, S vectors of a sample.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hsae.cache.building.statistics import MEDIAN_SAMPLE, geometric_median
from hsae.cache.errors import UserError

PART = 4096
"""Vectors that are widened to float64 at a time."""


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """What a run has to know of its vectors before its first step."""

    scale: float
    median: Tensor
    """[D] geometric median, scaled: where the bias starts."""
    variance: float
    """E||x - E x||^2, scaled: what losses are a fraction of."""

    @classmethod
    def of_moments(cls, mean_D: Tensor, mean_square_norm: float, median_D: Tensor, where: str) -> "Scaling":
        """Scaling from moments in the vectors' own units. Raises UserError, naming `where`, if they don't vary."""
        d_in = len(mean_D)
        if not mean_square_norm > 0:
            raise UserError(f"{where} are all zero")
        scale = (d_in / mean_square_norm) ** 0.5
        mean = mean_D * scale
        variance = d_in - float(mean.square().sum())
        if not (torch.isfinite(mean).all() and variance > 1e-6 * d_in):
            raise UserError(f"{where} do not vary (variance {variance:g} after scaling)")
        return cls(scale=scale, median=(median_D * scale).float(), variance=variance)

    @classmethod
    def of_vectors(cls, vectors_ND: Tensor, where: str) -> "Scaling":
        """Scaling measured on vectors: the moments of all, the median of an evenly spaced sample.

        Raises UserError, naming `where`, if a value is NaN or infinite, or the vectors don't vary.
        """
        total = torch.zeros(vectors_ND.shape[1], dtype=torch.float64)
        squares = 0.0
        for first in range(0, len(vectors_ND), PART):
            part = vectors_ND[first : first + PART].cpu().double()
            if not (finite := part.isfinite().all(1)).all():
                raise UserError(f"{where}: vector {first + int((~finite).nonzero()[0])} has NaN or infinite values")
            total += part.sum(0)
            squares += float(part.square().sum())
        count = len(vectors_ND)
        sample_SD = vectors_ND[:: -(-count // MEDIAN_SAMPLE)].cpu().double()
        return cls.of_moments(total / count, squares / count, geometric_median(sample_SD), where)
