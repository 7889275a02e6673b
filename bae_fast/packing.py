"""Bit layouts of packed codes: the one place that defines them.

A code is a matrix of bits, N rows (hidden states) by K columns (features; K = k F for k-bit
codes). Every backend uses these layouts and none other:

``row-packed`` (canonical, also on disk)
    int32 ``[N, ceil(K/32)]``; bit ``f % 32`` of word ``f // 32`` in row ``n`` is B[n, f].
    The bytes equal ``numpy.packbits(B, axis=1, bitorder="little")``, zero-padded to whole
    little-endian words::

        row n:  | word 0: f = 31 .. 1 0 | word 1: f = 63 .. 33 32 | ...

``column-packed``
    int32 ``[ceil(N/32), K]``; bit ``n % 32`` of word ``n // 32`` in column ``f`` is B[n, f].
    Counts and co-occurrence are plain popcounts of it.

``feature-packed``
    int32 ``[K, W]``, ``W = ceil(N/32)`` rounded up to 8 words (256 bits): column-packed,
    transposed, so that the rows of one feature are contiguous, as 1-bit matrix units need.

Bits past the end (tail bits) are zero in every layout. Words are int32 and not uint32, which
lacks operators on the CPU; all arithmetic here is the same for both.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

WORD_BITS = 32
FEATURE_ALIGN_WORDS = 8

# (bytes b0..b7, each 0 or 1, as one little-endian int64) * _GATHER has bit i = b_i in its top
# byte: byte i, at bit 8 i, meets the factor's bit 56 - 7 i and lands on bit 56 + i; no two
# products share a bit below, so nothing carries into that byte.
_GATHER = 0x0102040810204080

if sys.byteorder != "little":
    raise ImportError("bae_fast packs bits in little-endian words; this machine is big-endian")


def n_words(n_bits: int) -> int:
    """Number of 32-bit words that hold ``n_bits`` bits."""
    return -(-n_bits // WORD_BITS)


def same_words(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same words of the same memory.

    ``Tensor.is_set_to`` says this too, but not of tensors without memory, on which launches are
    counted.
    """
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def pack_rows(bits: Tensor) -> Tensor:
    """Pack the last dimension, 32 bits a word.

    Args:
        bits: ``[..., K]``, any dtype; non-zero (NaN included) is one.

    Returns:
        int32 ``[..., ceil(K/32)]``, row-packed, contiguous.
    """
    *lead, k = bits.shape
    padded = torch.zeros(*lead, n_words(k) * WORD_BITS, dtype=torch.bool, device=bits.device)
    padded[..., :k] = bits
    gathered = padded.view(torch.int64).mul_(_GATHER).bitwise_right_shift_(56)
    return gathered.to(torch.uint8).view(torch.int32)


def unpack_rows(words: Tensor, n_columns: int, dtype: torch.dtype = torch.bool) -> Tensor:
    """Inverse of :func:`pack_rows`.

    Args:
        words: int32 ``[..., W]``, row-packed; any strides.
        n_columns: K, at most 32 W.
        dtype: the dtype of the result; ones become 1 of it.

    Returns:
        ``dtype [..., K]``.
    """
    shifts = torch.arange(8, device=words.device)
    table = ((torch.arange(256, device=words.device)[:, None] >> shifts) & 1).to(dtype)
    words = words.contiguous()
    if words.stride(-1) != 1:  # one word a row is contiguous with any stride, and is not viewed
        words = words.clone(memory_format=torch.contiguous_format)
    as_bytes = words.view(torch.uint8)[..., : -(-n_columns // 8)]
    # one gather of 8 values a byte: a single pass over the result, in its own dtype
    dense = torch.nn.functional.embedding(as_bytes.to(torch.int32), table)
    return dense.flatten(-2)[..., :n_columns]


def _transpose_blocks(blocks: Tensor) -> Tensor:
    """Transpose 32 x 32 bit matrices: int32 ``[..., 32]``, bit j of word i <-> bit i of word j.

    Five rounds that swap off-diagonal squares of side 16, 8, 4, 2, 1 (Warren, Hacker's
    Delight, 2nd ed., section 7-3), on all matrices at once.
    """
    blocks = blocks.clone(memory_format=torch.contiguous_format)
    for side, low in (
        (16, 0x0000FFFF),
        (8, 0x00FF00FF),
        (4, 0x0F0F0F0F),
        (2, 0x33333333),
        (1, 0x55555555),
    ):
        pairs = blocks.view(*blocks.shape[:-1], WORD_BITS // (2 * side), 2, side)
        upper, lower = pairs[..., 0, :], pairs[..., 1, :]
        # `low` has no bit among the top `side` ones, so the arithmetic shift's sign bits vanish
        swap = ((upper >> side) ^ lower) & low
        lower ^= swap
        upper ^= swap << side
    return blocks


def rows_to_columns(words: Tensor, n_columns: int) -> Tensor:
    """Row-packed int32 ``[N, W]`` to column-packed int32 ``[ceil(N/32), K]``; never dense."""
    n, w = words.shape
    m = n_words(n)
    padded = torch.zeros(m * WORD_BITS, w, dtype=torch.int32, device=words.device)
    padded[:n] = words
    blocks = padded.view(m, WORD_BITS, w).transpose(1, 2)
    return _transpose_blocks(blocks).flatten(1)[:, :n_columns].contiguous()


def columns_to_rows(words: Tensor, n_rows: int) -> Tensor:
    """Column-packed int32 ``[M, K]`` to row-packed int32 ``[N, ceil(K/32)]``; never dense."""
    m, k = words.shape
    w = n_words(k)
    padded = torch.zeros(m, w * WORD_BITS, dtype=torch.int32, device=words.device)
    padded[:, :k] = words
    blocks = _transpose_blocks(padded.view(m, w, WORD_BITS))
    return blocks.transpose(1, 2).reshape(m * WORD_BITS, w)[:n_rows].contiguous()


def columns_to_features(words: Tensor) -> Tensor:
    """Column-packed int32 ``[M, K]`` to feature-packed int32 ``[K, M rounded up to 8]``."""
    m, k = words.shape
    width = -(-m // FEATURE_ALIGN_WORDS) * FEATURE_ALIGN_WORDS
    features = torch.zeros(k, width, dtype=torch.int32, device=words.device)
    features[:, :m] = words.t()
    return features


def bit_weights(n_bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What bit i of a k-bit feature weighs, 2^i / (2^k - 1), for i = 0 .. k-1: ``[k]``."""
    wide = torch.promote_types(dtype, torch.float32)
    return (2.0 ** torch.arange(n_bits, device=device, dtype=wide) / (2**n_bits - 1)).to(dtype)


def popcount(words: Tensor) -> Tensor:
    """Number of ones in each word: int32 in, int32 of the same shape out."""
    v = words - ((words >> 1) & 0x55555555)
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F
    return (v * 0x01010101) >> 24


def column_counts(words: Tensor, n_columns: int) -> Tensor:
    """Ones in each column of row-packed int32 ``[N, W]``: int64 ``[K]``."""
    return popcount(rows_to_columns(words, n_columns)).sum(0, dtype=torch.int64)


def tail_is_zero(words: Tensor, n_columns: int) -> bool:
    """Whether every bit past column K of row-packed words is zero (reads the data back)."""
    used = n_columns % WORD_BITS
    if used == 0 or words.numel() == 0:
        return True
    return not bool((words[..., -1] >> used).any())
