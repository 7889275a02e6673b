"""Raw rows of hidden states: which are refused, and how an autoencoder normalises them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bae_fast.arguments import all_finite
from bae_fast.codes import check_strided
from bae_fast.devices import autocasts
from bae_fast.units import divided, empty_metric, inverse_units, multiplied

if TYPE_CHECKING:
    from typing_extensions import Self

# the buffers of a unit
_UNITS = ("scale", "metric", "metric_inverse")

# elements of rows upcast to float64 at a time
_CHUNK_ELEMENTS = 16 * 2**20


def numpy_hint(name: str, value: Any) -> str:
    """How an array of NumPy becomes a tensor, for an error's end; nothing for other values."""
    known = type(value).__module__.partition(".")[0] == "numpy"
    return f"; torch.from_numpy({name}) makes one of it" if known else ""


def check_rows(name: str, rows: Any, width: int, *, least: int = 1) -> None:
    """Refuse what is no tensor of hidden states ``[n, width]``.

    Raises:
        TypeError: no tensor, or one that is not of floating point.
        ValueError: another shape, or fewer than ``least`` rows.
    """
    if not isinstance(rows, Tensor):
        hint = ""
        if isinstance(getattr(rows, "rows", None), Tensor):
            hint = f"; its rows are {name}.rows"
        hint = hint or numpy_hint(name, rows)
        raise TypeError(f"{name} must be a tensor [n, {width}]; got {type(rows).__name__}{hint}")
    if rows.dim() != 2 or rows.shape[1] != width or not len(rows):
        hint = ""
        if rows.dim() > 2 and rows.shape[-1] == width and rows.numel():
            hint = f"; {name}.flatten(0, -2) has that shape"
        raise ValueError(f"{name} must have shape [n, {width}]; got {list(rows.shape)}{hint}")
    if not rows.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point; got {rows.dtype}")
    if len(rows) < least:
        raise ValueError(f"{name} must hold at least {least} rows; got {len(rows)}")


