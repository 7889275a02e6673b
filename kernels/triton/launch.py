"""Starting kernels: tile sizes by chip and size, tuning, and what a CUDA graph allows.

Every kernel is started by :func:`start`. Tile sizes come from :mod:`bae_fast.kernels.configs`: of a
kernel's tiles the one that ends first by :func:`cost`. With ``BAE_FAST_AUTOTUNE=1`` the first call
of a size on a device tries the candidates and keeps the fastest on disk, under
``$XDG_CACHE_HOME/bae_fast/triton`` (``~/.cache``), keyed by chip, kernel, dtype, sizes and triton's
version; later processes read it, tuning or not. Neither happens among several ranks: ranks with
different tiles would differ in bits whose pre-activation is within rounding of zero.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from bae_fast import files
from bae_fast.devices import current
from bae_fast.files import read_json, write_json
from bae_fast.kernels.configs import CANDIDATES, DEFAULTS, PRODUCTS_A_NUMBER, Config

ENV_AUTOTUNE = "BAE_FAST_AUTOTUNE"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

cdiv = triton.cdiv

_FAMILIES = {(8, 0): "sm_80", (9, 0): "sm_90"}
_FAMILIES_BY_MAJOR = {8: "sm_86", 9: "sm_90", 10: "sm_100", 11: "sm_100", 12: "sm_120"}


@functools.cache  # every start asks, and the host is short of time where steps are short
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


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many blocks of a large tile run at once."""
    if INTERPRETED:
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def cost(config: Config, rows: int, columns: int, processors: int) -> int:
    """What a result of ``rows`` x ``columns`` takes with these tiles, in products in a row."""
    waves = cdiv(cdiv(rows, config.m) * cdiv(columns, config.n), processors)
    return waves * max(config.m * config.n, PRODUCTS_A_NUMBER * (config.m + config.n))


def default(name: str, chip_family: str, rows: int, columns: int, processors: int) -> Config:
    """The tile of the checked-in table that ends first; the larger of two that end together."""
    entries = DEFAULTS[chip_family][name]
    if _entry is not None:
        return entries[min(_entry, len(entries) - 1)]
    return min(entries, key=lambda c: (cost(c, rows, columns, processors), -c.m * c.n))


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
    try:
        return _read(_file(chip, name, dtype))
    except OSError:  # a user without a home keeps nothing, and computes all the same
        return {}


@functools.cache
def _chip(device: torch.device) -> str:
    return "interpreter" if INTERPRETED else torch.cuda.get_device_name(device)


def _alone() -> bool:
    """Whether no other rank computes beside this process."""
    distributed = torch.distributed
    ready = distributed.is_available() and distributed.is_initialized()
    return not ready or distributed.get_world_size() == 1


def configuration(
    name: str, device: torch.device, dtype: torch.dtype, sizes: Sizes, columns: int = -1
) -> Config:
    """Tile sizes of one kernel: what was tuned for exactly these sizes, else the default.

    Args:
        sizes: all that the choice depends on; the first is the result's number of rows.
        columns: which of them is the result's number of columns.
    """
    if _entry is None and _alone():
        found = _tuned(_chip(device), name, dtype).get(sizes)
        if found is not None:
            return found
    return default(name, family(device), sizes[0], sizes[columns], multiprocessors(device))


def _milliseconds(call: Callable[[], Any]) -> float:
    """Least time on the device with a cold L2 cache; infinite where the tiles do not fit it.

    The host is ahead by then: what overwrites the cache runs while it starts the kernel. An error
    that leaves the device useless is not one of the tiles' and is raised.
    """
    try:
        call()
        torch.cuda.synchronize()
    except (triton.runtime.errors.TritonError, triton.compiler.CompilationError, RuntimeError):
        torch.cuda.synchronize()
        return math.inf
    return float(triton.testing.do_bench(call, warmup=5, rep=30, return_mode="min"))


def _tune(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sizes,
    columns: int,
    run: Callable[[Config], Any],
) -> None:
    """Time every candidate and keep the fastest, in this process and, where it can be, on disk.

    Raises:
        RuntimeError: no candidate runs.
    """
    chip = _chip(device)
    own = default(name, family(device), sizes[0], sizes[columns], multiprocessors(device))
    candidates = dict.fromkeys([own, *CANDIDATES.get(name, ())])
    times = {c: _milliseconds(functools.partial(run, c)) for c in candidates}
    fastest = min(times, key=times.__getitem__)
    if times[fastest] == math.inf:
        raise RuntimeError(f"no tile sizes of the kernel {name} run for sizes {sizes} on {chip}")
    _tuned(chip, name, dtype)[sizes] = fastest
    # a folder that cannot be written to costs the next process its tuning, no more
    with contextlib.suppress(OSError):
        path = _file(chip, name, dtype)
        kept = {**_read(path), sizes: fastest}
        write_json(path, {"tiles": [[list(s), list(config)] for s, config in sorted(kept.items())]})


def tuned(name: str, columns: int = -1) -> Callable[..., Any]:
    """Give a launcher its tile sizes as first argument.

    The choice goes by the shapes of the launcher's first two arguments, and by the dtype of the
    second where both are tensors; ``columns`` says which of these sizes is the result's number of
    columns. A launcher may be called many times over: it writes the same results again and adds to
    nothing.
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
                and _alone()
                and sizes not in _tuned(_chip(device), name, dtype)
            ):
                call = lambda c: launcher(c, first, second, *args)  # noqa: E731
                with current(device):  # whose streams and events are asked
                    if not torch.cuda.is_current_stream_capturing():
                        _tune(name, device, dtype, sizes, columns, call)
            config = configuration(name, device, dtype, sizes, columns)
            return launcher(config, first, second, *args)

        return run

    return decorate


# -- starting ----------------------------------------------------------------------------------


class _Capture(threading.local):
    """Whether this thread starts a kernel while a CUDA graph is captured."""

    going = False


_capture = _Capture()
_hooked = threading.Lock()


_triton_hook: Any = None


def _refuse(*args: Any, **kwargs: Any) -> Any:
    """Triton's hook before a compilation: refuses where this thread captures."""
    if _capture.going:
        raise RuntimeError(
            "a kernel of impl='triton' is not compiled for these inputs, and a CUDA graph cannot "
            "capture its compilation: call bae_fast.warmup('triton', device=...), or run the step "
            "once before capturing"
        )
    return None if _triton_hook is None else _triton_hook(*args, **kwargs)


def _hook() -> None:
    """Put :func:`_refuse` before the hook that is there, once: no other thread is refused."""
    global _triton_hook
    knobs = triton.knobs.runtime
    with _hooked:
        if knobs.jit_cache_hook is not _refuse:
            _triton_hook, knobs.jit_cache_hook = knobs.jit_cache_hook, _refuse


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
        _hook()
        _capture.going = True
        try:
            kernel[grid](*args, **constants)
        finally:
            _capture.going = False
