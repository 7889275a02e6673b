"""Backward of the encoder: from the gradients at recon and at the statistics to x, W_enc, b_enc.

For one chunk of columns, with G the gradient of recon, h the entropy's gradient and v the
curvature per column, S the signs of the covariance, N and n the counted rows and ones:

    g    = value^T(G W_dec^T) + h + v (1 - 2 B) + c 2/(N-1) (B S - 1 (n^T S)/N)   at the bits
    gpre = surrogate(g), zero in rows that do not count
    db_enc = 1^T gpre,   dW_enc = x^T gpre,   dx += gpre W_enc^T

N (B S) - n^T S is an integer and is formed in float64 before it is scaled. The chunks' parts of
dW_enc and db_enc are disjoint; only dx accumulates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bae_fast.backends.torch.covariance import TILE, SignProduct
from bae_fast.ops.products import (
    Preactivation,
    accumulate,
    column_chunks,
    empty_gradients,
    product,
    product_dtype,
    sum_dtype,
)
from bae_fast.ops.schemas import EncoderBackward
from bae_fast.packing import WORD_BITS, bit_weights, n_words, unpack_rows


def _add_covariance(
    g: Tensor, start: int, stop: int, sign_product: SignProduct, scale: Tensor
) -> None:
    """g += scale (N (B S) - n^T S) for columns start .. stop, tile by tile."""
    while start < stop:
        end = min(start + TILE, stop)
        g[:, : end - start] += (sign_product((start, end)) * scale).to(g.dtype)
        g, start = g[:, end - start :], end


def covariance_columns(
    grad_covariance: Tensor, at_hand: Tensor, words: Tensor, counts: Tensor, n_rows: Tensor
) -> Callable[[Tensor, int], None]:
    """See :attr:`bae_fast.ops.registry.Extras.covariance_columns`."""
    signs = SignProduct(at_hand, None, words, counts, n_rows)
    scale = _covariance_scale(grad_covariance, n_rows)

    def add(g: Tensor, first: int) -> None:
        _add_covariance(g, first, first + g.shape[1], signs, scale)

    return add


def _covariance_scale(grad_covariance: Tensor, n_rows: Tensor) -> Tensor:
    """What N (B S) - n^T S is multiplied with."""
    total = n_rows.double()
    return grad_covariance.double() * 2 / (total * (total - 1))


def _through_step(
    g: Tensor, pre: Tensor | None, window: Tensor | None, surrogate: str, width: float
) -> Tensor:
    """Surrogate gradient at pre; see :mod:`bae_fast.surrogates`."""
    if surrogate == "official":
        return g * (1 - g)
    if surrogate == "sigmoid":
        assert pre is not None
        s = torch.sigmoid(pre.to(g.dtype) / width)
        return g * (4 * s * (1 - s))
    if surrogate == "rectangle":
        assert window is not None
        # not g * window: a non-finite gradient outside the window must not turn into NaN
        return g.masked_fill_(~window, 0)
    return g


def encoder_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    given = EncoderBackward(*arguments)
    x, W_enc, b_enc, W_dec, words = given[:5]
    grad_recon, surrogate, n_bits = given.grad_recon, given.surrogate, given.n_bits
    n, k = x.shape[0], W_enc.shape[1]
    wide = sum_dtype(x.dtype)
    need_x, need_W, need_b = given.needs
    grad_x, grad_W, grad_b = empty_gradients(x, W_enc, b_enc, given.needs)
    dtype = product_dtype(x.dtype, x.device)
    x = x.to(dtype)
    grad_recon = None if grad_recon is None else grad_recon.to(dtype)
    preactivation = Preactivation(x) if surrogate == "sigmoid" else None
    sign_product = scale = None
    if given.grad_covariance is not None:
        sign_product = SignProduct(
            words, given.signs, given.stats_words, given.stats_counts, given.stats_n_rows
        )
        scale = _covariance_scale(given.grad_covariance, given.stats_n_rows)

    for start, stop in column_chunks(n, k, n_bits, x.device):
        features = slice(start // n_bits, stop // n_bits)
        if grad_recon is None:
            g = torch.zeros(n, stop - start, dtype=wide, device=x.device)
        else:
            g = product(grad_recon, W_dec[features].to(dtype).t()).to(wide)
            if n_bits > 1:
                g = (g[:, :, None] * bit_weights(n_bits, wide, x.device)).flatten(1)
        if given.grad_columns is not None:
            g += given.grad_columns[start:stop].to(wide)
        if given.curvature is not None:
            v = given.curvature[start:stop].to(wide)
            bits = unpack_rows(words[:, start // WORD_BITS : n_words(stop)], stop - start, wide)
            g.addcmul_(bits, v, value=-2).add_(v)
        if sign_product is not None and scale is not None:
            _add_covariance(g, start, stop, sign_product, scale)

        pre = (
            None
            if preactivation is None
            else preactivation(W_enc[:, start:stop], b_enc[start:stop])
        )
        inside = None
        if surrogate == "rectangle":
            inside = unpack_rows(given.window[:, start // WORD_BITS : n_words(stop)], stop - start)
        g = _through_step(g, pre, inside, surrogate, given.width)
        if given.row_mask is not None:
            g.masked_fill_(~given.row_mask[:, None], 0)

        if need_b:
            grad_b[start:stop] = g.sum(0)
        g = g.to(dtype)
        if need_W:
            grad_W[:, start:stop] = product(x.t(), g)
        if need_x:
            accumulate(grad_x, g, W_enc[:, start:stop].to(dtype).t())
    return grad_x.to(given.x.dtype), grad_W, grad_b
