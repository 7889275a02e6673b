"""Encode: B = [x W_enc + b_enc > 0] and the window [|pre| < w], packed, with counts.

    pre[n, f]  = sum_d x[n, d] W_enc[d, f] + b_enc[f]            fp32, the bias before any rounding
    word[n, m] = sum_{f in 32 m .. 32 m + 31} [pre[n, f] > 0] 2^(f % 32)
    count[f]   = sum_n [pre[n, f] > 0]

In half precision one kernel does it all and pre lives in registers only: cuBLAS would write and a
second pass read 8 bytes an element, over a third of the product's own time at d = 2048 (arithmetic
on an H200). In fp32 the product is torch's, by chunks, and ``threshold_kernel`` packs it: fp32
products run ten times longer, the pass no longer counts, and cuBLAS follows ``torch.backends`` on
TF32. NaN compares false. Counts meet by integer atomics, exact in any order.
"""

import triton
import triton.language as tl
from torch import Tensor

from bae_fast.kernels import launch
from bae_fast.kernels.bits import column_part, grouped, operand, pack_columns, wide


@triton.jit
def _emit(
    pre,
    rows,
    c,
    words_ptr,
    window_ptr,
    counts_ptr,
    keep_ptr,
    n,
    k,
    first_word,
    stride_words,
    width,
    n_masked,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Threshold, pack and count a tile of pre; column tile c counts from first_word's bit 0.

    pre is -inf past the last column: neither above zero nor near it.
    """
    keep = tl.load(keep_ptr + rows, mask=rows < n_masked, other=1)
    pre = tl.where(((rows < n) & (keep != 0))[:, None], pre, float("-inf"))
    at = first_word + c * (BLOCK_N // 32) + tl.arange(0, BLOCK_N // 32)
    offsets = rows.to(tl.int64)[:, None] * stride_words + at[None, :]
    mask = (rows < n)[:, None] & (at < first_word + tl.cdiv(k, 32))[None, :]
    tl.store(words_ptr + offsets, pack_columns(pre > 0, BLOCK_M, BLOCK_N), mask=mask)
    columns = c * BLOCK_N + tl.arange(0, BLOCK_N)
    count = tl.sum((pre > 0).to(tl.int32), axis=0).to(tl.int64)
    tl.atomic_add(counts_ptr + columns, count, mask=columns < k, sem="relaxed")
    if WINDOW:
        near = pack_columns(tl.abs(pre) < width, BLOCK_M, BLOCK_N)
        tl.store(window_ptr + offsets, near, mask=mask)


@triton.jit(do_not_specialize=["n", "first_word", "n_masked"])
def encode_kernel(
    x_ptr,
    W_ptr,
    b_ptr,
    keep_ptr,
    words_ptr,
    window_ptr,
    counts_ptr,
    n,
    k,
    d,
    first_word,
    stride_x,
    stride_W,
    stride_words,
    width,
    n_masked,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WINDOW: tl.constexpr,
    PARTS: tl.constexpr,
):
    m, c = grouped(tl.program_id(0), tl.cdiv(n, BLOCK_M), tl.cdiv(k, BLOCK_N), 8)
    rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = c * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    # rows past the end read the last one: no mask in the loop, and nothing of them is kept
    x_at = x_ptr + tl.minimum(rows, n - 1).to(tl.int64)[:, None] * stride_x + inner[None, :]
    W_at = W_ptr + inner.to(tl.int64)[:, None] * stride_W + columns[None, :]
    pre = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, d, BLOCK_K):
        left = inner < d - start
        x = tl.load(x_at, mask=left[None, :], other=0)
        W = tl.load(W_at, mask=left[:, None] & (columns < k)[None, :], other=0)
        pre = tl.dot(operand(x), operand(W), pre)
        x_at += BLOCK_K
        W_at += wide(stride_W) * BLOCK_K
    for part in tl.static_range(PARTS):
        columns = c * BLOCK_N + part * (BLOCK_N // PARTS) + tl.arange(0, BLOCK_N // PARTS)
        bias = tl.load(b_ptr + columns, mask=columns < k, other=float("-inf")).to(tl.float32)
        biased = column_part(pre, BLOCK_M, BLOCK_N, PARTS, part) + bias[None, :]
        _emit(
            biased, rows, c * PARTS + part, words_ptr, window_ptr, counts_ptr, keep_ptr, n, k,
            first_word, stride_words, width, n_masked, BLOCK_M, BLOCK_N // PARTS, WINDOW,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n", "k", "first_word", "n_masked"])
def threshold_kernel(
    pre_ptr,
    keep_ptr,
    words_ptr,
    window_ptr,
    counts_ptr,
    n,
    k,
    first_word,
    stride_pre,
    stride_words,
    width,
    n_masked,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
):
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    pre = tl.load(
        pre_ptr + rows.to(tl.int64)[:, None] * stride_pre + columns[None, :],
        mask=(rows < n)[:, None] & (columns < k)[None, :],
        other=float("-inf"),
    )
    _emit(
        pre, rows, tl.program_id(0), words_ptr, window_ptr, counts_ptr, keep_ptr, n, k, first_word,
        stride_words, width, n_masked, BLOCK_M, BLOCK_N, WINDOW,
    )  # fmt: skip


@launch.tuned("encode")
def encode(
    config: launch.Config,
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    row_mask: Tensor | None,
    width: float | None,
    first_word: int,
    words: Tensor,
    window: Tensor,
    counts: Tensor,
) -> None:
    """Pack the columns that W_enc holds into words (and window) from word ``first_word`` on;
    ``counts [k]`` are written whole. x and W_enc are half-precision, of one dtype."""
    counts.zero_()  # here, so that tuning may call this many times over
    x, W_enc = launch.dense_rows(x), launch.dense_rows(W_enc)
    (n, d), k = x.shape, W_enc.shape[1]
    launch.start(
        encode_kernel,
        (launch.cdiv(n, config.m) * launch.cdiv(k, config.n),),
        x,
        W_enc,
        b_enc.contiguous(),
        launch.byte_mask(row_mask, words),
        words,
        words if width is None else window,
        counts,
        n,
        k,
        d,
        first_word,
        x.stride(0),
        W_enc.stride(0),
        words.stride(0),
        float(width or 0),
        0 if row_mask is None else n,
        BLOCK_M=config.m,
        BLOCK_N=config.n,
        BLOCK_K=config.k,
        WINDOW=width is not None,
        PARTS=launch.parts(config.n),
        num_warps=config.warps,
        num_stages=config.stages,
    )


def threshold(
    pre: Tensor,
    row_mask: Tensor | None,
    width: float | None,
    first_word: int,
    words: Tensor,
    window: Tensor,
    counts: Tensor,
) -> None:
    """Pack one fp32 block ``pre [n, k]`` into words (and window) from word ``first_word`` on;
    ``counts [k]`` are added to."""
    pre, (n, k) = launch.dense_rows(pre), pre.shape
    config = launch.configuration("threshold", pre.device, pre.dtype, (n, k))
    launch.start(
        threshold_kernel,
        (launch.cdiv(k, config.n), launch.cdiv(n, config.m)),
        pre,
        launch.byte_mask(row_mask, words),
        words,
        words if width is None else window,
        counts,
        n,
        k,
        first_word,
        pre.stride(0),
        words.stride(0),
        float(width or 0),
        0 if row_mask is None else n,
        BLOCK_M=config.m,
        BLOCK_N=config.n,
        WINDOW=width is not None,
        num_warps=config.warps,
    )
