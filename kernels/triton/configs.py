"""Tile sizes by chip family, kernel and size: data, read by :mod:`bae_fast.kernels.launch`.

Chosen by what compiles: matrix instructions in the loop, no spill, shared memory within the chip's
limit (the tests that compile kernels); not timed on a device. Where a kernel has several tiles,
:func:`bae_fast.kernels.launch.default` takes one by the number of tiles and of multiprocessors.
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

Table = dict[str, tuple[Config, ...]]

# one pass over memory: the same on every chip
_PASSES: Table = {
    "threshold": (Config(32, 128, 1, 4, 1),),
    "surrogate": (Config(32, 128, 1, 4, 1),),
    "transpose": (Config(256, 2, 1, 4, 1),),
    "unpack": (Config(16, 8, 1, 4, 1),),
    "lists": (Config(1, 64, 1, 4, 1),),
    "columns": (Config(1, 1024, 1, 4, 1),),
    "pair_lists": (Config(16, 32, 1, 8, 1),),
}


def _table(product: Config, pairs: Config, signs: tuple[Config, ...]) -> Table:
    few = Config(64, 64, 64, 4, 3)
    products = dict.fromkeys(("encode", "bits_product", "gradient"), (few, product))
    return {**products, "covariance": (pairs,), "sign_product": signs, **_PASSES}


_AMPERE = _table(
    Config(128, 128, 32, 8, 4), Config(128, 128, 64, 8, 3), (Config(128, 128, 64, 8, 3),)
)
_HOPPER = _table(
    Config(128, 256, 64, 8, 3), Config(128, 128, 128, 8, 3), (Config(128, 128, 128, 8, 3),)
)

# the digits of the counts are few rows: half of a tile would be empty (the other chips would store
# the bits of such a tile byte by byte)
_DIGIT_TILE = (Config(64, 128, 128, 4, 3),)

# with 64 of the inner index Triton 3.9's assembler stops at 96 registers on sm_120, and spills
_THIN_TILE = Config(64, 64, 32, 4, 4)

# warps of the covariance where V is int64: half of the registers a thread, else they spill
# (Triton 3.6)
WIDE_WARPS = {"sm_90": 16}

# columns of a part of the gradient's tile of 256 where bits, covariance and pre are all read: with
# 32 they spill (Triton 3.9)
NARROW_PARTS = {"sm_90": 16}

# A multiprocessor makes so many products while it reads one number of an operand from the L2 cache
# (H100 and H200: 2,100 a cycle, 64 bytes): a tile with few products for its rows waits for them.
PRODUCTS_A_NUMBER = 64

DEFAULTS: dict[str, Table] = {
    "sm_80": _AMPERE,
    "sm_86": _AMPERE,
    "sm_90": {**_HOPPER, "sign_product": _DIGIT_TILE + _HOPPER["sign_product"]},
    "sm_100": _HOPPER,
    "sm_120": {**_AMPERE, "gradient": (_THIN_TILE, _AMPERE["gradient"][1])},
    # small, so that small problems have several tiles
    "interpreter": {
        **_PASSES,
        **dict.fromkeys(("encode", "bits_product", "gradient"), (Config(32, 64, 64, 4, 1),)),
        "sign_product": (Config(32, 64, 256, 4, 1),),
        "threshold": (Config(32, 64, 1, 4, 1),),
        "surrogate": (Config(32, 64, 1, 4, 1),),
        "covariance": (Config(128, 128, 128, 8, 1),),
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
