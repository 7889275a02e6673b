"""Encode: B = [x W_enc + b_enc > 0] and the rectangle's window [|pre| < w], packed at once.

Rows and columns are taken in blocks, so that pre-activations never exist but for one block.
NaN compares false: it gives the bit 0 and lies outside the window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bae_fast.ops.products import Preactivation, column_chunks, sum_dtype
from bae_fast.packing import WORD_BITS, column_counts, n_words, pack_rows

ROW_BLOCK = 8192


def encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, row_mask: Tensor | None, width: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, k = x.shape[0], W_enc.shape[1]
    words = torch.empty(n, n_words(k), dtype=torch.int32, device=x.device)
    window = torch.empty_like(words if width is not None else words[:0, 0])
    for top in range(0, n, ROW_BLOCK):
        rows = slice(top, min(top + ROW_BLOCK, n))
        preactivation = Preactivation(x[rows])
        keep = None if row_mask is None else row_mask[rows, None]
        for start, stop in column_chunks(rows.stop - top, k, 1, x.device):
            pre = preactivation(W_enc[:, start:stop], b_enc[start:stop])
            pre = pre.to(sum_dtype(pre.dtype))  # half comparisons are scalar loops on a CPU
            at = slice(start // WORD_BITS, n_words(stop))
            bits = pre > 0
            words[rows, at] = pack_rows(bits if keep is None else bits & keep)
            if width is not None:
                inside = pre.abs_() < width
                window[rows, at] = pack_rows(inside if keep is None else inside & keep)
    counts = column_counts(words, k)
    if row_mask is None:
        n_rows = torch.full((), n, dtype=torch.int64, device=x.device)
    else:
        n_rows = row_mask.sum()
    return words, window, counts, n_rows
