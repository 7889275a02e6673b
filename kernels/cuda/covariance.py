"""Launchers of ``csrc/cuda``: covariance, its signs, and products with the signs.

Names, arguments and results are those of :mod:`bae_fast.kernels.covariance`; the numbers are the
same to the last bit. Tile sizes and shared memory repeat ``csrc/cuda/tiles.cuh``; a test compares.

Pairs and products with the signs have a second form for compute capability 9.0, by asynchronous
products. No device has shown it, so that it is taken where ``BAE_FAST_CUDA_PAIRS`` or
``BAE_FAST_CUDA_SIGNS`` says ``wgmma`` and nowhere else.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from bae_fast.kernels.counts import from_digits
from bae_fast.kernels.covariance import INT32_ROWS
from bae_fast.kernels.launch import cdiv, dense_rows, multiprocessors
from bae_fast.kernels_cuda import driver
from bae_fast.kernels_cuda.driver import Kernel
from bae_fast.ops.nvidia import ENV_PAIRS, ENV_SIGNS
from bae_fast.packing import n_words

# rows and columns of a block's tile, its shared memory in bytes and its threads
PAIRS = (128, 128, 49152, 128)
SIGNS = (256, 128, 98304, 256)
COUNT_DIGITS = (64, 128, 61440, 256)
# features of a panel, words of a feature in a tile, shared memory in bytes, threads
PANELS = (128, 32, 207008, 384)
# rows of a panel that stays in shared memory
PANEL_ROWS = 8192
# lines of a tile of rows or of planes, words of a line in it, shared memory in bytes, threads
LINES = (256, 32, 197680, 384)
# lines that a block fills, and the bytes that tiles of planes may take at once
LINE_WARPS = 8
TILES_BYTES = 2**28

_PAIRS = "pqilllpqqiiiip"
COVARIANCE, COVARIANCE_WIDE, SLAB, SLAB_WIDE = (
    Kernel("cooccurrence.cu", name, *PAIRS[2:], _PAIRS)
    for name in ("covariance", "covariance_wide", "sign_slab", "sign_slab_wide")
)
SIGN_PRODUCT = Kernel("sign_product.cu", "sign_product", *SIGNS[2:], "pqipqqiiillffqp")
DIGIT_PRODUCT = Kernel("sign_product.cu", "digit_product", *COUNT_DIGITS[2:], "pqipqqiiipqp")
KERNELS = (COVARIANCE, COVARIANCE_WIDE, SLAB, SLAB_WIDE, SIGN_PRODUCT, DIGIT_PRODUCT)
FEATURE_TILES = Kernel("panels.cu", "feature_tiles", 0, 256, "pqiiipp", "a")
PANEL_COVARIANCE = Kernel("panels.cu", "panel_covariance", *PANELS[2:], "plllpqqiiiip", "a")
ROW_TILES = Kernel("sign_panels.cu", "row_tiles", 0, 32 * LINE_WARPS, "pqiiiippp", "a")
SIGN_TILES = Kernel("sign_panels.cu", "sign_tiles", 0, 32 * LINE_WARPS, "pqqiiiipp", "a")
SIGN_PANEL_PRODUCT = Kernel(
    "sign_panels.cu", "sign_panel_product", *LINES[2:], "ppipiiillffqp", "a"
)
PANEL_KERNELS = (FEATURE_TILES, PANEL_COVARIANCE, ROW_TILES, SIGN_TILES, SIGN_PANEL_PRODUCT)


def triangle_tiles(k: int) -> int:
    """Blocks that hold anything on or above the diagonal of a ``[k, k]`` matrix."""
    side = cdiv(k, PAIRS[0])
    return side * (side + 1) // 2


def _pairs(
    kernels: tuple[Kernel, Kernel],
    blocks: int,
    features: Tensor,
    counts: Tensor,
    n_rows: Tensor,
    sums: Tensor | None,
    signs: Tensor | None,
    rows: tuple[int, int],
    n_bound: int,
    unless: Tensor | None,
) -> None:
    driver.start(
        kernels[n_bound >= INT32_ROWS],
        blocks,
        features,
        features.stride(0),
        features.shape[1],
        counts,
        n_rows,
        sums,
        signs,
        0 if signs is None else signs.stride(0),
        0 if signs is None else signs.stride(1),
        0 if signs is None else signs.shape[2],
        rows[0],
        rows[1] - rows[0],
        counts.shape[0],
        unless,
    )


def asynchronous(variable: str, device: torch.device) -> bool:
    """Whether asynchronous products are asked for, and can be made on this device.

    Args:
        variable: the environment variable that asks for them.

    Raises:
        ValueError: it has another value than mma or wgmma.
    """
    given = os.environ.get(variable) or "mma"
    if given not in ("mma", "wgmma"):
        raise ValueError(f"{variable} must be 'mma' or 'wgmma'; got {given!r}")
    return given == "wgmma" and driver.arch(device) == "sm_90"


def feature_tiles(features: Tensor, unless: Tensor | None = None) -> Tensor:
    """Feature-packed int32 ``[K, W]`` in tiles of 128 features x 1024 bits, swizzled.

    int32 ``[ceil(K/128), ceil(W/32), 128, 32]``: word w of feature f of a tile is word
    ``(w // 4 ^ f % 8) * 4 + w % 4`` of its row, zero where there is none.
    """
    (k, width), (rows, words) = features.shape, PANELS[:2]
    tiles = features.new_empty(cdiv(k, rows), cdiv(width, words), rows, words)
    stride, chunks = features.stride(0), tiles.shape[1]
    blocks = tiles.shape[0] * chunks
    driver.start(FEATURE_TILES, blocks, features, stride, width, k, chunks, tiles, unless)
    return tiles


def panel_covariance(
    features: Tensor,
    counts: Tensor,
    n_rows: Tensor,
    keep_signs: bool,
    unless: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`covariance` by asynchronous products of up to ``PANEL_ROWS`` rows."""
    tiles = feature_tiles(features, unless)
    k, device = counts.shape[0], features.device
    side = tiles.shape[0]
    blocks = min(side * (side + 1) // 2, multiprocessors(device))
    sums = torch.empty(blocks, 8, dtype=torch.int64, device=device)
    signs = features.new_empty(2, k, n_words(k)) if keep_signs else None
    strides = (0, 0, 0) if signs is None else (signs.stride(0), signs.stride(1), signs.shape[2])
    driver.start(
        PANEL_COVARIANCE, blocks,
        tiles, counts, n_rows, sums, signs, *strides, k, tiles.shape[1], blocks, unless,
    )  # fmt: skip
    return sums.sum(), features.new_empty(0) if signs is None else signs


def covariance(
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
    rows = max(n_bound, 32 * features.shape[1])
    if rows <= PANEL_ROWS and asynchronous(ENV_PAIRS, features.device):
        return panel_covariance(features, counts, n_rows, keep_signs, unless)
    k = counts.shape[0]
    sums = torch.empty(triangle_tiles(k), dtype=torch.int64, device=features.device)
    signs = features.new_empty(2, k, n_words(k)) if keep_signs else None
    kernels = (COVARIANCE, COVARIANCE_WIDE)
    _pairs(kernels, len(sums), features, counts, n_rows, sums, signs, (0, k), n_bound, unless)
    return sums.sum(), features.new_empty(0) if signs is None else signs


def sign_slab(
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
    signs = features.new_empty(2, stop - start, n_words(k)) if out is None else out
    blocks = cdiv(stop - start, PAIRS[0]) * cdiv(k, PAIRS[1])
    kernels = (SLAB, SLAB_WIDE)
    span = (start, stop)
    _pairs(kernels, blocks, features, counts, n_rows, None, signs, span, n_bound, unless)
    return signs


def _aligned(*operands: Tensor) -> bool:
    """Whether every row starts on 16 bytes."""
    return all(
        operand.data_ptr() % 16 == 0 and all(s % 4 == 0 for s in operand.stride()[:-1])
        for operand in operands
    )


def _start_product(
    kernel: Kernel,
    tile: tuple[int, ...],
    bits: Tensor,
    signs: Tensor,
    rest: tuple[Tensor, ...],
    out: Tensor,
    unless: Tensor | None,
) -> Tensor:
    bits = dense_rows(bits)
    n, (_, k, width) = bits.shape[0], signs.shape
    driver.start(
        kernel,
        cdiv(n, tile[0]) * cdiv(k, tile[1]),
        bits,
        bits.stride(0),
        n,
        signs,
        signs.stride(0),
        signs.stride(1),
        k,
        width,
        int(_aligned(bits, signs)),
        *rest,
        out,
        out.stride(0),
        unless,
    )
    return out


def panel_sign_product(
    words: Tensor,
    signs: Tensor,
    counts_signs: Tensor,
    n_rows: Tensor,
    scale: Tensor,
    out: Tensor,
    unless: Tensor | None = None,
) -> Tensor:
    """:func:`sign_product` by asynchronous products, given n^T S, int64 ``[slab]``, into ``out``.

    Tiles of planes are made for so many columns at a time that they take ``TILES_BYTES``.
    """
    words = dense_rows(words)
    (n, width), (lines, line_words) = words.shape, LINES[:2]
    chunks, rows, half = cdiv(width, line_words), cdiv(n, lines), lines // 2
    lefts = words.new_empty(rows, chunks, lines, line_words)
    ones = words.new_empty(rows * lines)
    driver.start(
        ROW_TILES, rows * lines // LINE_WARPS,
        words, words.stride(0), width, n, chunks, int(_aligned(words)), lefts, ones, unless,
    )  # fmt: skip
    panels = cdiv(signs.shape[1], half)
    most = min(max(TILES_BYTES // (4 * lefts[0].numel()), 1), panels)
    rights = words.new_empty(most, chunks, lines, line_words)
    for first in range(0, panels, most):
        span = slice(first * half, (first + most) * half)
        planes, to = signs[:, span], out[:, span]
        k = planes.shape[1]
        driver.start(
            SIGN_TILES, cdiv(k, half) * lines // LINE_WARPS,
            planes, *planes.stride()[:2], width, k, chunks, int(_aligned(planes)), rights, unless,
        )  # fmt: skip
        blocks = min(rows * cdiv(k, half), multiprocessors(words.device))
        driver.start(
            SIGN_PANEL_PRODUCT, blocks,
            lefts, ones, n, rights, k, chunks, blocks, counts_signs[span], n_rows, scale, to,
            to.stride(0), unless,
        )  # fmt: skip
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
    raw = words.new_empty(digits.shape[0], slab)
    _start_product(DIGIT_PRODUCT, COUNT_DIGITS, digits, signs, (), raw, unless)
    rest = (from_digits(raw), n_rows, scale)
    out = torch.empty(words.shape[0], slab, dtype=torch.float32, device=words.device)
    if asynchronous(ENV_SIGNS, words.device):
        return panel_sign_product(words, signs, *rest, out, unless)
    return _start_product(SIGN_PRODUCT, SIGNS, words, signs, rest, out, unless)
