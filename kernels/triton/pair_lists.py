"""Covariance of codes with few ones, exact, without a number a pair: by lists of the ones.

With M = sum_j n_j, and V_ij = N n_ij - n_i n_j as everywhere:

    sum_{i != j} |V_ij| = M^2 - sum_j n_j^2 + sum over i != j with n_ij > 0 of (|V_ij| - n_i n_j)
    S_ij = -1 where n_ij = 0 < n_i n_j

so only pairs that are on together are counted: sum_r l_r^2 steps, l_r the ones of row r, whatever
the number of features is (Gustavson's product of sparse matrices, by rows).

``length_kernel`` and ``list_kernel`` turn packed lines into lists: feature-packed words into the
rows of each feature, row-packed ones into the features of each row. ``pairs_kernel`` takes feature
after feature: for every row of feature i it adds one to a counter for each feature j of that row,
so that j's counter ends as n_ij. What a pair adds to the sum is a function f of its counter with
f(0) = 0; every step adds f(after) - f(before), which gives f(n_ij) in any order, without a list of
the pairs that were met. The same rows take the counters back to zero. ``signs_kernel`` counts
alike, and then adds the signs of i against the features of each row that is asked for: the rows in
the window of feature i.

Whether lists serve is a number on the device (``serve_kernel``), and no one reads it back: lists
have a fixed capacity, the kernels here return at once where it is zero and those of
:mod:`bae_fast.kernels.covariance` where it is not; ``settle_kernel`` writes the sum of lists, where
they serve, over what was left unmade. All sums are integers, so either way gives the
same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bae_fast.kernels import launch
from bae_fast.kernels.bits import feature_packed, wide
from bae_fast.ops import nvidia
from bae_fast.packing import same_words

# capacities: ones of an average row, and the share of the entries that a window may hold
MOST_ONES = 256
WINDOW_SHARE = 64
# memory of all counters, bytes, and programs a multiprocessor at most
_COUNTERS_BYTES = 2**28
_PROGRAMS = 2


@triton.jit
def _ones(words):
    """Ones of each word, int32: the assembler knows this sum of halves as one instruction."""
    x = words.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return ((((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit(do_not_specialize=["width", "stride_words"])
def length_kernel(words_ptr, starts_ptr, width, stride_words, BLOCK_W: tl.constexpr):
    """The number of ones of line i to ``starts[i + 1]``, and zero to the first."""
    line = tl.program_id(0)
    if line == 0:
        tl.store(starts_ptr, tl.zeros((), tl.int64))
    words_at = words_ptr + line.to(tl.int64) * stride_words
    at = tl.arange(0, BLOCK_W)
    ones = tl.zeros((BLOCK_W,), tl.int32)
    for start in range(0, width, BLOCK_W):
        ones += _ones(tl.load(words_at + start + at, mask=start + at < width, other=0))
    tl.store(starts_ptr + line + 1, tl.sum(ones, axis=0).to(tl.int64))


@triton.jit(do_not_specialize=["width", "stride_words", "capacity"])
def list_kernel(
    serves_ptr,
    words_ptr,
    starts_ptr,
    entries_ptr,
    width,
    stride_words,
    capacity,
    BLOCK_W: tl.constexpr,
):
    """Where the ones of a line are, from its start on."""
    if tl.load(serves_ptr) == 0:
        return
    line = tl.program_id(0)
    words_at = words_ptr + line.to(tl.int64) * stride_words
    places = tl.arange(0, 32)[None, :]
    at = tl.arange(0, BLOCK_W)
    done = tl.load(starts_ptr + line)
    for start in range(0, width, BLOCK_W):
        words = tl.load(words_at + start + at, mask=start + at < width, other=0)
        bits = ((words[:, None] >> places) & 1).reshape(BLOCK_W * 32)
        to = done + tl.cumsum(bits, axis=0) - 1
        place = start * 32 + tl.arange(0, BLOCK_W * 32)
        tl.store(entries_ptr + to, place, mask=(bits != 0) & (to < capacity))
        done += tl.sum(bits, axis=0)


@triton.jit(do_not_specialize=["n_lines", "n_features", "capacity"])
def serve_kernel(
    starts_ptr,
    serves_ptr,
    steps_ptr,
    n_lines,
    n_features,
    capacity,
    DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Steps that the pairs of all rows take, and whether lists serve: they fit and take less."""
    total = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, n_lines, BLOCK):
        line = first + tl.arange(0, BLOCK)
        begin = tl.load(starts_ptr + line, mask=line < n_lines, other=0)
        length = tl.load(starts_ptr + line + 1, mask=line < n_lines, other=0) - begin
        total += length * length
    steps = tl.sum(total, axis=0)
    tl.store(steps_ptr, steps)
    most = n_lines.to(tl.int64) * n_features * n_features // (2 * DENSE)
    fits = tl.load(starts_ptr + n_lines) <= capacity
    tl.store(serves_ptr, (fits & (steps <= most)).to(tl.int32))


