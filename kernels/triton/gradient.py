"""Gradient at the bits, and through the step to the gradient at pre, for one chunk of columns.

    g    = value^T(G W_dec^T) + h + v (1 - 2 B) + covariance            at the bits, fp32
    gpre = surrogate(g), zero in rows that do not count                 in x's dtype

    identity    g                      sigmoid      4 g s (1 - s), s = sigmoid(pre / T)
    official    g (1 - g)              rectangle    g where the window's bit is one

h and v are one number a column (entropy, curvature), covariance is the chunk's own matrix. In half
precision with one-bit codes ``PRODUCT`` makes G W_dec^T in the kernel: cuBLAS would write g in fp32
and this pass read it again, 8 bytes an element and over a third of the product's time at d = 2048
(arithmetic on an H200). Otherwise g comes from torch's product and the kernel is one pass over it.
Sums of columns (the gradient of b_enc) are made tile by tile in fp32 and added by torch: no float
atomics. ``sigmoid`` reads pre, which cuBLAS makes again: a second accumulator would halve the tile.
Terms and surrogates are constants of the compiled kernel: chosen at run time they are six times the
instructions behind the product, and ``official`` and ``sigmoid`` take registers of every step.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bae_fast.kernels import launch
from bae_fast.kernels.bits import column_part, grouped, operand
from bae_fast.kernels.configs import NARROW_PARTS
from bae_fast.surrogates import SURROGATES

# bits of TERMS
CURVATURE, COVARIANCE = 1, 2
# numbers of the surrogates in the kernel
NUMBERS = {name: number for number, name in enumerate(SURROGATES)}
_OFFICIAL = tl.constexpr(NUMBERS["official"])
_SIGMOID = tl.constexpr(NUMBERS["sigmoid"])
_RECTANGLE = tl.constexpr(NUMBERS["rectangle"])


@triton.jit
def _bit(words_ptr, stride, rows, columns, mask):
    """Bit ``columns`` of row-packed words, int32 0 or 1; zero outside the mask."""
    at = words_ptr + rows.to(tl.int64)[:, None] * stride + (columns // 32)[None, :]
    return (tl.load(at, mask=mask, other=0) >> (columns % 32)[None, :]) & 1


@triton.jit(do_not_specialize=["n", "first", "n_masked", "n_bits", "stride_words"])
def gradient_kernel(
    G_ptr,
    W_ptr,
    words_ptr,
    window_ptr,
    keep_ptr,
    columns_ptr,
    curvature_ptr,
    covariance_ptr,
    pre_ptr,
    out_ptr,
    sums_ptr,
    n,
    k,
    d,
    first,
    n_masked,
    n_bits,
    width,
    stride_G,
    stride_W,
    stride_words,
    stride_out,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRODUCT: tl.constexpr,
    PARTS: tl.constexpr,
    TERMS: tl.constexpr,
    SURROGATE: tl.constexpr,
):
    m, c = grouped(tl.program_id(0), tl.cdiv(n, BLOCK_M), tl.cdiv(k, BLOCK_N), 8)
    rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
    if PRODUCT:
        columns = c * BLOCK_N + tl.arange(0, BLOCK_N)
        inner = tl.arange(0, BLOCK_K)
        # past the end the last row or column is read: no such mask in the loop, nothing is kept
        G_at = G_ptr + tl.minimum(rows, n - 1).to(tl.int64)[:, None] * stride_G + inner[None, :]
        W_at = W_ptr + tl.minimum(columns, k - 1).to(tl.int64)[None, :] * stride_W + inner[:, None]
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, d, BLOCK_K):
            left = inner < d - start
            G = tl.load(G_at, mask=left[None, :], other=0)
            W = tl.load(W_at, mask=left[:, None], other=0)
            total = tl.dot(operand(G), operand(W), total)
            G_at += BLOCK_K
            W_at += BLOCK_K
    keep = (rows < n) & (tl.load(keep_ptr + rows, mask=rows < n_masked, other=1) != 0)

    for part in tl.static_range(PARTS):
        columns = c * BLOCK_N + part * (BLOCK_N // PARTS) + tl.arange(0, BLOCK_N // PARTS)
        inside = (rows < n)[:, None] & (columns < k)[None, :]
        if PRODUCT:
            g = column_part(total, BLOCK_M, BLOCK_N, PARTS, part)
        else:
            # bit i of a feature weighs 2^i / (2^k - 1): exactly 1 for one-bit codes
            weight = (1 << columns % n_bits).to(tl.float32) / ((1 << n_bits) - 1).to(tl.float32)
            at = rows.to(tl.int64)[:, None] * stride_G + (columns // n_bits)[None, :]
            g = tl.load(G_ptr + at, mask=inside, other=0).to(tl.float32) * weight[None, :]

        g += tl.load(columns_ptr + columns, mask=columns < k, other=0)[None, :]
        if TERMS & 1:
            bits = _bit(words_ptr, stride_words, rows, first + columns, inside)
            v = tl.load(curvature_ptr + columns, mask=columns < k, other=0)
            g += v[None, :] * (1 - 2 * bits).to(tl.float32)
        chunk = rows.to(tl.int64)[:, None] * stride_out + columns[None, :]
        if TERMS & 2:
            g += tl.load(covariance_ptr + chunk, mask=inside, other=0)
        if SURROGATE == _OFFICIAL:
            g = g * (1 - g)
        if SURROGATE == _SIGMOID:
            s = tl.sigmoid(tl.load(pre_ptr + chunk, mask=inside, other=0) / width)
            g = g * (4 * s * (1 - s))
        if SURROGATE == _RECTANGLE:
            near = _bit(window_ptr, stride_words, rows, first + columns, inside)
            g = tl.where(near != 0, g, 0)  # not a product: 0 x inf would be NaN
        g = tl.where(keep[:, None], g, 0)
        tl.store(out_ptr + chunk, g.to(out_ptr.dtype.element_ty), mask=inside)
        to = sums_ptr + m.to(tl.int64) * k + columns
        tl.store(to, tl.sum(g, axis=0), mask=columns < k)


@launch.tuned("gradient", columns=2)
def product_gradient(config: launch.Config, G: Tensor, W: Tensor, *args: Any) -> Any:
    """:func:`gradient` with g = G W^T made in the kernel: G ``[N, d]``, W ``[chunk, d]``, half."""
    return _start(config, launch.dense_rows(G), launch.dense_rows(W), True, *args)


def gradient(g: Tensor, dtype: torch.dtype, *args: Any) -> Any:
    """Through the step: gradient at pre ``[N, chunk]`` in ``dtype``, and sums of its columns.

    The sums are fp32 ``[tiles of rows, chunk]``, to be added over the tiles.

    Args:
        g: G W_dec^T, ``[N, chunk / n_bits]``, floating.
        args: the arguments of :func:`_start` from ``dtype`` on.
    """
    n, features = g.shape
    config = launch.configuration("surrogate", g.device, torch.float32, (n, features))
    return _start(config, launch.dense_rows(g), g, False, dtype, *args)


def _start(
    config: launch.Config,
    G: Tensor,
    W: Tensor,
    product: bool,
    dtype: torch.dtype,
    span: tuple[int, int],
    n_bits: int,
    words: Tensor,
    window: Tensor,
    row_mask: Tensor | None,
    columns: Tensor,
    curvature: Tensor | None,
    covariance: Tensor | None,
    pre: Tensor | None,
    surrogate: str,
    width: float,
) -> tuple[Tensor, Tensor]:
    """Args after ``product``:

    dtype: the dtype of the result.
    span: the chunk's columns, start and stop.
    words, window: row-packed, of all columns.
    columns, curvature: fp32 ``[chunk]``.
    covariance, pre: fp32 ``[N, chunk]``, contiguous.
    """
    n, k = G.shape[0], span[1] - span[0]
    out = torch.empty(n, k, dtype=dtype, device=G.device)
    n_tiles = launch.cdiv(n, config.m)
    sums = torch.empty(n_tiles, k, dtype=torch.float32, device=G.device)
    terms = (curvature is not None) * CURVATURE
    terms |= (covariance is not None) * COVARIANCE
    part = 32  # columns; with 64 a tile of 256 spills (Triton 3.6, sm_90)
    if config.n > 128 and terms == CURVATURE | COVARIANCE and pre is not None:
        part = NARROW_PARTS.get(launch.family(G.device), part)
    launch.start(
        gradient_kernel,
        (n_tiles * launch.cdiv(k, config.n),),
        G,
        W,
        words,
        window if surrogate == "rectangle" else words,
        launch.byte_mask(row_mask, words),
        columns,
        columns if curvature is None else curvature,
        columns if covariance is None else covariance,
        columns if pre is None else pre,
        out,
        sums,
        n,
        k,
        G.shape[1],
        span[0],
        0 if row_mask is None else n,
        n_bits,
        width,
        G.stride(0),
        W.stride(0),
        words.stride(0),
        out.stride(0),
        BLOCK_M=config.m,
        BLOCK_N=config.n,
        BLOCK_K=config.k,
        PRODUCT=product,
        PARTS=launch.parts(config.n, part) if product else 1,
        TERMS=terms,
        SURROGATE=NUMBERS[surrogate],
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out, sums
