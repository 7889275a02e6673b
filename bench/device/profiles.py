"""One step seen from inside: its kernels by torch's profiler."""

from __future__ import annotations

from typing import Any

import torch

from bench import step


def profile(impl: str, shape: tuple[int, int, int], device: str) -> list[list[Any]]:
    """Kernels of one step of the paper's objective: name, count and microseconds of all."""
    from torch.profiler import ProfilerActivity

    with torch.device(device):
        run = step.build("paper", *shape, [f"{impl} bf16"]).sides[f"{impl} bf16"].run
    activities = [ProfilerActivity.CPU]
    run()  # compiles
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        if device == "cuda":
            torch.cuda.synchronize()
    found = []
    for event in profiler.key_averages():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if device == "cuda" and on_device:
            found.append([event.key, event.count, event.self_device_time_total])
        elif device != "cuda":
            found.append([event.key, event.count, event.self_cpu_time_total])
    return sorted(found, key=lambda row: -row[2])
