"""Backward of the encoder: from the gradients at recon and at the statistics to x, W_enc, b_enc.

For one chunk of columns, with G the gradient of recon, h the entropy's gradient and v the
curvature per column, S the signs of the covariance, N and n the counted rows and ones:

    g    = value^T(G W_dec^T) + h + v (1 - 2 B) + c 2/(N-1) (B S - 1 (n^T S)/N)   at the bits
    gpre = surrogate(g), zero in rows that do not count
    db_enc = 1^T gpre,   dW_enc = x^T gpre,   dx += gpre W_enc^T

The signs S are planes of bits, kept or made again, or come from lists of the rows (``covariance``).

Three ways. Where the rectangle's window is sparse, its entries alone (``sparse_backward``), in fp32
for half precision too. With products of the package's own (``units``), both dense products and all
between them strip by strip in C++. Else torch's products, and one pass in C++ over the chunk
between them. B S is made of bits each time, and so is n^T S: the binary digits of n are further
rows of bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bae_fast.backends.cpp.covariance import are_lists, dense_rows, kept_lists, pair_lists
from bae_fast.backends.cpp.extension import empty_gradient, op
from bae_fast.backends.cpp.sparse_backward import listed_window, sparse_backward
from bae_fast.backends.cpp.units import operand, unit_digits
from bae_fast.ops.products import (
    HALF,
    Preactivation,
    accumulate,
    column_chunks,
    product,
    product_dtype,
    sum_dtype,
)
from bae_fast.ops.schemas import EncoderBackward
from bae_fast.packing import bit_weights, pack_rows


def _digits(counts: Tensor, n_rows: int) -> Tensor:
    """Bit b of every count, row-packed ``[bits of n_rows, ceil(K/32)]``."""
    places = torch.arange(max(n_rows.bit_length(), 1))
    return pack_rows((counts >> places[:, None]) & 1)


class _Terms(NamedTuple):
    """What is added to the product at the bits, and what masks it."""

    words: Tensor
    shift: Tensor | None
    curvature: Tensor | None
    # whether there is a covariance, signs, column-packed statistics, ranks and two lists, counts,
    # N, digits, scale
    statistics: tuple[Any, ...]
    window: Tensor | None
    keep: Tensor | None


def _statistics(
    grad_covariance: Tensor | None,
    signs: Tensor | None,
    stats_words: Tensor | None,
    counts: Tensor,
    n_rows: int,
    words: Tensor,
    all_rows: bool,
) -> tuple[Any, ...]:
    counts = counts.contiguous()
    none = (None, None, None)
    if grad_covariance is None:
        return False, None, None, *none, counts, n_rows, None, 0.0
    scale = float(grad_covariance) * 2 / (n_rows * (n_rows - 1))
    if signs is not None and are_lists(signs):
        # bits may be the faster form for the product with all rows: then the choice is made again
        if not all_rows or stats_words is None:
            kept = kept_lists(signs, stats_words, words, len(counts))
            return True, None, None, *kept, counts, n_rows, None, scale
        signs = None
    if signs is not None:
        digits = _digits(counts, n_rows)
        return True, signs.contiguous(), None, *none, counts, n_rows, digits, scale
    assert stats_words is not None
    lists = pair_lists(stats_words, counts, n_rows, words, all_rows)
    if lists is not None:
        return True, None, None, *lists, counts, n_rows, None, scale
    columns = op("rows_to_columns")(dense_rows(stats_words), len(counts))
    return True, None, columns, *none, counts, n_rows, _digits(counts, n_rows), scale


def covariance_columns(
    grad_covariance: Tensor, at_hand: Tensor, words: Tensor, counts: Tensor, n_rows: Tensor
) -> Callable[[Tensor, int], None]:
    """See :attr:`bae_fast.ops.registry.Extras.covariance_columns`."""
    at_hand = dense_rows(at_hand)
    statistics = _statistics(grad_covariance, None, words, counts, int(n_rows), at_hand, True)

    def add(g: Tensor, first: int) -> None:
        column_sum = torch.empty(g.shape[1], dtype=torch.float64)
        op("backward")(
            g, at_hand, first, None, None, *statistics, None, None, None, False, column_sum
        )

    return add


def encoder_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    given = EncoderBackward(*arguments)
    x, W_enc, W_dec, grad_recon = given.x, given.W_enc, given.W_dec, given.grad_recon
    n_bits, surrogate = given.n_bits, given.surrogate
    wide = sum_dtype(x.dtype)
    need_x, need_W, need_b = given.needs
    grad_x = x.new_zeros(x.shape if need_x else 0, dtype=wide)
    grad_W = W_enc.new_empty(0)
    if need_W:
        grad_W = empty_gradient(W_enc.shape[0], W_enc.shape[1], W_enc.dtype)
    column_sum = torch.empty(W_enc.shape[1], dtype=torch.float64)
    words = dense_rows(given.words)
    inside = dense_rows(given.window) if surrogate == "rectangle" else None
    keep = None if given.row_mask is None else given.row_mask.contiguous()
    entries = None if inside is None else listed_window(x, W_enc, inside, keep, n_bits)
    terms = _Terms(
        words=words,
        shift=None if given.grad_columns is None else given.grad_columns.to(wide).contiguous(),
        curvature=None if given.curvature is None else given.curvature.to(wide).contiguous(),
        statistics=_statistics(
            given.grad_covariance,
            given.signs,
            given.stats_words,
            given.stats_counts,
            int(given.stats_n_rows),
            words,
            entries is None,
        ),
        window=inside,
        keep=keep,
    )
    dtype = product_dtype(x.dtype, x.device) if entries is None else wide
    x = x.to(dtype)
    grad_recon = None if grad_recon is None else grad_recon.to(dtype)
    if entries is not None:
        out = grad_W
        if need_W and grad_W.dtype != wide:
            out = empty_gradient(grad_W.shape[0], grad_W.shape[1], wide)
        sparse_backward(
            entries, terms.words, grad_recon,
            W_dec if grad_recon is None else W_dec.to(wide), terms.shift, terms.curvature,
            terms.statistics, x, W_enc.to(wide) if need_x else W_enc,
            grad_x, out, column_sum,
        )  # fmt: skip
        if out is not grad_W:
            grad_W.copy_(out)
    elif (
        need_x
        or n_bits > 1
        or surrogate == "sigmoid"
        or grad_recon is None
        or not _unit_backward(
            terms, x, W_dec, grad_recon, surrogate == "official", grad_W, column_sum
        )
    ):
        _dense_backward(
            terms, x, W_enc, given.b_enc, W_dec, grad_recon, surrogate, given.width, n_bits,
            grad_x, grad_W, column_sum,
        )  # fmt: skip
    grad_b = (column_sum if need_b else column_sum[:0]).to(given.b_enc.dtype)
    return grad_x.to(given.x.dtype), grad_W, grad_b


def _unit_backward(
    terms: _Terms,
    x: Tensor,
    W_dec: Tensor,
    grad_recon: Tensor,
    official: bool,
    grad_W: Tensor,
    column_sum: Tensor,
) -> bool:
    """Whether products of the package's own filled grad_W and column_sum."""
    digits = unit_digits(x.dtype, len(x), W_dec.shape[0])
    if not digits:
        return False
    out = grad_W
    if grad_W.numel() and grad_W.dtype != torch.float32:
        out = empty_gradient(grad_W.shape[0], grad_W.shape[1], torch.float32)
    left, gradient, weight = (operand(m, digits) for m in (x, grad_recon, W_dec))
    done: bool = op("unit_backward")(
        left, gradient, weight, digits, terms.words, terms.shift, terms.curvature,
        *terms.statistics, terms.window, terms.keep, official, column_sum, out,
    )  # fmt: skip
    if done and out is not grad_W:
        grad_W.copy_(out)
    return done


