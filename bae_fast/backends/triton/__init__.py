"""``impl="triton"``: kernels on packed bits for NVIDIA GPUs, beside cuBLAS.

Kernels are in ``kernels/triton/`` (the package ``bae_fast.kernels``); the bodies here divide the
work into chunks and keep with torch what cuBLAS does best. Nothing here imports triton until an
operator is called. With ``TRITON_INTERPRET=1`` set before triton's first import the kernels run in
its interpreter and CPU tensors are served: for tests, a thousand times slower than anything else.
Not run on a device.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from bae_fast.ops import registry, schemas
from bae_fast.ops.products import raw

_MODULES = {
    "encode": "encode",
    "decode": "decode",
    "covariance": "covariance",
    "decoder_backward": "decode",
    "encoder_backward": "encoder_backward",
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_CAPABILITY = (8, 0)


def interpreted() -> bool:
    """Whether triton's interpreter was asked for."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _body(name: str) -> Callable[..., Any]:
    """The operator's body, imported, and triton with it, when it is first called."""

    def call(*args: Any) -> Any:
        module = importlib.import_module(f"bae_fast.backends.triton.{_MODULES[name]}")
        return getattr(module, name)(*args)

    return call


def _missing() -> str | None:
    """Why no kernel can run in this process, found without importing triton."""
    for module, reason in (
        ("triton", "the package triton is not installed"),
        ("bae_fast.kernels", "its kernels are not installed: pip install bae-fast, or -e ."),
    ):
        try:
            found = importlib.util.find_spec(module)
        except ImportError as error:
            return f"{reason} ({error})"
        if found is None:
            return reason
    return None


def _not_supported(request: registry.Request) -> list[str]:
    reasons = []
    if request.dtype not in _DTYPES:
        reasons.append(f"float32, bfloat16 and float16; got {request.dtype} (impl='torch' has it)")
    if request.n_bits > 30:
        reasons.append(f"codes of up to 30 bits a feature; got {request.n_bits}")
    if interpreted():
        if request.device_type not in ("cpu", "cuda"):
            reasons.append(f"the interpreter serves CPU and CUDA; got {request.device_type}")
    elif request.device_type != "cuda":
        reasons.append(
            f"runs on CUDA devices; the tensor is on {request.device_type} "
            "(TRITON_INTERPRET=1, set before the start, serves CPU tensors for tests)"
        )
    elif not torch.cuda.is_available():
        reasons.append("torch sees no CUDA device")
    elif torch.version.hip is not None:
        reasons.append("made for NVIDIA GPUs; this torch is built for AMD's")
    elif torch.cuda.get_device_capability() < _LEAST_CAPABILITY:
        major, minor = torch.cuda.get_device_capability()
        reasons.append(f"needs compute capability 8.0; got {major}.{minor}")
    return reasons


def _warmup(device: torch.device) -> None:
    from bae_fast.backends.triton.warmup import warmup

    warmup(device)


def _make() -> registry.Backend:
    reason = _missing()
    if reason is not None:
        return registry.Backend(name="triton", unavailable=reason)
    schemas.define("triton")
    bodies = {name: raw(_body(name)) for name in _MODULES}
    for key in ("CUDA", "CPU") if interpreted() else ("CUDA",):
        schemas.implement("triton", bodies, key)
    return registry.Backend(
        name="triton",
        ops=schemas.overloads("triton"),
        not_supported_reasons=_not_supported,
        warmup=_warmup,
    )


BACKEND = _make()
