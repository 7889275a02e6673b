"""Tile sizes by chip family, kernel and size: data, read by :mod:`bae_fast.kernels.launch`.

Chosen by what compiles: matrix instructions in the loop, no spill, shared memory within the chip's
limit (``tests/backends/test_triton_compile.py``); not timed on a device. Entries go by the number
of rows of the kernel's first operand.
"""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """Tile of the result (m x n), of the inner index (k), warps and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# shared memory of one block, bytes
SHARED_MEMORY = {
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
}

_FEW, _MANY = 64, 4096
_DIGITS = 32  # nearest to 63 rows, and not to 512

# one pass over memory: the same on every chip
_PASSES: dict[str, dict[int, Config]] = {
    "threshold": {_MANY: Config(32, 128, 1, 4, 1)},
    "surrogate": {_MANY: Config(32, 128, 1, 4, 1)},
    "transpose": {_MANY: Config(256, 2, 1, 4, 1)},
}


def _table(
    few: Config, encode: Config, bits: Config, gradient: Config, pairs: Config, signs: Config
) -> dict[str, dict[int, Config]]:
    return {
        "encode": {_FEW: few, _MANY: encode},
        "bits_product": {_FEW: few, _MANY: bits},
        "gradient": {_FEW: few, _MANY: gradient},
        "covariance": {_MANY: pairs},
        "sign_product": {_MANY: signs},
        **_PASSES,
    }


_AMPERE = _table(
    few=Config(64, 64, 64, 4, 3),
    encode=Config(128, 128, 32, 8, 4),
    bits=Config(128, 128, 32, 8, 4),
    gradient=Config(128, 128, 32, 8, 4),
    pairs=Config(128, 128, 64, 8, 3),
    signs=Config(128, 128, 64, 8, 3),
)
_HOPPER = _table(
    few=Config(64, 64, 64, 4, 3),
    encode=Config(128, 256, 64, 8, 3),
    bits=Config(128, 256, 64, 8, 3),
    gradient=Config(128, 256, 64, 8, 3),
    pairs=Config(128, 128, 128, 8, 3),
    signs=Config(128, 128, 128, 8, 3),
)

# the digits of the counts are 63 rows: half of a tile would be empty (the other chips would store
# the bits of such a tile byte by byte)
_DIGIT_TILE = {_DIGITS: Config(64, 128, 128, 4, 3)}

# warps of the covariance where V is int64: half of the registers a thread, else they spill
# (Triton 3.6)
WIDE_WARPS = {"sm_90": 16}

DEFAULTS: dict[str, dict[str, dict[int, Config]]] = {
    "sm_80": _AMPERE,
    "sm_86": _AMPERE,
    "sm_90": {**_HOPPER, "sign_product": {**_DIGIT_TILE, **_HOPPER["sign_product"]}},
    "sm_100": _HOPPER,
    "sm_120": _AMPERE,
    # small, so that small problems have several tiles
    "interpreter": {
        **{
            name: {_MANY: Config(32, 64, 64, 4, 1)}
            for name in ("encode", "bits_product", "gradient")
        },
        "sign_product": {_MANY: Config(32, 64, 256, 4, 1)},
        "threshold": {_MANY: Config(32, 64, 1, 4, 1)},
        "surrogate": {_MANY: Config(32, 64, 1, 4, 1)},
        "covariance": {_MANY: Config(128, 128, 128, 8, 1)},
        "transpose": {_MANY: Config(256, 2, 1, 4, 1)},
    },
}

_PRODUCTS = tuple(
    Config(m, n, k, warps, stages)
    for m, n, warps in ((64, 64, 4), (64, 128, 4), (128, 128, 8), (128, 256, 8), (256, 128, 8))
    for k, stages in ((32, 4), (64, 3), (64, 4))
)

# what BAE_FAST_AUTOTUNE=1 tries beside the default
CANDIDATES: dict[str, tuple[Config, ...]] = {
    "encode": _PRODUCTS,
    "bits_product": _PRODUCTS,
    "gradient": _PRODUCTS,
    # square, and quartered by the epilogue: 128 or more
    "covariance": tuple(Config(128, 128, k, 8, s) for k in (64, 128, 256) for s in (2, 3, 4)),
    "sign_product": tuple(
        Config(m, n, k, 8, s)
        for m, n in ((128, 128), (128, 256))
        for k in (64, 128)
        for s in (2, 3)
    ),
}
