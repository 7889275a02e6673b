"""``impl="cpp"``: kernels on packed bits for CPUs, beside torch's own matrix products.

Bodies are Python around two kinds of work: products of dense matrices, which stay with torch, by
chunks of columns that fit the cache; and everything on bits, in C++ (``csrc/``). The instruction
set is the best that the CPU has, or the one that ``BAE_FAST_SIMD`` names.
"""

from collections.abc import Callable
from typing import Any

from bae_fast.backends.cpp import extension
from bae_fast.ops import registry, schemas
from bae_fast.ops.products import raw


def _bodies() -> dict[str, Callable[..., Any]]:
    from bae_fast.backends.cpp.covariance import covariance
    from bae_fast.backends.cpp.decode import decode, decoder_backward
    from bae_fast.backends.cpp.encode import encode
    from bae_fast.backends.cpp.encoder_backward import encoder_backward
    from bae_fast.backends.cpp.losses import slopes, terms

    return {
        "encode": encode,
        "decode": decode,
        "covariance": covariance,
        "terms": terms,
        "slopes": slopes,
        "decoder_backward": decoder_backward,
        "encoder_backward": encoder_backward,
    }


def _extras() -> registry.Extras:
    from bae_fast.backends.cpp.encoder_backward import covariance_columns
    from bae_fast.backends.cpp.losses import squared_error, squared_error_gradient
    from bae_fast.backends.cpp.pair_counts import common_ones, pair_counts
    from bae_fast.backends.cpp.salient import column_counts, grouped, salient
    from bae_fast.backends.cpp.search import search

    return registry.Extras(
        column_counts=column_counts,
        common_ones=common_ones,
        grouped=grouped,
        pair_counts=pair_counts,
        salient=salient,
        search=search,
        squared_error=squared_error,
        squared_error_gradient=squared_error_gradient,
        covariance_columns=covariance_columns,
    )


def _not_supported(request: registry.Request) -> list[str]:
    if request.device_type != "cpu":
        return [f"runs on CPUs; the tensor is on {request.device_type}"]
    return []


def _make() -> registry.Backend:
    reason = extension.load()
    if reason is not None:
        return registry.Backend(name="cpp", unavailable=reason)
    schemas.define("cpp")
    schemas.implement("cpp", {name: raw(body) for name, body in _bodies().items()}, "CPU")
    return registry.Backend(
        name="cpp",
        ops=schemas.overloads("cpp"),
        not_supported_reasons=_not_supported,
        simd=extension.simd,
        extras=_extras(),
    )


BACKEND = registry.register(_make())
