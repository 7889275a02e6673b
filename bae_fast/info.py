"""What runs here: versions, the CPU's vector level, and each backend with the reason if not."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from typing import Any

import torch

from bae_fast._version import __version__
from bae_fast.ops.registry import (
    AUTO_ORDER,
    BACKENDS,
    BY_NAME,
    IMPLS,
    Request,
    choose,
    reasons_against,
)
from bae_fast.surrogates import SURROGATES
from bae_fast.waiting import policy

_PACKAGES = ("torch", "triton", "numpy", "safetensors", "transformers")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def info() -> dict[str, Any]:
    """Versions, devices, SIMD level, and for each backend "available" or why not.

    Imports no optional package: versions are read from installed metadata.
    """
    backends = {}
    for name in IMPLS[2:]:
        reasons = []
        for device, order in AUTO_ORDER.items():
            if name in (*order, *BY_NAME.get(device, ())):
                reasons += reasons_against(name, Request(device, torch.float32))
        backends[name] = "available" if not reasons else "; ".join(dict.fromkeys(reasons))
    # what our own kernels use; torch's, where none are compiled
    simd = [b.simd() for b in BACKENDS.values() if b.simd is not None]
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "bae_fast": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpu": {
            "machine": platform.machine(),
            "simd": simd[0] if simd else torch.backends.cpu.get_cpu_capability().lower(),
            "threads": torch.get_num_threads(),
            "wait_policy": policy(),
        },
        "cuda_devices": cuda,
        "backends": {"reference": "available", **backends},
    }


def warmup(
    impl: str = "auto",
    *,
    device: torch.device | str = "cpu",
    surrogates: Sequence[str] = SURROGATES,
    multilinear: bool = False,
) -> str:
    """Compile what a first call on ``device`` would compile; returns the name of the backend.

    Backends without a just-in-time part (``torch``) have nothing to do.

    Args:
        surrogates: the surrogates of the steps to come; naming fewer takes less time.
        multilinear: whether these steps have the multilinear term.

    Raises:
        ValueError: no surrogate, or one that is not known.
        BackendUnavailableError: the backend cannot run on that device.
    """
    if not surrogates or not set(surrogates) <= set(SURROGATES):
        raise ValueError(
            f"surrogates must name some of {', '.join(SURROGATES)}; got {list(surrogates)}"
        )
    place = torch.device(device)
    name = choose(impl, place.type, torch.float32, None, 1, place.index)
    if name in BACKENDS and BACKENDS[name].warmup is not None:
        BACKENDS[name].warmup(place, surrogates, multilinear)  # type: ignore[misc]
    return name
