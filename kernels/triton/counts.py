"""What a step needs of the counts of its columns, one kernel where torch would start ten.

With n_j ones in column j of N rows, p = n_j / N, q = 1 - p and eps of :mod:`bae_fast.statistics`:

    H        = -sum_j p log2(p + eps) + q log2(q + eps)        D = sum_{i != j} |V_ij| / (N (N - 1))
    slope_j  = dH/dB_j = (log2((q + eps) / (p + eps)) + (q / (q + eps) - p / (p + eps)) / ln 2) / N

``entropy_kernel`` makes H of blocks of columns and ``totals_kernel`` adds them, in one order, and
divides the numerator of D; ``slopes_kernel`` makes the slopes, times the gradient of H. All of it
is float64 and rounded once.

For the products with the signs ``sign_operands_kernel`` makes the binary digits of the counts, as
rows of packed bits, and c 2/(N (N - 1)) with c the gradient of D; ``from_digits_kernel`` puts n^T S
together from the product of these rows.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from bae_fast.kernels import launch
from bae_fast.kernels.bits import wide
from bae_fast.ops.limits import check_counted
from bae_fast.packing import n_words
from bae_fast.statistics import EPS

# digits of an int64 count, where no number of rows bounds it
DIGITS = 63

_EPS = tl.constexpr(EPS)
_LN2 = tl.constexpr(math.log(2))


@triton.jit
def _shares(counts_ptr, n_rows_ptr, columns, k):
    """p and q = 1 - p of columns, and N: float64."""
    n = tl.load(n_rows_ptr).to(tl.float64)
    p = tl.load(counts_ptr + columns, mask=columns < k, other=0).to(tl.float64) / n
    return p, 1 - p, n


@triton.jit(do_not_specialize=["k"])
def entropy_kernel(counts_ptr, n_rows_ptr, sums_ptr, k, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    columns = program * BLOCK + tl.arange(0, BLOCK)
    p, q, _ = _shares(counts_ptr, n_rows_ptr, columns, k)
    eps = tl.full((), _EPS, tl.float64)
    h = p * tl.log2(p + eps) + q * tl.log2(q + eps)
    tl.store(sums_ptr + program, -tl.sum(tl.where(columns < k, h, 0.0), axis=0))


@triton.jit(do_not_specialize=["n_sums"])
def totals_kernel(
    sums_ptr,
    numerator_ptr,
    n_rows_ptr,
    entropy_ptr,
    covariance_ptr,
    n_sums,
    COVARIANCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, n_sums, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(sums_ptr + at, mask=at < n_sums, other=0.0)
    tl.store(entropy_ptr, tl.sum(total, axis=0).to(entropy_ptr.dtype.element_ty))
    covariance = tl.zeros((), tl.float64)
    if COVARIANCE:
        n = tl.load(n_rows_ptr).to(tl.float64)
        covariance = tl.load(numerator_ptr).to(tl.float64) / (n * (n - 1))
    tl.store(covariance_ptr, covariance.to(covariance_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["k"])
def slopes_kernel(counts_ptr, n_rows_ptr, grad_ptr, out_ptr, k, BLOCK: tl.constexpr):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p, q, n = _shares(counts_ptr, n_rows_ptr, columns, k)
    eps, ln2 = tl.full((), _EPS, tl.float64), tl.full((), _LN2, tl.float64)
    slope = tl.log2((q + eps) / (p + eps)) + (q / (q + eps) - p / (p + eps)) / ln2
    found = slope / n * tl.load(grad_ptr).to(tl.float64)
    tl.store(out_ptr + columns, found.to(out_ptr.dtype.element_ty), mask=columns < k)


@triton.jit(do_not_specialize=["k", "n_digits", "width"])
def sign_operands_kernel(
    counts_ptr,
    n_rows_ptr,
    grad_ptr,
    digits_ptr,
    scale_ptr,
    k,
    n_digits,
    width,
    BLOCK_W: tl.constexpr,
):
    program = tl.program_id(0)
    at = program * BLOCK_W + tl.arange(0, BLOCK_W)
    places = tl.arange(0, 32)[None, :]
    columns = at[:, None] * 32 + places
    counts = tl.load(counts_ptr + columns, mask=columns < k, other=0)
    for digit in range(n_digits):
        words = tl.sum(((counts >> digit) & 1).to(tl.int32) << places, axis=1)
        tl.store(digits_ptr + digit * width + at, words, mask=at < width)
    if program == 0:
        n = tl.load(n_rows_ptr).to(tl.float64)
        scale = tl.load(grad_ptr).to(tl.float64) * 2 / (n * (n - 1))
        tl.store(scale_ptr, scale.to(tl.float32))


@triton.jit(do_not_specialize=["k", "n_digits"])
def from_digits_kernel(raw_ptr, out_ptr, k, n_digits, BLOCK: tl.constexpr):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int64)
    for digit in range(n_digits):
        at = raw_ptr + wide(digit) * k + columns
        total += tl.load(at, mask=columns < k, other=0).to(tl.int64) << digit
    tl.store(out_ptr + columns, total, mask=columns < k)


def _over_columns(counts: Tensor) -> tuple[launch.Config, int]:
    """Columns of a block in ``n``, and the number of blocks."""
    k = counts.shape[-1]
    config = launch.configuration("columns", counts.device, counts.dtype, (1, k))
    return config, launch.cdiv(k, config.n)


def terms(
    counts: Tensor, n_rows: Tensor, numerator: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """H in bits and D, ``dtype []`` each; D is zero where there is no numerator.

    Args:
        counts, n_rows: int64 ``[K]`` and ``[]``.
        numerator: int64 ``[]``, sum_{i != j} |V_ij|.
    """
    check_counted(n_rows)
    counts = counts.contiguous()
    config, blocks = _over_columns(counts)
    sums = torch.empty(blocks, dtype=torch.float64, device=counts.device)
    launch.start(
        entropy_kernel, (blocks,), counts, n_rows, sums, counts.shape[0],
        BLOCK=config.n, num_warps=config.warps,
    )  # fmt: skip
    entropy, covariance = (torch.empty((), dtype=dtype, device=counts.device) for _ in range(2))
    launch.start(
        totals_kernel, (1,), sums, n_rows if numerator is None else numerator, n_rows, entropy,
        covariance, blocks, COVARIANCE=numerator is not None, BLOCK=config.n,
        num_warps=config.warps,
    )  # fmt: skip
    return entropy, covariance


def slopes(counts: Tensor, n_rows: Tensor, grad_entropy: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of H at every bit of a column, times that of the loss at H: ``dtype [K]``."""
    counts = counts.contiguous()
    config, blocks = _over_columns(counts)
    out = torch.empty(counts.shape, dtype=dtype, device=counts.device)
    launch.start(
        slopes_kernel, (blocks,), counts, n_rows, grad_entropy, out, counts.shape[0],
        BLOCK=config.n, num_warps=config.warps,
    )  # fmt: skip
    return out


