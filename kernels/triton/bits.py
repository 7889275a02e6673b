"""Bits in registers: unpacking for matrix units, packing of results, transposing.

Unpacking. A product sums over its inner index, so that index may be permuted if both operands
are permuted alike. The order here makes unpacking cheap: one shift and one mask give several
operand elements that already lie side by side in a 32-bit register,

    int8:   (w >> b) & 0x01010101          bits b, b+8, b+16, b+24      b = 0..7
    half:   (w >> b) & 0x00010001, times 1.0's pattern    bits b, b+16  b = 0..15

and joins keep the parts of a word in one thread, so that they reach shared memory 16 bytes at a
time. Shifting by a vector of 32 places instead costs four times the instructions, one byte stored
at a time. Position c of a word's 32 in the inner order is bit

    int8: any order, the same in both operands       half: c // 2 + 16 (c % 2)

Where the product is cuBLAS's, ``unpack_kernel`` writes the operand in its plain order, 16 bytes a
store.

Transposing. ``transpose_kernel`` turns row-packed words into feature-packed ones
(:mod:`bae_fast.packing`) through 256 rows x 32 columns a word of bits in registers.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from bae_fast.kernels import launch
from bae_fast.packing import FEATURE_ALIGN_WORDS, WORD_BITS, n_words

# bf16 arithmetic is silently wrong in the interpreter: operands become fp32 there, as exact
INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def wide(number):
    """An argument as int64: one that is 1 reaches a kernel as a constant, which has no ``.to``."""
    return tl.cast(number, tl.int64)


@triton.jit
def operand(x):
    """An operand of a product as it was loaded, fp32 under the interpreter."""
    return x.to(tl.float32) if INTERPRET else x


@triton.jit
def _eighths(w):
    """int32 [M, W] to [M, W, 2, 2, 2]: four bits of w in four bytes, eight times."""
    mask = 0x01010101
    return tl.join(
        tl.join(tl.join(w & mask, (w >> 4) & mask), tl.join((w >> 2) & mask, (w >> 6) & mask)),
        tl.join(
            tl.join((w >> 1) & mask, (w >> 5) & mask), tl.join((w >> 3) & mask, (w >> 7) & mask)
        ),
    )


@triton.jit
def _bytes(t, M: tl.constexpr, W: tl.constexpr):
    """int32 [M, W, 2, 2, 2] of four bytes each to int8 [M, 32 W], without moving a byte."""
    halves = tl.join(t.to(tl.int16), (t >> 16).to(tl.int16))
    return tl.join(halves.to(tl.int8), (halves >> 8).to(tl.int8)).reshape(M, W * 32)


@triton.jit
def unpack_int8(w, M: tl.constexpr, W: tl.constexpr):
    """int32 words [M, W] to int8 {0, 1} [M, 32 W], in the inner order of this file."""
    return _bytes(_eighths(w), M, W)


@triton.jit
def unpack_signs(above, below, M: tl.constexpr, W: tl.constexpr):
    """Planes [V > 0] and [V < 0], int32 [M, W], to int8 {-1, 0, 1} [M, 32 W]."""
    # bytes 0x01 and 0xFF are 1 and -1; the planes are disjoint
    return _bytes(_eighths(above) | (_eighths(below) * 255), M, W)


@triton.jit
def _four(w, ONE: tl.constexpr):
    """Pairs of bits 0, 4, 8, 12 and 16 more, times ONE, ascending along two new dimensions."""
    mask = 0x00010001
    return tl.join(
        tl.join((w & mask) * ONE, ((w >> 8) & mask) * ONE),
        tl.join(((w >> 4) & mask) * ONE, ((w >> 12) & mask) * ONE),
    )


@triton.jit
def unpack_half(w, M: tl.constexpr, W: tl.constexpr, dtype: tl.constexpr):
    """int32 words [M, W] to bf16 or fp16 {0, 1} [M, 32 W]; position c is bit c//2 + 16 (c%2)."""
    ONE: tl.constexpr = 0x3F80 if dtype == tl.bfloat16 else 0x3C00
    # a join adds the innermost dimension, so the highest digit of the place is joined first
    t = tl.join(
        tl.join(_four(w, ONE), _four(w >> 2, ONE)), tl.join(_four(w >> 1, ONE), _four(w >> 3, ONE))
    )
    both = tl.join(t.to(tl.int16), (t >> 16).to(tl.int16))
    return both.reshape(M, W * 32).to(dtype, bitcast=True)


