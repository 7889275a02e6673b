"""Starting kernels: tile sizes by chip and size, tuning, and what a CUDA graph allows.

Every kernel is started by :func:`start`. Tile sizes come from :mod:`bae_fast.kernels.configs`, one
default a chip family and kernel, that of the nearest number of rows where there are several. With
``BAE_FAST_AUTOTUNE=1`` the first call of a size on a device tries the candidates and keeps the
fastest on disk, under ``$XDG_CACHE_HOME/bae_fast/triton`` (``~/.cache``), keyed by chip, kernel,
dtype, sizes and triton's version; later processes read it, tuning or not.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from bae_fast import files
from bae_fast.files import read_json, write_json
from bae_fast.kernels.configs import CANDIDATES, DEFAULTS, Config

ENV_AUTOTUNE = "BAE_FAST_AUTOTUNE"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

cdiv = triton.cdiv

# least compute capability: bf16 products and asynchronous copies
LEAST_CAPABILITY = (8, 0)
_FAMILIES = {(8, 0): "sm_80", (9, 0): "sm_90"}
_FAMILIES_BY_MAJOR = {8: "sm_86", 9: "sm_90", 10: "sm_100", 11: "sm_100", 12: "sm_120"}


def family(device: torch.device) -> str:
    """Name of the chip's row in the table of defaults."""
    if INTERPRETED:
        return "interpreter"
    capability = torch.cuda.get_device_capability(device)
    by_major = _FAMILIES_BY_MAJOR.get(capability[0], "sm_100")
    return _FAMILIES.get(capability, by_major)


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor itself where its last dimension is contiguous, else a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def byte_mask(row_mask: Tensor | None, stand_in: Tensor) -> Tensor:
    """The mask as bytes; where there is none, any memory that a kernel will not read."""
    return (stand_in if row_mask is None else row_mask.contiguous()).view(torch.uint8)


def parts(columns: int, width: int = 64) -> int:
    """Parts that an epilogue divides a tile of so many columns into, each of ``width`` columns."""
    return max(columns // width, 1)


# -- tile sizes --------------------------------------------------------------------------------


Sizes = tuple[int, ...]

# set by :func:`table_entry`
_entry: int | None = None


@contextlib.contextmanager
def table_entry(index: int) -> Iterator[None]:
    """Use one entry of every kernel's table (the last where it has fewer) whatever the sizes."""
    global _entry
    before, _entry = _entry, index
    try:
        yield
    finally:
        _entry = before


def default(name: str, chip_family: str, rows: int) -> Config:
    """The entry of the checked-in table whose number of rows is nearest, by its logarithm."""
    entries = DEFAULTS[chip_family][name]
    if _entry is not None:
        return list(entries.values())[min(_entry, len(entries) - 1)]
    return entries[min(entries, key=lambda other: abs(math.log(max(rows, 1) / other)))]


def cache_folder() -> Path:
    """Where tuned tile sizes are kept."""
    return files.cache_folder("triton")


def _file(chip: str, name: str, dtype: torch.dtype) -> Path:
    key = f"{chip}|{name}|{dtype}|{triton.__version__}"
    return cache_folder() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _read(path: Path) -> dict[Sizes, Config]:
    """What was kept; nothing where the file is missing or is not one of ours."""
    try:
        rows = read_json(path)["tiles"]
        return {tuple(map(int, sizes)): Config(*map(int, config)) for sizes, config in rows}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


@functools.cache
def _tuned(chip: str, name: str, dtype: torch.dtype) -> dict[Sizes, Config]:
    return _read(_file(chip, name, dtype))


def _chip(device: torch.device) -> str:
    return "interpreter" if INTERPRETED else torch.cuda.get_device_name(device)


def configuration(name: str, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Config:
    """Tile sizes of one kernel: what was tuned for exactly these sizes, else the default."""
    if _entry is None:
        found = _tuned(_chip(device), name, dtype).get(sizes)
        if found is not None:
            return found
    return default(name, family(device), sizes[0])


def _milliseconds(call: Callable[[], Any]) -> float:
    """Least of 10 timings on the device; infinite where the configuration does not fit it."""
    try:
        call()
    except triton.runtime.errors.TritonError:
        return math.inf
    best = math.inf
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end))
    return best


def _tune(
    name: str, device: torch.device, dtype: torch.dtype, sizes: Sizes, run: Callable[[Config], Any]
) -> None:
    """Time every candidate and keep the fastest, in this process and on disk."""
    chip = _chip(device)
    candidates = dict.fromkeys([default(name, family(device), sizes[0]), *CANDIDATES.get(name, ())])
    fastest = min(candidates, key=lambda config: _milliseconds(lambda: run(config)))
    path = _file(chip, name, dtype)
    kept = {**_read(path), sizes: fastest}
    write_json(path, {"tiles": [[list(s), list(config)] for s, config in sorted(kept.items())]})
    _tuned(chip, name, dtype)[sizes] = fastest


def tuned(name: str) -> Callable[..., Any]:
    """Give a launcher its tile sizes as first argument.

    The choice goes by the shapes of the launcher's first two arguments, and by the dtype of the
    second where both are tensors. A launcher may be called many times over: it writes the same
    results again.
    """

    def decorate(launcher: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(launcher)
        def run(first: Tensor, second: Any, *args: Any) -> Any:
            tensors = [first, second] if isinstance(second, Tensor) else [first]
            sizes = tuple(size for tensor in tensors for size in tensor.shape)
            device, dtype = first.device, tensors[-1].dtype
            if (
                os.environ.get(ENV_AUTOTUNE) == "1"
                and not INTERPRETED
                and _entry is None
                and sizes not in _tuned(_chip(device), name, dtype)
                and not torch.cuda.is_current_stream_capturing()
            ):
                _tune(name, device, dtype, sizes, lambda c: launcher(c, first, second, *args))
            return launcher(configuration(name, device, dtype, sizes), first, second, *args)

        return run

    return decorate


# -- starting ----------------------------------------------------------------------------------


def _refuse(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError(
        "a kernel of impl='triton' is not compiled for these inputs, and a CUDA graph cannot "
        "capture its compilation: call bae_fast.warmup('triton', device=...), or run the step once "
        "before capturing"
    )


def start(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Start a kernel on the device of its first argument.

    Raises:
        RuntimeError: a CUDA graph is being captured and the kernel is not compiled yet.
    """
    if not args[0].is_cuda:
        kernel[grid](*args, **constants)
        return
    with torch.cuda.device(args[0].device):
        if INTERPRETED or not torch.cuda.is_current_stream_capturing():
            kernel[grid](*args, **constants)
            return
        # asked only where a kernel is not in memory: nothing would be compiled without it
        knobs = triton.knobs.runtime
        before, knobs.jit_cache_hook = knobs.jit_cache_hook, _refuse
        try:
            kernel[grid](*args, **constants)
        finally:
            knobs.jit_cache_hook = before