def sign_operands(
    counts: Tensor, n_rows: Tensor, grad_covariance: Tensor, n_bound: int | None = None
) -> tuple[Tensor, Tensor]:
    """Bit b of every count, row-packed ``[digits, ceil(K/32)]``, and c 2/(N (N - 1)), fp32 ``[]``.

    Args:
        counts, n_rows: int64 ``[K]`` and ``[]``.
        grad_covariance: ``[]``, c.
        n_bound: a number that no count exceeds; None: any int64.
    """
    counts, k = counts.contiguous(), counts.shape[0]
    n_digits = DIGITS if n_bound is None else max(n_bound.bit_length(), 1)
    width, (config, blocks) = n_words(k), _over_columns(counts)
    digits = torch.empty(n_digits, width, dtype=torch.int32, device=counts.device)
    scale = torch.empty((), dtype=torch.float32, device=counts.device)
    launch.start(
        sign_operands_kernel, (blocks,), counts, n_rows, grad_covariance, digits, scale, k,
        n_digits, width, BLOCK_W=config.n // 32, num_warps=config.warps,
    )  # fmt: skip
    return digits, scale


def from_digits(raw: Tensor) -> Tensor:
    """n^T S, int64 ``[slab]``, from the product ``[digits, slab]`` with the digits' rows."""
    n_digits, k = raw.shape
    config, blocks = _over_columns(raw)
    out = torch.empty(k, dtype=torch.int64, device=raw.device)
    launch.start(
        from_digits_kernel, (blocks,), raw, out, k, n_digits,
        BLOCK=config.n, num_warps=config.warps,
    )  # fmt: skip
    return out