@triton.jit(do_not_specialize=["n_features", "n_sums", "stride_plane"])
def settle_kernel(
    serves_ptr,
    counts_ptr,
    sums_ptr,
    total_ptr,
    signs_ptr,
    n_features,
    n_sums,
    stride_plane,
    MARK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where lists serve: their numerator in place of the other form's, and the mark of planes."""
    if tl.load(serves_ptr) != 0:
        at = tl.arange(0, BLOCK)
        ones = tl.zeros((BLOCK,), tl.int64)
        rest = tl.zeros((BLOCK,), tl.int64)
        for first in range(0, n_features, BLOCK):
            n_j = tl.load(counts_ptr + first + at, mask=first + at < n_features, other=0)
            ones += n_j
            rest -= n_j * n_j
        for first in range(0, n_sums, BLOCK):
            rest += tl.load(sums_ptr + first + at, mask=first + at < n_sums, other=0)
        all_ones = tl.sum(ones, axis=0)
        tl.store(total_ptr, all_ones * all_ones + tl.sum(rest, axis=0))
        if MARK:
            mark = tl.full((), -1, tl.int32)
            tl.store(signs_ptr, mark)
            tl.store(signs_ptr + wide(stride_plane), mark)


@triton.jit
def _list(starts_ptr, line, inside):
    first = tl.load(starts_ptr + line, mask=inside, other=0)
    return first, tl.load(starts_ptr + line + 1, mask=inside, other=0)


@triton.jit
def _excess(count, n, product):
    """|V| of a pair that is on ``count`` times together, above n_i n_j; zero where it never is."""
    return tl.where(count > 0, tl.abs(n * count - product) - product, 0)


@triton.jit
def _raised(count, n, product):
    """The sign of V above the -1 of a pair that is never on together: 0, 1 or 2."""
    v = n * count - product
    return tl.where(count > 0, (v >= 0).to(tl.int64) + (v > 0).to(tl.int64), 0)


@triton.jit
def _count(
    feature,
    n,
    n_i,
    starts_ptr,
    features_ptr,
    row_starts_ptr,
    row_features_ptr,
    counts_ptr,
    counters_ptr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SIGNS: tl.constexpr,
):
    """Count a feature's pairs; the sum of their excess, or of n_j times their raised signs."""
    total = tl.zeros((BLOCK_R, BLOCK_E), tl.int64)
    begin, end = tl.load(starts_ptr + feature), tl.load(starts_ptr + feature + 1)
    for at in range(begin, end, BLOCK_R):
        which = at + tl.arange(0, BLOCK_R)
        rows = tl.load(features_ptr + which, mask=which < end, other=0)
        first, last = _list(row_starts_ptr, rows, which < end)
        for step in range(0, tl.max(last - first, axis=0), BLOCK_E):
            entry = first[:, None] + step + tl.arange(0, BLOCK_E)[None, :]
            inside = entry < last[:, None]
            other = tl.load(row_features_ptr + entry, mask=inside, other=0)
            inside = inside & (other != feature)
            n_j = tl.load(counts_ptr + other, mask=inside, other=0)
            before = tl.atomic_add(counters_ptr + other, 1, mask=inside, sem="relaxed")
            before = tl.where(inside, before, 0).to(tl.int64)
            product = n_i * n_j
            if SIGNS:
                more = _raised(before + 1, n, product) - _raised(before, n, product)
                total += tl.where(inside, more * n_j, 0)
            else:
                more = _excess(before + 1, n, product) - _excess(before, n, product)
                total += tl.where(inside, more, 0)
    return tl.sum(tl.sum(total, axis=1), axis=0)


@triton.jit
def _forget(
    feature,
    starts_ptr,
    features_ptr,
    row_starts_ptr,
    row_features_ptr,
    counters_ptr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Take the counters of a feature's pairs back to zero."""
    begin, end = tl.load(starts_ptr + feature), tl.load(starts_ptr + feature + 1)
    for at in range(begin, end, BLOCK_R):
        which = at + tl.arange(0, BLOCK_R)
        rows = tl.load(features_ptr + which, mask=which < end, other=0)
        first, last = _list(row_starts_ptr, rows, which < end)
        for step in range(0, tl.max(last - first, axis=0), BLOCK_E):
            entry = first[:, None] + step + tl.arange(0, BLOCK_E)[None, :]
            inside = entry < last[:, None]
            other = tl.load(row_features_ptr + entry, mask=inside, other=0)
            tl.atomic_and(counters_ptr + other, 0, mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=["n_features"])
def pairs_kernel(
    serves_ptr,
    starts_ptr,
    features_ptr,
    row_starts_ptr,
    row_features_ptr,
    counts_ptr,
    n_rows_ptr,
    counters_ptr,
    sums_ptr,
    n_features,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    program = tl.program_id(0)
    total = tl.zeros((), tl.int64)
    if tl.load(serves_ptr) != 0:
        n = tl.load(n_rows_ptr)
        counters = counters_ptr + program.to(tl.int64) * n_features
        for feature in range(program, n_features, tl.num_programs(0)):
            n_i = tl.load(counts_ptr + feature)
            total += _count(
                feature, n, n_i, starts_ptr, features_ptr, row_starts_ptr, row_features_ptr,
                counts_ptr, counters, BLOCK_R, BLOCK_E, False,
            )  # fmt: skip
            tl.debug_barrier()  # every thread has counted
            _forget(
                feature, starts_ptr, features_ptr, row_starts_ptr, row_features_ptr, counters,
                BLOCK_R, BLOCK_E,
            )  # fmt: skip
            tl.debug_barrier()  # every counter is zero
    tl.store(sums_ptr + program, total)


@triton.jit(do_not_specialize=["n_features", "first", "n_slab"])
def signs_kernel(
    serves_ptr,
    starts_ptr,
    features_ptr,
    row_starts_ptr,
    row_features_ptr,
    counts_ptr,
    n_rows_ptr,
    counters_ptr,
    window_starts_ptr,
    window_rows_ptr,
    own_starts_ptr,
    own_features_ptr,
    total_ptr,
    scale_ptr,
    out_ptr,
    n_features,
    first,
    n_slab,
    stride_out,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    program = tl.program_id(0)
    if tl.load(serves_ptr) != 0:
        n, ones, scale = tl.load(n_rows_ptr), tl.load(total_ptr), tl.load(scale_ptr)
        counters = counters_ptr + program.to(tl.int64) * n_features
        for column in range(program, n_slab, tl.num_programs(0)):
            feature = first + column
            n_i = tl.load(counts_ptr + feature)
            n_t_s = _count(
                feature, n, n_i, starts_ptr, features_ptr, row_starts_ptr, row_features_ptr,
                counts_ptr, counters, BLOCK_R, BLOCK_E, True,
            )  # fmt: skip
            n_t_s -= ones - n_i
            tl.debug_barrier()  # every thread has counted
            begin = tl.load(window_starts_ptr + feature)
            end = tl.load(window_starts_ptr + feature + 1)
            for at in range(begin, end, BLOCK_R):
                which = at + tl.arange(0, BLOCK_R)
                rows = tl.load(window_rows_ptr + which, mask=which < end, other=0)
                start, last = _list(own_starts_ptr, rows, which < end)
                signs = tl.zeros((BLOCK_R, BLOCK_E), tl.int64)
                for step in range(0, tl.max(last - start, axis=0), BLOCK_E):
                    entry = start[:, None] + step + tl.arange(0, BLOCK_E)[None, :]
                    inside = entry < last[:, None]
                    other = tl.load(own_features_ptr + entry, mask=inside, other=0)
                    inside = inside & (other != feature)
                    n_j = tl.load(counts_ptr + other, mask=inside, other=0)
                    # from the L2 cache, where the atomic additions were made
                    count = tl.load(
                        counters + other, mask=inside, other=0, cache_modifier=".cg"
                    ).to(tl.int64)
                    sign = _raised(count, n, n_i * n_j) - 1
                    signs += tl.where(inside & (n_j > 0), sign, 0)
                exact = n * tl.sum(signs, axis=1) - n_t_s
                exact = tl.where(n_i > 0, exact, 0)
                to = out_ptr + rows.to(tl.int64) * stride_out + column
                tl.store(to, exact.to(tl.float32) * scale, mask=which < end)
            tl.debug_barrier()  # every thread has read
            _forget(
                feature, starts_ptr, features_ptr, row_starts_ptr, row_features_ptr, counters,
                BLOCK_R, BLOCK_E,
            )  # fmt: skip
            tl.debug_barrier()  # every counter is zero


class Lists:
    """Ones of packed lines: those of line i are ``entries[starts[i] : starts[i + 1]]``, ascending.

    Attributes:
        starts: int64 ``[lines + 1]``; the last is the number of all.
        entries: int32 ``[capacity]``, not set before :meth:`fill`.
    """

    def __init__(self, lines: Tensor, capacity: int) -> None:
        """Count the ones of packed lines, int32 ``[lines, words]``."""
        self.lines, n = launch.dense_rows(lines), lines.shape[0]
        starts = torch.empty(n + 1, dtype=torch.int64, device=lines.device)
        self.entries = torch.empty(max(capacity, 1), dtype=torch.int32, device=lines.device)
        width, config = lines.shape[1], self._config()
        launch.start(
            length_kernel, (n,), self.lines, starts, width, self.lines.stride(0),
            BLOCK_W=config.n, num_warps=config.warps,
        )  # fmt: skip
        self.starts = torch.cumsum(starts, 0)

    def _config(self) -> launch.Config:
        lines = self.lines
        return launch.configuration("lists", lines.device, lines.dtype, tuple(lines.shape))

    def fill(self, serves: Tensor) -> None:
        """Write the entries, as many as fit, where ``serves`` is not zero on the device."""
        (n, width), config = self.lines.shape, self._config()
        launch.start(
            list_kernel, (n,), serves, self.lines, self.starts, self.entries, width,
            self.lines.stride(0), len(self.entries), BLOCK_W=config.n, num_warps=config.warps,
        )  # fmt: skip

    def fit(self) -> Tensor:
        """Whether all are there: bool ``[]``."""
        return self.starts[-1] <= len(self.entries)

    def lengths(self) -> Tensor:
        """Ones of every line, int64 ``[lines]``."""
        return self.starts.diff()


def places(found: Lists) -> tuple[Tensor, Tensor]:
    """What a kernel reads of lists."""
    return found.starts, found.entries


def flag(serves: Tensor) -> Tensor:
    """A truth on the device as kernels read it: int32 ``[1]``."""
    return serves.to(torch.int32).view(1)


class PairLists:
    """Lists of counted rows, and whether they serve.

    Their entries are written where they are used, by the truth that their reader goes by: the sum
    of all pairs and the signs in a window ask for other numbers of steps.
    """

    def __init__(self, words: Tensor, features: Tensor, counts: Tensor, n_rows: Tensor) -> None:
        """Args:
        words, features: row-packed ``[N, ceil(K/32)]`` and feature-packed ``[K, W]`` bits.
        counts, n_rows: int64 ``[K]`` and ``[]``.
        """
        n, k = words.shape[0], counts.shape[0]
        capacity = n * min(k, MOST_ONES)
        self.counts, self.n_rows = counts.contiguous(), n_rows
        self.words = words
        self.by_row, self.by_feature = Lists(words, capacity), Lists(features, capacity)
        self.dense = n * k * k // (2 * nvidia.DENSE_A_STEP)
        self.steps = torch.empty((), dtype=torch.int64, device=words.device)
        self.serves = torch.empty(1, dtype=torch.int32, device=words.device)
        config = launch.configuration("columns", words.device, words.dtype, (1, n))
        launch.start(
            serve_kernel, (1,), self.by_row.starts, self.serves, self.steps, n, k, capacity,
            DENSE=nvidia.DENSE_A_STEP, BLOCK=config.n, num_warps=config.warps,
        )  # fmt: skip

    def fill(self, serves: Tensor) -> None:
        """Write the entries where ``serves`` is not zero on the device."""
        for found in (self.by_row, self.by_feature):
            found.fill(serves)

    def counters(self, features: int) -> Tensor:
        """Zeros for as many programs as run, ``[programs, K]``."""
        k, device = self.counts.shape[0], self.counts.device
        most = min(_PROGRAMS * launch.multiprocessors(device), _COUNTERS_BYTES // (4 * k), features)
        return torch.zeros(max(most, 1), k, dtype=torch.int32, device=device)

    def start(self, kernel: object, serves: Tensor, counters: Tensor, *rest: Tensor | int) -> None:
        config = launch.configuration(
            "pair_lists", counters.device, counters.dtype, tuple(counters.shape)
        )
        launch.start(
            kernel, (counters.shape[0],), serves, *places(self.by_feature), *places(self.by_row),
            self.counts, self.n_rows, counters, *rest,
            BLOCK_R=config.m, BLOCK_E=config.n, num_warps=config.warps,
        )  # fmt: skip

    def settle(self, total: Tensor, signs: Tensor) -> None:
        """Where lists serve, write what they give over what the other form left unmade.

        Args:
            total: int64 ``[]``, becomes sum_{i != j} |V_ij|.
            signs: planes ``[2, K, words]``, which are marked as not made, or no elements.
        """
        k = self.counts.shape[0]
        self.fill(self.serves)
        counters = self.counters(k)
        sums = torch.empty(counters.shape[0], dtype=torch.int64, device=counters.device)
        self.start(pairs_kernel, self.serves, counters, sums, k)
        config = launch.configuration("columns", counters.device, torch.int64, (1, k))
        mark = signs.numel() > 0
        launch.start(
            settle_kernel, (1,), self.serves, self.counts, sums, total, signs if mark else sums,
            k, len(sums), signs.stride(0) if mark else 0, MARK=mark, BLOCK=config.n,
            num_warps=config.warps,
        )  # fmt: skip


class WindowSigns:
    """scale (N (B S) - 1 (n^T S)) in the entries of a window, for a slab of columns at a time."""

    def __init__(self, pairs: PairLists, words: Tensor, window: Tensor, scale: Tensor) -> None:
        """Args:
        words: row-packed bits at hand ``[N, ceil(K/32)]``, those that were counted or others.
        window: packed words; what lies outside is not written.
        scale: fp32 ``[]``.
        """
        n, k = words.shape[0], pairs.counts.shape[0]
        self.pairs, self.scale = pairs, scale
        same = same_words(words, pairs.words)
        self.own = pairs.by_row if same else Lists(words, n * min(k, MOST_ONES))
        self.window = Lists(feature_packed(window, k), n * -(-k // WINDOW_SHARE))
        self.total = pairs.counts.sum()
        near = self.window.starts[-1]
        gathers = near * self.own.starts[-1] // max(n, 1)  # of rows with the average number of ones
        fit = pairs.by_row.fit() & self.own.fit() & self.window.fit()
        self.serves = flag(fit & (pairs.steps + gathers <= 2 * pairs.dense))
        pairs.fill(self.serves)
        for found in (self.window,) if same else (self.window, self.own):
            found.fill(self.serves)
        self.counters = pairs.counters(k)

    def add_to(self, out: Tensor, start: int) -> None:
        """Write columns start .. start + slab into ``out [N, slab]`` where lists serve."""
        self.pairs.start(
            signs_kernel, self.serves, self.counters, *places(self.window), *places(self.own),
            self.total, self.scale, out, self.pairs.counts.shape[0], start, out.shape[1],
            out.stride(0),
        )  # fmt: skip
