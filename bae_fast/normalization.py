"""Normalisation of hidden states, kept in buffers of the module that needs it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self

# elements upcast to float64 at a time
_CHUNK_ELEMENTS = 16 * 2**20


def check_rows(name: str, rows: Any, width: int) -> None:
    """Refuse what is no tensor of hidden states ``[n, width]``.

    Raises:
        TypeError: no tensor, or one that is not of floating point.
        ValueError: another shape, or no rows.
    """
    if not isinstance(rows, Tensor):
        hint = ""
        if isinstance(getattr(rows, "rows", None), Tensor):
            hint = f"; its rows are {name}.rows"
        elif type(rows).__module__.partition(".")[0] == "numpy":
            hint = f"; torch.from_numpy({name}) makes one of it"
        raise TypeError(f"{name} must be a tensor [n, {width}]; got {type(rows).__name__}{hint}")
    if rows.dim() != 2 or rows.shape[1] != width or not len(rows):
        raise ValueError(f"{name} must have shape [n, {width}]; got {list(rows.shape)}")
    if not rows.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point; got {rows.dtype}")


class Normalized(nn.Module):
    """Buffers ``x_mean [d_in]`` and ``x_scale []`` (``y_mean``, ``y_scale`` for another target).

    They are 0 and 1 until :meth:`fit_normalization_`.
    """

    x_mean: Tensor
    x_scale: Tensor
    is_transcoder: bool

    def _register_normalization(
        self,
        d_in: int,
        d_out: int | None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the buffers; ``d_out`` is None where the target is x itself."""
        self.is_transcoder = d_out is not None
        for name, width in (("x", d_in), ("y", d_out)):
            if width is not None:
                self.register_buffer(f"{name}_mean", torch.zeros(width, device=device, dtype=dtype))
                self.register_buffer(f"{name}_scale", torch.ones((), device=device, dtype=dtype))

    @property
    def _target_mean(self) -> Tensor:
        return self.y_mean if self.is_transcoder else self.x_mean  # type: ignore[return-value]

    @property
    def _target_scale(self) -> Tensor:
        return self.y_scale if self.is_transcoder else self.x_scale  # type: ignore[return-value]

    def normalize(self, x: Tensor) -> Tensor:
        """(x - x_mean) / x_scale, ``[..., d_in]``, in x's dtype."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor; got {type(x).__name__}")
        if x.shape[-1:] != self.x_mean.shape:
            raise ValueError(f"x must have shape [..., {len(self.x_mean)}]; got {list(x.shape)}")
        if not x.dtype.is_floating_point:
            raise TypeError(f"x must be floating point; got {x.dtype}")
        if x.device != self.x_mean.device:
            raise ValueError(
                f"x must be on the module's device {self.x_mean.device}; got {x.device}"
            )
        return ((x - self.x_mean) / self.x_scale).to(x.dtype)

    def denormalize(self, recon: Tensor) -> Tensor:
        """Inverse of the target's normalisation, ``[..., d_out]``, in recon's dtype."""
        return (recon * self._target_scale + self._target_mean).to(recon.dtype)

    @torch.no_grad()
    def fit_normalization_(self, x: Tensor, target: Tensor | None = None) -> Self:
        """Set the buffers so that the rows of x are centred and of unit mean square.

        Args:
            x: ``[..., d_in]``. Rows with outlying norms should be dropped before.
            target: ``[..., d_out]``, for a transcoder only.

        Returns:
            self.

        Raises:
            TypeError: x or target is not a floating point tensor.
            ValueError: no rows, non-finite or constant x, or a target missing or not wanted.
        """
        if self.is_transcoder != (target is not None):
            raise ValueError(
                f"target must {'be given' if self.is_transcoder else 'be None'}: d_out decides"
            )
        pairs = [("x", x, self.x_mean, self.x_scale)]
        if target is not None:
            pairs.append(("target", target, self._target_mean, self._target_scale))
        fitted = []
        for name, rows, mean, _ in pairs:
            if not isinstance(rows, Tensor):
                raise TypeError(f"{name} must be a tensor; got {type(rows).__name__}")
            if not rows.dtype.is_floating_point:
                raise TypeError(f"{name} must be floating point; got {rows.dtype}")
            if rows.shape[-1:] != mean.shape or rows.numel() == 0:
                raise ValueError(
                    f"{name} must have shape [..., {len(mean)}] and rows; got {list(rows.shape)}"
                )
            rows = rows.reshape(-1, len(mean))
            # float64 sums by blocks of rows: no float64 copy of all of x
            blocks = rows.split(max(_CHUNK_ELEMENTS // len(mean), 1))
            centre = sum(block.double().sum(0) for block in blocks) / len(rows)
            square = (
                sum((block.double() - centre).square().sum() for block in blocks) / rows.numel()
            )
            scale = float(torch.as_tensor(square).sqrt())
            if not (math.isfinite(scale) and scale > 0):
                raise ValueError(
                    f"{name} must be finite and not constant; got root mean square {scale}"
                )
            fitted.append((centre, scale))
        for (_, _, mean, scale_buffer), (centre, scale) in zip(pairs, fitted, strict=True):
            mean.copy_(centre)
            scale_buffer.fill_(scale)
        return self
