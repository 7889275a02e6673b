"""What this machine can do at best, measured in the run whose figures are held against it.

    gemm_float32, gemm_bfloat16   flop/s of torch's own square product
    copy                          bytes/s of torch's copy, read and written bytes both counted
    bit_macs                      bit-MAC/s by instruction set, operands in registers
                                  (bench/ceiling.cpp); empty without a C++ compiler

A ceiling is the best of several tries, a figure held against it a median: shares are on the low
side.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bae_fast.backends.cpp.extension import LEVELS
from bae_fast.devices import has_bfloat16

SOURCE = Path(__file__).with_name("ceiling.cpp")
PROBE_SECONDS = 0.2  # of every thread at once
TRY_SECONDS = 0.5
GEMM_SIDE = 2048
COPY_BYTES = 2**28


def _best(run: Callable[[], Any]) -> float:
    """Seconds of the fastest of a few calls."""
    run()
    times: list[float] = []
    while len(times) < 3 or sum(times) < TRY_SECONDS:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def compiled(source: Path) -> ctypes.CDLL | None:
    """A C++ file as a library, or None where there is no compiler or it refuses."""
    names = filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++"))
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / f"{source.stem}.so"
        command = [compiler, "-O2", "-std=c++17", "-shared", "-fPIC", "-pthread"]
        done = subprocess.run(
            [*command, str(source), "-o", str(library)], capture_output=True, check=False
        )
        return None if done.returncode else ctypes.CDLL(str(library))


@functools.cache
def _probe() -> ctypes.CDLL | None:
    probe = compiled(SOURCE)
    if probe is not None:
        probe.bit_macs_per_second.restype = ctypes.c_double
        probe.bit_macs_per_second.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.c_double)
    return probe


def bit_macs(level: str) -> float | None:
    """bit-MAC/s of one instruction set, all of torch's threads at once; None if unknown."""
    probe = _probe()
    if probe is None:
        return None
    return probe.bit_macs_per_second(level.encode(), torch.get_num_threads(), PROBE_SECONDS) or None


def rates(
    best: Callable[[Callable[[], Any]], float],
    copy_bytes: int,
    gemm_side: int,
    dtypes: Sequence[torch.dtype],
) -> dict[str, Any]:
    """Those of torch's copy and of its products, on the device that tensors are made on.

    Args:
        best: seconds of the fastest of a few calls.
    """
    source, target = torch.rand(copy_bytes // 4), torch.empty(copy_bytes // 4)
    copied = best(functools.partial(target.copy_, source))
    found: dict[str, Any] = {"copy": 2 * copy_bytes / copied}
    del source, target
    for dtype in dtypes:
        a, b = (torch.randn(gemm_side, gemm_side).to(dtype) for _ in range(2))
        seconds = best(functools.partial(torch.mm, a, b))
        found[f"gemm_{str(dtype).removeprefix('torch.')}"] = 2 * gemm_side**3 / seconds
    return found


def measure() -> dict[str, Any]:
    """Every ceiling of this CPU."""
    dtypes = [torch.float32]
    if has_bfloat16("cpu"):  # else a product of this size takes minutes
        dtypes.append(torch.bfloat16)
    found = rates(_best, COPY_BYTES, GEMM_SIDE, dtypes)
    counted = {level: bit_macs(level) for level in LEVELS}
    return found | {"bit_macs": {level: rate for level, rate in counted.items() if rate}}