class Normalized(nn.Module):
    """A module that centres raw rows and gives them unit mean square, and takes that back.

    Buffers ``x_mean [d_in]`` and ``x_scale []`` (``y_mean``, ``y_scale`` for another target)
    normalise; they are 0 and 1 until :meth:`fit_normalization_`. Where a metric was given there is
    ``x_metric [d_in]`` too (``y_metric``), the relative unit of each dimension, or
    ``[d_in, d_in]``, a symmetric positive definite matrix that rows are divided by; else None.

    Attributes:
        is_transcoder: whether the target is something else than x.
    """

    is_transcoder: bool = False
    x_mean: Tensor
    x_scale: Tensor
    x_metric: Tensor | None
    x_metric_inverse: Tensor | None

    def register_normalization(
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
                # in files only where a metric was given
                self.register_buffer(f"{name}_metric", None)
                self.register_buffer(f"{name}_metric_inverse", None, persistent=False)

    def set_metric_(self, metric: Tensor | None, side: str = "x") -> None:
        """Make a metric the module's own, of x or of the target (``"y"``), without a look at rows.

        Args:
            metric: ``[d]``, ``[d, d]`` or None, as in :class:`Normalized`.

        Raises:
            ValueError: a matrix that is not symmetric and positive definite.
        """
        setattr(self, f"{side}_metric_inverse", inverse_units(metric))
        setattr(self, f"{side}_metric", metric)

    def _apply(self, *args: Any, **options: Any) -> Self:
        """Move and convert; the inverse of a matrix is that of the numbers it has afterwards."""
        super()._apply(*args, **options)
        for side in "xy":
            metric = getattr(self, f"{side}_metric", None)
            if isinstance(metric, Tensor) and metric.dim() == 2:
                # memory that is yet to be filled holds no matrix; what fills it sets the metric
                with contextlib.suppress(ValueError):
                    self.set_metric_(metric, side)
        return self

    @property
    def target_mean(self) -> Tensor:
        """``[d_out]``, the mean of the target."""
        return self.y_mean if self.is_transcoder else self.x_mean  # type: ignore[return-value]

    def _divided(self, rows: Tensor, side: str) -> Tensor:
        return divided(rows, *(getattr(self, f"{side}_{n}") for n in _UNITS))

    def in_target_units(self, rows: Tensor) -> Tensor:
        """Differences of targets ``[..., d_out]`` in the units that errors are measured in."""
        return self._divided(rows, "y" if self.is_transcoder else "x")

    @property
    def target_unit(self) -> Tensor | None:
        """``[d_out]``, what :meth:`in_target_units` multiplies each dimension by; None where that
        is the product with a matrix."""
        scale, metric, _ = (
            getattr(self, f"{'y' if self.is_transcoder else 'x'}_{n}") for n in _UNITS
        )
        if metric is not None and metric.dim() == 2:
            return None
        scale = scale.to(torch.promote_types(scale.dtype, torch.float32))
        unit: Tensor = (scale if metric is None else scale * metric).reciprocal()
        return unit.expand(self.target_mean.shape)

    def in_raw_units(self, rows: Tensor) -> Tensor:
        """Differences of normalised targets, as decoder directions ``[..., d_out]``, in raw units:
        :meth:`denormalize` without the mean."""
        side = "y" if self.is_transcoder else "x"
        return multiplied(rows, *(getattr(self, f"{side}_{n}") for n in _UNITS[:2]))

    def normalize(self, x: Tensor) -> Tensor:
        """(x - x_mean) / (x_scale x_metric), ``[..., d_in]``, in x's dtype, or in the parameters'
        where that is wider: rows of a bfloat16 cache go into a float32 layer. A metric that is a
        matrix divides by its inverse.

        Raises:
            TypeError: x is not a tensor of floats.
            ValueError: x has another width, or lies on another device.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor; got {type(x).__name__}{numpy_hint('x', x)}")
        check_strided("x", x)
        if x.shape[-1:] != self.x_mean.shape:
            raise ValueError(f"x must have shape [..., {len(self.x_mean)}]; got {list(x.shape)}")
        if not x.dtype.is_floating_point:
            raise TypeError(f"x must be floating point; got {x.dtype}")
        if x.device != self.x_mean.device:
            raise ValueError(
                f"x must be on the module's device {self.x_mean.device}; got {x.device}"
            )
        # not the buffers' dtype: FSDP's mixed precision narrows parameters and leaves buffers wide
        own = next(self.parameters(), self.x_mean).dtype
        dtype = own if torch.promote_types(x.dtype, own) == own else x.dtype
        return self._divided(x - self.x_mean, "x").to(dtype)

    def normalized_rows(self, x: Tensor) -> Tensor:
        """:meth:`normalize`, for a product with the parameters.

        Raises:
            TypeError: x is wider than the parameters, which a product outside autocast refuses;
                and see :meth:`normalize`.
            ValueError: see :meth:`normalize`.
        """
        rows = self.normalize(x)
        own = next(self.parameters(), rows).dtype
        autocast = autocasts(rows.device)
        # autocast narrows what a product is given, but for float64
        if rows.dtype != own and (rows.dtype == torch.float64 or not autocast):
            raise TypeError(
                f"x must have the module's dtype {own}, or a narrower one; got {x.dtype}: "
                f"x.to({own}) has it"
            )
        return rows

    def denormalize(self, recon: Tensor) -> Tensor:
        """Inverse of the target's normalisation, ``[..., d_out]``, in recon's dtype."""
        return (self.in_raw_units(recon) + self.target_mean).to(recon.dtype)

    @torch.no_grad()
    def fit_normalization_(
        self,
        x: Tensor,
        target: Tensor | None = None,
        *,
        metric: Tensor | None = None,
        target_metric: Tensor | None = None,
    ) -> Self:
        """Set the buffers so that the rows of x are centred and of unit mean square.

        With a metric each dimension is divided by its own scale before, so its squared error in
        training weighs as the inverse square of that; see :mod:`bae_fast.analysis.error_metric`. A
        matrix M makes the squared error of a row e that of e M^-1.

        Args:
            x: ``[..., d_in]``. Rows with outlying norms should be dropped before.
            target: ``[..., d_out]``, for a transcoder only.
            metric: ``[d_in]``, the scales of x's dimensions, positive; or ``[d_in, d_in]``,
                symmetric and positive definite. Only their ratios count.
            target_metric: ``[d_out]`` or ``[d_out, d_out]``, those of the target, for a transcoder
                only.

        Returns:
            self.

        Raises:
            TypeError: x or target is not a floating point tensor.
            ValueError: no rows, non-finite or constant x, a mean or a scale that the module's
                dtype does not hold, a target missing or not wanted, or a metric that is not
                wanted, of another width, or not positive.
        """
        if self.is_transcoder != (target is not None):
            raise ValueError(
                f"target must {'be given' if self.is_transcoder else 'be None'}: d_out decides"
            )
        if target is None and target_metric is not None:
            raise ValueError("target_metric must be None where there is no target")
        parts = [("x", x, metric)]
        if target is not None:
            parts.append(("target", target, target_metric))
        fitted = []
        for name, rows, units in parts:
            mean = self.x_mean if name == "x" else self.target_mean
            if not isinstance(rows, Tensor):
                check_rows(name, rows, len(mean))
            check_strided(name, rows)
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
            scale = math.sqrt(float(square))
            relative = None
            if units is not None:
                relative = _relative_units(name, units, blocks, centre, scale)
            if not (math.isfinite(scale) and scale > 0):
                bad = int(sum((~block.isfinite()).any(1).sum() for block in blocks))
                found = f"root mean square {scale}"
                if bad:
                    found = f"NaN or Inf in {bad:,} of {len(rows):,} rows"
                elif len(rows) == 1:
                    found = "one row"
                raise ValueError(f"{name} must be finite and not constant; got {found}")
            _check_held(name, centre, scale, mean.dtype)
            fitted.append((centre, scale, relative))
        for side, (centre, scale, relative) in zip("xy", fitted, strict=False):
            mean = getattr(self, f"{side}_mean")
            mean.copy_(centre)
            getattr(self, f"{side}_scale").fill_(scale)
            self.set_metric_(None if relative is None else relative.to(mean), side)
        return self

    def usual_norms(self) -> tuple[float, float]:
        """Root mean square norms of the inputs and of the targets that the normalisation was
        fitted to; infinite where it was not fitted (mean 0 and scale 1)."""
        norms = []
        for side in "xy" if self.is_transcoder else "xx":
            mean, scale = getattr(self, f"{side}_mean"), getattr(self, f"{side}_scale")
            fitted = bool(mean.any()) or float(scale) != 1
            square = float(mean.double().square().sum()) + len(mean) * float(scale) ** 2
            norms.append(square**0.5 if fitted else math.inf)
        return norms[0], norms[1]

    def is_normalized(self) -> bool:
        """Whether :meth:`fit_normalization_` was called; on a meta device it counts as called."""
        if self.x_mean.is_meta:
            return True
        return bool(self.x_mean.any()) or float(self.x_scale) != 1

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **options: Any
    ) -> None:
        """Have a metric where the state's normalisation has one, and none where it has none."""
        for side in "xy":
            name, mean = f"{side}_metric", getattr(self, f"{side}_mean", None)
            if not isinstance(mean, Tensor) or f"{prefix}{side}_mean" not in state_dict:
                continue
            given = state_dict.get(prefix + name)
            own = getattr(self, name)
            if given is None:
                self.set_metric_(None, side)
            elif own is None or own.shape != given.shape:
                setattr(self, name, empty_metric(mean, given))
        super()._load_from_state_dict(state_dict, prefix, *args, **options)
        for side in "xy":
            if isinstance(getattr(self, f"{side}_metric", None), Tensor):
                self.set_metric_(getattr(self, f"{side}_metric"), side)


def _check_held(name: str, centre: Any, scale: float, dtype: torch.dtype) -> None:
    """Refuse a normalisation that the module's dtype has no numbers for."""
    held = centre.new_tensor(scale).to(dtype)
    if not (bool(held.isfinite()) and held > 0 and all_finite(centre.to(dtype))):
        raise ValueError(
            f"{name} must have a mean and a scale within {str(dtype).removeprefix('torch.')}, the "
            f"dtype of x_mean and x_scale; got means up to {float(centre.abs().max()):.3g} and a "
            f"root mean square of {scale:.3g}"
        )


def _relative_units(
    name: str, units: Tensor, blocks: Sequence[Tensor], centre: Any, scale: float
) -> Tensor:
    """Units over the scale, such that rows divided by both have unit mean square."""
    what = "metric" if name == "x" else "target_metric"
    width = blocks[0].shape[1]
    if not isinstance(units, Tensor) or units.shape not in ((width,), (width, width)):
        got = list(units.shape) if isinstance(units, Tensor) else type(units).__name__
        raise ValueError(f"{what} must be a tensor [{width}] or [{width}, {width}]; got {got}")
    units = units.to(blocks[0].device, torch.float64)
    if units.dim() == 1 and not bool((units.isfinite() & (units > 0)).all()):
        raise ValueError(f"{what} must be finite and positive; the least is {float(units.min())}")
    inverse = inverse_units(units, what)
    one = units.new_ones(())
    n = sum(block.numel() for block in blocks)
    square = sum(
        divided(block.double() - centre, one, units, inverse).square().sum() for block in blocks
    )
    return units * math.sqrt(float(square) / n) / scale
