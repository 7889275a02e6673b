"""Pairs of columns: counts of rows with both on, mutual information, the tree of the largest."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bae_fast import packing
from bae_fast.codes import BinaryCode
from bae_fast.ops import registry

# one float32 matrix holds the mutual information of all pairs: 1 GiB at this width
MAX_COLUMNS = 16384

# rows unpacked and columns paired at a time: 16 KiB of scratch a column
ROW_BLOCK = 1024
COLUMN_BLOCK = 256

# share of ones below which adding up the rows of each column is faster than the dense product
_SPARSE = 1 / 12

# rows that stand together in the sample that a tree is found by: neighbours are alike
SAMPLE_PIECE = 256

# products of two bits that finding a tree may take, some seconds of a CPU core for dense bits and
# less than one for sparse ones
_SAMPLE_PRODUCTS = 2**36
_SAMPLE_LEAST, _SAMPLE_MOST = 2**14, 2**17

# rows that kernels count at a time: their bits by column, or lists of their ones, take a few
# hundred MiB at the most columns
KERNEL_ROWS = 2**17

# columns whose bits a kernel can name
_NAMED = 2**16


def columns_as_rows(words: Tensor, n_columns: int, columns: Tensor) -> Tensor:
    """Columns of row-packed words ``[N, W]`` as packed bits, int32 ``[k, ceil(N/32)]``."""
    return packing.rows_to_columns(words, n_columns).t()[columns].contiguous()


def joint_counts(
    left: BinaryCode, left_columns: Tensor, right: BinaryCode, right_columns: Tensor
) -> Tensor:
    """Rows in which column i of one code and j of another are on: float32 of exact integers.

    By blocks of rows and columns; every partial sum is an integer below 2^24.

    Args:
        left, right: ``[N, K]`` and ``[N, L]`` of the same rows without a row mask, N < 2^24; may
            be one code.
        left_columns, right_columns: int64 ``[k]`` and ``[l]``.

    Returns:
        ``[k, l]``.
    """
    a, b = left.flatten(), right.flatten()
    common = registry.extras("auto", left.device.type).common_ones
    shape = (len(left_columns), len(right_columns))
    found = torch.zeros(shape, dtype=torch.float32, device=left.device)
    if common is not None and shape[1] <= _NAMED:
        index = torch.arange(shape[1], device=left.device).expand(shape)
        for mine, theirs in zip(
            a.words.split(KERNEL_ROWS), b.words.split(KERNEL_ROWS), strict=True
        ):
            own = columns_as_rows(mine, a.n_columns, left_columns)[:, None]
            others = columns_as_rows(theirs, b.n_columns, right_columns)
            found += common(own, others, index)[:, 0]
        return found
    for start in range(0, a.shape[0], ROW_BLOCK):
        rows = slice(start, start + ROW_BLOCK)
        bits = packing.unpack_rows(b.words[rows], b.n_columns, torch.uint8)
        second = bits[:, right_columns].float()
        if left is right and left_columns is right_columns:
            first = second
        else:
            if left is not right:
                bits = packing.unpack_rows(a.words[rows], a.n_columns, torch.uint8)
            first = bits[:, left_columns].float()
        for top in range(0, len(left_columns), COLUMN_BLOCK):
            found[top : top + COLUMN_BLOCK] += first[:, top : top + COLUMN_BLOCK].T @ second
    return found


def pair_counts(code: BinaryCode, columns: Tensor) -> Tensor:
    """The same for pairs of different columns of one code, float32 ``[k, k]``.

    Where few bits are on, on a CPU, only products with a one are taken; the counts are the same.
    """
    rows = code.flatten()
    compiled = registry.extras("auto", rows.device.type).pair_counts
    if compiled is not None and len(rows):
        first, *others = rows.words.split(KERNEL_ROWS)
        found = compiled(first, columns, rows.n_columns)
        for words in others:
            found += compiled(words, columns, rows.n_columns)
        return found
    is_sparse = int(rows.counts().sum()) < _SPARSE * len(rows) * rows.n_columns
    if not is_sparse or rows.device.type != "cpu" or len(columns) == 0:
        return joint_counts(code, columns, code, columns)
    return sparse_pair_counts(rows, columns)


def sparse_pair_counts(code: BinaryCode, columns: Tensor) -> Tensor:
    """What :func:`joint_counts` says of pairs of columns of one code, fast where ones are few.

    Row i of the result is the sum of the rows of bits in which column i is on.

    Args:
        code: ``[N, K]`` on the CPU without a row mask, N < 2^24.
        columns: int64 ``[k]``.
    """
    k = len(columns)
    found = torch.zeros(k, k, dtype=torch.float32, device=code.device)
    for words in code.words.split(ROW_BLOCK):
        bits = packing.unpack_rows(words, code.n_columns, torch.uint8)[:, columns]
        column, row = bits.T.nonzero().unbind(1)
        n_ones = torch.bincount(column, minlength=k)
        dense, at = bits.float(), 0
        # by blocks, so that there is no second matrix of all pairs
        for part, n in zip(found.split(COLUMN_BLOCK), n_ones.split(COLUMN_BLOCK), strict=True):
            own = row[at : at + int(n.sum())]
            part += torch.nn.functional.embedding_bag(own, dense, n.cumsum(0) - n, mode="sum")
            at += len(own)
    return found


def edge_counts(code: BinaryCode, left: Tensor, right: Tensor) -> Tensor:
    """Rows in which both columns of each of k pairs are on: int64 ``[k]``, exact for any N.

    Args:
        code: ``[..., K]`` without a row mask.
        left, right: int64 ``[k]``, the columns of the pairs.
    """
    both = torch.zeros(len(left), dtype=torch.int64, device=code.device)
    for block in code.flatten().words.split(ROW_BLOCK):
        columns = packing.rows_to_columns(block, code.n_columns).t().contiguous()
        both += packing.popcount(columns[left] & columns[right]).sum(1)
    return both


def xlog2x(p: Tensor) -> Tensor:
    """p log2 p, 0 at 0."""
    return torch.special.xlogy(p, p) / math.log(2)


def pair_information(n_i: Tensor, n_j: Tensor, both: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Mutual information of pairs of columns from their counts, and how many outcomes occur.

    Args:
        n_i, n_j, both: int64 ``[k]``, rows in which one, the other and both are on, of n.

    Returns:
        Mutual information in bits, float64 ``[k]``, and int64 ``[k]`` of 1 to 4.
    """
    cells = torch.stack([both, n_i - both, n_j - both, n - n_i - n_j + both])
    p_i, p_j = n_i.double() / n, n_j.double() / n
    own = -xlog2x(p_i) - xlog2x(1 - p_i) - xlog2x(p_j) - xlog2x(1 - p_j)
    return own + xlog2x(cells.double() / n).sum(0), (cells > 0).sum(0)


