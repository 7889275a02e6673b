"""The contract of the raw operators: schema and fake of each, shared by every backend.

Operator ``encode`` of backend ``torch`` is ``torch.ops.bae_fast.encode.torch``: one operator,
one overload a backend, all of the same schema. A backend gives bodies and nothing else (see
:func:`define`). The operators are private: they carry no gradient, and callers go through
:mod:`bae_fast.functional`, which owns the one autograd Function and checks arguments.

Shapes: x [N, d], W_enc [d, K], b_enc [K], W_dec [F, d_out], K = k F with k = ``n_bits``; words
and window are row-packed int32 [N, ceil(K/32)]; signs is int32 [2, K, ceil(K/32)], the planes
[V > 0] and [V < 0]. x has the compute dtype; parameters may be wider (autocast) and gradients
come back in the parameters' own dtype. An absent tensor result has zero elements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bae_fast.packing import n_words

NAMESPACE = "bae_fast"

SCHEMAS = {
    # B = [x W_enc + b_enc > 0], zero in rows where row_mask is False; window = [|pre| < width]
    # when width is given; counts int64 [K] and n_rows int64 [] of the rows kept.
    "encode": (
        "(Tensor x, Tensor W_enc, Tensor b_enc, Tensor? row_mask, float? width)"
        " -> (Tensor words, Tensor window, Tensor counts, Tensor n_rows)"
    ),
    # value(B) W_dec + b_dec in `dtype`, summed in fp32 or wider.
    "decode": "(Tensor words, Tensor W_dec, Tensor b_dec, int n_bits, ScalarType dtype) -> Tensor",
    # numerator = sum_{i != j} |N n_ij - n_i n_j|, int64 []; signs when keep_signs. Two forms give
    # the same integers. By bits: F^2 N products of bits. By lists: pairs that are never on together
    # are known in closed form, the rest is counted in sum_r l_r^2 steps (l_r ones in row r). A body
    # chooses by that sum. By lists no planes are made, so signs has no elements though keep_signs
    # asks for them; with keep_lists it may be [m] instead, the lists of these rows, which are for
    # encoder_backward of the same backend. A caller that traces, where a shape is one, passes False
    # for both. A body on a device that is not read back returns both shapes as the fake does, and
    # chooses again in backward.
    "covariance": (
        "(Tensor words, Tensor counts, Tensor n_rows, bool keep_signs, bool keep_lists=False)"
        " -> (Tensor numerator, Tensor signs)"
    ),
    # H in bits and D = numerator / (N (N - 1)), zero where there is no numerator, `dtype []` each.
    "terms": (
        "(Tensor counts, Tensor n_rows, Tensor? numerator, ScalarType dtype)"
        " -> (Tensor entropy, Tensor covariance)"
    ),
    # grad_entropy dH/dB, the same number in every row of a column: `dtype [K]`.
    "slopes": "(Tensor counts, Tensor n_rows, Tensor grad_entropy, ScalarType dtype) -> Tensor",
    # value(B)^T grad_recon and the column sums of grad_recon, in `dtype`.
    "decoder_backward": (
        "(Tensor words, Tensor grad_recon, int n_columns, int n_bits, ScalarType dtype)"
        " -> (Tensor grad_W_dec, Tensor grad_b_dec)"
    ),
    # Gradient of x, W_enc, b_enc (those asked for by `needs`), given the gradient of recon, a
    # gradient per column (entropy), a curvature c per column (it adds c (1 - 2 b) at a bit b) and
    # the scale of dD/dB; the statistics are inputs. signs may be absent while stats_words is
    # there: then pairs are counted again, in whichever form is faster for these rows. The rows at
    # hand may be others than those counted. The covariance's part at row r, column i is
    #     scale (N (B S)_ri - (n^T S)_i),   with Q = S + 1 where n_ij > 0, zero elsewhere and
    #     (B S)_ri = -(l_r - B_ri) + (B Q)_ri,   (n^T S)_i = -(M - n_i) + (n^T Q)_i
    # over columns that are not constant in the counted rows; S and both terms are zero for others.
    # Both terms are exact integers, so the form changes no bit of the result.
    "encoder_backward": (
        "(Tensor x, Tensor W_enc, Tensor b_enc, Tensor W_dec, Tensor words, Tensor window,"
        " Tensor? row_mask, Tensor? grad_recon, Tensor? grad_columns, Tensor? curvature,"
        " Tensor? grad_covariance, Tensor? signs, Tensor? stats_words, Tensor stats_counts,"
        " Tensor stats_n_rows,"
        " str surrogate, float width, int n_bits, bool[] needs)"
        " -> (Tensor grad_x, Tensor grad_W_enc, Tensor grad_b_enc)"
    ),
}


class EncoderBackward(NamedTuple):
    """What ``encoder_backward`` is given, in the order of its schema."""

    x: Tensor
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    words: Tensor
    window: Tensor
    row_mask: Tensor | None
    grad_recon: Tensor | None
    grad_columns: Tensor | None
    curvature: Tensor | None
    grad_covariance: Tensor | None
    signs: Tensor | None
    stats_words: Tensor | None
    stats_counts: Tensor
    stats_n_rows: Tensor
    surrogate: str
    width: float
    n_bits: int
    needs: list[bool]


def _fake_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, row_mask: Tensor | None, width: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, k = x.shape[0], W_enc.shape[1]
    words = x.new_empty((n, n_words(k)), dtype=torch.int32)
    window = torch.empty_like(words) if width is not None else x.new_empty(0, dtype=torch.int32)
    counts = x.new_empty(k, dtype=torch.int64)
    return words, window, counts, x.new_empty((), dtype=torch.int64)


def _fake_decode(
    words: Tensor, W_dec: Tensor, b_dec: Tensor, n_bits: int, dtype: torch.dtype
) -> Tensor:
    return W_dec.new_empty((words.shape[0], W_dec.shape[1]), dtype=dtype)


def _fake_covariance(
    words: Tensor, counts: Tensor, n_rows: Tensor, keep_signs: bool, keep_lists: bool = False
) -> tuple[Tensor, Tensor]:
    k = counts.shape[0]
    signs = words.new_empty((2, k, n_words(k)) if keep_signs else 0)
    return words.new_empty((), dtype=torch.int64), signs


def _fake_terms(
    counts: Tensor, n_rows: Tensor, numerator: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return counts.new_empty((), dtype=dtype), counts.new_empty((), dtype=dtype)


def _fake_slopes(
    counts: Tensor, n_rows: Tensor, grad_entropy: Tensor, dtype: torch.dtype
) -> Tensor:
    return counts.new_empty(counts.shape, dtype=dtype)


def _fake_decoder_backward(
    words: Tensor, grad_recon: Tensor, n_columns: int, n_bits: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    d_out = grad_recon.shape[1]
    return (
        grad_recon.new_empty((n_columns // n_bits, d_out), dtype=dtype),
        grad_recon.new_empty(d_out, dtype=dtype),
    )


def _fake_encoder_backward(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    needs = args[-1]
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format) if needs[0] else x.new_empty(0),
        W_enc.new_empty(W_enc.shape if needs[1] else 0),
        b_enc.new_empty(b_enc.shape if needs[2] else 0),
    )


FAKES: dict[str, Callable[..., Any]] = {
    "encode": _fake_encode,
    "decode": _fake_decode,
    "covariance": _fake_covariance,
    "terms": _fake_terms,
    "slopes": _fake_slopes,
    "decoder_backward": _fake_decoder_backward,
    "encoder_backward": _fake_encoder_backward,
}

_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def define(backend: str) -> None:
    """Define every operator's overload for ``backend``, with its fake and without a body."""
    for name, schema in SCHEMAS.items():
        overload = f"{name}.{backend}"
        _LIBRARY.define(overload + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{NAMESPACE}::{overload}", FAKES[name], lib=_LIBRARY)
        # autograd passes over it; otherwise floating results would ask for a gradient and warn
        _LIBRARY.impl(overload, torch.library.fallthrough_kernel, "Autograd")


def implement(backend: str, bodies: dict[str, Callable[..., Any]], key: str) -> None:
    """Register Python bodies for ``backend`` under a dispatch key.

    Raises:
        ValueError: an operator of the contract has no body, or a body has no operator.
    """
    if bodies.keys() != SCHEMAS.keys():
        raise ValueError(
            f"backend {backend!r} must implement {sorted(SCHEMAS)}; got {sorted(bodies)}"
        )
    for name, body in bodies.items():
        _LIBRARY.impl(f"{name}.{backend}", body, key)


def overloads(backend: str) -> dict[str, Any]:
    """The callable operators of one backend, by name."""
    namespace = getattr(torch.ops, NAMESPACE)
    return {name: getattr(getattr(namespace, name), backend) for name in SCHEMAS}
