"""Held-out evaluation of a baseline, in the same terms as that of a Binary Autoencoder.

Description length of a row, in bits: a code must say which features are on and what their values
are,

    bits = sum_j H2(p_j) + b L0,

p_j the share of held-out rows in which feature j is on, H2 the entropy of a bit, L0 the mean
number of features on, b the bits of a value (0 for codes of bits). The first term is what an
independent entropy coder of the active set needs, and is the same sum as the entropy of a binary
code. The b bits are really taken: ``fvu_quantized`` is that of values rounded to 2^b levels,
evenly spaced between the least and the largest value that the feature takes on training rows.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from bae_fast.analysis import metrics
from bae_fast.analysis.evaluation import activity
from bae_fast.baselines.model import SparseAutoencoder
from bae_fast.codes import BinaryCode

VALUE_BITS = 5

# elements of features held at a time
_CHUNK_ELEMENTS = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class SparseEvaluation:
    """What a baseline does with rows it was not trained on.

    Attributes:
        fvu: fraction of variance unexplained of the target, with values as they are.
        fvu_quantized: the same with values of ``value_bits`` bits; equal for codes of bits.
        bits: description length of a row, see the module's text.
        support_bits: its first term, the entropy of the active set.
        value_bits: bits of a value.
        gaussian_bound_bits: rate of a Gaussian with the covariance of the target at ``fvu``.
        l0: mean features on in a row.
        dead_share, dense_share, always_on_share: of the features; never on, on in more than
            10 %, on in more than 90 % of the rows.
        max_density: the largest share of rows a feature is on in.
        n_rows: rows evaluated.
    """

    fvu: float
    fvu_quantized: float
    bits: float
    support_bits: float
    value_bits: int
    gaussian_bound_bits: float
    l0: float
    dead_share: float
    dense_share: float
    always_on_share: float
    max_density: float
    n_rows: int

    def summary(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        return dataclasses.asdict(self)


def _blocks(model: SparseAutoencoder, rows: Tensor) -> list[Tensor]:
    return list(rows.split(max(_CHUNK_ELEMENTS // model.config.d_sae, 1)))


def _value_ranges(model: SparseAutoencoder, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The least and largest positive value of every feature over rows; 0, 0 where never on."""
    f = model.config.d_sae
    low = torch.full((f,), torch.inf, **model.dtype_and_device)
    high = torch.zeros(f, **model.dtype_and_device)
    for block in _blocks(model, rows):
        features = model.encode(block.to(**model.dtype_and_device))
        high = torch.maximum(high, features.amax(0))
        low = torch.minimum(low, torch.where(features > 0, features, torch.inf).amin(0))
    return torch.where(high > 0, low, 0), high


def quantize(features: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Positive values to the middle of one of 2^bits even steps between low and high; 0 stays.

    Args:
        features: ``[..., F]``, none negative.
        low, high: ``[F]``; values outside go to the nearest level.
    """
    step = (high - low) / 2**bits
    index = ((features - low) / step.clamp_min(1e-30)).floor().clamp(0, 2**bits - 1)
    return torch.where(features > 0, low + (index + 0.5) * step, 0)


@torch.no_grad()
def evaluate_baseline(
    model: SparseAutoencoder,
    rows: Tensor,
    targets: Tensor | None = None,
    *,
    training_rows: Tensor,
    value_bits: int = VALUE_BITS,
) -> SparseEvaluation:
    """Encode and decode rows in the module's own dtype and measure the code.

    Args:
        model: in eval mode.
        rows: raw hidden states ``[n, d_in]``, any floating dtype, n >= 2; read in blocks.
        targets: ``[n, d_out]``, of a transcoder.
        training_rows: ``[m, d_in]``, from which the quantiser takes its ranges.
        value_bits: bits of a value, 0 to 16; ignored for codes of bits.

    Raises:
        ValueError: a model in training mode (BatchTopK would look at whole batches), targets
            missing, not wanted or of another length, or value_bits out of range.
    """
    if model.training:
        raise ValueError("model must be in eval mode: call model.eval() first")
    if model.is_transcoder != (targets is not None):
        raise ValueError(
            f"targets must {'be given' if model.is_transcoder else 'be None'}: d_out decides"
        )
    goals = rows if targets is None else targets
    if len(goals) != len(rows):
        raise ValueError(f"targets must have {len(rows)} rows; got {len(goals)}")
    if not 0 <= value_bits <= 16:
        raise ValueError(f"value_bits must lie in [0, 16]; got {value_bits!r}")
    if model.binary:
        value_bits = 0
    low, high = _value_ranges(model, training_rows)
    error, quantized = metrics.FVUAccumulator(), metrics.FVUAccumulator()
    codes = []
    pairs = zip(_blocks(model, rows), _blocks(model, goals), strict=True)
    for block, goal in pairs:
        goal = goal.to(**model.dtype_and_device)
        features = model.encode(block.to(**model.dtype_and_device))
        error.update(goal, model.decode(features))
        if not model.binary:
            rounded = quantize(features, low, high, value_bits)
            quantized.update(goal, model.decode(rounded))
        codes.append(BinaryCode.from_dense(features > 0))
    code = BinaryCode.cat(codes)
    measured = activity(code)
    fvu = error.compute()
    support = code.entropy().item()
    spectrum = metrics.covariance_eigenvalues(goals)
    return SparseEvaluation(
        fvu=fvu,
        fvu_quantized=fvu if model.binary else quantized.compute(),
        bits=support + value_bits * measured["l0"],
        support_bits=support,
        value_bits=value_bits,
        gaussian_bound_bits=float(metrics.gaussian_rate_distortion_bits(spectrum, fvu)),
        **measured,
        n_rows=len(rows),
    )
