"""Dense products of the package's own, where they are faster than torch's.

On matrix units (AMX) a float is three bf16 digits, and six products of digits are as exact as one
product in fp32 and faster; numbers of bf16 are one digit. Operators that use them say where they
could not, because an operand is not finite or nearly so: then torch's own product serves.

With AVX2 and AVX-512 numbers of fp32 and of bf16 are multiplied as they are, by fused
multiply-adds; where the processor multiplies bf16 natively, torch's product of such numbers is
faster. Encode makes products of integers there, of 16 bits (``csrc/screened_encode.h``) or of 8
(``csrc/screened_bytes.h``). Either way what comes before and after a product of the package's own
is done strip by strip, without a matrix [N, F] in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bae_fast.backends.cpp.extension import op
from bae_fast.devices import cpu_has_bfloat16

_DIGITS = {torch.float32: 3, torch.bfloat16: 1}
# without matrix units: fewer rows cost more to prepare than they gain; every thread needs a strip
LEAST_ROWS = 32
LEAST_COLUMNS = 64


def has_matrix_units() -> bool:
    """Whether the instruction set in use has matrix units."""
    return bool(op("unit_kind")() == 2)


def unit_digits(dtype: torch.dtype, rows: int, columns: int) -> int:
    """Digits of a number of the compute dtype; 0 where torch's product serves it better.

    Args:
        dtype: of both operands.
        rows, columns: of the product.
    """
    kind = op("unit_kind")()
    if kind == 2:
        return _DIGITS.get(dtype, 0)
    if dtype == torch.bfloat16 and cpu_has_bfloat16():
        return 0
    enough = rows >= LEAST_ROWS and columns >= LEAST_COLUMNS * torch.get_num_threads()
    return 3 if kind == 1 and dtype in _DIGITS and enough else 0


def encode_digits(dtype: torch.dtype, rows: int, columns: int) -> int:
    """The same for encode, whose products of integers no product of bf16 outruns."""
    if dtype == torch.bfloat16 and op("unit_kind")() == 1:
        dtype = torch.float32
    return unit_digits(dtype, rows, columns)


def operand(matrix: Tensor, digits: int) -> Tensor:
    """A matrix as the products read it: fp32, or bf16 where it may stay so; contiguous one way."""
    may_stay = digits == 1 or not has_matrix_units()
    if matrix.dtype != torch.float32 and not (may_stay and matrix.dtype == torch.bfloat16):
        matrix = matrix.to(torch.float32 if digits == 3 else torch.bfloat16)
    return matrix if matrix.stride(1) == 1 or matrix.stride(0) == 1 else matrix.contiguous()