def mutual_information_(joint: Tensor, counts: Tensor, n: int) -> None:
    """Replace the counts n_ij by I(b_i; b_j) in bits, block by block; -inf on the diagonal."""
    p = (counts.double() / n).float()
    own = -xlog2x(p) - xlog2x(1 - p)
    for block, p_i, own_i in zip(
        joint.split(COLUMN_BLOCK), p.split(COLUMN_BLOCK), own.split(COLUMN_BLOCK), strict=True
    ):
        both = block / n
        only_i = (p_i[:, None] - both).clamp_min(0)
        only_j = (p - both).clamp_min(0)
        neither = (1 - both - only_i - only_j).clamp_min(0)
        block.copy_(own_i[:, None] + own)
        for share in (both, only_i, only_j, neither):
            block += xlog2x(share)
    joint.fill_diagonal_(-torch.inf)


def spanning_tree(weights: Tensor) -> Tensor:
    """Edges of the maximum spanning tree of a symmetric matrix (Prim): int64 ``[k - 1, 2]``.

    Each edge is (a column that is in the tree already, the column that it adds).
    """
    k = len(weights)
    best, parent = weights[0].clone(), torch.zeros(k, dtype=torch.int64, device=weights.device)
    outside = torch.ones(k, dtype=torch.bool, device=weights.device)
    outside[0] = False
    edges = torch.empty(k - 1, 2, dtype=torch.int64, device=weights.device)
    for i in range(k - 1):
        new = torch.where(outside, best, -torch.inf).argmax()
        edges[i, 0], edges[i, 1] = parent[new], new
        outside[new] = False
        closer = weights[new] > best
        best = torch.where(closer, weights[new], best)
        parent = torch.where(closer, new, parent)
    return edges


