"""The covariance where a process holds some of the columns: the gradient of D at its own bits.

D is of all columns, and so are the words that are counted; W_enc and b_enc are of the columns
``first .. first + K``. With g = 2 / (N (N-1)) (N (B S) - n^T S) at the own bits, over all columns
in the sums,

    gpre = surrogate(g),   db_enc = 1^T gpre,   dW_enc = x^T gpre

is added to what the rest of the loss gives: the surrogates used here are linear in g. Summed over
the processes' columns this is the gradient of one process that holds them all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bae_fast.functional import Encoded
from bae_fast.ops import registry
from bae_fast.ops.products import column_chunks, product, product_dtype, sum_dtype
from bae_fast.packing import WORD_BITS, n_words, unpack_rows
from bae_fast.statistics import CodeStatistics
from bae_fast.surrogates import resolve_surrogate

# g is squared by this one, so parts of it cannot be added after it
_NOT_LINEAR = ("official",)


class _ColumnCovariance(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        window: Tensor,
        row_words: Tensor,
        words: Tensor,
        counts: Tensor,
        n_rows: Tensor,
        numerator: Tensor,
        first: int,
        impl: str,
        surrogate: str,
        width: float,
    ) -> Tensor:
        pairs = n_rows.double() * (n_rows.double() - 1)
        return (numerator / pairs).to(sum_dtype(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:8])
        ctx.options = inputs[9:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, b_enc, window, row_words, words, counts, n_rows = ctx.saved_tensors
        first, impl, surrogate, width = ctx.options
        with torch.autocast(x.device.type, enabled=False):
            grad_W, grad_b = _gradients(
                x, W_enc, b_enc, window, row_words, words, counts, n_rows, grad,
                first, impl, surrogate, width,
            )  # fmt: skip
        return None, grad_W, grad_b, *[None] * 10


def _gradients(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    window: Tensor,
    row_words: Tensor,
    words: Tensor,
    counts: Tensor,
    n_rows: Tensor,
    grad: Tensor,
    first: int,
    impl: str,
    surrogate: str,
    width: float,
) -> tuple[Tensor, Tensor]:
    extras = registry.extras(impl, x.device.type)
    make = extras.covariance_columns or registry.BACKENDS["torch"].extras.covariance_columns
    assert make is not None
    add = make(grad, row_words, words, counts, n_rows)
    wide, dtype = sum_dtype(x.dtype), product_dtype(x.dtype, x.device)
    x = x.to(dtype)
    grad_W, grad_b = torch.empty_like(W_enc), torch.empty_like(b_enc)
    for start, stop in column_chunks(len(x), W_enc.shape[1], 1, x.device):
        g = torch.zeros(len(x), stop - start, dtype=wide, device=x.device)
        add(g, first + start)
        if surrogate == "rectangle":
            inside = unpack_rows(window[:, start // WORD_BITS : n_words(stop)], stop - start)
            g.masked_fill_(~inside, 0)
        elif surrogate == "sigmoid":
            s = torch.sigmoid((product(x, W_enc[:, start:stop].to(dtype)) + b_enc[start:stop])
                              .to(wide) / width)  # fmt: skip
            g *= 4 * s * (1 - s)
        grad_b[start:stop] = g.sum(0)
        grad_W[:, start:stop] = product(x.t(), g.to(dtype))
    return grad_W, grad_b


def covariance_of_columns(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    encoded: Encoded,
    row_words: Tensor,
    stats: CodeStatistics,
    first: int,
    *,
    surrogate: str = "rectangle",
    surrogate_width: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """D of all columns, with its gradient at the columns of W_enc.

    Args:
        x: the rows ``[n, d_in]`` that the layer sees, in the dtype it computes in; constant.
        W_enc, b_enc: ``[d_in, K]``, ``[K]`` of the columns ``first .. first + K``; K and ``first``
            are multiples of 32.
        encoded: x encoded by these columns, see :func:`bae_fast.functional.encode_rows`.
        row_words: int32 ``[n, W]``, the bits of x in all columns.
        stats: statistics of the rows counted, in all columns, with words and numerator.
        surrogate, surrogate_width: see :func:`bae_fast.binary_autoencoder`; not "official".
        impl: the same.

    Returns:
        ``[]``, D, float32 (float64 for float64 x); the same on every process.

    Raises:
        ValueError: the surrogate "official", columns that do not lie on words, statistics without
            covariance, or an x that asks for a gradient.
    """
    surrogate, width = resolve_surrogate(surrogate, surrogate_width)
    if surrogate in _NOT_LINEAR:
        raise ValueError(
            "surrogate must be linear in the gradient for a covariance over processes: rectangle, "
            f"identity or sigmoid; got {surrogate!r}"
        )
    if first % WORD_BITS or W_enc.shape[1] % WORD_BITS:
        raise ValueError(
            f"first and the columns of W_enc must be multiples of {WORD_BITS}; got {first} and "
            f"{W_enc.shape[1]}"
        )
    if stats.numerator is None:
        raise ValueError("stats has no covariance: make it with statistics(covariance=True)")
    if x.requires_grad:
        raise ValueError("x must be constant for the covariance of columns; it requires a gradient")
    return _ColumnCovariance.apply(
        x, W_enc, b_enc, encoded.window, row_words, stats.require_words(), stats.counts,
        stats.n_rows, stats.numerator, first, impl, surrogate, width,
    )  # fmt: skip
