"""Decode and its weight gradient: products of packed bits with dense matrices.

    recon  = V W_dec + b_dec,    dW_dec = V^T G,    db_dec = 1^T G

V is the value of the code, ``[N, F]``: the bit itself for one-bit codes, else
sum_i b_i 2^i / (2^k - 1). Both are one product, rows of bits times rows of numbers. With one-bit
codes there are three ways, chosen by the measured density: adding the rows where bits are one, read
where they lie, or from blocks of them that are copied close together; and one cost at any density,
by tables of the sums of five rows, or by matrix units on integers of 32 bits, where the CPU has
them. All are as exact as fp32. In half precision they are the same, of widened numbers; matrix
units multiply bits as bf16 numbers where these are dense. float64 and codes of several bits take
torch's product of unpacked bits, one chunk of features at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bae_fast.backends.cpp.covariance import dense_rows
from bae_fast.backends.cpp.extension import empty_gradient, op, simd
from bae_fast.backends.cpp.units import has_matrix_units, operand
from bae_fast.ops.products import (
    decode_by_chunks,
    decoder_gradient_by_chunks,
    half_chunks,
    sum_dtype,
)
from bae_fast.packing import WORD_BITS, n_words

# Density below which adding rows is faster, measured at N = 512, F = 8192 (NEON: as scalar)
GATHER_BELOW = {"scalar": 0.17, "avx2": 0.2, "avx512": 0.16, "neon": 0.17, "amx": 0.08}
# The same against bf16 products of matrix units: adding rows took 0.69 to 1.21 of their time at
# density 0.03 (four shapes, bench/results/operators.json); less, as it does not shrink to nothing.
GATHER_BELOW_UNITS = 0.02

# Ones in a row and 512 of depth up to which the rows are read where they lie: few of a copied block
# would be used, and sums would be fetched again for every block. Measured at five shapes and three
# instruction sets: up to 24 and more of numbers that the last cache holds, up to 1.5 and more of
# others (uniform bits; the common features of a trained code are in a cache more often).
IN_PLACE_UP_TO, IN_PLACE_UP_TO_OUTSIDE = 24, 2
BLOCK_DEPTH = 512
LAST_CACHE = 2**24  # bytes


def _in_place(ones: int, rows: int, dense: Tensor) -> bool:
    if dense.dtype == torch.float16:  # the kernel widens bf16 numbers alone
        return False
    outside = dense.numel() * dense.element_size() > LAST_CACHE
    most = IN_PLACE_UP_TO_OUTSIDE if outside else IN_PLACE_UP_TO
    return ones * BLOCK_DEPTH <= most * rows * dense.shape[0]


def _adds_rows(ones: int, rows: int, depth: int, units: bool) -> bool:
    below = GATHER_BELOW_UNITS if units else GATHER_BELOW[simd()]
    return ones < below * rows * depth


def decode(words: Tensor, W_dec: Tensor, b_dec: Tensor, n_bits: int, dtype: torch.dtype) -> Tensor:
    words = dense_rows(words)
    recon = _decode_bits(words, W_dec, b_dec, dtype) if n_bits == 1 else None
    return decode_by_chunks(words, W_dec, b_dec, n_bits, dtype) if recon is None else recon


def _decode_bits(words: Tensor, W_dec: Tensor, b_dec: Tensor, dtype: torch.dtype) -> Tensor | None:
    """None where torch's product serves: in float64, and numbers that are not finite."""
    if torch.float64 in (dtype, W_dec.dtype):
        return None
    n, f = words.shape[0], W_dec.shape[0]
    bias = b_dec.float().contiguous()
    units = dtype == torch.bfloat16 and has_matrix_units()
    ones = op("count_ones")(words)
    gather = _adds_rows(ones, n, f, units)
    if gather and _in_place(ones, n, W_dec):
        rounds = dtype == torch.bfloat16  # else it is float32, or rounded here
        recon = torch.empty(n, len(bias), dtype=dtype if rounds else torch.float32)
        op("gather_rows")(words, dense_rows(W_dec), bias, recon)
        return recon.to(dtype)
    recon = bias.expand(n, -1).clone()
    if units and not gather:
        op("unit_product")(words, operand(W_dec, 1), 1, True, recon)
        return recon.to(dtype)
    # numbers of a half-precision parameter are widened a chunk at a time
    chunks = (
        [(0, f)] if W_dec.dtype == torch.float32 else half_chunks(W_dec.shape[1], f, W_dec.device)
    )
    for start, stop in chunks:
        bits = words[:, start // WORD_BITS : n_words(stop)]
        dense = dense_rows(W_dec[start:stop].float())
        if not op("bits_product")(bits, dense, gather, True, recon):
            return None
    return recon.to(dtype)


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
    """None where torch's product serves: in float64, and numbers that are not finite."""
    if torch.float64 in (dtype, grad_recon.dtype):
        return None
    n, d_out = grad_recon.shape
    if n == 0:  # of no depth a kernel writes nothing
        return torch.zeros(n_columns, d_out, dtype=dtype)
    units = grad_recon.dtype == torch.bfloat16 and has_matrix_units()
    ones = op("count_ones")(words)
    gather = _adds_rows(ones, n, n_columns, units)
    features = op("rows_to_features")(words, n_columns)
    grad_W = empty_gradient(n_columns, d_out, torch.float32)
    if units and not gather:
        op("unit_product")(features, operand(grad_recon, 1), 1, False, grad_W)
    elif gather and _in_place(ones, n_columns, grad_recon):
        op("gather_rows")(features, dense_rows(grad_recon), None, grad_W)
    elif not op("bits_product")(features, dense_rows(grad_recon.float()), gather, False, grad_W):
        return None
    return grad_W.to(dtype)
