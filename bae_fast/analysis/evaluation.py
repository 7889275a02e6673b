"""Held-out evaluation of a Binary Autoencoder."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from bae_fast.analysis import metrics
from bae_fast.codes import BinaryCode
from bae_fast.model import BinaryAutoencoder

# rows reconstructed at a time
_ROW_BLOCK = 8192


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a code does with rows it was not trained on.

    Attributes:
        fvu: fraction of variance unexplained, sum (x - recon)^2 / sum (x - mean)^2.
        bits: entropy of the code in bits a row, summed over columns, pooled over all rows.
        gaussian_bound_bits: rate of a Gaussian with the covariance of the rows evaluated, at this
            FVU (reverse water-filling): no code of Gaussian rows needs fewer bits; one of real
            rows may.
        l0: mean ones in a row.
        dead_share, dense_share, always_on_share: of the columns; never on, on in more than 10 %,
            on in more than 90 % of the rows.
        max_density: the largest share of rows a column is on in.
        n_rows: rows evaluated.
        code: their code, ``[n, K]``.
        density: share of ones, float64 ``[K]``.
        spectrum: eigenvalues of the rows' covariance, float64 ``[d_in]``.
    """

    fvu: float
    bits: float
    gaussian_bound_bits: float
    l0: float
    dead_share: float
    dense_share: float
    always_on_share: float
    max_density: float
    n_rows: int
    code: BinaryCode
    density: Tensor
    spectrum: Tensor

    def summary(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("code", "density", "spectrum")
        }


def activity(code: BinaryCode) -> dict[str, float]:
    """How often columns are on: ``l0`` to ``max_density`` of :class:`Evaluation`."""
    density = code.density()
    histogram = metrics.density_histogram(density)
    return {
        "l0": code.l0().double().mean().item(),
        "dead_share": histogram.dead,
        "dense_share": histogram.dense,
        "always_on_share": histogram.always_on,
        "max_density": density.max().item(),
    }


@torch.no_grad()
def evaluate(bae: BinaryAutoencoder, rows: Tensor) -> Evaluation:
    """Encode and decode rows in the module's own dtype and measure the code.

    Args:
        rows: raw hidden states ``[n, d_in]``, any floating dtype, n >= 2; read in blocks.

    Raises:
        ValueError: rows of another width, fewer than two, or a transcoder.
    """
    if bae.is_transcoder:
        raise ValueError("evaluate needs d_out=None: a transcoder is judged against its target")
    error = metrics.FVUAccumulator()
    codes = []
    for block in rows.split(_ROW_BLOCK):
        block = block.to(bae.W_enc.device, bae.W_enc.dtype)
        code = bae.encode(block)
        error.update(block, bae.decode(code))
        codes.append(code)
    code = BinaryCode.cat(codes)
    spectrum = metrics.covariance_eigenvalues(rows)
    fvu = error.compute()
    return Evaluation(
        fvu=fvu,
        bits=code.entropy().item(),
        gaussian_bound_bits=float(metrics.gaussian_rate_distortion_bits(spectrum, fvu)),
        **activity(code),
        n_rows=len(rows),
        code=code,
        density=code.density(),
        spectrum=spectrum,
    )
