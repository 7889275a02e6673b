"""The Binary Autoencoder's objective in plain dense PyTorch: the definition of correct.

    B     = step(x W_enc + b_enc)                     bits, [N, k F]
    recon = value(B) W_dec + b_dec                    [N, d_out]
    H     = sum_j H2(p_j)                             batch entropy of the bits, in bits
    D     = sum_{i != j} |C_ij|                       C = unbiased covariance of the bits
    loss  = mean (target - recon)^2 + a_e H + a_c D

(arXiv 2509.20997, section 3.) Everything is differentiated by autograd but the step, whose
derivative is replaced by a surrogate. Any device and floating dtype; x, pre and recon keep the
input's dtype, the statistics are computed in float64. Memory is O(N F + F^2): for checking and
for small problems. The packed implementations are held against this file.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bae_fast.packing import unpack_rows
from bae_fast.statistics import CodeStatistics

EPS = 1e-10


class DenseOutput(NamedTuple):
    """recon ``[N, d_out]``; entropy, covariance (or None), variance ``[]``; bits ``[N, k F]``."""

    recon: Tensor
    entropy: Tensor
    covariance: Tensor | None
    variance: Tensor
    bits: Tensor


class Step(torch.autograd.Function):
    """[pre > 0] with a surrogate gradient (see :mod:`bae_fast.surrogates`)."""

    @staticmethod
    def forward(pre: Tensor, surrogate: str, width: float) -> Tensor:
        return (pre > 0).to(torch.promote_types(pre.dtype, torch.float32))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pre, ctx.surrogate, ctx.width = inputs
        ctx.save_for_backward(pre)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (pre,) = ctx.saved_tensors
        if ctx.surrogate == "official":
            g = g * (1 - g)
        elif ctx.surrogate == "sigmoid":
            s = torch.sigmoid(pre.to(g.dtype) / ctx.width)
            g = g * 4 * s * (1 - s)
        elif ctx.surrogate == "rectangle":
            g = torch.where(pre.abs() < ctx.width, g, 0)
        return g.to(pre.dtype), None, None


def binary_entropy(p: Tensor) -> Tensor:
    """H2(p) in bits, elementwise; EPS keeps it and its derivative finite at 0 and 1."""
    q = 1 - p
    return -p * torch.log2(p + EPS) - q * torch.log2(q + EPS)


def absolute_covariance(joint: Tensor, counts: Tensor, n: Tensor) -> Tensor:
    """D from n_ij ``[K, K]``, n_j ``[K]`` and N ``[]``, in the integer form of the covariance:
    V = N n_ij - n_i n_j, C = V / (N (N - 1)). In float64 V is exact, so sign(0) is 0."""
    v = n * joint - torch.outer(counts, counts)
    v = v - torch.diag(torch.diagonal(v))
    return v.abs().sum() / (n * (n - 1))


def binary_autoencoder(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    *,
    surrogate: str = "rectangle",
    width: float = 0.25,
    n_bits: int = 1,
    covariance: bool = True,
    mask: Tensor | None = None,
    stats: CodeStatistics | None = None,
    past: CodeStatistics | None = None,
) -> DenseOutput:
    """Encode, decode and the two statistics of the bits.

    Args:
        x: ``[N, d_in]``; W_enc ``[d_in, k F]``, b_enc ``[k F]``, W_dec ``[F, d_out]``, b_dec
            ``[d_out]``, with k = ``n_bits``; bit i of feature j is column j k + i and weighs
            2^i / (2^k - 1).
        mask: bool ``[N]``; rows where it is False get zero bits, no gradient, and do not count.
        stats: statistics of other rows (a whole batch, all ranks, a bank of past codes) that
            take the place of this call's; gradient still goes to this call's bits only.
        past: statistics of other rows that this call's are added to.
    """
    pre = x @ W_enc + b_enc
    bits = Step.apply(pre, surrogate, width)
    if mask is not None:
        bits = bits * mask[:, None]

    weights = 2.0 ** torch.arange(n_bits, device=x.device, dtype=bits.dtype) / (2**n_bits - 1)
    values = bits.unflatten(-1, (-1, n_bits)) @ weights
    recon = (values.to(pre.dtype) @ W_dec + b_dec).to(pre.dtype)
    if mask is not None:
        recon = torch.where(mask[:, None], recon, recon.detach())

    b = bits.double()
    if stats is None:
        n = b.new_full((), x.shape[0]) if mask is None else mask.sum().to(b.dtype)
        counts = b.sum(0)
        joint = b.T @ b if covariance else None
    else:
        # values of `stats`; derivatives of this call's bits (`change` is zero, its gradient not)
        change = b - b.detach()
        n, joint = stats.n_rows.double(), None
        counts = stats.counts.double() + change.sum(0)
        if covariance:
            counted = unpack_rows(stats.require_words(), b.shape[1], torch.float64)
            joint = counted.T @ counted + change.T @ b.detach() + b.detach().T @ change

    if past is not None:
        n, counts = n + past.n_rows, counts + past.counts
        if joint is not None:
            before = unpack_rows(past.require_words(), b.shape[1], torch.float64)
            joint = joint + before.T @ before

    # Independent random bits of mean b would add sum_j |w_j|^2 b_j (1 - b_j) to a squared error:
    # zero on bits, but its derivative makes slopes into exact differences.
    steps = torch.outer(W_dec.detach().to(bits.dtype).square().sum(1), weights.square()).flatten()
    variance = (steps * bits * (1 - bits)).sum()

    entropy = binary_entropy(counts / n).sum().to(bits.dtype)
    spread = None if joint is None else absolute_covariance(joint, counts, n).to(bits.dtype)
    return DenseOutput(recon, entropy, spread, variance, bits)


def loss(
    out: DenseOutput, target: Tensor, entropy_weight: float, covariance_weight: float = 0.0
) -> Tensor:
    """The training objective; ``target`` is x, or another state for a transcoder."""
    total = (target - out.recon).square().mean() + entropy_weight * out.entropy
    return total if out.covariance is None else total + covariance_weight * out.covariance
