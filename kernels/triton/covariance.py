"""Covariance of packed bits: sum |V_ij|, the signs of V, and products with the signs.

    V_ij = N n_ij - n_i n_j,   n_ij = sum_n B_ni B_nj,   S = sign(V), sign(0) = 0, zero diagonal

``covariance_kernel`` counts n_ij by int8 products (exact int32 sums) of feature-packed bits that
are unpacked in registers. Its epilogue makes V in int32, in int64 where N^2 >= 2^31, adds |V| in
int64 and packs the two planes [V > 0], [V < 0]. Only tiles on and above the diagonal are computed;
each writes its planes and their mirror. The tiles' sums are written out and added by torch:
integers, the same in any order. With ``TRIANGLE`` off the kernel makes the planes of a slab of rows
against all columns instead, which is how signs are recomputed in backward.

``sign_product_kernel`` makes B S from row-packed bits and rows of the planes (S is symmetric, so
rows of S serve as its columns, contiguous along the inner index), and from it in int64

    scale (N (B S)_nj - (n^T S)_j)

rounded to fp32 once before it is scaled. n^T S comes from the same kernel: the binary digits of n,
as many as the number of rows has, are further rows of bits (:mod:`bae_fast.kernels.counts`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bae_fast.kernels import launch
from bae_fast.kernels.bits import (
    column_part,
    grouped,
    pack_columns,
    pack_rows,
    unpack_int8,
    unpack_signs,
    wide,
)
from bae_fast.kernels.configs import WIDE_WARPS
from bae_fast.kernels.counts import from_digits
from bae_fast.packing import n_words

# below this many rows V fits int32
INT32_ROWS = 46341


@triton.jit(
    do_not_specialize=[
        "unless_ptr", "first", "n_rows_slab", "n_columns", "width", "stride_features"
    ]
)  # fmt: skip
def covariance_kernel(
    unless_ptr,
    features_ptr,
    counts_ptr,
    n_rows_ptr,
    sums_ptr,
    signs_ptr,
    first,
    n_rows_slab,
    n_columns,
    width,
    stride_features,
    stride_signs,
    stride_plane,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TRIANGLE: tl.constexpr,
    SIGNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    if tl.load(unless_ptr) != 0:
        return
    # feature-packed rows are whole 256 bits: no mask along them
    tl.static_assert(256 % BLOCK_K == 0)
    WORDS: tl.constexpr = BLOCK_K // 32
    stride = tl.multiple_of(stride_features, 8)
    tiles = tl.cdiv(n_columns, BLOCK)
    program = tl.program_id(0)
    if TRIANGLE:
        # rows r and tiles - 1 - r of the triangle hold tiles + 1 tiles together
        i = program // (tiles + 1)
        j = i + program % (tiles + 1)
        if j >= tiles:
            j = j - 1 - i
            i = tiles - 1 - i
    else:
        i, j = grouped(program, tl.cdiv(n_rows_slab, BLOCK), tiles, 8)
    rows = first + i * BLOCK + tl.arange(0, BLOCK)
    columns = j * BLOCK + tl.arange(0, BLOCK)
    at = tl.arange(0, WORDS)
    left_at = features_ptr + rows.to(tl.int64)[:, None] * stride + at[None, :]
    right_at = features_ptr + columns.to(tl.int64)[:, None] * stride + at[None, :]
    both = tl.zeros((BLOCK, BLOCK), tl.int32)
    for _ in range(0, width, WORDS):
        left = tl.load(left_at, mask=(rows < n_columns)[:, None], other=0)
        right = tl.load(right_at, mask=(columns < n_columns)[:, None], other=0)
        both = tl.dot(
            unpack_int8(left, BLOCK, WORDS),
            tl.trans(unpack_int8(right, BLOCK, WORDS)),
            both,
            out_dtype=tl.int32,
        )
        left_at += WORDS
        right_at += WORDS

    QUARTER: tl.constexpr = BLOCK // 4
    n = tl.load(n_rows_ptr)
    n_i = tl.load(counts_ptr + rows, mask=rows < n_columns, other=0)
    width_signs = tl.cdiv(n_columns, 32)
    slab = i * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int64)
    for part in tl.static_range(4):
        count = column_part(both, BLOCK, BLOCK, 4, part)
        columns = j * BLOCK + part * QUARTER + tl.arange(0, QUARTER)
        n_j = tl.load(counts_ptr + columns, mask=columns < n_columns, other=0)
        # V in the width that holds it; zero past the end, where there is nothing to count
        if WIDE:
            v = count.to(tl.int64) * n - n_i[:, None] * n_j[None, :]
        else:
            v = count * n.to(tl.int32) - n_i.to(tl.int32)[:, None] * n_j.to(tl.int32)[None, :]
        v = tl.where(rows[:, None] != columns[None, :], v, 0)
        if TRIANGLE:
            total += tl.sum(tl.abs(v).to(tl.int64), axis=1)
        if SIGNS:
            words = (j * BLOCK + part * QUARTER) // 32 + tl.arange(0, QUARTER // 32)
            to = signs_ptr + slab.to(tl.int64)[:, None] * stride_signs + words[None, :]
            mask = (slab < n_rows_slab)[:, None] & (words < width_signs)[None, :]
            tl.store(to, pack_columns(v > 0, BLOCK, QUARTER), mask=mask)
            to += wide(stride_plane)
            tl.store(to, pack_columns(v < 0, BLOCK, QUARTER), mask=mask)
            if TRIANGLE:
                words = i * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
                to = signs_ptr + columns.to(tl.int64)[None, :] * stride_signs + words[:, None]
                mask = (columns < n_columns)[None, :] & (words < width_signs)[:, None]
                tl.store(to, pack_rows(v > 0, BLOCK, QUARTER), mask=mask)
                to += wide(stride_plane)
                tl.store(to, pack_rows(v < 0, BLOCK, QUARTER), mask=mask)
    if TRIANGLE:
        sum_all = tl.sum(total, axis=0)
        tl.store(sums_ptr + program, tl.where(i == j, sum_all, 2 * sum_all))


@triton.jit(do_not_specialize=["unless_ptr", "n", "k"])
def sign_product_kernel(
    unless_ptr,
    bits_ptr,
    signs_ptr,
    counts_signs_ptr,
    n_rows_ptr,
    scale_ptr,
    out_ptr,
    n,
    k,
    width,
    stride_bits,
    stride_signs,
    stride_plane,
    stride_out,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RAW: tl.constexpr,
):
    if tl.load(unless_ptr) != 0:
        return
    WORDS: tl.constexpr = BLOCK_K // 32
    m, c = grouped(tl.program_id(0), tl.cdiv(n, BLOCK_M), tl.cdiv(k, BLOCK_N), 8)
    rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = c * BLOCK_N + tl.arange(0, BLOCK_N)
    at = tl.arange(0, WORDS)
    bits_at = bits_ptr + tl.minimum(rows, n - 1).to(tl.int64)[:, None] * stride_bits + at[None, :]
    above_at = (
        signs_ptr + tl.minimum(columns, k - 1).to(tl.int64)[:, None] * stride_signs + at[None, :]
    )
    below_at = above_at + wide(stride_plane)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, width, WORDS):
        mask = (at < width - start)[None, :]
        bits = unpack_int8(tl.load(bits_at, mask=mask, other=0), BLOCK_M, WORDS)
        above = tl.load(above_at, mask=mask, other=0)
        below = tl.load(below_at, mask=mask, other=0)
        signs = unpack_signs(above, below, BLOCK_N, WORDS)
        total = tl.dot(bits, tl.trans(signs), total, out_dtype=tl.int32)
        bits_at += WORDS
        above_at += WORDS
        below_at += WORDS
    to = out_ptr + rows.to(tl.int64)[:, None] * stride_out + columns[None, :]
    mask = (rows < n)[:, None] & (columns < k)[None, :]
    if RAW:
        tl.store(to, total, mask=mask)
    else:
        n_t_s = tl.load(counts_signs_ptr + columns, mask=columns < k, other=0)
        exact = total.to(tl.int64) * tl.load(n_rows_ptr) - n_t_s[None, :]
        tl.store(to, exact.to(tl.float32) * tl.load(scale_ptr), mask=mask)


def flag(unless: Tensor | None, n_rows: Tensor) -> Tensor:
    """What tells a kernel to make nothing; where the caller has none, 32 bits that are zero.

    These are the upper half of the number of rows: memory of its own would be set to zero by one
    more start.
    """
    return n_rows.view(1).view(torch.int32)[1:] if unless is None else unless


def _tiles(n_columns: int, block: int) -> int:
    side = launch.cdiv(n_columns, block)
    return side * (side + 1) // 2


@launch.tuned("covariance")
def covariance(
    config: launch.Config,
    features: Tensor,
    counts: Tensor,
    n_rows: Tensor,
    keep_signs: bool,
    n_bound: int,
    unless: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """sum_{i != j} |V_ij|, int64 ``[]``, and the planes int32 ``[2, K, ceil(K/32)]`` or empty.

    Args:
        features: feature-packed bits of the counted rows.
        counts, n_rows: int64 ``[K]`` and ``[]``.
        n_bound: a number of rows that n_rows does not exceed.
        unless: int32 of one element; where it is not zero on the device, nothing is made.
    """
    k = counts.shape[0]
    sums = torch.empty(_tiles(k, config.m), dtype=torch.int64, device=features.device)
    shape = (2, k, n_words(k)) if keep_signs else (2, 0, 0)
    signs = torch.empty(shape, dtype=torch.int32, device=features.device)
    _start(config, features, counts, n_rows, sums, signs, (0, k), n_bound, True, keep_signs, unless)
    return sums.sum(), signs if keep_signs else signs.flatten()


@launch.tuned("covariance")
def sign_slab(
    config: launch.Config,
    features: Tensor,
    counts: Tensor,
    n_rows: Tensor,
    start: int,
    stop: int,
    n_bound: int,
    unless: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Rows start .. stop of both planes, int32 ``[2, stop - start, ceil(K/32)]``.

    ``unless`` is as in :func:`covariance`; ``out`` is where they are written, rows contiguous.
    """
    k = counts.shape[0]
    signs = out
    if signs is None:
        signs = torch.empty(2, stop - start, n_words(k), dtype=torch.int32, device=features.device)
    span = (start, stop)
    _start(config, features, counts, n_rows, counts, signs, span, n_bound, False, True, unless)
    return signs


