"""Decode and its weight gradient: products of packed bits with dense matrices.

    recon  = V W_dec + b_dec,    dW_dec = V^T G,    db_dec = 1^T G

V is the value of the code, ``[N, F]``: the bit itself for one-bit codes, else
sum_i b_i 2^i / (2^k - 1). Both are one product, rows of bits times rows of numbers. In fp32 with
one-bit codes there are two ways, chosen by the measured density: adding the rows where bits are
one; and one cost at any density, by tables of the sums of five rows, or by matrix units on a
float's three bf16 digits, where the CPU has them: both as exact as fp32. All other dtypes and
codes take torch's product of unpacked bits, one chunk of features at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bae_fast.backends.cpp.covariance import dense_rows
from bae_fast.backends.cpp.extension import op, simd
from bae_fast.ops.products import decode_by_chunks, decoder_gradient_by_chunks, sum_dtype

# Density below which adding rows is faster, measured at N = 512, F = 8192 (NEON: as scalar)
GATHER_BELOW = {"scalar": 0.17, "avx2": 0.18, "avx512": 0.16, "neon": 0.17, "amx": 0.05}


def _gathers(words: Tensor, n_columns: int) -> bool:
    ones = int(op("column_counts")(words, n_columns).sum())
    return ones < GATHER_BELOW[simd()] * words.shape[0] * n_columns


def decode(words: Tensor, W_dec: Tensor, b_dec: Tensor, n_bits: int, dtype: torch.dtype) -> Tensor:
    words = dense_rows(words)
    if n_bits == 1 and dtype == W_dec.dtype == torch.float32:
        recon = b_dec.to(dtype).expand(words.shape[0], -1).clone()
        gather = _gathers(words, W_dec.shape[0])
        op("bits_product")(words, dense_rows(W_dec), gather, True, recon)
        return recon
    return decode_by_chunks(words, W_dec, b_dec, n_bits, dtype)


def decoder_backward(
    words: Tensor, grad_recon: Tensor, n_columns: int, n_bits: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    words = dense_rows(words)
    grad_b = grad_recon.sum(0, dtype=sum_dtype(grad_recon.dtype)).to(dtype)
    if n_bits == 1 and dtype == grad_recon.dtype == torch.float32:
        grad_W = torch.empty(n_columns, grad_recon.shape[1])
        features = op("rows_to_features")(words, n_columns)
        gather = _gathers(words, n_columns)
        op("bits_product")(features, dense_rows(grad_recon), gather, False, grad_W)
        return grad_W, grad_b
    return decoder_gradient_by_chunks(words, grad_recon, n_columns, n_bits, dtype), grad_b
