"""What a wheel's extension asks of the machine it runs on: python -m bench.abi WHEEL

Reads the symbol tables of its shared objects and says the least torch, Python and glibc. The status
is 1 where a symbol belongs to no stable interface, or where the wheel's own metadata promises an
older torch than its symbols need.
"""

from __future__ import annotations

import argparse
import email.parser
import io
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

# Functions of LibTorch's stable C interface, by the version whose headers declare them first. What
# was there in 2.9 or earlier stands as 2.9.
TORCH = {
    **dict.fromkeys(
        (
            "aoti_torch_delete_tensor_object",
            "aoti_torch_device_type_cpu",
            "aoti_torch_dtype_bfloat16",
            "aoti_torch_dtype_element_size",
            "aoti_torch_dtype_float32",
            "aoti_torch_dtype_float64",
            "aoti_torch_dtype_int32",
            "aoti_torch_dtype_int64",
            "aoti_torch_empty_strided",
            "aoti_torch_get_data_ptr",
            "aoti_torch_get_dtype",
            "aoti_torch_get_numel",
            "aoti_torch_get_size",
            "aoti_torch_get_stride",
            "aoti_torch_layout_strided",
            "aoti_torch_library_init_impl",
            "aoti_torch_new_tensor_handle",
        ),
        (2, 9),
    ),
    **dict.fromkeys(("torch_get_num_threads", "torch_library_impl", "torch_parallel_for"), (2, 10)),
    "torch_from_blob": (2, 11),
}
# of Python's limited interface, all there in 3.10
PYTHON = {"PyExc_ImportError", "PyErr_SetString", "PyModule_Create2"}


def asked_for(data: bytes) -> tuple[set[str], dict[str, tuple[int, ...]]]:
    """(undefined symbols, newest version of each versioned library) of a shared object."""
    from elftools.elf.elffile import ELFFile
    from elftools.elf.gnuversions import GNUVerNeedSection
    from elftools.elf.sections import SymbolTableSection

    names: set[str] = set()
    newest: dict[str, tuple[int, ...]] = {}
    for section in ELFFile(io.BytesIO(data)).iter_sections():
        if isinstance(section, SymbolTableSection) and section.name == ".dynsym":
            names |= {
                symbol.name
                for symbol in section.iter_symbols()
                if symbol["st_shndx"] == "SHN_UNDEF" and symbol.name
            }
        elif isinstance(section, GNUVerNeedSection):
            for _, needed in section.iter_versions():
                for one in needed:
                    found = re.fullmatch(r"([A-Z]+(?:ABI)?)_([\d.]+)", one.name)
                    if found:
                        version = tuple(map(int, found[2].split(".")))
                        newest[found[1]] = max(version, newest.get(found[1], ()))
    return names, newest


def least_torch(names: set[str]) -> tuple[tuple[int, int], list[str]]:
    """(the least version of torch, symbols of torch or Python that no stable interface has)."""
    ours = {name for name in names if name.startswith(("aoti_", "torch_", "_ZN2at", "_ZN3c10"))}
    ours |= {name for name in names if name.startswith("_ZN5torch")}
    python = {name for name in names if re.match(r"_?Py[A-Z_]", name)}
    strange = sorted((ours - TORCH.keys()) | (python - PYTHON))
    return max((TORCH[name] for name in ours & TORCH.keys()), default=(0, 0)), strange


def promised(archive: zipfile.ZipFile) -> tuple[int, ...]:
    """The least torch of a wheel's metadata."""
    name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = email.parser.Parser().parsestr(archive.read(name).decode())
    for line in metadata.get_all("Requires-Dist") or ():
        found = re.match(r"torch\s*>=\s*([\d.]+)", line)
        if found:
            return tuple(map(int, found[1].split(".")))
    return ()


def read(wheel: Path) -> dict[str, Any]:
    """What the shared objects of a wheel ask for together.

    Raises:
        ValueError: the wheel holds none.
    """
    names: set[str] = set()
    newest: dict[str, tuple[int, ...]] = {}
    with zipfile.ZipFile(wheel) as archive:
        objects = [name for name in archive.namelist() if name.endswith(".so")]
        if not objects:
            raise ValueError(f"{wheel} must hold a shared object; it is a wheel for any machine")
        for name in objects:
            more, versions = asked_for(archive.read(name))
            names |= more
            for library, version in versions.items():
                newest[library] = max(version, newest.get(library, ()))
        metadata = promised(archive)
    torch, strange = least_torch(names)
    return {"torch": torch, "strange": strange, "versions": newest, "metadata": metadata}


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 1 for a wheel that promises more than its symbols hold."""
    parser = argparse.ArgumentParser(prog="python -m bench.abi", description=__doc__)
    parser.add_argument("wheel", type=Path)
    found = read(parser.parse_args(arguments).wheel)

    def dotted(version: tuple[int, ...]) -> str:
        return ".".join(map(str, version))

    print(f"torch {dotted(found['torch'])} or newer")
    print("python 3.10 or newer, by the limited interface")
    for library, version in sorted(found["versions"].items()):
        print(f"{library} {dotted(version)} or newer")
    for name in found["strange"]:
        print(f"{name} must be of a stable interface", file=sys.stderr)
    older = found["metadata"] < found["torch"]
    if older:
        print(
            f"Requires-Dist must name torch>={dotted(found['torch'])}; got "
            f"{dotted(found['metadata']) or 'no bound'}",
            file=sys.stderr,
        )
    return 1 if found["strange"] or older else 0


if __name__ == "__main__":
    sys.exit(main())
