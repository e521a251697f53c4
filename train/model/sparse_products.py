"""Encoding and decoding that only touch active latents.

A code whose active pre-activations pass unchanged (relu, top-k, BatchTopK, with or without a child gate) has gradients
at its active entries alone. With K of F latents active that leaves one dense product of a step's five, the encoder's;
the others become sums of K rows, some F/K times fewer multiplications. Values and gradients are those of the dense
computation.

All of them are one of two operations on rows in segments, which are the vectors of a batch, each with its latents'
rows, or the latents, each with its vectors: `weighted_sums` of rows, and `dots` of each segment's vector with its rows.

Shapes: B vectors, I width of what the level reads, F latents, N active entries of the batch.
"""

import importlib
import importlib.util
import math
import warnings
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from hsae.train.model.activations import widened

DENSEST = 1 / 8  # a code denser than this is faster as a dense matrix
SMALLEST = {"cpu": 1 << 16, "cuda": 1 << 27}  # entries of W_enc below which a dense step is the faster one

with warnings.catch_warnings():  # torch says once a process that its sparse tensors are young
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 1], [0], [1.0])


class Segments(NamedTuple):
    """N rows of a matrix, in segments of any length."""

    rows: Tensor
    """[N] numbers of the rows, segment by segment."""
    starts: Tensor
    """[S+1] where each of S segments begins."""
    dtype: torch.dtype
    """In which a GPU reads them."""


class Pattern:
    """Where a code [B, F] is active."""

    def __init__(self, flat_N: Tensor, pre_BF: Tensor) -> None:
        """`flat_N`: positions in the flattened pre-activations, vector by vector."""
        self.flat, self.shape, self.dtype = flat_N, pre_BF.shape, pre_BF.dtype
        self.vectors = (flat_N // self.shape[1]).int()
        """[N]"""
        self.latents = (flat_N % self.shape[1]).int()
        """[N]"""
        self.by_vector = Segments(self.latents, _starts(self.vectors, self.shape[0]), self.dtype)
        """Of each vector its latents, in the order of `flat`."""

    @cached_property
    def order(self) -> Tensor:
        """[N] the entries latent by latent."""
        return self._sorted[1]

    @cached_property
    def by_latent(self) -> Segments:
        """Of each latent the vectors in which it is active, in the order of `order`."""
        vectors = self.vectors.index_select(0, self.order)
        return Segments(vectors, _starts(self._sorted[0], self.shape[1]), self.dtype)

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor]:
        latents, order = self.latents.sort(stable=True)
        return latents, order

    def sum_by_latent(self, values_N: Tensor) -> Tensor:
        """[F] the sum of each latent's values."""
        starts = self.by_latent.starts.long()
        return torch.segment_reduce(values_N.index_select(0, self.order), "sum", offsets=starts, initial=0)

    def dense(self, values_N: Tensor) -> Tensor:
        """The code [B, F] with these values."""
        code = values_N.new_zeros(self.shape.numel())
        return code.index_put((self.flat,), values_N).view(self.shape)


def _starts(rising_N: Tensor, count: int) -> Tensor:
    """[count+1] where each of the numbers below `count` begins."""
    return torch.searchsorted(rising_N, torch.arange(count + 1, dtype=torch.int32, device=rising_N.device)).int()


class Active(NamedTuple):
    """The active entries of a code."""

    at: Pattern
    values: Tensor
    """[N]"""


Code = Tensor | Active
"""A code, [B, F], or its active entries."""


def dense(code: Code) -> Tensor:
    """[B, F]"""
    return code if isinstance(code, Tensor) else code.at.dense(code.values)


def fired(code: Code) -> Tensor:
    """[F] which latents are active in any vector."""
    if isinstance(code, Tensor):
        return (code > 0).any(0)
    starts = code.at.by_latent.starts
    return starts[1:] > starts[:-1]


def mean_l0(code: Code) -> Tensor:
    """How many latents are active in a vector, on average; a scalar."""
    if isinstance(code, Tensor):
        return (code > 0).sum(1).float().mean()
    return torch.tensor(len(code.values) / code.at.shape[0], device=code.values.device)


def mean_square(code: Code) -> Tensor:
    """[F] each latent's mean square."""
    if isinstance(code, Tensor):
        return widened(code).square().mean(0)
    return code.at.sum_by_latent(code.values.square()) / code.at.shape[0]


def mean_sum(code: Code) -> Tensor:
    """The mean over vectors of the sum of a vector's code; a scalar."""
    if isinstance(code, Tensor):
        return widened(code).sum(1).mean()
    return code.values.sum() / code.at.shape[0]


def pays_off(entries: int, device: torch.device) -> bool:
    """Whether a level whose W_enc has so many entries is faster by its active latents."""
    if entries < SMALLEST.get(device.type, math.inf):
        return False
    return device.type == "cpu" or importlib.util.find_spec("triton") is not None


