"""Encoding and decoding that only touch active latents, for processors without fast matrix products.

A code whose active pre-activations pass unchanged (relu, top-k, BatchTopK, with or without a child gate) has gradients
at its active entries alone. With K of F latents active that leaves one dense product of a step's six, the encoder's;
the others become products with a sparse [B, F] matrix, some F/K times fewer multiplications. Values and gradients are
those of the dense computation.

Shapes: B vectors, I width of what the level reads, F latents, N active entries of the batch.
"""

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

DENSEST = 1 / 8  # a code denser than this is faster as a dense matrix

with warnings.catch_warnings():  # torch says once a process that its sparse tensors are young
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 1], [0], [1.0])


class Pattern(NamedTuple):
    """Where a code [B, F] is active: as rows of a compressed matrix, and as those of its transpose."""

    shape: tuple[int, int]
    flat: Tensor
    """[N] positions in the flattened code, ascending."""
    starts: Tensor
    """[B+1] where each row begins."""
    columns: Tensor
    """[N]"""
    order: Tensor
    """[N] the entries in the order of the transpose."""
    transposed_starts: Tensor
    """[F+1]"""
    transposed_columns: Tensor
    """[N]"""

    def matrix(self, values: Tensor) -> Tensor:
        """The sparse [B, F] matrix with these values."""
        return torch.sparse_csr_tensor(self.starts, self.columns, values, self.shape, check_invariants=False)

    def transposed(self, values: Tensor) -> Tensor:
        """Its transpose, [F, B]."""
        shape = self.shape[::-1]
        return torch.sparse_csr_tensor(
            self.transposed_starts, self.transposed_columns, values[self.order], shape, check_invariants=False
        )


class Active(NamedTuple):
    """The active entries of a code."""

    at: Pattern
    values: Tensor
    """[N]"""


def pattern_of(code_BF: Tensor) -> Pattern | None:
    """Where a code is not zero; None if that is in too many places for a sparse matrix to be worth it."""
    rows, latents = code_BF.shape
    flat = code_BF.flatten().nonzero().squeeze(1)
    if len(flat) > DENSEST * code_BF.numel():
        return None
    row, column = flat // latents, flat % latents
    order = column.argsort(stable=True)
    return Pattern(
        (rows, latents), flat, _starts(row, rows), column.int(), order, _starts(column, latents), row[order].int()
    )


def _starts(index: Tensor, count: int) -> Tensor:
    starts = torch.zeros(count + 1, dtype=torch.int32, device=index.device)
    starts[1:] = torch.bincount(index, minlength=count).cumsum(0)
    return starts


def encode(read_BI: Tensor, bias_I: Tensor, W_enc_IF: Tensor, b_enc_F: Tensor, pre_BF: Tensor, at: Pattern) -> Tensor:
    """[N] pre-activations (read - bias) W_enc + b_enc at the pattern, from `pre_BF`, which has no gradient."""
    values: Tensor = _Encode.apply(read_BI, bias_I, W_enc_IF, b_enc_F, pre_BF, at)  # type: ignore[no-untyped-call]
    return values


def decode(values_N: Tensor, W_dec_FI: Tensor, at: Pattern) -> Tensor:
    """[B, I] the code with these values times W_dec."""
    decoded: Tensor = _Decode.apply(values_N, W_dec_FI, at)  # type: ignore[no-untyped-call]
    return decoded


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, read: Tensor, bias: Tensor, W_enc: Tensor, b_enc: Tensor, pre: Tensor, at: Pattern) -> Tensor:
        ctx.save_for_backward(read, bias, W_enc)
        ctx.at = at
        return pre.flatten()[at.flat]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        read, bias, W_enc = ctx.saved_tensors
        at, (values,) = ctx.at, gradients
        needs_read, needs_bias, needs_W, needs_b, _, _ = ctx.needs_input_grad
        to_b = torch.zeros_like(W_enc[0]).index_add_(0, at.columns, values) if needs_b or needs_bias else None
        to_W = (at.transposed(values) @ (read - bias)).T.contiguous() if needs_W else None
        to_read = at.matrix(values) @ W_enc.T if needs_read else None
        to_bias = -(W_enc @ to_b) if needs_bias and to_b is not None else None
        return to_read, to_bias, to_W, to_b, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, at: Pattern) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.at = at
        return at.matrix(values) @ W_dec

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        values, W_dec = ctx.saved_tensors
        at, gradient = ctx.at, gradients[0].contiguous()
        to_values = None
        if ctx.needs_input_grad[0]:
            to_values = torch.sparse.sampled_addmm(at.matrix(torch.zeros_like(values)), gradient, W_dec.T).values()
        to_W = at.transposed(values) @ gradient if ctx.needs_input_grad[1] else None
        return to_values, to_W, None
