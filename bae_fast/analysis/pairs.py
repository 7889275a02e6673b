"""Rows in which two columns of codes are both on: exact counts, by blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from bae_fast import packing
from bae_fast.codes import BinaryCode

# rows unpacked and columns paired at a time: 16 KiB of scratch a column
ROW_BLOCK = 1024
COLUMN_BLOCK = 256


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
    shape = (len(left_columns), len(right_columns))
    found = torch.zeros(shape, dtype=torch.float32, device=left.device)
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
    """The same for pairs of columns of one code, float32 ``[k, k]``."""
    return joint_counts(code, columns, code, columns)
