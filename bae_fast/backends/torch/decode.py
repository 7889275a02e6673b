"""Decode and its weight gradient: products of packed bits with dense matrices.

    recon  = V W_dec + b_dec,    dW_dec = V^T G,    db_dec = 1^T G

V is the value of the code, ``[N, F]``: the bit itself for one-bit codes, else
sum_i b_i 2^i / (2^k - 1). It is unpacked one chunk of features at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bae_fast.ops.products import decode_by_chunks, decoder_gradient_by_chunks, sum_dtype

decode = decode_by_chunks


def decoder_backward(
    words: Tensor, grad_recon: Tensor, n_columns: int, n_bits: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    grad_W = decoder_gradient_by_chunks(words, grad_recon, n_columns, n_bits, dtype)
    return grad_W, grad_recon.sum(0, dtype=sum_dtype(grad_recon.dtype)).to(dtype)
