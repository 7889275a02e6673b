"""What every timed result is held against: float64 and integers, at the size that is timed.

The analytic formulas of the objective on given bits, by blocks, so that nothing F x F is whole in
memory and F = 32,768 can be checked. They are another route than :mod:`bae_fast.reference`
(autograd through dense float64), which ``bench/test_bench.py`` holds them against.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bae_fast.backends.cpp import units
from bae_fast.ops.products import product_dtype
from bae_fast.statistics import entropy_bits, entropy_gradient
from bench import eager

BLOCK = 1024
# beyond twice the rival's error, for sums that the rival has rounded less often
OWN_LIMIT = {False: 1e-6, True: 2.0**-8}

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


class WrongResultError(Exception):
    """A timed side gave a wrong result: it gets no figure."""


# -- numbers -----------------------------------------------------------------------------------


def dtype_of(side: str) -> torch.dtype:
    """The dtype of a side's products."""
    if side == "autocast" or side.endswith(" bf16"):
        return torch.bfloat16
    return torch.float16 if side.endswith(" fp16") else torch.float32


def is_half(side: str) -> bool:
    """Whether a side's products are in half precision."""
    return dtype_of(side) != torch.float32


def weights_dtype(side: str, bits: Tensor) -> torch.dtype:
    """The dtype that float32 weights were multiplied in to make bits ``[N, F]``.

    Those of `cpp` and `torch` stay as they are where the CPU does not multiply bfloat16, and those
    of `cpp` where it encodes by integers. Sides in float16 are given their weights rounded.
    """
    dtype = dtype_of(side)
    if side.partition(" ")[0] == "cpp" and units.encode_digits(dtype, *bits.shape) == 3:
        return torch.float32
    if dtype == torch.bfloat16 and side.partition(" ")[0] in ("cpp", "torch"):
        return product_dtype(dtype, bits.device)
    return dtype


def gradient(parameter: Tensor) -> Tensor:
    """The gradient that a backward pass has left.

    Raises:
        ValueError: there is none.
    """
    if parameter.grad is None:
        raise ValueError(f"parameter must have a gradient; {list(parameter.shape)} has none")
    return parameter.grad


def relative_error(got: Tensor, exact: Tensor, slack: Tensor | None = None) -> float:
    """|got - exact| / |exact| in the Frobenius norm, elements forgiven up to ``slack``; infinite
    where got is not finite."""
    off = (got.double() - exact).abs()
    if slack is not None:
        off = (off - slack).clamp_min(0)
    error = torch.linalg.vector_norm(off) / torch.linalg.vector_norm(exact)
    return float(error) if bool(error.isfinite()) else float("inf")


class Closeness:
    """Numbers are close: a dense program to float64, ours no worse than twice that program.

    The rival of a side is the dense program of its precision. Where it was not checked before
    (one side at a time), the limit of the dense programs stands in. They alone are forgiven
    ``slack``: what rounding noise in the place of sign(0) can do.
    """

    def __init__(self, **limits: float) -> None:
        """``limits`` replace those of the dense programs, by name."""
        self.limits = {
            "eager": 1e-5, "compile": 1e-5, "autocast": 2e-2, "compile bf16": 2e-2,
        } | limits  # fmt: skip
        self.errors: dict[tuple[str, str], float] = {}

    def check(
        self, side: str, what: str, got: Tensor, exact: Tensor, slack: Tensor | None = None
    ) -> None:
        """Raise WrongResultError where ``got`` is too far from ``exact``, or of another shape."""
        if got.shape != exact.shape:
            raise WrongResultError(
                f"{what} has shape {list(got.shape)}; should be {list(exact.shape)}"
            )
        dense, half = side in self.limits, is_half(side)
        error = relative_error(got.detach(), exact, slack if dense else None)
        rival = side if dense else "autocast" if half else "eager"
        limit = self.limits[rival]
        if dense:
            self.errors[side, what] = error
        else:
            limit = 2 * self.errors.get((rival, what), limit) + OWN_LIMIT[half]
        if error > limit:
            raise WrongResultError(f"{what} is off by {error:.1e} of its norm; allowed {limit:.1e}")


class Bits:
    """What float64 says of the bits of x W_enc + b_enc, and where rounding may say otherwise."""

    def __init__(self, x: Tensor, W_enc: Tensor, b_enc: Tensor) -> None:
        self.inputs = x, W_enc, b_enc
        self.made: dict[tuple[torch.dtype, torch.dtype], tuple[Tensor, Tensor]] = {}

    def _products(self, dtype: torch.dtype, weights: torch.dtype) -> tuple[Tensor, Tensor]:
        """x W_enc in float64 and |x| |W_enc| in float32, x rounded to ``dtype``, W_enc to
        ``weights``."""
        if (dtype, weights) not in self.made:
            x, W_enc = self.inputs[0].to(dtype).float(), self.inputs[1].to(weights).float()
            self.made[dtype, weights] = x.double() @ W_enc.double(), x.abs() @ W_enc.abs()
        return self.made[dtype, weights]

    def check(self, bits: Tensor, side: str) -> None:
        """Raise WrongResultError unless bits ``[N, F]`` are float64's beyond the rounding bound.

        The products of every side are summed in float32. Dense programs round the sum to the
        side's dtype before the bias is added.
        """
        dtype, rounded = dtype_of(side), side in eager.DENSE and is_half(side)
        product, magnitude = self._products(dtype, weights_dtype(side, bits))
        b_enc = self.inputs[2]
        pre = product + b_enc.double()
        slips = (self.inputs[0].shape[1] + 2) * UNIT_ROUNDOFF[torch.float32]
        bound = slips / (1 - slips) * (magnitude + b_enc.abs())
        if rounded:
            bound += UNIT_ROUNDOFF[dtype] * product.abs()
        differ, near = bits != (pre > 0), pre.abs() <= bound
        outside = int((differ & ~near).sum())
        if outside:
            raise WrongResultError(
                f"{outside} bits differ from float64 where |pre| is above the rounding bound"
            )
        inside, allowed = int(differ.sum()), int(near.sum()) // 2 + 8
        if inside > allowed:
            raise WrongResultError(
                f"{inside} bits within the rounding bound differ from float64; allowed {allowed}"
            )


