"""The paper's program written plainly: the dense side of every comparison.

    B = step(x W_enc + b_enc) as fp32 numbers
    loss = mean (x - recon)^2 + a_e H + a_c D,   D = sum_{i != j} |torch.cov(B)_ij|

What a careful user would write in a few lines of PyTorch (arXiv 2509.20997, section 3): nothing
wasteful, nothing clever. It is what the packed layer is measured against, not what it is checked
against: in fp32 torch.cov turns exact ties into rounding noise. The definition of correct is
:mod:`bae_fast.reference`, at full size :mod:`bench.exact`.

Three programs are made of it: as it stands, under bfloat16 autocast, and compiled
(:data:`PROGRAMS`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bae_fast.devices import has_bfloat16

EPS = 1e-10
PROGRAMS = ("eager", "autocast", "compile")


def programs() -> list[str]:
    """Those that are run on this CPU: without native bfloat16, autocast takes minutes a call."""
    return [name for name in PROGRAMS if name != "autocast" or has_bfloat16("cpu")]


# and on a GPU, where nobody runs it in float32
DENSE = (*PROGRAMS, "compile bf16")
# bench/test_*.py put "eager" here: the same path, no C++ compiler
COMPILER = "inductor"


class _Step(torch.autograd.Function):
    """[pre > 0] in pre's dtype; the gradient passes unchanged, or only where |pre| < width."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, width: float | None) -> Tensor:
        ctx.width = width
        if width is not None:
            ctx.save_for_backward(pre)
        return (pre > 0).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        if ctx.width is None:
            return g, None
        (pre,) = ctx.saved_tensors
        return torch.where(pre.abs() < ctx.width, g, 0), None


def encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, width: float | None = None) -> Tensor:
    """Bits as numbers: ``[N, F]``."""
    return _Step.apply(x @ W_enc + b_enc, width)


def decode(bits: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """``[N, d]``."""
    return bits @ W_dec + b_dec


def decoder_backward(bits: Tensor, grad_recon: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of W_dec and b_dec, as autograd makes them."""
    return bits.t() @ grad_recon, grad_recon.sum(0)


def encoder_backward(
    x: Tensor,
    pre: Tensor,
    W_dec: Tensor,
    grad_recon: Tensor,
    grad_columns: Tensor,
    width: float | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of W_enc and b_enc, as autograd makes them; grad_columns is the entropy's."""
    g = grad_recon @ W_dec.t() + grad_columns
    if width is not None:
        g = torch.where(pre.abs() < width, g, 0)
    return x.t() @ g, g.sum(0)


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
    width: float | None = None,
    entropy_weight: float = 1e-7,
    covariance_weight: float | None = 1e-7,
) -> Tensor:
    """The training loss of rows x ``[N, d]``; weights default to those of the released recipe.

    ``width=None`` is the ``identity`` surrogate, a number ``rectangle``. ``covariance_weight=None``
    leaves the covariance out (nothing F x F is made).
    """
    bits = encode(x, W_enc, b_enc, width)
    recon = decode(bits, W_dec, b_dec)
    loss = (x - recon).square().mean() + entropy_weight * batch_entropy(bits)
    if covariance_weight is None:
        return loss
    return loss + covariance_weight * absolute_covariance(bits)


def autocast(
    dtype: torch.dtype | None, device: torch.device | str = "cpu"
) -> contextlib.AbstractContextManager[Any]:
    """Autocast to a half-precision dtype on a device, or nothing."""
    if dtype not in (torch.bfloat16, torch.float16):
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype)


def program(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as one of :data:`DENSE` runs it: tensors first, all on one device."""
    if name.startswith("compile"):
        function = torch.compile(function, backend=COMPILER)
    if name in ("eager", "compile"):
        return function

    def under_autocast(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        with autocast(torch.bfloat16, first.device):
            return function(first, *args, **kwargs)

    return under_autocast
