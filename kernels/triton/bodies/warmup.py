"""Compiling ahead of the first step: small steps of every kind, with every default tile size."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from bae_fast.kernels.bodies.covariance import covariance
from bae_fast.kernels.bodies.decode import decode, decoder_backward
from bae_fast.kernels.bodies.encode import encode
from bae_fast.kernels.bodies.encoder_backward import encoder_backward
from bae_fast.kernels.covariance import INT32_ROWS
from bae_fast.kernels.launch import INTERPRETED, table_entry
from bae_fast.ops.products import raw

# x and parameters: alike, or parameters in fp32 under autocast
_DTYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
)
# a row of 32 and of 33 words: strides that are a multiple of 16, and that are not
_COLUMNS = (1024, 1056)
_ENTRIES = (0, 1)
_ROWS, _WIDTH = 64, 64


def warmup(kernels: Any, device: torch.device) -> None:
    """Run on ``device`` what any step with d and K in multiples of 16 runs."""
    if INTERPRETED:
        return  # nothing is compiled
    for entry, (dtype, kind), k in itertools.product(_ENTRIES, _DTYPES, _COLUMNS):
        with table_entry(entry):
            _step(torch.zeros(_ROWS, _WIDTH, dtype=dtype, device=device), kernels, kind, k)


@raw
def _step(x: Tensor, kernels: Any, kind: torch.dtype, k: int) -> None:
    """One forward and backward of everything, with parameters of dtype ``kind``."""
    W_enc, b_enc = x.new_zeros(_WIDTH, k, dtype=kind), x.new_zeros(k, dtype=kind)
    W_dec, b_dec = x.new_zeros(k, _WIDTH, dtype=kind), x.new_zeros(_WIDTH, dtype=kind)
    grad = torch.zeros_like(x)
    encode(x, W_enc, b_enc, None, None)
    words, window, counts, n_rows = encode(x, W_enc, b_enc, None, 0.25)
    decode(words, W_dec, b_dec, 1, x.dtype)
    decoder_backward(words, grad, k, 1, kind)
    many = words.new_zeros(INT32_ROWS, words.shape[1])
    for rows in (words, many):
        covariance(kernels, rows, counts, n_rows, False)
        _, signs = covariance(kernels, rows, counts, n_rows, True)
        for planes, gradient in itertools.product((signs, None), (grad, None)):
            encoder_backward(
                kernels, x, W_enc, b_enc, W_dec, words, window, None, gradient, None, None,
                x.new_zeros((), dtype=torch.float32), planes, rows, counts, n_rows,
                "rectangle", 0.25, 1, [True, True, True],
            )  # fmt: skip