# -- the covariance ----------------------------------------------------------------------------


def pair_values(bits: Tensor, columns: Tensor | slice, start: int = 0) -> Tensor:
    """V_ij = N n_ij - n_i n_j, zero on the diagonal: float64 ``[F - start, len(columns)]``.

    ``bits`` is float32 ``[N, F]``. A float32 product counts exactly below 2^24 rows.
    """
    if len(bits) >= 2**24:
        raise ValueError(f"bits must have fewer than 2^24 rows; got {len(bits)}")
    joint = (bits[:, start:].t() @ bits[:, columns]).double()
    counts = bits.sum(0, dtype=torch.float64)
    v = joint.mul_(len(bits)).sub_(torch.outer(counts[start:], counts[columns]))
    at = torch.arange(bits.shape[1], device=bits.device)[columns]
    own = (at >= start).nonzero().flatten()
    v[at[own] - start, own] = 0
    return v


def covariance_numerator(bits: Tensor) -> int:
    """sum_{i != j} |V_ij| of float32 bits ``[N, F]``."""
    total = 0
    for start in range(0, bits.shape[1], BLOCK):
        v = pair_values(bits, slice(start, start + BLOCK), start).abs()
        # blocks from the diagonal down; those below it stand for both triangles
        total += 2 * int(v.sum()) - int(v[:BLOCK].sum())
    return total


def ties(v: Tensor, columns: Tensor | slice) -> Tensor:
    """[V = 0] off the diagonal, for ``v`` of :func:`pair_values` from row 0: float64."""
    tied = (v == 0).double()
    at = torch.arange(len(v), device=v.device)[columns]
    tied[at, torch.arange(len(at), device=v.device)] = 0
    return tied


def covariance_gradient(bits: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """left^T dD/dB, for float32 bits ``[N, F]`` and float64 left ``[N, m]``: ``[m, F]``; and how
    far signs other than 0 at ties could move it."""
    n = len(bits)
    weights = (left - left.mean(0)).t() @ bits.double()
    out = left.new_empty(left.shape[1], bits.shape[1])
    slack = torch.empty_like(out)
    for start in range(0, bits.shape[1], BLOCK):
        at = slice(start, start + BLOCK)
        v = pair_values(bits, at)
        out[:, at] = weights @ v.sign()
        slack[:, at] = weights.abs() @ ties(v, at)
    return out.mul_(2 / (n - 1)), slack.mul_(2 / (n - 1))


# -- a whole step ------------------------------------------------------------------------------


class Gradients(NamedTuple):
    """Loss, and gradients of the parameters for some features: W_enc ``[d, m]``, b_enc ``[m]``,
    W_dec ``[m, d]``; b_dec ``[d]``. The slacks: how far ties of the covariance could move two."""

    loss: Tensor
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    W_enc_slack: Tensor
    b_enc_slack: Tensor


def training_gradients(
    x: Tensor,
    parameters: list[Tensor],
    bits: Tensor,
    window: Tensor | None,
    features: Tensor,
    *,
    entropy_weight: float,
    covariance_weight: float | None,
    variance_weight: float = 0.0,
) -> Gradients:
    """The objective of :func:`bench.eager.eager_loss` and its gradient, for the bits given.

    Args:
        variance_weight: of the multilinear term, the mean over rows and columns of
            |W_dec_j|^2 b (1 - b): zero in value, with the slope 1 - 2 b.
        bits, window: bool ``[N, F]``; window is where the surrogate lets the gradient pass, None
            for everywhere.
        features: int64 ``[m]``, the features whose gradients are asked for.
    """
    n, d = x.shape
    x = x.double()
    W_dec, b_dec = (p.detach().double() for p in parameters[2:])
    b = bits.float()
    recon = b.double() @ W_dec + b_dec
    counts, rows = bits.sum(0), torch.tensor(n)
    loss = (x - recon).square().mean() + entropy_weight * entropy_bits(counts, rows)
    slope = 2 * (recon - x) / (n * d)
    g = slope @ W_dec[features].t() + entropy_weight * entropy_gradient(counts, rows)[features]
    if variance_weight:
        steps = variance_weight / (n * d) * W_dec[features].square().sum(1)
        g += steps * (1 - 2 * b[:, features].double())
    slack = torch.zeros_like(g)
    if covariance_weight is not None:
        loss = loss + covariance_weight * covariance_numerator(b) / (n * (n - 1))
        v = pair_values(b, features)
        centred = b.double() - counts.double() / n
        scale = covariance_weight * 2 / (n - 1)
        g += scale * centred @ v.sign()
        slack += scale * centred.abs() @ ties(v, features)
    if window is not None:
        g *= window[:, features]
        slack *= window[:, features]
    return Gradients(
        loss, x.t() @ g, g.sum(0), b[:, features].double().t() @ slope, slope.sum(0),
        x.abs().t() @ slack, slack.sum(0),
    )  # fmt: skip
