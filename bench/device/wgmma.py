"""What impl="cuda" makes by wgmma, on request only: checked at the edges of sizes, and timed.

Pairs and products with the signs are integers and bits, so they are compared with exact ones, and
those by mma.sync with the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bae_fast.ops import registry
from bae_fast.ops.nvidia import ENV_PAIRS, ENV_SIGNS
from bae_fast.packing import pack_rows
from bench import exact
from bench.device.chip import request_of
from bench.device.layer import variables
from bench.exact import WrongResultError
from bench.timing import Side

# (N, F) at which pairs are checked: one feature, edges of panels and of tiles of 1024 rows, blocks
# with many tiles, the most rows
PANEL_SHAPES = [
    (2, 1), (33, 129), (1024, 128), (1025, 300), (4096, 4096), (4097, 2500), (6000, 5000),
    (8192, 4096),
]  # fmt: skip
# (N, columns of S, F) at which products with the signs are checked: few of everything, edges of
# results of 256 x 128 and of tiles of 1024 bits, stages used again, blocks with many results
SIGN_SHAPES = [
    (2, 1, 1), (256, 128, 1024), (257, 129, 1025), (300, 500, 3300), (4096, 3000, 4128),
    (1025, 9000, 9000),
]  # fmt: skip
# how often each is made by wgmma
REPEATS = 5
FORMS = (("mma", 1), ("wgmma", REPEATS))


def check_panels(
    covariance: Callable[..., tuple[Tensor, Tensor]],
    shapes: list[tuple[int, int]] = PANEL_SHAPES,
) -> int:
    """Numerators and planes of pairs by wgmma, each several times; how many.

    They are integers and bits: equal to float64's, and to those by mma.sync.

    Args:
        covariance: the operator of impl="cuda".

    Raises:
        WrongResultError: they are not.
    """
    for n, f in shapes:
        words, counts, numerator, planes = _pairs(n, f)
        for form, times in FORMS:
            for repeat in range(times):
                with variables(**{ENV_PAIRS: form}):
                    got, signs = covariance(words, counts, torch.tensor(n), True)
                    alone, _ = covariance(words, counts, torch.tensor(n), False)
                where = f"pairs by {form} of {n} rows and {f} features, call {repeat + 1}"
                if int(got) != numerator or int(alone) != numerator:
                    raise WrongResultError(
                        f"{where}: {int(got)} with signs and {int(alone)} without; "
                        f"should be {numerator}"
                    )
                if not torch.equal(signs, planes):
                    wrong = int((signs != planes).sum())
                    raise WrongResultError(f"{where}: {wrong} words of signs of {signs.numel()}")
    return len(shapes) * REPEATS


def _pairs(n: int, f: int) -> tuple[Tensor, Tensor, int, Tensor]:
    """Packed bits and their counts; the exact numerator and planes of signs."""
    torch.manual_seed(n + f)
    dense = torch.rand(n, f) < torch.rand(f)
    dense[:, :: max(f // 5, 1)] = False  # constant columns, and one that is the opposite
    dense[:, f - 1] = ~dense[:, f // 2]
    words, counts = pack_rows(dense), dense.sum(0)
    right = exact.pair_values(dense.float(), slice(None))
    numerator = int(right.abs().sum())  # below 2^53: exact
    return words, counts, numerator, torch.stack([pack_rows(right > 0), pack_rows(right < 0)])


def check_sign_panels(
    sign_product: Callable[..., Tensor],
    digits_of: Callable[..., tuple[Tensor, Tensor]],
    shapes: list[tuple[int, int, int]] = SIGN_SHAPES,
) -> int:
    """Products with the signs by wgmma, each several times; how many.

    They are integers that are rounded once: equal to those of float64 to the last bit, and to those
    by mma.sync.

    Args:
        sign_product: of the kernels of impl="cuda".
        digits_of: :func:`bae_fast.kernels.counts.sign_operands`.

    Raises:
        WrongResultError: they are not.
    """
    for n, columns, f in shapes:
        *operands, right = _sign_products(n, columns, f, digits_of)
        for form, times in FORMS:
            for repeat in range(times):
                with variables(**{ENV_SIGNS: form}):
                    got = sign_product(*operands)
                if not torch.equal(got, right):
                    raise WrongResultError(
                        f"B S by {form} of {n} rows, {columns} columns and {f} features, call "
                        f"{repeat + 1}: {int((got != right).sum())} numbers of {right.numel()}"
                    )
    return len(shapes) * REPEATS


def _sign_products(
    n: int, columns: int, f: int, digits_of: Callable[..., tuple[Tensor, Tensor]]
) -> tuple[Tensor, ...]:
    """What the kernel is given, and what it has to return."""
    torch.manual_seed(n + columns + f)
    dense, s = torch.rand(n, f) < torch.rand(f), torch.randint(-1, 2, (columns, f))
    words, planes = pack_rows(dense), torch.stack([pack_rows(s > 0), pack_rows(s < 0)])
    counts, n_rows = dense.sum(0), torch.tensor(n)
    digits, scale = digits_of(counts, n_rows, torch.tensor(float(n * n)), n)
    sums = n * (dense.double() @ s.double().t()) - counts.double() @ s.double().t()
    right = sums.float() * scale  # below 2^53: exact until here
    return words, planes, digits, n_rows, scale, right


def check_kind(kind: str) -> int:
    """The checks of a kind of case, "panels" or "sign panels"; how many."""
    if kind == "panels":
        return check_panels(registry.BACKENDS["cuda"].ops["covariance"])
    from bae_fast.kernels.counts import sign_operands
    from bae_fast.kernels_cuda.covariance import sign_product

    return check_sign_panels(sign_product, sign_operands)


def unavailable(device: str) -> str | None:
    """Why impl="cuda" makes nothing by wgmma here, or None."""
    reasons = registry.reasons_against("cuda", request_of(device))
    if not reasons and torch.cuda.get_device_capability() != (9, 0):
        reasons = ["compute capability 9.0 alone has the instruction"]
    return "; ".join(reasons) if reasons else None


def by_wgmma(side: Side, variable: str) -> Side:
    """The same side with what the variable names made by wgmma."""

    def run(*arguments: Any) -> Any:
        with variables(**{variable: "wgmma"}):
            return side.run(*arguments)

    return side._replace(run=run)
