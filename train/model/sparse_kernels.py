"""Weighted sums of gathered rows on a GPU, in Triton, for dictionaries so wide that dense products cost more.

Rows are read in the type they have, in tiles, and added up in float32; a segment is summed by one program from its
first row to its last, so that the same input gives the same bits. torch's `embedding_bag` does the same a number at a
time: too few bytes on their way at once to be faster than a dense product.

Shapes: N rows in S segments, I width of a row.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 256
FEWEST_ROWS, MOST_ROWS = 4, 16  # of a tile


def weighted_sums(matrix_MI: Tensor, weights_N: Tensor, rows_N: Tensor, starts_S1: Tensor) -> Tensor:
    """[S, I] the weighted sum of each segment's rows of a matrix, in float32; the weights alone have a gradient."""
    sums_SI: Tensor = _WeightedSums.apply(matrix_MI.contiguous(), weights_N, rows_N, starts_S1)
    return sums_SI


class _WeightedSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, weights: Tensor, rows: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(matrix, rows, starts)
        segments, width = len(starts) - 1, matrix.shape[1]
        sums = torch.empty(segments, width, device=matrix.device)
        tile = _tile(rows, segments)
        _sum[segments, triton.cdiv(width, COLUMNS)](matrix, weights, rows, starts, sums, width, tile, COLUMNS)
        return sums

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        matrix, rows, starts = ctx.saved_tensors
        vectors, segments = gradients[0].to(matrix.dtype).contiguous(), len(starts) - 1
        products = torch.empty(len(rows), device=matrix.device)
        tile = _tile(rows, segments)
        _dot[(segments,)](vectors, matrix, rows, starts, products, matrix.shape[1], tile, COLUMNS)
        return None, products, None, None


def _tile(rows_N: Tensor, segments: int) -> int:
    """How many rows a tile has: about as many as a segment."""
    average: int = triton.next_power_of_2(-(-len(rows_N) // segments))
    return min(max(average, FEWEST_ROWS), MOST_ROWS)


@triton.jit
def _sum(matrix, weights, rows, starts, sums, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """sums[s] = sum over n of segment s of weights[n] * matrix[rows[n]], for one s and some columns."""
    segment = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    begin, end = tl.load(starts + segment), tl.load(starts + segment + 1)
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(begin, end, ROWS):
        n = first + tl.arange(0, ROWS)
        row = tl.load(rows + n, mask=n < end, other=0).to(tl.int64)
        weight = tl.load(weights + n, mask=n < end, other=0).to(tl.float32)
        inside = (n < end)[:, None] & (column < width)[None, :]
        tile = tl.load(matrix + row[:, None] * width + column[None, :], mask=inside, other=0).to(tl.float32)
        total += tl.sum(weight[:, None] * tile, 0)
    tl.store(sums + segment * width + column, total, mask=column < width)


@triton.jit
def _dot(vectors, matrix, rows, starts, products, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """products[n] = vectors[s] . matrix[rows[n]] for all n of one segment s."""
    segment = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(starts + segment), tl.load(starts + segment + 1)
    for first in range(begin, end, ROWS):
        n = first + tl.arange(0, ROWS)
        row = tl.load(rows + n, mask=n < end, other=0).to(tl.int64)
        total = tl.zeros((ROWS,), tl.float32)
        for left in range(0, width, COLUMNS):
            column = left + tl.arange(0, COLUMNS)
            inside = (n < end)[:, None] & (column < width)[None, :]
            vector = tl.load(vectors + segment * width + column, mask=column < width, other=0).to(tl.float32)
            tile = tl.load(matrix + row[:, None] * width + column[None, :], mask=inside, other=0).to(tl.float32)
            total += tl.sum(vector[None, :] * tile, 1)
        tl.store(products + n, total, mask=n < end)