def pattern_of(code_BF: Tensor) -> Pattern | None:
    """Where a code is not zero; None if that is in too many places for it to be worth it."""
    is_active = code_BF != 0
    if is_active.count_nonzero() > DENSEST * code_BF.numel():
        return None
    return Pattern(is_active.flatten().nonzero().squeeze(1), code_BF)


def weighted_sums(matrix_MI: Tensor, weights_N: Tensor, at: Segments) -> Tensor:
    """[S, I] the weighted sum of each segment's rows of a matrix; without gradient."""
    if uses_kernels(matrix_MI.device):
        sums_SI: Tensor = sparse_kernels().weighted_sums(matrix_MI.to(at.dtype), weights_N, at.rows, at.starts)
        return sums_SI
    return embedding_bag(
        at.rows,
        matrix_MI.to(weights_N.dtype),
        at.starts,
        mode="sum",
        per_sample_weights=weights_N,
        include_last_offset=True,
    )


def dots(vectors_SI: Tensor, matrix_MI: Tensor, at: Segments) -> Tensor:
    """[N] each segment's vector times its rows of a matrix; without gradient."""
    if uses_kernels(matrix_MI.device):
        vectors_SI, matrix_MI = vectors_SI.to(at.dtype), matrix_MI.to(at.dtype)
        products_N: Tensor = sparse_kernels().dots(vectors_SI, matrix_MI, at.rows, at.starts)
        return products_N
    zeros, shape = vectors_SI.new_zeros(len(at.rows)), (len(vectors_SI), len(matrix_MI))
    pattern = torch.sparse_csr_tensor(at.starts, at.rows, zeros, shape, check_invariants=False)
    products_N = torch.sparse.sampled_addmm(pattern, vectors_SI, matrix_MI.T).values()
    return products_N


def uses_kernels(device: torch.device) -> bool:
    """Whether Triton multiplies here, and not torch."""
    return device.type == "cuda"


def sparse_kernels() -> Any:
    """The Triton kernels, which need triton."""
    return importlib.import_module("hsae.train.model.sparse_kernels")


def encode(
    read_BI: Tensor, bias_I: Tensor, W_enc_IF: Tensor, b_enc_F: Tensor, pre_BF: Tensor, at: Pattern | None
) -> Tensor:
    """[N] pre-activations (read - bias) W_enc + b_enc at the pattern, from `pre_BF`, which has no gradient.

    Without a pattern all of them, [B, F].
    """
    values: Tensor
    if at is None:
        values = _EncodeAll.apply(read_BI, bias_I, W_enc_IF, b_enc_F, pre_BF)  # type: ignore[no-untyped-call]
    else:
        values = _Encode.apply(read_BI, bias_I, W_enc_IF, b_enc_F, pre_BF, at)  # type: ignore[no-untyped-call]
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
        return pre.flatten().index_select(0, at.flat).to(W_enc.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        read, bias, W_enc = ctx.saved_tensors
        at, (values,) = ctx.at, gradients
        needs_read, needs_bias, needs_W, needs_b, _, _ = ctx.needs_input_grad
        to_b = at.sum_by_latent(values) if needs_b or needs_bias else None
        to_W = weighted_sums(read - bias, values.index_select(0, at.order), at.by_latent).T if needs_W else None
        to_read = weighted_sums(W_enc.T.contiguous(), values, at.by_vector) if needs_read else None
        to_bias = -(W_enc @ to_b) if needs_bias and to_b is not None else None
        return to_read, to_bias, to_W, to_b, None, None


class _EncodeAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, read: Tensor, bias: Tensor, W_enc: Tensor, b_enc: Tensor, pre: Tensor) -> Tensor:
        ctx.save_for_backward(read, bias, W_enc)
        return pre.view_as(pre)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        read, bias, W_enc = ctx.saved_tensors
        gradient = gradients[0]
        needs_read, needs_bias, needs_W, needs_b, _ = ctx.needs_input_grad
        to_b = widened(gradient).sum(0) if needs_b or needs_bias else None
        to_W = ((read - bias).to(gradient.dtype).T @ gradient).to(W_enc.dtype) if needs_W else None
        to_read = (gradient @ W_enc.to(gradient.dtype).T).to(read.dtype) if needs_read else None
        to_bias = -(W_enc @ to_b) if needs_bias and to_b is not None else None
        return to_read, to_bias, to_W, to_b, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, at: Pattern) -> Tensor:
        W_dec = W_dec.contiguous()
        ctx.save_for_backward(values, W_dec)
        ctx.at = at
        return weighted_sums(W_dec, values, at.by_vector)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        values, W_dec = ctx.saved_tensors
        at, gradient = ctx.at, gradients[0].contiguous()
        needs_values, needs_W, _ = ctx.needs_input_grad
        to_values = dots(gradient, W_dec, at.by_vector) if needs_values else None
        to_W = weighted_sums(gradient, values.index_select(0, at.order), at.by_latent) if needs_W else None
        return to_values, to_W, None
