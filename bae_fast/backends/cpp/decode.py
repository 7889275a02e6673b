"""Decode and its weight gradient: products of packed bits with dense matrices.

    recon  = V W_dec + b_dec,    dW_dec = V^T G,    db_dec = 1^T G

V is the value of the code, ``[N, F]``: the bit itself for one-bit codes, else
sum_i b_i 2^i / (2^k - 1). Both are one product, rows of bits times rows of numbers. In fp32 with
one-bit codes there are two ways, chosen by the measured density: adding the rows where bits are
one; and one cost at any density, by tables of the sums of five rows, or by matrix units on integers
of 32 bits, where the CPU has them: both as exact as fp32. In bf16 matrix units multiply bits as
numbers. All other dtypes and codes take torch's product of unpacked bits, one chunk of features at
a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bae_fast.backends.cpp.covariance import dense_rows
from bae_fast.backends.cpp.extension import empty_gradient, op, simd
from bae_fast.backends.cpp.units import operand, unit_digits
from bae_fast.ops.products import decode_by_chunks, decoder_gradient_by_chunks, sum_dtype

# Density below which adding rows is faster, measured at N = 512, F = 8192 (NEON: as scalar)
GATHER_BELOW = {"scalar": 0.17, "avx2": 0.2, "avx512": 0.16, "neon": 0.17, "amx": 0.08}


def _bits_product(bits: Tensor, dense: Tensor, ones: int, add: bool, out: Tensor) -> bool:
    """out (+)= bits dense; False where that needs finite numbers and met others."""
    gather = ones < GATHER_BELOW[simd()] * out.shape[0] * dense.shape[0]
    done: bool = op("bits_product")(bits, dense_rows(dense), gather, add, out)
    return done


def decode(words: Tensor, W_dec: Tensor, b_dec: Tensor, n_bits: int, dtype: torch.dtype) -> Tensor:
    words = dense_rows(words)
    recon = _decode_bits(words, W_dec, b_dec, dtype) if n_bits == 1 else None
    return decode_by_chunks(words, W_dec, b_dec, n_bits, dtype) if recon is None else recon


def _decode_bits(words: Tensor, W_dec: Tensor, b_dec: Tensor, dtype: torch.dtype) -> Tensor | None:
    """None where torch's product is the fastest, or serves numbers that are not finite."""
    recon = b_dec.float().expand(words.shape[0], -1).clone()
    if dtype == W_dec.dtype == torch.float32:
        ones = int(op("column_counts")(words, W_dec.shape[0]).sum())
        return recon if _bits_product(words, W_dec, ones, True, recon) else None
    if dtype == torch.bfloat16 and unit_digits(dtype):
        op("unit_product")(words, operand(W_dec, 1), 1, True, recon)
        return recon.to(dtype)
    return None


def decoder_backward(
    words: Tensor, grad_recon: Tensor, n_columns: int, n_bits: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    words = dense_rows(words)
    grad_b = grad_recon.sum(0, dtype=sum_dtype(grad_recon.dtype)).to(dtype)
    grad_W = _gradient_of_bits(words, grad_recon, n_columns, dtype) if n_bits == 1 else None
    if grad_W is None:
        grad_W = decoder_gradient_by_chunks(words, grad_recon, n_columns, n_bits, dtype)
    return grad_W, grad_b


def _gradient_of_bits(
    words: Tensor, grad_recon: Tensor, n_columns: int, dtype: torch.dtype
) -> Tensor | None:
    """None where torch's product is the fastest, or serves numbers that are not finite."""
    grad_W = empty_gradient(n_columns, grad_recon.shape[1], torch.float32)
    if dtype == grad_recon.dtype == torch.float32:
        ones = int(op("column_counts")(words, n_columns).sum())
        features = op("rows_to_features")(words, n_columns)
        return grad_W if _bits_product(features, grad_recon, ones, False, grad_W) else None
    if grad_recon.dtype == torch.bfloat16 and unit_digits(torch.bfloat16):
        features = op("rows_to_features")(words, n_columns)
        op("unit_product")(features, operand(grad_recon, 1), 1, False, grad_W)
        return grad_W.to(dtype)
    return None
