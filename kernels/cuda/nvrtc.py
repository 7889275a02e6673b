"""Compiling the CUDA sources without a toolkit: NVRTC, which torch's CUDA wheels bring.

What it makes is kept under ``$XDG_CACHE_HOME/bae_fast/cuda`` (``~/.cache``), keyed by the sources,
the options, the chip and NVRTC's version, behind a checksum: a damaged file is made again.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import torch

from bae_fast.files import cache_folder, replacing
from bae_fast.kernels_cuda import source

OPTIONS = ("--std=c++17",)
_CHECKSUM_BYTES = 32


class CompilationError(RuntimeError):
    """NVRTC refused a source; the message holds its log."""


# -- the library -------------------------------------------------------------------------------


def _majors() -> tuple[str, ...]:
    """CUDA's major versions whose machine code a driver is sure to load: torch's own."""
    own = (torch.version.cuda or "").partition(".")[0]
    return (own,) if own else ("13", "12")


def candidates() -> list[str]:
    """Paths of NVRTC in the wheels at hand, then the names that the system's loader may know."""
    found = []
    spec = importlib.util.find_spec("nvidia")
    roots = [] if spec is None else list(spec.submodule_search_locations or [])
    for major in _majors():
        for root in roots:
            for folder in (f"cu{major}", "cuda_nvrtc"):
                path = Path(root) / folder / "lib" / f"libnvrtc.so.{major}"
                if path.is_file():
                    found.append(str(path))
    return [*found, *(f"libnvrtc.so.{major}" for major in _majors())]


@functools.cache
def _library() -> ctypes.CDLL | None:
    for name in candidates():
        with contextlib.suppress(OSError):
            library = ctypes.CDLL(name)
            if Path(name).is_absolute():
                # it opens a second library by name when it compiles, which in the wheels of CUDA
                # 13.0 nobody would find: they do not say that it lies beside the first
                for other in sorted(Path(name).parent.glob("libnvrtc-builtins.so.*")):
                    ctypes.CDLL(str(other))
            return library
    return None


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    if _library() is None:
        return (
            f"the library libnvrtc is not found ({', '.join(candidates())}): torch's CUDA wheels "
            "bring it, as does the package nvidia-cuda-nvrtc"
        )
    return None


def _nvrtc() -> ctypes.CDLL:
    library = _library()
    if library is None:
        raise CompilationError(missing())
    return library


def _check(library: ctypes.CDLL, result: int, doing: str) -> None:
    if result != 0:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        reason = library.nvrtcGetErrorString(result).decode()
        raise CompilationError(f"{doing}: {reason}")


def version() -> tuple[int, int]:
    """NVRTC's major and minor version."""
    library, major, minor = _nvrtc(), ctypes.c_int(), ctypes.c_int()
    _check(library, library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
    return major.value, minor.value


# -- compiling ---------------------------------------------------------------------------------


def read_sources(name: str) -> tuple[str, dict[str, str]]:
    """Text of one ``.cu`` file and, by name, of every header."""
    folder = Path(source.__file__).parent
    headers = {path.name: path.read_text("utf-8") for path in sorted(folder.glob("*.cuh"))}
    return (folder / name).read_text("utf-8"), headers


def compile_cubin(name: str, text: str, headers: dict[str, str], arch: str) -> bytes:
    """Machine code of one source for one chip.

    Args:
        name: what messages call the source.
        headers: text of every file that it may include.
        arch: a name such as ``sm_90``.

    Raises:
        CompilationError: NVRTC's log.
    """
    library, program = _nvrtc(), ctypes.c_void_p()
    texts = (ctypes.c_char_p * len(headers))(*(text.encode() for text in headers.values()))
    names = (ctypes.c_char_p * len(headers))(*(key.encode() for key in headers))
    options = [f"--gpu-architecture={arch}".encode(), *(option.encode() for option in OPTIONS)]
    result = library.nvrtcCreateProgram(
        ctypes.byref(program), text.encode(), name.encode(), len(headers), texts, names
    )
    _check(library, result, f"NVRTC cannot read {name}")
    try:
        result = library.nvrtcCompileProgram(
            program, len(options), (ctypes.c_char_p * len(options))(*options)
        )
        log = _text(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program)
        if result != 0:
            message = log.rstrip(b"\0").decode(errors="replace").strip()
            _check(library, result, f"NVRTC cannot compile {name} for {arch}:\n{message}\n")
        return _text(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, program)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _text(size_of: Any, get: Any, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    if size_of(program, ctypes.byref(size)) != 0:
        return b""
    buffer = ctypes.create_string_buffer(size.value)
    return buffer.raw if get(program, buffer) == 0 else b""


# -- the cache ---------------------------------------------------------------------------------


def _key(text: str, headers: dict[str, str], arch: str) -> str:
    digest = hashlib.sha256()
    for part in (text, *(t for item in headers.items() for t in item), *OPTIONS, arch):
        digest.update(f"{len(part)}:{part}".encode())
    digest.update(repr(version()).encode())
    return digest.hexdigest()


def _read(path: Path) -> bytes | None:
    """What was kept; None where the file is missing or is not what was written."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    checksum, code = data[:_CHECKSUM_BYTES], data[_CHECKSUM_BYTES:]
    return code if code and hashlib.sha256(code).digest() == checksum else None


def cubin(name: str, arch: str) -> bytes:
    """Machine code of the source ``name`` for a chip, compiled or as it was kept.

    Raises:
        CompilationError: NVRTC is missing or refuses the source.
    """
    text, headers = read_sources(name)
    file = f"{Path(name).stem}-{arch}-{_key(text, headers, arch)[:32]}.cubin"
    # no folder, or none that can be written to, costs the next process its compilation, no more
    with contextlib.suppress(OSError):
        code = _read(cache_folder("cuda") / file)
        if code is not None:
            return code
    code = compile_cubin(name, text, headers, arch)
    with contextlib.suppress(OSError), replacing(cache_folder("cuda") / file) as temporary:
        temporary.write_bytes(hashlib.sha256(code).digest() + code)
    return code
