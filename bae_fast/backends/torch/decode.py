"""Decode and its weight gradient: products of packed bits with dense matrices.

    recon  = V W_dec + b_dec,    dW_dec = V^T G,    db_dec = 1^T G

V is the value of the code, ``[N, F]``: the bit itself for one-bit codes, else
sum_i b_i 2^i / (2^k - 1). It is unpacked one chunk of features at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bae_fast.ops.products import (
    accumulate,
    column_chunks,
    product,
    sum_dtype,
    unpack_values,
)

ROW_BLOCK = 8192


def decode(words: Tensor, W_dec: Tensor, b_dec: Tensor, n_bits: int, dtype: torch.dtype) -> Tensor:
    out = torch.empty(words.shape[0], W_dec.shape[1], dtype=dtype, device=words.device)
    for top in range(0, words.shape[0], ROW_BLOCK):
        rows = words[top : top + ROW_BLOCK]
        recon = b_dec.to(sum_dtype(dtype)).expand(len(rows), -1).clone()
        for start, stop in column_chunks(len(rows), W_dec.shape[0] * n_bits, n_bits, words.device):
            values = unpack_values(rows, start, stop, n_bits, dtype)
            accumulate(recon, values, W_dec[start // n_bits : stop // n_bits].to(dtype))
        out[top : top + ROW_BLOCK] = recon
    return out


def decoder_backward(
    words: Tensor, grad_recon: Tensor, n_columns: int, n_bits: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    n, d_out = grad_recon.shape
    grad_W = torch.empty(n_columns // n_bits, d_out, dtype=dtype, device=words.device)
    for start, stop in column_chunks(n, n_columns, n_bits, words.device):
        values = unpack_values(words, start, stop, n_bits, grad_recon.dtype)
        grad_W[start // n_bits : stop // n_bits] = product(values.t(), grad_recon)
    return grad_W, grad_recon.sum(0, dtype=sum_dtype(grad_recon.dtype)).to(dtype)
