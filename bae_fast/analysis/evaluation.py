"""Held-out evaluation of an autoencoder, the same for bits and for features with values.

Description length of a row, in bits: a code must say which features are on and what their values
are,

    bits = sum_j H2(p_j) + b L0,

p_j the share of held-out rows in which column j of the code is on, H2 the entropy of a bit, L0 the
mean number of features on, b the bits of a value (0 for codes of bits). The first term is what an
independent entropy coder of the active set needs. The b bits are really taken: ``fvu_quantized``
is that of values rounded to 2^b levels, evenly spaced between the least and the largest value that
the feature takes on training rows.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from bae_fast.analysis import metrics
from bae_fast.analysis.quantisers import quantize, value_ranges
from bae_fast.arguments import all_finite, check_int
from bae_fast.autoencoder import Autoencoder, as_code
from bae_fast.codes import BinaryCode
from bae_fast.devices import without_autocast
from bae_fast.normalization import check_rows

VALUE_BITS = 5

# what `Evaluation.summary` leaves out: no number for a table
_LARGE = ("code", "density", "spectrum")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an autoencoder does with rows it was not trained on.

    Attributes:
        fvu: fraction of variance unexplained of the target, sum (x - recon)^2 / sum (x - mean)^2,
            with values as they are.
        bits: description length of a row, see the module's text. For a code of bits it is its
            entropy, summed over columns and pooled over all rows.
        gaussian_bound_bits: rate of a Gaussian with the covariance of the target at this FVU
            (reverse water-filling): no code of Gaussian rows needs fewer bits; one of real rows
            may. Infinite where the FVU is 0.
        l0: mean ones in a row.
        dead_share, dense_share, always_on_share: shares of the columns that are never on, on in
            more than 10 %, and on in more than 90 % of the rows.
        max_density: the largest share of rows a column is on in.
        n_rows: rows evaluated.
        fvu_quantized: FVU with values of ``value_bits`` bits; ``fvu`` for codes of bits, None
            where no training rows were given.
        support_bits: the first term of ``bits``, the entropy of the active set.
        value_bits: bits of a value, 0 for codes of bits.
        code: which columns are on, ``[n, K]``.
        density: share of ones, float64 ``[K]``.
        spectrum: eigenvalues of the target's covariance, float64 ``[d_out]``.
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
    fvu_quantized: float | None
    support_bits: float
    value_bits: int
    code: BinaryCode
    density: Tensor
    spectrum: Tensor

    def summary(self) -> dict[str, Any]:
        """The numbers, for JSON; None for one that is not finite."""
        found = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in _LARGE
        }
        return {
            name: value if value is not None and math.isfinite(value) else None
            for name, value in found.items()
        }


def activity(code: BinaryCode) -> dict[str, float]:
    """How often columns are on: ``l0`` to ``max_density`` of :class:`Evaluation`."""
    density = code.density()
    histogram = metrics.density_histogram(density)
    return {
        "l0": (code.counts().sum().double() / code.n_rows()).item(),
        "dead_share": histogram.dead,
        "dense_share": histogram.dense,
        "always_on_share": histogram.always_on,
        "max_density": density.max().item(),
    }


@torch.no_grad()
@without_autocast()
def evaluate(
    model: Autoencoder,
    rows: Tensor,
    targets: Tensor | None = None,
    *,
    training_rows: Tensor | None = None,
    value_bits: int = VALUE_BITS,
) -> Evaluation:
    """Encode and decode rows in the module's own dtype, without autocast, and measure the code.

    Args:
        model: an autoencoder; one with values in eval mode (else BatchTopK looks at batches).
        rows: raw hidden states ``[n, d_in]``, any floating dtype, n >= 2; read in blocks.
        targets: ``[n, d_out]``, of a transcoder.
        training_rows: ``[m, d_in]``, from which the quantiser of values takes its ranges; a code
            of bits needs none.
        value_bits: bits of a value, 0 to 16; ignored for codes of bits.

    Raises:
        TypeError: rows that are no tensor of floats.
        ValueError: rows of another width, fewer than two, rows that hold NaN or Inf, a model in
            training mode, targets missing, not wanted or of another length, or value_bits out of
            range.
    """
    check_rows("rows", rows, model.d_in, least=2)
    binary = model.is_binary
    if model.training and not binary:
        raise ValueError("model must be in eval mode: call model.eval() first")
    if model.is_transcoder != (targets is not None):
        raise ValueError(
            f"targets must {'be given' if model.is_transcoder else 'be None'}: d_out decides"
        )
    goals = rows if targets is None else targets
    if targets is not None:
        check_rows("targets", targets, model.d_out)
        if len(targets) != len(rows):
            raise ValueError(f"targets must have {len(rows)} rows; got {len(targets)}")
    check_int("value_bits", value_bits, 0, 16)
    ranges = None
    if training_rows is not None and not binary:
        check_rows("training_rows", training_rows, model.d_in)
        ranges = value_ranges(model, training_rows)
    error, quantized = metrics.FVUAccumulator(), metrics.FVUAccumulator()
    codes, first = [], 0
    for block in model.blocks(rows, dense=not binary):
        goal = model.as_own(goals[first : first + len(block)])
        if not (all_finite(block) and all_finite(goal)):
            finite = block.isfinite().all(1) & goal.isfinite().all(1)
            row = first + int((~finite).int().argmax())
            raise ValueError(f"rows (and targets) must be finite; got NaN or Inf in row {row}")
        features = model.encode(block)
        error.update(goal, model.decode(features))
        if ranges is not None and isinstance(features, Tensor):
            quantized.update(goal, model.decode(quantize(features, *ranges, value_bits)))
        codes.append(as_code(features))
        first += len(block)
    code = BinaryCode.cat(codes)
    measured = activity(code)
    fvu, support = error.compute(), code.entropy().item()
    fvu_quantized = None if ranges is None else quantized.compute()
    if binary:
        value_bits, fvu_quantized = 0, fvu
    spectrum = metrics.covariance_eigenvalues(goals)
    # rows of few values can come back without an error
    bound = float(metrics.gaussian_rate_distortion_bits(spectrum, fvu)) if fvu else math.inf
    return Evaluation(
        fvu=fvu,
        bits=support + value_bits * measured["l0"],
        gaussian_bound_bits=bound,
        **measured,
        n_rows=len(rows),
        fvu_quantized=fvu_quantized,
        support_bits=support,
        value_bits=value_bits,
        code=code,
        density=code.density(),
        spectrum=spectrum,
    )
