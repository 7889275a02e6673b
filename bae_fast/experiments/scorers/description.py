"""Bits a row under one and the same coder for every method, with the values' best precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bae_fast.analysis.description import CODERS, description_length
from bae_fast.analysis.metrics import (
    FVUAccumulator,
    covariance_eigenvalues,
    gaussian_rate_distortion_bits,
)
from bae_fast.analysis.quantisers import quantize, value_ranges
from bae_fast.autoencoder import Autoencoder, as_code
from bae_fast.codes import BinaryCode
from bae_fast.experiments.data import N_HELDOUT
from bae_fast.experiments.scorers import Column, Context, Scorer

ORDER = -1

# bits of a value that are tried
VALUE_BITS = tuple(range(1, 9))


def make(context: Context) -> list[Scorer]:
    """One scorer, unless the configuration leaves it out."""
    if not context.config.description:
        return []

    def score(model: Any, method: str, _k: int | None, _seed: int) -> dict[str, Any]:
        return describe(model, *rows_of(context, method))

    columns = [
        Column("value_bits", "bits a value", "{:.0f}"),
        Column("fvu", "FVU with these", "{:.4f}"),
        Column("columns", "bits, independent columns", "{:.0f}"),
        Column("tree", "bits, tree", "{:.0f}"),
    ]
    settings = {"coders": list(CODERS), "value_bits": list(VALUE_BITS)}
    return [Scorer("description", settings, score, columns)]


class Precision(NamedTuple):
    """How precisely a method's values are written.

    Attributes:
        bits: the number of bits that is best for the method; 0 for a code of bits.
        fvu: the FVU at every number that was tried.
        ranges: the least and the largest value of each feature; None for a code of bits.
        l0: features on in a row, mean of the held-out rows.
    """

    bits: int
    fvu: dict[int, float]
    ranges: tuple[Tensor, Tensor] | None
    l0: float


@torch.no_grad()
def value_precision(
    model: Autoencoder,
    train: Tensor,
    held: Tensor,
    target: Tensor,
    sizes: Sequence[int] = VALUE_BITS,
) -> Precision:
    """The number of bits of a value that is best for a model, and the errors at all that are tried.

    At the best one the whole code lies least above the rate that Gaussian rows need at the error
    that is left: neither few bits at a large error nor a small error at many bits is the aim in
    itself.

    Args:
        model, train, held, target: see :func:`describe`.
        sizes: numbers of bits that are tried.
    """
    if model.is_binary:
        sizes, ranges = (0,), None
    else:
        ranges = value_ranges(model, train)
    errors = {bits: FVUAccumulator() for bits in sizes}
    first, on = 0, 0.0
    for block in model.blocks(held):
        goal = model.as_own(target[first : first + len(block)])
        first += len(block)
        features = model.encode(block)
        on += float(as_code(features).l0().sum(dtype=torch.float64))
        for bits, error in errors.items():
            rounded = features
            if ranges is not None and isinstance(features, Tensor):
                rounded = quantize(features, *ranges, bits)
            error.update(goal, model.decode(rounded))
    l0 = on / max(first, 1)
    fvu = {bits: error.compute() for bits, error in errors.items()}
    spectrum = covariance_eigenvalues(target)

    def excess(bits: int) -> float:
        # an error beyond that of the mean needs no bit at all
        return bits * l0 - float(gaussian_rate_distortion_bits(spectrum, fvu[bits]))

    return Precision(min(sizes, key=excess), fvu, ranges, l0)


@torch.no_grad()
def describe(model: Autoencoder, train: Tensor, held: Tensor, target: Tensor) -> dict[str, Any]:
    """Description length of held-out rows under coders fitted to training rows.

    Values are rounded to the number of bits, 1 to 8, that :func:`value_precision` finds best.

    Args:
        model: the autoencoder, in eval mode.
        train, held: raw rows ``[n, d_in]`` and ``[m, d_in]``.
        target: ``[m, d_out]``, what is reconstructed.

    Returns:
        ``columns`` and ``tree``, bits a row; of each the part that says which features are on
        (``_support``) and what the coder itself takes, once (``_model_bits``); ``value_bits``, the
        ``fvu`` at them, the FVU at all that were tried, and ``l0``.
    """
    precision = value_precision(model, train, held, target)
    code, fitted_to = (
        BinaryCode.cat(as_code(model.encode(block)) for block in model.blocks(rows))
        for rows in (held, train)
    )
    l0, best, fvu = precision.l0, precision.bits, precision.fvu
    found: dict[str, Any] = {"l0": l0, "value_bits": best, "fvu": fvu[best]}
    found["fvu_by_value_bits"] = {str(bits): value for bits, value in fvu.items()}
    for coder in CODERS:
        length = description_length(code, coder, fitted_to=fitted_to)
        found[coder] = length.bits + best * l0
        found |= {f"{coder}_support": length.bits, f"{coder}_model_bits": length.model_bits}
    return found


def rows_of(context: Context, method: str) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs that a method was trained on, held-out inputs and held-out targets."""
    if method == "transcoder":
        pair = context.pair
        return pair["x_train"], pair["x_heldout"], pair["y_heldout"]
    rows, split = context.cache.rows, context.cache.split(N_HELDOUT)
    held = rows[split.heldout.start : split.heldout.stop]
    return rows[split.train.start : split.train.stop], held, held
