"""``impl="cuda"``: 1-bit matrix instructions for the covariance, on NVIDIA GPUs that have them.

n_ij and the products with the signs are CUDA C++ (``csrc/cuda``, started by ``kernels/cuda/``, the
package ``bae_fast.kernels_cuda``), compiled on first use by NVRTC, which torch's CUDA wheels bring.
All else is what ``impl="triton"`` runs. Nothing here imports triton or loads NVRTC until a call on
a device that could use them. Not run on a device.
"""

from __future__ import annotations

import functools
import importlib

import torch

from bae_fast.ops import nvidia, registry, schemas

_BODIES = "bae_fast.kernels.bodies"
_KERNELS = "bae_fast.kernels_cuda.covariance"
# the chips that have the instruction; later ones take it apart into int8 products
_LEAST_CAPABILITY, _MOST_CAPABILITY = (8, 0), (9, 0)


def _not_supported(request: registry.Request) -> list[str]:
    reasons = nvidia.input_reasons(request)
    on_device = nvidia.device_reasons(request, _LEAST_CAPABILITY)
    if not on_device:
        capability = torch.cuda.get_device_capability(request.device_index)
        if capability > _MOST_CAPABILITY:
            on_device = [
                "1-bit products are emulated on compute capability "
                f"{capability[0]}.{capability[1]}: impl='triton' has int8 products there"
            ]
    if not on_device:
        no_compiler = importlib.import_module("bae_fast.kernels_cuda.nvrtc").missing()
        on_device = [] if no_compiler is None else [no_compiler]
    return reasons + on_device


def _make() -> registry.Backend:
    reason = nvidia.missing("bae_fast.kernels") or nvidia.missing("bae_fast.kernels_cuda")
    if reason is not None:
        return registry.Backend(name="cuda", unavailable=reason)
    schemas.define("cuda")
    schemas.implement("cuda", nvidia.bodies(_BODIES, _KERNELS), "CUDA")
    return registry.Backend(
        name="cuda",
        ops=schemas.overloads("cuda"),
        not_supported_reasons=_not_supported,
        may_leave_planes=nvidia.lists_may_serve,
        keeps_copy=nvidia.keeps_copy,
        capturable=True,
        warmup=functools.partial(nvidia.warm, _BODIES, _KERNELS),
    )


BACKEND = registry.register(_make())