@triton.jit
def half_order(c):
    """Row of a tile of dense numbers that meets position c of :func:`unpack_half`."""
    return c // 32 * 32 + c % 32 // 2 + 16 * (c % 2)


@triton.jit
def pack_columns(bits, M: tl.constexpr, N: tl.constexpr):
    """Zeros and ones [M, N] to words [M, N / 32], bit j % 32 of word j // 32."""
    places = tl.arange(0, 32)[None, None, :]
    return tl.sum(bits.to(tl.int32).reshape(M, N // 32, 32) << places, axis=2)


@triton.jit
def pack_rows(bits, M: tl.constexpr, N: tl.constexpr):
    """Zeros and ones [M, N] to words [M / 32, N], bit i % 32 of word i // 32."""
    places = tl.arange(0, 32)[None, :, None]
    return tl.sum(bits.to(tl.int32).reshape(M // 32, 32, N) << places, axis=1)


@triton.jit
def _halves(tile, M: tl.constexpr, N: tl.constexpr):
    return tl.permute(tl.reshape(tile, (M, 2, N // 2)), (0, 2, 1)).split()


@triton.jit
def column_part(tile, M: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr, part: tl.constexpr):
    """Part of a tile [M, N] in 1, 2, 4, 8 or 16 by columns: registers change their names only.

    Epilogues go part by part: a whole accumulator takes half of a thread's registers, and what is
    made of it would need as many again.
    """
    if PARTS > 1:
        low, high = _halves(tile, M, N)
        tile = low if part * 2 < PARTS else high
        if PARTS > 2:
            low, high = _halves(tile, M, N // 2)
            tile = low if part % (PARTS // 2) * 4 < PARTS else high
            if PARTS > 4:
                low, high = _halves(tile, M, N // 4)
                tile = low if part % (PARTS // 4) * 8 < PARTS else high
                if PARTS > 8:
                    low, high = _halves(tile, M, N // 8)
                    tile = low if part % 2 == 0 else high
    return tile


@triton.jit
def grouped(program, n_m, n_n, GROUP: tl.constexpr):
    """Tile (m, n) of a program: groups of rows share their columns in the L2 cache."""
    first = program // (GROUP * n_n) * GROUP
    size = tl.minimum(n_m - first, GROUP)
    inside = program % (GROUP * n_n)
    return first + inside % size, inside // size


@triton.jit
def _rows_first(n, BLOCK: tl.constexpr):
    """Tile (m, c) of a program, rows first: in one number, for a grid's second is below 2^16."""
    tiles = tl.cdiv(n, BLOCK)
    return tl.program_id(0) % tiles, tl.program_id(0) // tiles


@triton.jit(do_not_specialize=["n", "width", "stride_words"])
def unpack_kernel(
    words_ptr,
    out_ptr,
    n,
    width,
    stride_words,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    m, c = _rows_first(n, BLOCK_M)
    rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
    at = c * BLOCK_W + tl.arange(0, BLOCK_W)
    inside = (rows < n)[:, None] & (at < width)[None, :]
    words = tl.load(
        words_ptr + rows.to(tl.int64)[:, None] * stride_words + at[None, :], mask=inside, other=0
    )
    places = tl.arange(0, 32)[None, None, :]
    bits = (words[:, :, None] >> places) & 1
    to = out_ptr + (rows.to(tl.int64)[:, None] * width + at[None, :])[:, :, None] * 32 + places
    kind: tl.constexpr = out_ptr.dtype.element_ty
    if kind == tl.bfloat16 or kind == tl.float16:
        # the number's own bits: nothing is converted
        ONE: tl.constexpr = 0x3F80 if kind == tl.bfloat16 else 0x3C00
        numbers = (bits * ONE).to(tl.int16).to(kind, bitcast=True)
    else:
        numbers = bits.to(kind)
    tl.store(to, numbers, mask=inside[:, :, None])


def unpack(words: Tensor, n_columns: int, dtype: torch.dtype) -> Tensor:
    """Row-packed int32 ``[N, ceil(K/32)]`` to zeros and ones ``dtype [N, K]``.

    The result is a view of rows of whole words, 32 numbers each: rows start on 64 bytes.
    """
    words, (n, width) = launch.dense_rows(words), words.shape
    config = launch.configuration("unpack", words.device, dtype, (n, width))
    out = torch.empty(n, width * WORD_BITS, dtype=dtype, device=words.device)
    launch.start(
        unpack_kernel,
        (launch.cdiv(n, config.m) * launch.cdiv(width, config.n),),
        words,
        out,
        n,
        width,
        words.stride(0),
        BLOCK_M=config.m,
        BLOCK_W=config.n,
        num_warps=config.warps,
    )
    return out[:, :n_columns]


@triton.jit(do_not_specialize=["n", "n_blocks", "n_columns"])
def transpose_kernel(
    words_ptr,
    out_ptr,
    n,
    n_blocks,
    n_columns,
    stride_words,
    stride_feature,
    stride_block,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    m, c = _rows_first(n_blocks * 32, BLOCK_M)
    rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
    at = c * BLOCK_W + tl.arange(0, BLOCK_W)
    inside = (rows < n)[:, None] & (at * 32 < n_columns)[None, :]
    words = tl.load(
        words_ptr + rows.to(tl.int64)[:, None] * stride_words + at[None, :], mask=inside, other=0
    )
    bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    packed = pack_rows(bits.reshape(BLOCK_M, BLOCK_W * 32), BLOCK_M, BLOCK_W * 32)
    blocks = m * (BLOCK_M // 32) + tl.arange(0, BLOCK_M // 32)
    columns = c * (BLOCK_W * 32) + tl.arange(0, BLOCK_W * 32)
    tl.store(
        out_ptr
        + blocks.to(tl.int64)[:, None] * stride_block
        + columns.to(tl.int64)[None, :] * stride_feature,
        packed,
        mask=(blocks < n_blocks)[:, None] & (columns < n_columns)[None, :],
    )


@launch.tuned("transpose")
def _transpose(config: launch.Config, words: Tensor, n_columns: int, out: Tensor) -> Tensor:
    """``out[f, m]``, of any strides, is word m of feature f; zero behind the last row."""
    words = launch.dense_rows(words)
    n, n_blocks = words.shape[0], out.shape[1]
    launch.start(
        transpose_kernel,
        (launch.cdiv(WORD_BITS * n_blocks, config.m) * launch.cdiv(n_words(n_columns), config.n),),
        words,
        out,
        n,
        n_blocks,
        n_columns,
        words.stride(0),
        out.stride(0),
        out.stride(1),
        BLOCK_M=config.m,
        BLOCK_W=config.n,
        num_warps=config.warps,
    )
    return out


def feature_packed(words: Tensor, n_columns: int) -> Tensor:
    """Row-packed int32 ``[N, ceil(K/32)]`` to feature-packed int32 ``[K, W]``."""
    unit = WORD_BITS * FEATURE_ALIGN_WORDS
    width = launch.cdiv(words.shape[0], unit) * FEATURE_ALIGN_WORDS
    out = torch.empty(n_columns, width, dtype=torch.int32, device=words.device)
    return _transpose(words, n_columns, out)
