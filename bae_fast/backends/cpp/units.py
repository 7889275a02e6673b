"""Dense products on the CPU's matrix units, where it has them (AMX).

A float is three bf16 digits, and six products of digits are as exact as one product in fp32 and
faster; numbers of bf16 are one digit. Operators that use them say where they could not, because an
operand is not finite or nearly so: then torch's own product serves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bae_fast.backends.cpp.extension import op

_DIGITS = {torch.float32: 3, torch.bfloat16: 1}


def unit_digits(dtype: torch.dtype) -> int:
    """Digits of a number of the compute dtype; 0 where the units are missing or do not serve it."""
    return _DIGITS.get(dtype, 0) if op("has_units")() else 0


def operand(matrix: Tensor, digits: int) -> Tensor:
    """A matrix as the units read it: fp32, with one digit also bf16; contiguous one way."""
    if matrix.dtype != torch.float32 and (digits == 3 or matrix.dtype != torch.bfloat16):
        matrix = matrix.to(torch.float32 if digits == 3 else torch.bfloat16)
    return matrix if matrix.stride(1) == 1 or matrix.stride(0) == 1 else matrix.contiguous()
