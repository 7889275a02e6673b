"""Values of features written with few bits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from bae_fast.arguments import all_finite
from bae_fast.autoencoder import Autoencoder
from bae_fast.codes import BinaryCode


def quantize(features: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Positive values to the middle of one of 2^bits even steps between low and high; 0 stays.

    Args:
        features: ``[..., F]``, none negative.
        low, high: ``[F]``; values outside go to the nearest level.
    """
    low, high = _widened(low), _widened(high)
    index = _steps(features, low, high, bits)
    middle = low + (index + 0.5) * ((high - low) / 2**bits)
    return torch.where(features > 0, middle, 0).to(features.dtype)


def _steps(features: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """The step that each value lies in, 0 to 2^bits - 1, as floats; low and high are widened."""
    step = (high - low) / 2**bits
    return ((_widened(features) - low) / step.clamp_min(1e-30)).floor().clamp(0, 2**bits - 1)


def _widened(numbers: Tensor) -> Tensor:
    """As float32 or wider: half precision has neither 1e-30 nor every number of a step."""
    return numbers.to(torch.promote_types(numbers.dtype, torch.float32))


@dataclasses.dataclass(frozen=True)
class FoundValues:
    """The values of features over rows: which features are on, and how strongly.

    Attributes:
        code: which features are on, ``[n, F]``.
        feature: int32 ``[m]``, the feature of each positive value, row after row.
        value: ``[m]``, the values.
    """

    code: BinaryCode
    feature: Tensor
    value: Tensor

    @classmethod
    def of(cls, blocks: Iterable[Tensor]) -> FoundValues:
        """Those of blocks of rows, each ``[n, F]``; what is not positive is not on.

        Raises:
            ValueError: no block, or one with NaN or Inf.
        """
        codes, features, values = [], [], []
        for block in blocks:
            if not all_finite(block):
                raise ValueError("blocks must be finite; got NaN or Inf among the features")
            on = block > 0
            codes.append(BinaryCode.from_dense(on))
            features.append(on.nonzero()[:, 1].to(torch.int32))
            values.append(block[on])
        if not codes:
            raise ValueError("blocks must hold at least one block of rows; got none")
        return cls(BinaryCode.cat(codes), torch.cat(features), torch.cat(values))

    @functools.cached_property
    def ranges(self) -> tuple[Tensor, Tensor]:
        """The least and the largest value of each feature, ``[F]``; 0 and 0 where it is off."""
        feature, value = self.feature.to(torch.int64), self.value
        none = value.new_zeros(self.code.n_columns)
        high = none.scatter_reduce(0, feature, value, "amax")
        low = high.scatter_reduce(0, feature, value, "amin")
        return low, high


class ValueSteps:
    """Each feature's values in 2^bits even steps: what is read for a step, and what it costs.

    The steps lie between the least and the largest value in training rows. A value is read as the
    mean of the training values of its step, which is the best for the squared error; the middle of
    the step stands for it where the training rows have none. With 0 bits every feature has one
    value, as a binary code has.

    Attributes:
        bits: the number of bits, the logarithm of the number of steps.
        counts: int64 ``[F, 2^bits]``, training values in each step.
        means: ``[F, 2^bits]``, what is read.
    """

    def __init__(self, fitted_to: FoundValues, bits: int) -> None:
        """Fit the steps to the values of training rows; bits is from 0 on."""
        self.bits = bits
        low, high = map(_widened, fitted_to.ranges)
        self._low, self._high = low, high
        value = fitted_to.value
        at = self._places(fitted_to.feature.to(torch.int64), value)
        size = len(low) << bits
        self.counts = torch.bincount(at, minlength=size).view(len(low), -1)
        sums = torch.bincount(at, weights=value.double(), minlength=size).view_as(self.counts)
        step = ((high - low) / 2**bits)[:, None]
        middles = low[:, None] + (torch.arange(1 << bits, device=low.device) + 0.5) * step
        means = (sums / self.counts.clamp_min(1)).to(low.dtype)
        self.means = torch.where(self.counts > 0, means, middles)

    def _places(self, feature: Tensor, value: Tensor) -> Tensor:
        """Where the steps of values ``[m]`` lie in the flat table of all features' steps."""
        steps = _steps(value, self._low[feature], self._high[feature], self.bits)
        return (feature << self.bits) + steps.to(torch.int64)

    def read(self, features: Tensor) -> Tensor:
        """Features ``[..., F]`` with each value as it is read; what is not positive becomes 0."""
        on = features > 0
        feature = on.nonzero()[:, -1]
        read = torch.zeros_like(features)
        read[on] = self.means.flatten()[self._places(feature, features[on])].to(features.dtype)
        return read

    def cost(self, charged: FoundValues) -> float:
        """Bits that all values of other rows take, by the shares of the steps in training rows.

        A feature's share of a step is that of its own values, with two more of all features': what
        is seldom on has no shares of its own. As of what is on, see
        :mod:`bae_fast.analysis.description`, they are of other rows than are charged.
        """
        at = self._places(charged.feature.to(torch.int64), charged.value)
        return float(self._lengths[at].sum())

    @functools.cached_property
    def _lengths(self) -> Tensor:
        """Bits that a value of each step takes, flat as the table of all features' steps."""
        own = self.counts.double()
        pooled = (own.sum(0) + 0.5) / (own.sum() + 0.5 * own.shape[1])
        shares = (own + 2 * pooled) / (own.sum(1, keepdim=True) + 2)
        return -shares.flatten().log2()


@torch.no_grad()
def value_ranges(model: Autoencoder, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest positive value of every feature over raw rows ``[n, d_in]``.

    Returns:
        Two of ``[F]``; 0 and 0 where a feature is never on.

    Raises:
        ValueError: no rows.
    """
    low = high = None
    for block in model.blocks(rows):
        features = model.activations(block)
        least = torch.where(features > 0, features, torch.inf).amin(0)
        low = least if low is None else torch.minimum(low, least)
        high = features.amax(0) if high is None else torch.maximum(high, features.amax(0))
    if low is None or high is None:
        raise ValueError(f"rows must hold at least one row; got {list(rows.shape)}")
    high = high.clamp_min(0)
    return torch.where(high > 0, low, 0), high
