"""Which device this is, what runs on it, and its state."""

from __future__ import annotations

import platform
import shutil
from typing import Any

import torch

from bae_fast.ops import registry
from bench.device import processes


def request_of(device: str) -> registry.Request:
    """A call in bf16."""
    return registry.Request(device, torch.bfloat16)


def reasons_against(impl: str, device: str) -> str:
    """Why an implementation cannot run here; empty where it can."""
    return "; ".join(registry.reasons_against(impl, request_of(device)))


def clocks() -> dict[str, str]:
    """Driver, clocks, temperature and power, where the driver's tool says so."""
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu")
    found = shutil.which("nvidia-smi")
    if found is None:
        return {}
    done = processes.run_process(
        [found, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"], 20.0
    )
    values = done.lines[:1]
    return (
        dict(zip(fields, (v.strip() for v in values[0].split(",")), strict=False))
        if (done.status == 0 and values)
        else {}
    )


def chip(device: str) -> dict[str, Any]:
    """The device and what its programs were built with."""
    found: dict[str, Any] = {"name": platform.processor() or platform.machine()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found = {
            "name": properties.name,
            "capability": list(torch.cuda.get_device_capability()),
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "l2": getattr(properties, "L2_cache_size", 0),
            "cuda": torch.version.cuda,
        }
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    return found | clocks()
