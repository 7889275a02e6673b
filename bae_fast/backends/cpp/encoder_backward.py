"""Backward of the encoder: from the gradients at recon and at the statistics to x, W_enc, b_enc.

For one chunk of columns, with G the gradient of recon, h the entropy's gradient and v the
curvature per column, S the signs of the covariance, N and n the counted rows and ones:

    g    = value^T(G W_dec^T) + h + v (1 - 2 B) + c 2/(N-1) (B S - 1 (n^T S)/N)   at the bits
    gpre = surrogate(g), zero in rows that do not count
    db_enc = 1^T gpre,   dW_enc = x^T gpre,   dx += gpre W_enc^T

The dense products are torch's. All between them is one pass in C++ over the chunk, which also
makes B S by popcounts and the sums of db_enc. n^T S comes from the same kernel: the binary digits
of n are further rows of bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bae_fast.backends.cpp.covariance import dense_rows
from bae_fast.backends.cpp.extension import empty_gradient, op
from bae_fast.backends.cpp.sparse_backward import is_sparse, sparse_backward
from bae_fast.backends.cpp.units import operand, unit_digits
from bae_fast.ops.products import (
    Preactivation,
    accumulate,
    column_chunks,
    product,
    sum_dtype,
)
from bae_fast.packing import bit_weights, pack_rows


def _digits(counts: Tensor, n_rows: int) -> Tensor:
    """Bit b of every count, row-packed ``[bits of n_rows, ceil(K/32)]``."""
    places = torch.arange(max(n_rows.bit_length(), 1))
    return pack_rows((counts >> places[:, None]) & 1)


def encoder_backward(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    words: Tensor,
    window: Tensor,
    row_mask: Tensor | None,
    grad_recon: Tensor | None,
    grad_columns: Tensor | None,
    curvature: Tensor | None,
    grad_covariance: Tensor | None,
    signs: Tensor | None,
    stats_words: Tensor | None,
    stats_counts: Tensor,
    stats_n_rows: Tensor,
    surrogate: str,
    width: float,
    n_bits: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    n, k, dtype = x.shape[0], W_enc.shape[1], x.dtype
    wide = sum_dtype(dtype)
    need_x, need_W, need_b = needs
    grad_x = x.new_zeros(x.shape if need_x else 0, dtype=wide)
    grad_W = empty_gradient(*W_enc.shape, W_enc.dtype) if need_W else W_enc.new_empty(0)
    column_sum = torch.empty(k, dtype=torch.float64)
    preactivation = Preactivation(x) if surrogate == "sigmoid" else None
    words, window = dense_rows(words), dense_rows(window)
    keep = None if row_mask is None else row_mask.contiguous()
    shift = None if grad_columns is None else grad_columns.to(wide).contiguous()
    curve = None if curvature is None else curvature.to(wide).contiguous()

    counts, columns, digits = stats_counts.contiguous(), None, None
    total, scale = int(stats_n_rows), 0.0
    if grad_covariance is not None:
        scale = float(grad_covariance) * 2 / (total * (total - 1))
        digits = _digits(counts, total)
        if signs is None:
            assert stats_words is not None
            columns = op("rows_to_columns")(dense_rows(stats_words), k)
        else:
            signs = signs.contiguous()

    if is_sparse(x, W_enc, W_dec, window, surrogate, n_bits):
        sparse_backward(
            window, keep, words, grad_recon, W_dec, shift, curve, grad_covariance is not None,
            signs, columns, counts, total, digits, scale, x, W_enc, grad_x, grad_W, column_sum,
        )  # fmt: skip
        return grad_x, grad_W, (column_sum if need_b else column_sum[:0]).to(b_enc.dtype)

    rest = (counts, total, digits, scale, window if surrogate == "rectangle" else None)
    unit = unit_digits(dtype)
    if unit and n_bits == 1 and surrogate != "sigmoid" and not need_x and grad_recon is not None:
        whole = grad_W
        if need_W and grad_W.dtype != torch.float32:
            whole = torch.empty(W_enc.shape, dtype=torch.float32)
        if op("unit_backward")(
            operand(x, unit), operand(grad_recon, unit), operand(W_dec, unit), unit, words, shift, curve,
            grad_covariance is not None, signs, columns, *rest, keep, surrogate == "official",
            column_sum, whole,
        ):  # fmt: skip
            grad_b = column_sum if need_b else column_sum[:0]
            return grad_x.to(dtype), whole.to(W_enc.dtype), grad_b.to(b_enc.dtype)

    backward = op("backward")
    for start, stop in column_chunks(n, k, n_bits, x.device):
        features = slice(start // n_bits, stop // n_bits)
        if grad_recon is None:
            g = torch.zeros(n, stop - start, dtype=wide)
        else:
            g = product(grad_recon, W_dec[features].to(dtype).t()).to(wide)
            if n_bits > 1:
                g = (g[:, :, None] * bit_weights(n_bits, wide, x.device)).flatten(1)
        factor = None
        if preactivation is not None:
            pre = preactivation(W_enc[:, start:stop], b_enc[start:stop])
            s = torch.sigmoid(pre.to(wide) / width)
            factor = (4 * s * (1 - s)).contiguous()
        g = g.contiguous()
        backward(
            g,
            words,
            start,
            None if shift is None else shift[start:stop],
            None if curve is None else curve[start:stop],
            grad_covariance is not None,
            signs,
            columns,
            *rest,
            factor,
            keep,
            surrogate == "official",
            column_sum[start:stop],
        )
        g = g.to(dtype)
        if need_W and grad_W.dtype == dtype:
            torch.mm(x.t(), g, out=grad_W[:, start:stop])  # no copy: 4 d K bytes of traffic less
        elif need_W:
            grad_W[:, start:stop] = product(x.t(), g)
        if need_x:
            accumulate(grad_x, g, W_enc[:, start:stop].to(dtype).t())
    return grad_x.to(dtype), grad_W, (column_sum if need_b else column_sum[:0]).to(b_enc.dtype)
