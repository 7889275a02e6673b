"""Decode and its weight gradient.

    recon  = V W_dec + b_dec,    dW_dec = V^T G,    db_dec = 1^T G

In half precision with one-bit codes both are the kernel's product of packed bits, but on compute
capability 9.x. There Triton hands unpacked bits to ``wgmma`` in registers and may write these again
while the product in flight reads them: seen in the machine code of Triton 3.6 and, by the
assembler of CUDA 12.9, of later ones. Bits are therefore unpacked by a kernel of their own, a chunk
of features at a time, and the product is cuBLAS's. In fp32 and for multi-bit codes torch's product
of unpacked chunks serves everywhere: it follows ``torch.backends`` on TF32, and a Triton product
without matrix units is slower than cuBLAS's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bae_fast.kernels import launch
from bae_fast.kernels.bits import feature_packed, unpack
from bae_fast.kernels.products import bits_product
from bae_fast.ops.products import (
    HALF,
    ROW_BLOCK,
    accumulate,
    decode_by_chunks,
    decoder_gradient_by_chunks,
    half_chunks,
    product,
    product_into,
    sum_dtype,
)
from bae_fast.packing import WORD_BITS, n_words

# where a product of packed bits has its left operand in registers of an asynchronous instruction
_UNPACKED = ("sm_90",)


def unpacks(device: torch.device) -> bool:
    """Whether bits are unpacked into memory for a product there."""
    return launch.family(device) in _UNPACKED


def _columns(words: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Bits of columns start .. stop as numbers, start on a word."""
    return unpack(words[:, start // WORD_BITS : n_words(stop)], stop - start, dtype)


def _decode_unpacked(words: Tensor, W_dec: Tensor, b_dec: Tensor, dtype: torch.dtype) -> Tensor:
    """B W_dec + b_dec by chunks of features, summed over them in fp32 and rounded once."""
    n, (k, d) = words.shape[0], W_dec.shape
    out = torch.empty(n, d, dtype=dtype, device=words.device)
    for top in range(0, n, ROW_BLOCK):
        rows = words[top : top + ROW_BLOCK]
        first, *others = half_chunks(len(rows), k, words.device)
        recon = product(_columns(rows, *first, dtype), W_dec[slice(*first)].to(dtype)).float()
        for start, stop in others:
            accumulate(recon, _columns(rows, start, stop, dtype), W_dec[start:stop].to(dtype))
        torch.add(recon, b_dec, out=out[top : top + ROW_BLOCK])
    return out


def _gradient_unpacked(
    words: Tensor, grad_recon: Tensor, n_columns: int, dtype: torch.dtype
) -> Tensor:
    """B^T grad_recon by chunks of features, whose rows of the gradient are disjoint."""
    (n, d), half = grad_recon.shape, grad_recon.dtype
    grad_W = torch.empty(n_columns, d, dtype=dtype, device=words.device)
    for start, stop in half_chunks(n, n_columns, words.device):
        bits = _columns(words, start, stop, half)
        product_into(grad_W[start:stop], bits.t(), grad_recon)
    return grad_W


def decode(words: Tensor, W_dec: Tensor, b_dec: Tensor, n_bits: int, dtype: torch.dtype) -> Tensor:
    if n_bits > 1 or dtype not in HALF:
        return decode_by_chunks(words, W_dec, b_dec, n_bits, dtype)
    if unpacks(words.device):
        return _decode_unpacked(words, W_dec, b_dec, dtype)
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
    if unpacks(words.device):
        return _gradient_unpacked(words, grad_recon, n_columns, dtype), grad_b
    return bits_product(feature_packed(words, n_columns), grad_recon, None, dtype), grad_b
