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
from bae_fast.analysis.quantisers import FoundValues, ValueSteps
from bae_fast.autoencoder import Autoencoder, as_code
from bae_fast.codes import BinaryCode
from bae_fast.experiments.scorers import Column, Context, Scorer
from bae_fast.spacing import evenly

ORDER = -1

# bits of a value that are tried; with 0 a feature has one value, as in a binary code
VALUE_BITS = tuple(range(9))

# how values are written, for the settings of what is kept: by the shares of even steps, and each
# read as the mean of the training values of its step
WRITTEN = "means of steps, coded"


def make(context: Context) -> list[Scorer]:
    """One scorer, unless the configuration leaves it out."""
    if not context.config.description:
        return []

    def score(model: Any, method: str, _k: int | None, _seed: int) -> dict[str, Any]:
        return describe(precision_of(context, model, method))

    columns = [
        Column("value_bits", "bits a value", "{:.0f}"),
        Column("fvu", "FVU with these", "{:.4f}"),
        Column("columns", "bits, independent columns", "{:.0f}"),
        Column("tree", "bits, tree", "{:.0f}"),
    ]
    settings = {"coders": list(CODERS), "value_bits": list(VALUE_BITS), "values": WRITTEN}
    return [Scorer("description", settings, score, columns)]


class Precision(NamedTuple):
    """How precisely a method's values are written.

    Attributes:
        bits: the number of bits that is best for the method; 0 for a code of bits.
        fvu: the FVU at every number that was tried.
        values: bits a row that the values take at each, by the shares of their steps in the
            training rows; about the number times ``l0`` where all steps are as likely.
        steps: what values are read as at each; empty for a code of bits.
        code: which features are on in the held-out rows.
        fitted_to: which features are on in the training rows.
        l0: the number of features on in a held-out row, mean of these rows.
    """

    bits: int
    fvu: dict[int, float]
    values: dict[int, float]
    steps: dict[int, ValueSteps]
    code: BinaryCode
    fitted_to: BinaryCode
    l0: float


def precision_of(context: Context, model: Autoencoder, method: str) -> Precision:
    """:func:`value_precision` of a method's model, found once for all scorers."""
    return context.once(
        model, "precision", lambda: value_precision(model, *rows_of(context, method))
    )


@torch.no_grad()
def value_precision(model: Autoencoder, train: Tensor, held: Tensor, target: Tensor) -> Precision:
    """The number of bits of a value, 0 to 8, that is best for a model, and the error at each.

    At the best one the whole code lies least above the rate that Gaussian rows need at the error
    that is left: neither few bits at a large error nor a small error at many bits is the aim in
    itself. Every row is encoded once.

    Args:
        model: the autoencoder, in eval mode.
        train, held: raw rows ``[n, d_in]`` and ``[m, d_in]``.
        target: ``[m, d_out]``, what is reconstructed.
    """
    steps: dict[int, ValueSteps] = {}
    if model.is_binary:
        fitted_to = BinaryCode.cat(as_code(model.encode(block)) for block in model.blocks(train))
    else:
        found = FoundValues.of(model.activations(block) for block in model.blocks(train))
        fitted_to = found.code
        steps = {bits: ValueSteps(found, bits) for bits in VALUE_BITS}
    errors = {bits: FVUAccumulator() for bits in steps or (0,)}
    first, codes, values = 0, [], dict.fromkeys(errors, 0.0)
    for block in model.blocks(held):
        goal = model.as_own(target[first : first + len(block)])
        first += len(block)
        features = model.encode(block)
        codes.append(as_code(features))
        if not steps or not isinstance(features, Tensor):
            errors[0].update(goal, model.decode(features))
            continue
        charged = FoundValues.of([features])
        for bits, fitted in steps.items():
            errors[bits].update(goal, model.decode(fitted.read(features)))
            values[bits] += fitted.cost(charged)
    code = BinaryCode.cat(codes)
    l0 = float(code.l0().sum(dtype=torch.float64)) / len(code)
    fvu = {bits: error.compute() for bits, error in errors.items()}
    values = {bits: total / len(code) for bits, total in values.items()}
    spectrum = covariance_eigenvalues(target)

    def excess(bits: int) -> float:
        # an error beyond that of the mean needs no bit at all
        return values[bits] - float(gaussian_rate_distortion_bits(spectrum, fvu[bits]))

    return Precision(min(errors, key=excess), fvu, values, steps, code, fitted_to, l0)


@torch.no_grad()
def describe(precision: Precision) -> dict[str, Any]:
    """Description length of held-out rows under coders fitted to training rows.

    Args:
        precision: :func:`value_precision` of a model: both kinds of rows' codes, and what values
            take.

    Returns:
        ``columns`` and ``tree``, bits a row; of each the part that says which features are on
        (``_support``) and what the coder itself takes, once (``_model_bits``); ``value_bits``, the
        ``fvu`` at them, the FVU and the values' bits a row at all that were tried, and ``l0``; and
        of the training rows, of which there are more, the shares of features that are never on in
        them (``fitted_dead_share``) and on in more than a tenth (``fitted_dense_share``).
    """
    fitted_to = precision.fitted_to
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
