"""Bits a row under one and the same coder for every method, with the values' best precision."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bae_fast.analysis.description import CODERS, description_length
from bae_fast.analysis.evaluation import activity
from bae_fast.analysis.metrics import (
    FVUAccumulator,
    covariance_eigenvalues,
    gaussian_rate_distortion_bits,
)
from bae_fast.analysis.quantisers import ValueCounts, quantize, value_ranges
from bae_fast.autoencoder import Autoencoder, as_code
from bae_fast.codes import BinaryCode
from bae_fast.experiments.scorers import Column, Context, Scorer
from bae_fast.spacing import evenly

ORDER = -1

# bits of a value that are tried
VALUE_BITS = tuple(range(1, 9))


def make(context: Context) -> list[Scorer]:
    """One scorer, unless the configuration leaves it out."""
    if not context.config.description:
        return []

    def score(model: Any, method: str, _k: int | None, _seed: int) -> dict[str, Any]:
        train, _, _ = rows_of(context, method)
        return describe(model, train, precision_of(context, model, method))

    columns = [
        Column("value_bits", "bits a value", "{:.0f}"),
        Column("fvu", "FVU with these", "{:.4f}"),
        Column("columns", "bits, independent columns", "{:.0f}"),
        Column("tree", "bits, tree", "{:.0f}"),
    ]
    settings = {"coders": list(CODERS), "value_bits": list(VALUE_BITS), "values": "coded"}
    return [Scorer("description", settings, score, columns)]


class Precision(NamedTuple):
    """How precisely a method's values are written.

    Attributes:
        bits: the number of bits that is best for the method; 0 for a code of bits.
        fvu: the FVU at every number that was tried.
        values: bits a row that the values take at each, by the shares of their steps in the
            training rows; about the number times ``l0`` where all steps are as likely.
        ranges: the least and the largest value of each feature; None for a code of bits.
        code: which features are on in the held-out rows.
        l0: their number in a row, mean of these rows.
    """

    bits: int
    fvu: dict[int, float]
    values: dict[int, float]
    ranges: tuple[Tensor, Tensor] | None
    code: BinaryCode
    l0: float


def precision_of(context: Context, model: Autoencoder, method: str) -> Precision:
    """:func:`value_precision` of a method's model, found once for all scorers."""
    return context.once(
        model, "precision", lambda: value_precision(model, *rows_of(context, method))
    )


@torch.no_grad()
def value_precision(model: Autoencoder, train: Tensor, held: Tensor, target: Tensor) -> Precision:
    """The number of bits of a value, 1 to 8, that is best for a model, and the error at each.

    At the best one the whole code lies least above the rate that Gaussian rows need at the error
    that is left: neither few bits at a large error nor a small error at many bits is the aim in
    itself.

    Args:
        model: the autoencoder, in eval mode.
        train, held: raw rows ``[n, d_in]`` and ``[m, d_in]``.
        target: ``[m, d_out]``, what is reconstructed.
    """
    ranges = None if model.is_binary else value_ranges(model, train)
    sizes = VALUE_BITS if ranges is not None else (0,)
    errors = {bits: FVUAccumulator() for bits in sizes}
    fitted, charged = (
        {} if ranges is None else {bits: ValueCounts(*ranges, bits) for bits in sizes}
        for _ in range(2)
    )
    for block in model.blocks(train) if fitted else ():
        values_of = model.activations(block)
        for counts in fitted.values():
            counts.add(values_of)
    first, codes = 0, []
    for block in model.blocks(held):
        goal = model.as_own(target[first : first + len(block)])
        first += len(block)
        features = model.encode(block)
        codes.append(as_code(features))
        for bits, error in errors.items():
            rounded = features
            if ranges is not None and isinstance(features, Tensor):
                rounded = quantize(features, *ranges, bits)
                charged[bits].add(features.reshape(-1, features.shape[-1]))
            error.update(goal, model.decode(rounded))
    code = BinaryCode.cat(codes)
    l0 = float(code.l0().sum(dtype=torch.float64)) / len(code)
    fvu = {bits: error.compute() for bits, error in errors.items()}
    values = {bits: fitted[bits].bits_of(charged[bits]) / len(code) for bits in fitted} or {0: 0.0}
    spectrum = covariance_eigenvalues(target)

    def excess(bits: int) -> float:
        # an error beyond that of the mean needs no bit at all
        return values[bits] - float(gaussian_rate_distortion_bits(spectrum, fvu[bits]))

    return Precision(min(sizes, key=excess), fvu, values, ranges, code, l0)


@torch.no_grad()
def describe(model: Autoencoder, train: Tensor, precision: Precision) -> dict[str, Any]:
    """Description length of held-out rows under coders fitted to training rows.

    Args:
        model: the autoencoder, in eval mode.
        train: raw rows ``[n, d_in]``.
        precision: :func:`value_precision` of the model: the held-out rows' code, and the number of
            bits that values are rounded to.

    Returns:
        ``columns`` and ``tree``, bits a row; of each the part that says which features are on
        (``_support``) and what the coder itself takes, once (``_model_bits``); ``value_bits``, the
        ``fvu`` at them, the FVU and the values' bits a row at all that were tried, and ``l0``; and
        of the training rows, of which there are more, the shares of features that are never on in
        them (``fitted_dead_share``) and on in more than a tenth (``fitted_dense_share``).
    """
    fitted_to = BinaryCode.cat(as_code(model.encode(block)) for block in model.blocks(train))
    l0, best, fvu = precision.l0, precision.bits, precision.fvu
    found: dict[str, Any] = {"l0": l0, "value_bits": best, "fvu": fvu[best]}
    found["fvu_by_value_bits"] = {str(bits): value for bits, value in fvu.items()}
    found["values_by_value_bits"] = {str(bits): value for bits, value in precision.values.items()}
    active = activity(fitted_to)
    found |= {f"fitted_{share}": active[share] for share in ("dead_share", "dense_share")}
    for coder in CODERS:
        length = description_length(precision.code, coder, fitted_to=fitted_to)
        found[coder] = length.bits + precision.values[best]
        found |= {f"{coder}_support": length.bits, f"{coder}_model_bits": length.model_bits}
    return found


def rows_of(context: Context, method: str) -> tuple[Tensor, Tensor, Tensor]:
    """Some inputs that a method was trained on, held-out inputs and held-out targets."""
    if method == "transcoder":
        pair = context.pair
        return evenly(pair["x_train"]), pair["x_heldout"], pair["y_heldout"]
    rows, train, heldout = context.cache.rows, context.train, context.heldout
    held = rows[heldout.start : heldout.stop]
    return evenly(rows[train.start : train.stop]), held, held
