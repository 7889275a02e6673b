"""Encode: B = [x W_enc + b_enc > 0] and the rectangle's window [|pre| < w], packed.

With products of the package's own (``units``), of integers or of floats, the product, the
comparison and the packing are one pass in C++. Else the product of one chunk of columns is torch's
and stays in the cache: C++ reads it once, adds the bias and writes one bit an element of each. The
counts are made from the packed bits, a thirty-second of that traffic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bae_fast.backends.cpp.extension import op
from bae_fast.backends.cpp.units import encode_digits, operand
from bae_fast.ops.products import Preactivation, column_chunks
from bae_fast.packing import n_words

# a block of rows by the least chunk of columns, in fp32: 1 MiB
ROW_BLOCK = 8192


def encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, row_mask: Tensor | None, width: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, k = x.shape[0], W_enc.shape[1]
    words = torch.empty(n, n_words(k), dtype=torch.int32)
    window = torch.empty_like(words if width is not None else words[:0, 0])
    keep = None if row_mask is None else row_mask.contiguous()
    limit = 0.0 if width is None else width
    digits = encode_digits(x.dtype, n, k)
    done = digits > 0 and op("unit_encode")(
        operand(x, digits), operand(W_enc, digits), b_enc.float().contiguous(), keep, limit,
        digits, words, window,
    )  # fmt: skip
    narrow = x.dtype == torch.bfloat16 and W_enc.dtype == torch.float32
    if not done and narrow and op("unit_kind")() == 1:
        x = x.float()  # the weights as they are, as where integers are multiplied
    threshold = op("threshold")
    for top in range(0, 0 if done else n, ROW_BLOCK):
        rows = slice(top, min(top + ROW_BLOCK, n))
        preactivation = Preactivation(x[rows])
        memory = x.new_empty(0)
        for start, stop in column_chunks(rows.stop - top, k, 1, x.device):
            # without the bias, which torch would write to every row before it adds the product
            if not len(memory):
                memory = x.new_empty(
                    (rows.stop - top) * (stop - start), dtype=preactivation.x.dtype
                )
            pre, bias = preactivation.without_bias(W_enc[:, start:stop], b_enc[start:stop], memory)
            threshold(
                pre,
                bias,
                None if keep is None else keep[rows],
                limit,
                start,
                words[rows],
                window[rows] if width is not None else window,
            )
    counts = op("column_counts")(words, k)
    n_rows = torch.full((), n, dtype=torch.int64) if row_mask is None else row_mask.sum()
    return words, window, counts, n_rows
