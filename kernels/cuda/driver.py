"""Loading machine code and starting kernels: CUDA's driver, by ctypes, in torch's own context."""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bae_fast.kernels_cuda import nvrtc

LIBRARY = "libcuda.so.1"
_MAX_DYNAMIC_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_POINTERS = {"p": torch.int32, "l": torch.int64, "f": torch.float32}
_INTEGERS: dict[str, Any] = {"i": ctypes.c_int32, "q": ctypes.c_int64}


class Kernel(NamedTuple):
    """A kernel of ``csrc/cuda``: its file, name, what a block needs, arguments, and instructions.

    ``arguments`` has one letter each: p for an int32 tensor, l for an int64 and f for a fp32 one,
    each of which may be None, i for int32, q for int64. ``family`` is "a" where the source has
    instructions of one chip alone, which is compiled as ``sm_90a``, and empty elsewhere.
    """

    source: str
    name: str
    shared_bytes: int
    threads: int
    arguments: str
    family: str = ""


class DriverError(RuntimeError):
    """CUDA's driver refused a call."""


@functools.cache
def _driver() -> ctypes.CDLL:
    library = ctypes.CDLL(LIBRARY)
    # stream, parameters and extra are pointers; ctypes would pass them as int
    library.cuLaunchKernel.argtypes = [
        ctypes.c_void_p,
        *[ctypes.c_uint] * 7,
        *[ctypes.c_void_p] * 3,
    ]
    _check(library, library.cuInit(0), "cuInit")
    return library


def _check(library: ctypes.CDLL, result: int, doing: str) -> None:
    if result != 0:
        text = ctypes.c_char_p()
        library.cuGetErrorString(result, ctypes.byref(text))
        reason = text.value.decode() if text.value else "unknown"
        raise DriverError(f"{doing} failed with {result}: {reason}")


@functools.cache
def _primary(index: int) -> ctypes.c_void_p:
    """The device's primary context, the one that torch uses; never released."""
    library, device, context = _driver(), ctypes.c_int(), ctypes.c_void_p()
    _check(library, library.cuDeviceGet(ctypes.byref(device), index), "cuDeviceGet")
    result = library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    _check(library, result, "cuDevicePrimaryCtxRetain")
    return context


def _context(index: int) -> int:
    """Address of the thread's own context; the primary one where the thread has none yet.

    A thread that has called nothing but the driver has none. Where the caller has made another
    one current for the device, the kernel runs in that one, as torch's own do.
    """
    library, context = _driver(), ctypes.c_void_p()
    _check(library, library.cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
    if context.value is None:
        context = _primary(index)
        _check(library, library.cuCtxSetCurrent(context), "cuCtxSetCurrent")
    assert context.value is not None
    return context.value


# by source or kernel, device and context
_modules: dict[tuple[str, int, int], ctypes.c_void_p] = {}
_functions: dict[tuple[Kernel, int, int], ctypes.c_void_p] = {}
_lock = threading.Lock()  # backward runs in a thread of its own


def arch(device: torch.device) -> str:
    """The chip's name for NVRTC, as ``sm_90``."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _load(kernel: Kernel, index: int, context: int) -> ctypes.c_void_p:
    """The kernel in the context that is current, compiled where that is needed."""
    library, key = _driver(), (kernel.source, index, context)
    if key not in _modules:
        chip = arch(torch.device("cuda", index)) + kernel.family
        code = nvrtc.cubin(kernel.source, chip)
        module = ctypes.c_void_p()
        result = library.cuModuleLoadData(ctypes.byref(module), code)
        _check(library, result, f"loading {kernel.source}")
        _modules[key] = module
    function = ctypes.c_void_p()
    result = library.cuModuleGetFunction(
        ctypes.byref(function), _modules[key], kernel.name.encode()
    )
    _check(library, result, f"finding the kernel {kernel.name}")
    result = library.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED_BYTES, kernel.shared_bytes)
    _check(library, result, f"{kernel.shared_bytes} bytes of shared memory for {kernel.name}")
    return function


def pack(kernel: Kernel, args: tuple[Tensor | int | None, ...]) -> list[Any]:
    """The arguments' values as C has them.

    Raises:
        TypeError: a tensor of another dtype than the kernel reads.
        ValueError: tensors on different devices, or a first argument that is none.
        OverflowError: an integer that its type does not hold.
    """
    first = args[0]
    if not isinstance(first, Tensor):
        raise ValueError(f"argument 0 of {kernel.name} must be a tensor; got {first!r}")
    values: list[Any] = []
    for letter, arg in zip(kernel.arguments, args, strict=True):
        if letter in _POINTERS:
            what = f"argument {len(values)} of {kernel.name}"
            if isinstance(arg, Tensor) and arg.dtype != _POINTERS[letter]:
                raise TypeError(f"{what} must be {_POINTERS[letter]}; got {arg.dtype}")
            if isinstance(arg, Tensor) and arg.device != first.device:
                raise ValueError(f"{what} must be on {first.device}; got {arg.device}")
            values.append(ctypes.c_void_p(arg.data_ptr() if isinstance(arg, Tensor) else None))
            continue
        value = _INTEGERS[letter](arg)
        if value.value != arg:
            raise OverflowError(f"argument {len(values)} of {kernel.name} is too large: {arg}")
        values.append(value)
    return values


def start(kernel: Kernel, blocks: int, *args: Tensor | int | None) -> None:
    """Start a kernel on torch's current stream of its first argument's device.

    Raises:
        RuntimeError: a CUDA graph is being captured and the kernel is not loaded yet.
        CompilationError: see :func:`bae_fast.kernels_cuda.nvrtc.cubin`.
        DriverError: the driver refused a call.
    """
    values = pack(kernel, args)
    assert isinstance(args[0], Tensor)
    device = args[0].device
    addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    library, index = _driver(), device.index
    with torch.cuda.device(device):
        context = _context(index)
        function = _functions.get((kernel, index, context))
        if function is None:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "a kernel of impl='cuda' is not loaded, and a CUDA graph cannot capture its "
                    "compilation: call bae_fast.warmup('cuda', device=...), or run the step once "
                    "before capturing"
                )
            with _lock:
                function = _functions[kernel, index, context] = _load(kernel, index, context)
        stream = torch.cuda.current_stream(device).cuda_stream
        grid, block = (blocks, 1, 1), (kernel.threads, 1, 1)
        rest = (kernel.shared_bytes, stream, addresses, None)
        result = library.cuLaunchKernel(function, *grid, *block, *rest)
        _check(library, result, f"starting {kernel.name}")
