"""Backward of the encoder where only the entries inside the rectangle's window carry gradient.

    g_nj = G_n . W_dec_j + h_j + v_j (1 - 2 b_nj) + c 2/(N-1) ((B S)_nj - (n^T S)_j / N)
    db_enc_j = sum_n g_nj,   dW_enc_j = sum_n x_n g_nj,   dx_n = sum_j g_nj W_enc_j

over listed entries (n, j), in C++ (``csrc/kernels_sparse.h``), in fp32 or float64. Its cost goes
with their number; a dense product's does not, and it does more a second: the density decides, and
at a smaller one where the dense products would be of native bfloat16.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bae_fast.backends.cpp import extension
from bae_fast.backends.cpp.covariance import dense_rows
from bae_fast.backends.cpp.extension import op
from bae_fast.devices import cpu_has_matrix_units
from bae_fast.ops.products import product_dtype

# Density of the window below which its entries are listed. Both ways are as fast at 0.17, 0.26,
# 0.38 and 0.23 (scalar, avx2, avx512, amx; N=512, d=2048, fp32); less, for smaller caches. Not
# measured on neon.
SPARSE_BELOW = {"scalar": 0.12, "avx2": 0.2, "avx512": 0.3, "neon": 0.1, "amx": 0.2}
# The same against bfloat16 products of matrix units, torch's below level amx, which are up to five
# times as fast as in fp32. At density 0.035 listing took 0.55 to 0.71 of their time (five shapes).
SPARSE_BELOW_UNITS = {"scalar": 0.02, "avx2": 0.04, "avx512": 0.06, "neon": 0.02, "amx": 0.045}
# The same against bfloat16 products of vectors, as of AVX512-BF16: the whole step took as long at
# 0.23 (avx512, three shapes) and 0.24 (avx2, two shapes). Not measured on neon.
SPARSE_BELOW_VECTORS = {"scalar": 0.02, "avx2": 0.2, "avx512": 0.2, "neon": 0.02}


def _sparse_below(dtype: torch.dtype, device: torch.device) -> float:
    table = SPARSE_BELOW
    if product_dtype(dtype, device) == torch.bfloat16:
        table = SPARSE_BELOW_UNITS if cpu_has_matrix_units() else SPARSE_BELOW_VECTORS
    return table[extension.simd()]


def listed_window(
    x: Tensor, W_enc: Tensor, window: Tensor, keep: Tensor | None, n_bits: int
) -> Tensor | None:
    """The window's entries in rows that count, where listing them is the faster way; else None.

    int32: where each row begins ``[N + 1]``, then the columns, rising in each row.
    """
    if n_bits > 1:
        return None
    most = math.ceil(_sparse_below(x.dtype, x.device) * x.shape[0] * W_enc.shape[1]) - 1
    entries: Tensor = op("list_window")(window, keep, most)
    return entries if entries.numel() else None


def sparse_backward(
    entries: Tensor,
    words: Tensor,
    grad_recon: Tensor | None,
    W_dec: Tensor,
    shift: Tensor | None,
    curvature: Tensor | None,
    statistics: tuple[Any, ...],
    x: Tensor,
    W_enc: Tensor,
    grad_x: Tensor,
    grad_W: Tensor,
    column_sum: Tensor,
) -> None:
    """Fill grad_W and column_sum (float64, db_enc) and add to grad_x; empty is not asked for.

    Of one dtype: all numbers but those of an input that is not read (W_enc without grad_x).
    ``entries`` as from :func:`listed_window`, ``statistics`` as in ``encoder_backward._Terms``.
    """
    op("sparse_backward")(
        entries,
        words,
        None if grad_recon is None else dense_rows(grad_recon),
        dense_rows(W_dec),
        shift,
        curvature,
        *statistics,
        dense_rows(x),
        dense_rows(W_enc) if grad_x.numel() else W_enc,
        grad_x,
        grad_W,
        column_sum,
    )
