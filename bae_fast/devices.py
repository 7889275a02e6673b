"""What a device computes natively, and in which precision whatever the caller's setting."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Leave out the caller's autocast, on every kind of device; also a decorator."""
    with contextlib.ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def autocasts(device: torch.device) -> bool:
    """Whether autocast is active for a device; a kind that has none, such as meta, is asked not."""
    # a compiler meets kinds that have it, and torch 2.11's cannot trace the question
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device.type)
    return known and torch.is_autocast_enabled(device.type)


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a CUDA device the current one, and leave others as they are.

    Streams, events and captures that are asked for without a device are those of the current one.
    """
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _threads_may_be_withheld() -> bool:
    """Whether OpenMP may give a loop fewer threads than it asks for.

    torch's products of bfloat16 are then wrong without a word (seen in 2.13.0: a third to a half
    of small ones, by as much as the numbers themselves); those of float32 are right.
    """
    limit = os.environ.get("OMP_THREAD_LIMIT", "")
    below = limit.strip().isdigit() and int(limit) < torch.get_num_threads()
    return below or os.environ.get("OMP_DYNAMIC", "").strip().lower() in ("true", "1")


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 natively (x86: AVX512-BF16 or AMX; Arm: BF16)."""
    if _threads_may_be_withheld():
        return False
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def cpu_has_matrix_units() -> bool:
    """Whether this CPU multiplies bfloat16 on matrix units (x86: AMX)."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def has_bfloat16(device: torch.device | str) -> bool:
    """Whether bfloat16 products are faster than float32 ones on a device."""
    kind = torch.device(device).type
    return kind == "cuda" or (kind == "cpu" and cpu_has_bfloat16())