def tree_parents(code: BinaryCode) -> Tensor:
    """The tree of the most mutual information (Chow and Liu 1968): int64 ``[K]``, -1 at a root.

    Columns that never vary have no parent. Of more than :data:`MAX_COLUMNS` that vary, those of
    the most entropy are in the tree.

    Args:
        code: ``[..., K]`` without a row mask, fewer than 2^24 rows.
    """
    rows = code.flatten()
    n = len(rows)
    counts = rows.counts()
    parents = torch.full_like(counts, -1)
    columns = ((counts > 0) & (counts < n)).nonzero().flatten()
    if len(columns) > MAX_COLUMNS:
        evenness = torch.minimum(counts, n - counts)[columns]
        columns = columns[evenness.topk(MAX_COLUMNS).indices.sort().values]
    if len(columns) < 2:
        return parents
    joint = pair_counts(rows, columns)
    mutual_information_(joint, counts[columns], n)
    edges = spanning_tree(joint)
    parents[columns[edges[:, 1]]] = columns[edges[:, 0]]
    return parents


def sample_starts(n_rows: int, n_columns: int) -> list[int]:
    """First rows of the pieces of :data:`SAMPLE_PIECE` rows that are enough to find the tree by.

    All rows of a short code, fewer of one of many columns; evenly spaced.
    """
    wanted = _SAMPLE_PRODUCTS // max(n_columns, 1) ** 2
    wanted = min(n_rows, max(_SAMPLE_LEAST, min(wanted, _SAMPLE_MOST)))
    n_pieces, n_wanted = -(-n_rows // SAMPLE_PIECE), -(-wanted // SAMPLE_PIECE)
    return [i * n_pieces // n_wanted * SAMPLE_PIECE for i in range(n_wanted)]


def counts_with_parents(code: BinaryCode, parents: Tensor) -> Tensor:
    """Rows in which a column and its parent are on: int64 ``[K]``; at a root its own ones."""
    columns = torch.arange(len(parents), device=parents.device)
    return edge_counts(code, columns, torch.where(parents >= 0, parents, columns))


def edges_that_pay(parents: Tensor, counts: Tensor, both: Tensor, n: int) -> Tensor:
    """The same parents, -1 where the edge saves less than it costs to describe.

    An edge saves n I bits over n rows. Describing it takes log2 K bits for the parent's number and
    1/2 log2 n for the second of two probabilities (Rissanen 1978).

    Args:
        parents: int64 ``[K]``, -1 at a root.
        counts: int64 ``[K]``, ones of each column.
        both: int64 ``[K]``, rows in which a column and its parent are on; ignored at a root.
    """
    information, _ = pair_information(counts[parents.clamp_min(0)], counts, both, max(n, 1))
    cost = model_bits(len(parents), 1, n) - model_bits(len(parents), 0, n)
    pays = n * information > cost
    return torch.where((parents >= 0) & pays, parents, -1)


def model_bits(n_columns: int, n_edges: int, n_rows: int) -> float:
    """Bits that describe a tree and its probabilities: one for each column and one more for each
    edge, of 1/2 log2 N bits (Rissanen 1978), and the number of each parent."""
    probability = 0.5 * math.log2(max(n_rows, 1))
    return n_columns * probability + n_edges * (math.log2(max(n_columns, 1)) + probability)
