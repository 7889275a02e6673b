"""``impl="triton"``: kernels on packed bits for NVIDIA GPUs, beside cuBLAS.

Kernels are in ``kernels/triton/`` (the package ``bae_fast.kernels``); its ``bodies`` divide the
work into chunks and keep with torch what cuBLAS does best. Nothing here imports triton until an
operator is called. With ``TRITON_INTERPRET=1`` set before triton's first import the kernels run in
its interpreter and CPU tensors are served: for tests, a thousand times slower than anything else.
Not run on a device.
"""

from __future__ import annotations

import functools

from bae_fast.ops import nvidia, registry, schemas

_BODIES = "bae_fast.kernels.bodies"
_KERNELS = "bae_fast.kernels.covariance"
# bf16 products and asynchronous copies
_LEAST_CAPABILITY = (8, 0)


def _not_supported(request: registry.Request) -> list[str]:
    reasons = nvidia.input_reasons(request)
    if not nvidia.interpreted():
        note = " (TRITON_INTERPRET=1, set before the start, serves CPU tensors for tests)"
        reasons += nvidia.device_reasons(request, _LEAST_CAPABILITY, note)
    elif request.device_type not in ("cpu", "cuda"):
        reasons.append(f"the interpreter serves CPU and CUDA; got {request.device_type}")
    return reasons


def _make() -> registry.Backend:
    reason = nvidia.missing("bae_fast.kernels")
    if reason is not None:
        return registry.Backend(name="triton", unavailable=reason)
    schemas.define("triton")
    for key in ("CUDA", "CPU") if nvidia.interpreted() else ("CUDA",):
        schemas.implement("triton", nvidia.bodies(_BODIES, _KERNELS), key)
    return registry.Backend(
        name="triton",
        ops=schemas.overloads("triton"),
        not_supported_reasons=_not_supported,
        may_leave_planes=nvidia.lists_may_serve,
        keeps_copy=nvidia.keeps_copy,
        capturable=True,
        warmup=functools.partial(nvidia.warm, _BODIES, _KERNELS),
    )


BACKEND = registry.register(_make())