def _start(
    config: launch.Config,
    features: Tensor,
    counts: Tensor,
    n_rows: Tensor,
    sums: Tensor,
    signs: Tensor,
    rows: tuple[int, int],
    n_bound: int,
    triangle: bool,
    keep_signs: bool,
    unless: Tensor | None,
) -> None:
    k, slab = counts.shape[0], rows[1] - rows[0]
    wide, warps = n_bound >= INT32_ROWS, config.warps
    if wide:
        warps = WIDE_WARPS.get(launch.family(features.device), warps)
    square = launch.cdiv(slab, config.m) * launch.cdiv(k, config.m)
    launch.start(
        covariance_kernel,
        (_tiles(k, config.m) if triangle else square,),
        flag(unless, n_rows),
        features,
        counts,
        n_rows,
        sums,
        signs,
        rows[0],
        slab,
        k,
        features.shape[1],
        features.stride(0),
        signs.stride(1),
        signs.stride(0),
        BLOCK=config.m,
        BLOCK_K=config.k,
        TRIANGLE=triangle,
        SIGNS=keep_signs,
        WIDE=wide,
        num_warps=warps,
        num_stages=config.stages,
    )


@launch.tuned("sign_product", columns=3)
def _sign_product(
    config: launch.Config,
    bits: Tensor,
    signs: Tensor,
    counts_signs: Tensor,
    n_rows: Tensor,
    scale: Tensor,
    out: Tensor,
    unless: Tensor | None,
) -> Tensor:
    bits = launch.dense_rows(bits)
    n, (_, k, width) = bits.shape[0], signs.shape
    launch.start(
        sign_product_kernel,
        (launch.cdiv(n, config.m) * launch.cdiv(k, config.n),),
        flag(unless, n_rows),
        bits,
        signs,
        counts_signs,
        n_rows,
        scale,
        out,
        n,
        k,
        width,
        bits.stride(0),
        signs.stride(1),
        signs.stride(0),
        out.stride(0),
        BLOCK_M=config.m,
        BLOCK_N=config.n,
        BLOCK_K=config.k,
        RAW=out.dtype == torch.int32,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out


def sign_product(
    words: Tensor,
    signs: Tensor,
    digits: Tensor,
    n_rows: Tensor,
    scale: Tensor,
    unless: Tensor | None = None,
) -> Tensor:
    """scale (N (B S) - 1 (n^T S)) for a slab of columns, fp32 ``[rows of words, slab]``.

    Args:
        words: row-packed bits ``[N, ceil(K/32)]``.
        signs: rows of both planes, ``[2, slab, ceil(K/32)]``.
        digits: those of :func:`bae_fast.kernels.counts.sign_operands`.
        n_rows, scale: int64 ``[]`` and fp32 ``[]``.
        unless: see :func:`covariance`.
    """
    slab = signs.shape[1]
    raw = torch.empty(digits.shape[0], slab, dtype=torch.int32, device=words.device)
    counts_signs = from_digits(_sign_product(digits, signs, n_rows, n_rows, scale, raw, unless))
    out = torch.empty(words.shape[0], slab, dtype=torch.float32, device=words.device)
    return _sign_product(words, signs, counts_signs, n_rows, scale, out, unless)
