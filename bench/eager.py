"""The paper's program written plainly: the dense side of every comparison.

    B = step(x W_enc + b_enc) as fp32 numbers, the gradient passing the step unchanged
    loss = mean (x - recon)^2 + a_e H + a_c D,   D = sum_{i != j} |torch.cov(B)_ij|

What a careful user would write in a few lines of PyTorch (arXiv 2509.20997, section 3): nothing
wasteful, nothing clever. It is what the packed layer is measured against, not what it is checked
against: in fp32 torch.cov turns exact ties into rounding noise. The definition of correct is
:mod:`bae_fast.reference`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

EPS = 1e-10


class _Step(torch.autograd.Function):
    """[pre > 0] in pre's dtype; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor) -> Tensor:
        return (pre > 0).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def batch_entropy(bits: Tensor) -> Tensor:
    """Sum over columns of the binary entropy of their means, in bits: ``[]``."""
    p = bits.mean(0)
    return -(p * torch.log2(p + EPS) + (1 - p) * torch.log2(1 - p + EPS)).sum()


def absolute_covariance(bits: Tensor) -> Tensor:
    """Sum over i != j of |C_ij|, C the unbiased covariance of the columns: ``[]``."""
    cov = torch.cov(bits.t())
    return cov.abs().sum() - cov.diagonal().abs().sum()


def eager_loss(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    *,
    entropy_weight: float = 1e-7,
    covariance_weight: float | None = 1e-7,
) -> Tensor:
    """The training loss of rows x ``[N, d]``; weights default to those of the released recipe.

    ``covariance_weight=None`` leaves the covariance out (nothing F x F is made).
    """
    bits = _Step.apply(x @ W_enc + b_enc)
    recon = bits @ W_dec + b_dec
    loss = (x - recon).square().mean() + entropy_weight * batch_entropy(bits)
    if covariance_weight is None:
        return loss
    return loss + covariance_weight * absolute_covariance(bits)
