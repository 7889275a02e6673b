"""Backward of the encoder: from the gradients at recon and at the statistics to x, W_enc, b_enc.

For one chunk of columns, with G the gradient of recon, h the entropy's gradient and v the
curvature per column, S the signs of the covariance, N and n the counted rows and ones:

    g    = value^T(G W_dec^T) + h + v (1 - 2 B) + c 2/(N-1) (B S - 1 (n^T S)/N)   at the bits
    gpre = surrogate(g), zero in rows that do not count
    db_enc = 1^T gpre,   dW_enc = x^T gpre,   dx += gpre W_enc^T

The kernel makes gpre; the products behind it are plain ones and stay with torch. The covariance's
part is a matrix of its own, made by another kernel: one more write and read of the chunk beside a
product whose inner size is the number of features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bae_fast.kernels.bits import feature_packed
from bae_fast.kernels.bodies.covariance import made
from bae_fast.kernels.counts import sign_operands
from bae_fast.kernels.gradient import gradient, product_gradient
from bae_fast.kernels.pair_lists import PairLists, WindowSigns
from bae_fast.ops import nvidia
from bae_fast.ops.products import (
    HALF,
    Preactivation,
    accumulate,
    column_chunks,
    empty_gradients,
    product,
    product_into,
    sum_dtype,
)
from bae_fast.ops.schemas import EncoderBackward


class _Signs:
    """c 2/(N-1) (B S - 1 (n^T S)/N) for one chunk of columns at a time.

    With a window only its entries are of use: lists of ones serve them where codes are sparse.
    """

    def __init__(
        self,
        kernels: Any,
        words: Tensor,
        window: Tensor | None,
        grad_covariance: Tensor,
        signs: Tensor | None,
        stats_words: Tensor | None,
        counts: Tensor,
        n_rows: Tensor,
    ) -> None:
        self.kernels, self.words, self.signs, self.n_rows = kernels, words, signs, n_rows
        self.counts = counts.contiguous()
        n_bound = None if stats_words is None else stats_words.shape[0]
        self.digits, self.scale = sign_operands(self.counts, n_rows, grad_covariance, n_bound)
        # where it is not zero: lists serve, so no signs are multiplied; no planes are made
        self.unless: Tensor | None = None
        self.made: Tensor | None = None
        self.listed: WindowSigns | None = None
        if stats_words is None:
            return
        k = counts.shape[0]
        lists_may_serve = nvidia.lists_may_serve(stats_words.shape[0], k)
        if signs is None or lists_may_serve:
            self.features = feature_packed(stats_words, k)
            self.n_bound = stats_words.shape[0]
        if lists_may_serve:
            if window is not None:
                pairs = PairLists(stats_words, self.features, self.counts, n_rows)
                self.listed = WindowSigns(pairs, words, window, self.scale)
                self.unless = self.made = self.listed.serves
            if signs is not None:
                there = made(signs)
                self.made = there if self.made is None else there | self.made

    def __call__(self, start: int, stop: int) -> Tensor:
        signs = None if self.signs is None else self.signs[:, start:stop]
        if signs is None or self.made is not None:
            signs = self.kernels.sign_slab(
                self.features, self.counts, self.n_rows, start, stop, self.n_bound, self.made, signs
            )
        out = self.kernels.sign_product(
            self.words, signs, self.digits, self.n_rows, self.scale, self.unless
        )
        if self.listed is not None:
            self.listed.add_to(out, start)
        return out


def add_rows(rows: Tensor, out: Tensor) -> None:
    """Write the fp32 sums over rows into ``out``."""
    if out.dtype == rows.dtype:
        torch.sum(rows, 0, out=out)
    else:
        out.copy_(rows.sum(0))


def encoder_backward(kernels: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    given = EncoderBackward(*arguments)
    x, W_enc, b_enc, W_dec = given[:4]
    grad_recon, surrogate, n_bits = given.grad_recon, given.surrogate, given.n_bits
    n, k, dtype = x.shape[0], W_enc.shape[1], x.dtype
    wide = sum_dtype(dtype)
    need_x, need_W, need_b = given.needs
    words, window = given.words.contiguous(), given.window.contiguous()  # one row stride for both
    grad_x, grad_W, grad_b = empty_gradients(x, W_enc, b_enc, given.needs)
    preactivation = Preactivation(x) if surrogate == "sigmoid" else None
    if given.grad_columns is None:
        columns = torch.zeros(k, device=x.device)
    else:
        columns = given.grad_columns.float()
    curve = None if given.curvature is None else given.curvature.float()
    spread = None
    if given.grad_covariance is not None:
        statistics = (given.signs, given.stats_words, given.stats_counts, given.stats_n_rows)
        near = window if surrogate == "rectangle" else None
        spread = _Signs(kernels, words, near, given.grad_covariance, *statistics)

    for start, stop in column_chunks(n, k, n_bits, x.device):
        span, features = slice(start, stop), slice(start // n_bits, stop // n_bits)
        rest = (
            dtype,
            (start, stop),
            n_bits,
            words,
            window,
            given.row_mask,
            columns[span],
            None if curve is None else curve[span],
            None if spread is None else spread(start, stop),
            None if preactivation is None else preactivation(W_enc[:, span], b_enc[span]).to(wide),
            surrogate,
            given.width,
        )
        if grad_recon is None:
            nothing = x.new_zeros(1, features.stop - features.start, dtype=wide)
            g, sums = gradient(nothing.expand(n, -1), *rest)
        elif n_bits == 1 and dtype in HALF:
            g, sums = product_gradient(grad_recon, W_dec[features].to(dtype), *rest)
        else:
            dense = product(grad_recon, W_dec[features].to(dtype).t()).to(wide)
            g, sums = gradient(dense, *rest)

        if need_b:
            add_rows(sums, grad_b[span])
        if need_W:
            product_into(grad_W[:, span], x.t(), g)
        if need_x:
            accumulate(grad_x, g, W_enc[:, span].to(dtype).t())
    return grad_x.to(dtype), grad_W, grad_b
