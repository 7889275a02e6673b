"""Decode and its weight gradient: products of packed bits with dense matrices.

    recon  = V W_dec + b_dec,    dW_dec = V^T G,    db_dec = 1^T G

V is the value of the code, ``[N, F]``: the bit itself for one-bit codes, else
sum_i b_i 2^i / (2^k - 1). Both are one product, rows of bits times rows of numbers. In fp32 with
one-bit codes there are three ways, chosen by the measured density: adding the rows where bits are
one; matrix units, where the CPU has them, on a float's three bf16 digits, which is as exact as
fp32 and costs the same at any density; and torch's product of unpacked bits, one chunk of
features at a time, which also serves all other dtypes and codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bae_fast.backends.cpp.covariance import dense_rows
from bae_fast.backends.cpp.extension import empty_gradient, op
from bae_fast.backends.cpp.units import operand, unit_digits
from bae_fast.ops.products import decode_by_chunks, decoder_gradient_by_chunks, sum_dtype

# Density below which adding rows is faster: than the matrix units, than torch's product
GATHER_BELOW = {True: 0.05, False: 0.2}


def _gathers(words: Tensor, n_columns: int) -> bool | None:
    """Whether to add rows; None where torch's product is the fastest."""
    units = op("has_bits_product")()
    ones = int(op("column_counts")(words, n_columns).sum())
    gather = ones < GATHER_BELOW[units] * words.shape[0] * n_columns
    return gather if gather or units else None


def decode(words: Tensor, W_dec: Tensor, b_dec: Tensor, n_bits: int, dtype: torch.dtype) -> Tensor:
    words = dense_rows(words)
    recon = _decode_bits(words, W_dec, b_dec, dtype) if n_bits == 1 else None
    return decode_by_chunks(words, W_dec, b_dec, n_bits, dtype) if recon is None else recon


def _decode_bits(words: Tensor, W_dec: Tensor, b_dec: Tensor, dtype: torch.dtype) -> Tensor | None:
    """None where torch's product is the fastest, or serves numbers that are not finite."""
    recon = b_dec.float().expand(words.shape[0], -1).clone()
    if dtype == W_dec.dtype == torch.float32:
        gather = _gathers(words, W_dec.shape[0])
        if gather is None or not op("bits_product")(words, dense_rows(W_dec), gather, True, recon):
            return None
        return recon
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
    """None as above."""
    grad_W = empty_gradient(n_columns, grad_recon.shape[1], torch.float32)
    if dtype == grad_recon.dtype == torch.float32:
        gather = _gathers(words, n_columns)
        if gather is None:
            return None
        features = op("rows_to_features")(words, n_columns)
        product = op("bits_product")
        return grad_W if product(features, dense_rows(grad_recon), gather, False, grad_W) else None
    if grad_recon.dtype == torch.bfloat16 and unit_digits(torch.bfloat16):
        features = op("rows_to_features")(words, n_columns)
        op("unit_product")(features, operand(grad_recon, 1), 1, False, grad_W)
        return grad_W.to(dtype)
    return None