def _dense_backward(
    terms: _Terms,
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    grad_recon: Tensor | None,
    surrogate: str,
    width: float,
    n_bits: int,
    grad_x: Tensor,
    grad_W: Tensor,
    column_sum: Tensor,
) -> None:
    n, dtype, wide = x.shape[0], x.dtype, sum_dtype(x.dtype)
    if dtype in HALF:
        # torch's product reads what lies between strided rows, and 0 x NaN is NaN
        x = x.contiguous()
        grad_recon = None if grad_recon is None else grad_recon.contiguous()
    preactivation = Preactivation(x) if surrogate == "sigmoid" else None
    for start, stop in column_chunks(n, W_enc.shape[1], n_bits, x.device):
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
        op("backward")(
            g,
            terms.words,
            start,
            None if terms.shift is None else terms.shift[start:stop],
            None if terms.curvature is None else terms.curvature[start:stop],
            *terms.statistics,
            terms.window,
            factor,
            terms.keep,
            surrogate == "official",
            column_sum[start:stop],
        )
        g = g.to(dtype)
        if grad_W.numel() and grad_W.dtype == dtype:
            torch.mm(x.t(), g, out=grad_W[:, start:stop])  # no copy: 4 d K bytes of traffic less
        elif grad_W.numel():
            grad_W[:, start:stop] = product(x.t(), g)
        if grad_x.numel():
            accumulate(grad_x, g, W_enc[:, start:stop].to(dtype).t())
