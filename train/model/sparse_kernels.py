"""Sums and products of gathered rows on a GPU, in Triton, for dictionaries so wide that dense products cost more.

Rows are read in the type they have, in tiles, and added up in float32, which the results are in; a segment is summed
by one program from its first row to its last, so that the same input gives the same bits. torch's `embedding_bag` does
the same a number at a time: too few bytes on their way at once to be faster than a dense product.

Shapes: N rows in S segments, I width of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 256
FEWEST_ROWS, MOST_ROWS = 4, 16  # of a tile


def weighted_sums(matrix_MI: Tensor, weights_N: Tensor, rows_N: Tensor, starts_S1: Tensor) -> Tensor:
    """[S, I] the weighted sum of each segment's rows of a matrix."""
    segments, width = len(starts_S1) - 1, matrix_MI.shape[1]
    sums_SI, matrix_MI = torch.empty(segments, width, device=matrix_MI.device), matrix_MI.contiguous()
    grid, tile = (segments, triton.cdiv(width, COLUMNS)), _tile(rows_N, segments)
    _sum[grid](matrix_MI, weights_N, rows_N, starts_S1, sums_SI, width, tile, COLUMNS)
    return sums_SI


def dots(vectors_SI: Tensor, matrix_MI: Tensor, rows_N: Tensor, starts_S1: Tensor) -> Tensor:
    """[N] each segment's vector times its rows of a matrix."""
    vectors_SI, matrix_MI, tile = vectors_SI.contiguous(), matrix_MI.contiguous(), _tile(rows_N, len(vectors_SI))
    products_N = torch.empty(len(rows_N), device=matrix_MI.device)
    _dot[(len(vectors_SI),)](vectors_SI, matrix_MI, rows_N, starts_S1, products_N, matrix_MI.shape[1], tile, COLUMNS)
    return products_N


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
