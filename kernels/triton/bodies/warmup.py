"""Compiling ahead of the first step: small steps of every kind, with every default tile size."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bae_fast.kernels.bits import feature_packed
from bae_fast.kernels.bodies.covariance import covariance
from bae_fast.kernels.bodies.decode import decode, decoder_backward
from bae_fast.kernels.bodies.encode import encode
from bae_fast.kernels.bodies.encoder_backward import encoder_backward
from bae_fast.kernels.bodies.terms import slopes
from bae_fast.kernels.bodies.terms import terms as numbers
from bae_fast.kernels.covariance import INT32_ROWS
from bae_fast.kernels.launch import INTERPRETED, table_entry
from bae_fast.kernels.pair_lists import PairLists, WindowSigns
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


def warmup(
    kernels: Any, device: torch.device, surrogates: Sequence[str], multilinear: bool
) -> None:
    """Run on ``device`` what any step with d and K in multiples of 16 runs.

    Args:
        surrogates: the surrogates of the steps; each has compiled kernels of its own.
        multilinear: whether steps with that term are run too.
    """
    if INTERPRETED:
        return  # nothing is compiled
    terms = tuple(itertools.product(surrogates, (False, True)[: 1 + multilinear]))
    for entry, (dtype, kind), k in itertools.product(_ENTRIES, _DTYPES, _COLUMNS):
        with table_entry(entry):
            x = torch.zeros(_ROWS, _WIDTH, dtype=dtype, device=device)
            _step(x, kernels, kind, k, terms)


@raw
def _step(
    x: Tensor, kernels: Any, kind: torch.dtype, k: int, terms: Sequence[tuple[str, bool]]
) -> None:
    """One forward and backward of everything, with parameters of dtype ``kind``."""
    W_enc, b_enc = x.new_zeros(_WIDTH, k, dtype=kind), x.new_zeros(k, dtype=kind)
    W_dec, b_dec = x.new_zeros(k, _WIDTH, dtype=kind), x.new_zeros(_WIDTH, dtype=kind)
    grad = torch.zeros_like(x)
    encode(x, W_enc, b_enc, None, None)
    words, window, counts, n_rows = encode(x, W_enc, b_enc, None, 0.25)
    decode(words, W_dec, b_dec, 1, x.dtype)
    decoder_backward(words, grad, k, 1, kind)
    many = words.new_zeros(INT32_ROWS, words.shape[1])
    scale = x.new_zeros((), dtype=torch.float32)
    every = [True, True, True]
    for rows in (words, many):
        covariance(kernels, rows, counts, n_rows, False)
        _, signs = covariance(kernels, rows, counts, n_rows, True)
        for planes in (signs, None):
            encoder_backward(
                kernels, x, W_enc, b_enc, W_dec, words, window, None, grad, None, None, scale,
                planes, rows, counts, n_rows, terms[0][0], 0.25, 1, every,
            )  # fmt: skip
    for numerator in (None, n_rows):
        numbers(counts, n_rows, numerator, torch.float32)
    slopes(counts, n_rows, scale, torch.float32)
    pairs = PairLists(words, feature_packed(words, k), counts, n_rows)  # of wide codes alone
    _, planes = kernels.covariance(pairs.by_feature.lines, counts, n_rows, True, len(words))
    for signs_of in (planes, planes[:, :0]):
        pairs.settle(torch.zeros_like(n_rows), signs_of)
    WindowSigns(pairs, words, window, scale).add_to(torch.empty(len(x), k, device=x.device), 0)
    columns = x.new_zeros(k, dtype=torch.float32)
    for (surrogate, curved), gradient, spread in itertools.product(
        terms, (grad, None), (scale, None)
    ):
        encoder_backward(
            kernels, x, W_enc, b_enc, W_dec, words, window, None, gradient, columns,
            columns if curved else None, spread, signs, words, counts, n_rows, surrogate, 0.25, 1,
            every,
        )  # fmt: skip
