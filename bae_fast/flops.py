"""What torch's counter of floating-point operations is told of the operators.

    import bae_fast.flops                                   # before FlopCounterMode is made
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode() as counter:
        bae.loss(bae(x), x, entropy_weight=3e-4).backward()

The counter cannot look into an operator. It is told the products that the dense definition has
(:mod:`bae_fast.reference`), two operations for each multiplication and addition, whatever bits and
windows save: the number that budgets of training compare. Statistics and surrogates count nothing,
as in torch's own formulas.

Importing this module registers the formulas. ``import bae_fast`` does not: torch's counter takes
longer to import than the package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from bae_fast.ops.schemas import NAMESPACE, SCHEMAS, EncoderBackward

# the counter gives shapes in place of tensors
_Shape = Sequence[int]


def _encode(x: _Shape, W_enc: _Shape, *_: Any, **__: Any) -> int:
    return 2 * x[0] * W_enc[0] * W_enc[1]


def _decode(words: _Shape, W_dec: _Shape, *_: Any, **__: Any) -> int:
    return 2 * words[0] * W_dec[0] * W_dec[1]


def _covariance(words: _Shape, counts: _Shape, *_: Any, **__: Any) -> int:
    """B^T B."""
    return 2 * words[0] * counts[0] ** 2


def _decoder_backward(
    words: _Shape, grad_recon: _Shape, n_columns: int, n_bits: int, *_: Any, **__: Any
) -> int:
    return 2 * words[0] * (n_columns // n_bits) * grad_recon[1]


def _encoder_backward(*arguments: Any, **_: Any) -> int:
    """Gradients of x and W_enc, those at the features, and B S once for each side of B^T B."""
    given: Any = EncoderBackward(*arguments)
    (n, d), k = given.x, given.W_enc[1]
    products = 2 * n * d * k * (given.needs[0] + given.needs[1])
    if given.grad_recon is not None:
        products += 2 * n * given.W_dec[0] * given.W_dec[1]
    if given.grad_covariance is not None:
        products += 4 * n * k**2
    return products


def _nothing(*_: Any, **__: Any) -> int:
    return 0


FORMULAS: dict[str, Callable[..., int]] = {
    "encode": _encode,
    "decode": _decode,
    "covariance": _covariance,
    "terms": _nothing,
    "slopes": _nothing,
    "decoder_backward": _decoder_backward,
    "encoder_backward": _encoder_backward,
}

for _name in SCHEMAS:
    _operator = getattr(getattr(torch.ops, NAMESPACE), _name)
    if _operator not in flop_registry:  # where this module is imported again
        register_flop_formula(_operator)(FORMULAS[_name])
