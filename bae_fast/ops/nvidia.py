"""What backends for NVIDIA GPUs share before a kernel is imported: bodies, and reasons against."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bae_fast.ops.products import raw
from bae_fast.ops.registry import Request

# operator -> module of its body, and whether it takes the kernels of pairs and signs
_MODULES = {
    "encode": ("encode", False),
    "decode": ("decode", False),
    "covariance": ("covariance", True),
    "terms": ("terms", False),
    "slopes": ("terms", False),
    "decoder_backward": ("decode", False),
    "encoder_backward": ("encoder_backward", True),
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_BITS = 30  # their weights are int32

# how impl="cuda" makes pairs, and products with the signs, on compute capability 9.0: mma or wgmma
ENV_PAIRS, ENV_SIGNS = "BAE_FAST_CUDA_PAIRS", "BAE_FAST_CUDA_SIGNS"

# Products of bits that the dense covariance makes in the time of one step of a counter: 2e15 a
# second of 1-bit matrix instructions, 2e10 atomic additions in the L2 cache. Assumed, not measured.
DENSE_A_STEP = 100_000
# Lists of ones are made where a code with so many ones a row would be counted by them, and where
# the dense form takes a quarter of a millisecond: less is hidden by the twenty launches.
LEAST_ONES = 4
LEAST_PRODUCTS = 5 * 10**11


def lists_may_serve(n_rows: int, n_columns: int) -> bool:
    """Whether codes of these sizes may be counted by lists of their ones."""
    return (
        n_columns**2 >= 2 * LEAST_ONES**2 * DENSE_A_STEP and n_rows * n_columns**2 >= LEAST_PRODUCTS
    )


# a half-precision copy of W_dec stays from forward to backward where it is at most this share of
# the device's memory
_COPY_SHARE = 32


def keeps_copy(n_numbers: int, device: torch.device) -> bool:
    """Whether a half-precision copy of so many numbers may stay for a step."""
    if device.type != "cuda":
        return True
    total = int(torch.cuda.get_device_properties(device).total_memory)
    return 2 * n_numbers <= total // _COPY_SHARE


def interpreted() -> bool:
    """Whether triton's interpreter was asked for."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _body(package: str, name: str, kernels: str) -> Callable[..., Any]:
    """The operator's body, imported, and triton with it, when it is first called."""
    module, takes_kernels = _MODULES[name]

    def call(*args: Any) -> Any:
        body = getattr(importlib.import_module(f"{package}.{module}"), name)
        if takes_kernels:
            return body(importlib.import_module(kernels), *args)
        return body(*args)

    return call


def bodies(package: str, kernels: str) -> dict[str, Callable[..., Any]]:
    """Every operator: bodies of that package, the kernels of pairs and signs of that module."""
    return {name: raw(_body(package, name, kernels)) for name in _MODULES}


def warm(
    package: str, kernels: str, device: torch.device, surrogates: Sequence[str], multilinear: bool
) -> None:
    """Compile on a device what a step with these surrogates starts."""
    warmup = importlib.import_module(f"{package}.warmup").warmup
    warmup(importlib.import_module(kernels), device, surrogates, multilinear)


@functools.cache
def missing(kernels: str) -> str | None:
    """Why no kernel can run in this process, found without importing triton."""
    for module, reason in (
        ("triton", "the package triton is not installed"),
        (kernels, "its kernels are not installed: pip install bae-fast, or -e ."),
    ):
        try:
            found = importlib.util.find_spec(module)
        except ImportError as error:
            return f"{reason} ({error})"
        if found is None:
            return reason
    return None


def input_reasons(request: Request) -> list[str]:
    """Why the kernels cannot take the rows' dtype or the bits of a feature."""
    reasons = []
    if request.dtype not in _DTYPES:
        reasons.append(f"float32, bfloat16 and float16; got {request.dtype} (impl='torch' has it)")
    if request.n_bits > _MOST_BITS:
        reasons.append(f"codes of up to {_MOST_BITS} bits a feature; got {request.n_bits}")
    return reasons


def device_reasons(request: Request, least: tuple[int, int], note: str = "") -> list[str]:
    """Why the request's device, or the one at hand, cannot run them."""
    if request.device_type != "cuda":
        return [f"runs on CUDA devices; the tensor is on {request.device_type}{note}"]
    if not torch.cuda.is_available():
        return ["torch sees no CUDA device"]
    if torch.version.hip is not None:
        return ["made for NVIDIA GPUs; this torch is built for AMD's"]
    capability = torch.cuda.get_device_capability(request.device_index)
    if capability < least:
        return [
            f"needs compute capability {least[0]}.{least[1]}; got {capability[0]}.{capability[1]}"
        ]
    return []
