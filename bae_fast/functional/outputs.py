"""What the functions give."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from bae_fast.codes import BinaryCode


class BAEOutput(NamedTuple):
    """What one forward pass gives.

    Attributes:
        recon: ``[..., d_out]`` in the compute dtype (autocast's where that is active).
        entropy: ``[]``, H in bits, summed over columns; float32 (float64 for float64 input).
        covariance: ``[]``, D, of the same dtype as entropy; None unless ``covariance=True``.
        code: the bits, packed; no gradient.
        variance: ``[]``, sum over rows and columns of |dv/db W_dec|^2 b (1 - b): zero in value,
            see ``multilinear`` in :func:`binary_autoencoder`; None where it was not asked for.
    """

    recon: Tensor
    entropy: Tensor
    covariance: Tensor | None
    code: BinaryCode
    variance: Tensor | None = None


class Encoded(NamedTuple):
    """Rows that are encoded already, see :func:`encode_rows`; no gradient.

    Attributes:
        words: int32 ``[n, ceil(K/32)]``, the bits, row-packed.
        window: the same shape, the packed window of the ``rectangle`` surrogate; empty else.
        counts: int64 ``[K]``, ones in each column of the rows kept.
        n_rows: int64 ``[]``, the rows kept.
    """

    words: Tensor
    window: Tensor
    counts: Tensor
    n_rows: Tensor
