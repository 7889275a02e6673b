"""Encode: one kernel in half precision; in fp32 torch's product by chunks and one pass over it."""

from __future__ import annotations

import torch
from torch import Tensor

from bae_fast.kernels import encode as kernels
from bae_fast.ops.products import HALF, Preactivation, column_chunks, half_chunks
from bae_fast.packing import WORD_BITS, n_words

ROW_BLOCK = 8192


def encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, row_mask: Tensor | None, width: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (n, d), k = x.shape, W_enc.shape[1]
    words = torch.empty(n, n_words(k), dtype=torch.int32, device=x.device)
    window = torch.empty_like(words) if width is not None else words.new_empty(0)
    counts = torch.empty(k, dtype=torch.int64, device=x.device)
    if x.dtype not in HALF:
        counts.zero_()  # blocks of rows add to them
        _by_blocks(x, W_enc, b_enc, row_mask, width, words, window, counts)
    else:
        # under autocast a half-precision copy of W_enc, a chunk of its columns at a time
        chunks = [(0, k)] if W_enc.dtype == x.dtype else half_chunks(d, k, x.device)
        for start, stop in chunks:
            span = slice(start, stop)
            W, b = W_enc[:, span].to(x.dtype), b_enc[span]
            first = start // WORD_BITS
            kernels.encode(x, W, b, row_mask, width, first, words, window, counts[span])
    if row_mask is None:
        return words, window, counts, torch.full((), n, dtype=torch.int64, device=x.device)
    return words, window, counts, row_mask.sum()


def _by_blocks(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    row_mask: Tensor | None,
    width: float | None,
    words: Tensor,
    window: Tensor,
    counts: Tensor,
) -> None:
    n, k = x.shape[0], W_enc.shape[1]
    for top in range(0, n, ROW_BLOCK):
        rows = slice(top, min(top + ROW_BLOCK, n))
        preactivation = Preactivation(x[rows])
        keep = None if row_mask is None else row_mask[rows]
        for start, stop in column_chunks(rows.stop - top, k, 1, x.device):
            kernels.threshold(
                preactivation(W_enc[:, start:stop], b_enc[start:stop]),
                keep,
                width,
                start // WORD_BITS,
                words[rows],
                words[rows] if width is None else window[rows],
                counts[start:stop],
            )
