"""Decode and its weight gradient.

    recon  = V W_dec + b_dec,    dW_dec = V^T G,    db_dec = 1^T G

In half precision with one-bit codes both are the kernel's product of packed bits. In fp32 torch's
product of unpacked chunks serves (it follows ``torch.backends`` on TF32, and a Triton product
without matrix units is slower than cuBLAS's), as it does for multi-bit codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bae_fast.kernels.bits import feature_packed
from bae_fast.kernels.products import bits_product
from bae_fast.ops.products import (
    HALF,
    decode_by_chunks,
    decoder_gradient_by_chunks,
    half_chunks,
    sum_dtype,
)


def decode(words: Tensor, W_dec: Tensor, b_dec: Tensor, n_bits: int, dtype: torch.dtype) -> Tensor:
    if n_bits > 1 or dtype not in HALF:
        return decode_by_chunks(words, W_dec, b_dec, n_bits, dtype)
    if W_dec.dtype == dtype:
        return bits_product(words, W_dec, b_dec, dtype)
    # under autocast a half-precision copy of W_dec, a chunk of its columns at a time: whole, it
    # would be the largest tensor of the step
    f, d = W_dec.shape
    out = torch.empty(words.shape[0], d, dtype=dtype, device=words.device)
    for start, stop in half_chunks(f, d, words.device):
        span = slice(start, stop)
        bits_product(words, W_dec[:, span].to(dtype), b_dec[span], dtype, out[:, span])
    return out


def decoder_backward(
    words: Tensor, grad_recon: Tensor, n_columns: int, n_bits: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    grad_b = grad_recon.sum(0, dtype=sum_dtype(grad_recon.dtype)).to(dtype)
    if n_bits > 1 or grad_recon.dtype not in HALF:
        return decoder_gradient_by_chunks(words, grad_recon, n_columns, n_bits, dtype), grad_b
    return bits_product(feature_packed(words, n_columns), grad_recon, None, dtype), grad_b
