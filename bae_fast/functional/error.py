"""The squared error of a reconstruction: one pass each way where a backend has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from bae_fast.functional.autograd import savable
from bae_fast.ops import registry

_SERVED = (torch.float32, torch.bfloat16)


def squared_error(
    recon: Tensor,
    target: Tensor,
    unit: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Sum of ((recon - target) unit)^2 over all numbers of the rows kept.

    Args:
        recon, target: ``[..., d]``, floating.
        unit: ``[d]``, what the difference in each dimension is multiplied by; None: one.
        mask: bool ``[...]``; rows where it is False do not count, whatever they hold.
        impl: see :func:`bae_fast.binary_autoencoder`.

    Returns:
        ``[]`` in recon's dtype, float32 or wider; differentiable in recon and target.

    Raises:
        ValueError: target, unit or mask of another shape, or a mask that is not bool.
    """
    _check_shapes(recon, target, unit, mask)
    target = savable(target)
    mask = None if mask is None else savable(mask)
    keep = None if mask is None else mask.reshape(-1).contiguous()
    if _served(recon, target, unit, impl):
        width = recon.shape[-1]
        scales = recon.new_ones(width, dtype=torch.float32) if unit is None else unit
        scales = savable(scales.float().contiguous())
        flat = recon.reshape(-1, width), target.reshape(-1, width)
        found: Tensor = _SquaredError.apply(*flat, scales, keep, impl)
        return found
    wide = torch.promote_types(recon.dtype, torch.float32)
    recon, target = recon.to(wide), target.to(wide)
    if mask is not None:
        # before the square: the gradient of a dropped row that holds NaN must be zero
        recon, target = (torch.where(mask[..., None], rows, 0) for rows in (recon, target))
    if unit is not None:
        recon, target = recon * unit, target * unit
    # one pass each way, where the square of a difference takes two and three
    return mse_loss(recon, target, reduction="sum")


def _check_shapes(recon: Tensor, target: Tensor, unit: Tensor | None, mask: Tensor | None) -> None:
    """A kernel reads by recon's shape, whatever the others have."""
    shape = list(recon.shape)
    if not shape or target.shape != recon.shape:
        raise ValueError(f"target must have recon's shape {shape}; got {list(target.shape)}")
    if unit is not None and unit.shape != recon.shape[-1:]:
        raise ValueError(f"unit must have shape {shape[-1:]}; got {list(unit.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != recon.shape[:-1]):
        raise ValueError(f"mask must be bool {shape[:-1]}; got {mask.dtype} {list(mask.shape)}")


def _served(recon: Tensor, target: Tensor, unit: Tensor | None, impl: str) -> bool:
    """Whether the backend of this call has the two passes, and these tensors can be given to it."""
    tensors = [recon, target, *([] if unit is None else [unit])]
    return (
        not torch.compiler.is_compiling()
        and recon.shape[-1] > 0
        # a subclass may have no numbers
        and all(type(tensor) is Tensor and tensor.device.type == "cpu" for tensor in tensors)
        and all(tensor.dtype in _SERVED for tensor in tensors)
        and not any(tensor.requires_grad for tensor in tensors[1:])
        and registry.extras(impl, "cpu").squared_error is not None
    )


class _SquaredError(torch.autograd.Function):
    """(recon ``[n, d]``, target, unit ``[d]``, keep) -> ``[]``."""

    generate_vmap_rule = False

    @staticmethod
    def forward(
        recon: Tensor, target: Tensor, unit: Tensor, keep: Tensor | None, impl: str
    ) -> Tensor:
        squares = registry.extras(impl, "cpu").squared_error
        assert squares is not None
        return squares(recon, target, unit, keep).float()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.impl = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        recon, target, unit, keep = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated
            found = 2 * grad * unit.square() * (recon.float() - target.float())
            if keep is not None:
                found = torch.where(keep[:, None], found, 0)
            found = found.to(recon.dtype)
        else:
            gradient = registry.extras(ctx.impl, "cpu").squared_error_gradient
            assert gradient is not None
            found = gradient(recon, target, unit, keep, float(grad))
        return found, None, None, None, None
