"""Bits times dense half-precision numbers: decode and the gradient of W_dec.

    recon  = B W_dec + b_dec        bits row-packed,       inner index: features
    dW_dec = B^T G                  bits feature-packed,   inner index: rows

One kernel for both: rows of packed bits, contiguous along the inner index, times rows of numbers.
Bits become the operand in registers (:func:`bae_fast.kernels.bits.unpack_half`) and the dense
tile's rows are read in the order that this gives. Sums are fp32; the result is rounded once.
Not started on compute capability 9.x: see :mod:`bae_fast.kernels.bodies.decode`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bae_fast.kernels import launch
from bae_fast.kernels.bits import grouped, half_order, operand, unpack_half, wide
from bae_fast.packing import n_words


@triton.jit(do_not_specialize=["n", "n_inner", "stride_bits", "has_bias"])
def bits_product_kernel(
    bits_ptr,
    dense_ptr,
    bias_ptr,
    out_ptr,
    n,
    n_inner,
    n_out,
    stride_bits,
    stride_dense,
    stride_out,
    has_bias,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    WORDS: tl.constexpr = BLOCK_K // 32
    m, c = grouped(tl.program_id(0), tl.cdiv(n, BLOCK_M), tl.cdiv(n_out, BLOCK_N), 8)
    rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = c * BLOCK_N + tl.arange(0, BLOCK_N)
    at = tl.arange(0, WORDS)
    inner = half_order(tl.arange(0, BLOCK_K))
    bits_at = bits_ptr + tl.minimum(rows, n - 1).to(tl.int64)[:, None] * stride_bits + at[None, :]
    dense_at = dense_ptr + inner.to(tl.int64)[:, None] * stride_dense + columns[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, n_inner, BLOCK_K):
        words = tl.load(bits_at, mask=(start + at * 32 < n_inner)[None, :], other=0)
        dense = tl.load(
            dense_at,
            mask=(inner < n_inner - start)[:, None] & (columns < n_out)[None, :],
            other=0,
        )
        bits = unpack_half(words, BLOCK_M, WORDS, dense_ptr.dtype.element_ty)
        total = tl.dot(operand(bits), operand(dense), total)
        bits_at += WORDS
        dense_at += wide(stride_dense) * BLOCK_K
    if has_bias:
        total += tl.load(bias_ptr + columns, mask=columns < n_out, other=0).to(tl.float32)[None, :]
    tl.store(
        out_ptr + rows.to(tl.int64)[:, None] * stride_out + columns[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=(rows < n)[:, None] & (columns < n_out)[None, :],
    )


@launch.tuned("bits_product")
def bits_product(
    config: launch.Config,
    bits: Tensor,
    dense: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Rows of bits, int32 ``[M, >= ceil(K/32)]``, times ``dense [K, D]``, plus ``bias [D]``.

    Args:
        bits: zero past the first K; any row stride.
        dense: bf16 or fp16.
        dtype: the dtype of the result, ``[M, D]``.
        out: where the result is written, any row stride; new memory where it is None.
    """
    bits, dense = launch.dense_rows(bits), launch.dense_rows(dense)
    m, (k, d) = bits.shape[0], dense.shape
    if bits.shape[1] < n_words(k):
        raise ValueError(f"bits must have {n_words(k)} words a row for {k}; got {bits.shape[1]}")
    if out is None:
        out = torch.empty(m, d, dtype=dtype, device=bits.device)
    launch.start(
        bits_product_kernel,
        (launch.cdiv(m, config.m) * launch.cdiv(d, config.n),),
        bits,
        dense,
        dense if bias is None else bias.contiguous(),
        out,
        m,
        k,
        d,
        bits.stride(0),
        dense.stride(0),
        out.stride(0),
        int(bias is not None),
        BLOCK_M=config.m,
        BLOCK_N=config.n,
        BLOCK_K=config.k,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out
