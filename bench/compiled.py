"""Every GPU kernel compiled for every chip, without a GPU: registers, memory, spills, products.

Triton's kernels by the installed triton, in the variant with the largest tile and in bfloat16, as
tests/backends/triton_compile_worker.py compiles them; CUDA's by NVRTC. Nothing is timed and nothing
has run on a device.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import tables

ROOT = Path(__file__).resolve().parent.parent
WORKER = ROOT / "tests" / "backends" / "triton_compile_worker.py"
# of the tables of tile sizes; sm_86 is compiled for 8.9
TRITON_CHIPS = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
CUDA_CHIPS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_90a")
# matrix instructions by their names in a row of the worker
PRODUCTS = ("wgmma", "tcgen05", "mma")


def by_triton(chip: str) -> list[dict[str, Any]]:
    """Rows of Triton's kernels for one chip."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests" / "support")))
    done = subprocess.run(
        [sys.executable, str(WORKER), chip, "bfloat16", "few"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    return [_of_triton(row, chip, found["triton"]) for row in found["kernels"]]


def _of_triton(row: dict[str, Any], chip: str, version: str) -> dict[str, Any]:
    constants = row["constants"]
    name = row["kernel"].removesuffix("_kernel")
    if constants.get("PRODUCT") == "False":
        name += ", no product"
    if "SIGNS" in constants:
        name += ", signs" if constants["SIGNS"] == "True" else ", no signs"
    instruction = next((key for key in PRODUCTS if row[key]), "")
    return {
        "by": f"Triton {version}",
        "chip": chip,
        "kernel": name,
        "registers": row["registers"],
        "shared": row["shared"],
        "spills": row["spills"] + row["stack"] + row["local"],
        "products": row[instruction] if instruction else 0,
        "instruction": instruction,
    }


def by_nvrtc(chip: str) -> list[dict[str, Any]]:
    """Rows of CUDA's kernels for one chip, by the tools that triton brings."""
    from bae_fast.kernels_cuda import nvrtc
    from bae_fast.kernels_cuda.covariance import KERNELS, PANEL_KERNELS

    kernels = PANEL_KERNELS if chip.endswith("a") else KERNELS
    triton = importlib.util.find_spec("triton")
    if triton is None or not triton.submodule_search_locations:
        raise RuntimeError("the package triton, which brings cuobjdump, is not installed")
    binaries = Path(triton.submodule_search_locations[0]) / "backends" / "nvidia" / "bin"
    rows = []
    for source in dict.fromkeys(kernel.source for kernel in kernels):
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernels.cubin"
            cubin.write_bytes(nvrtc.compile_cubin(source, *nvrtc.read_sources(source), chip))
            usage, sass = (
                subprocess.run(
                    [binaries / tool, option, cubin], capture_output=True, text=True, check=True
                ).stdout
                for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
            )
        numbers = dict(re.findall(r"Function (\w+):\s*\n\s*(.*)", usage))
        parts = re.split(r"\.text\.(\w+):", sass)
        code = dict(zip(parts[1::2], parts[2::2], strict=True))
        for kernel in (kernel for kernel in kernels if kernel.source == source):
            use = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", numbers[kernel.name])}
            moved = len(re.findall(r"\b(?:STL|LDL)\b", code[kernel.name]))
            rows.append(
                {
                    "by": f"NVRTC {'.'.join(map(str, nvrtc.version()))}",
                    "chip": chip,
                    "kernel": kernel.name,
                    "registers": use["REG"],
                    "shared": kernel.shared_bytes,
                    "spills": moved + use["STACK"] + use["LOCAL"],
                    "products": len(re.findall(r"\bBG?MMA\b", code[kernel.name])),
                    "instruction": "wgmma b1" if kernel.family else "b1",
                }
            )
    return rows


def run(only: str = "", seconds: float = 0.0) -> dict[str, Any]:
    """Every chip whose ``triton CHIP`` or ``cuda CHIP`` holds ``only``."""
    rows = []
    for name, make, chips in (
        ("triton", by_triton, TRITON_CHIPS),
        ("cuda", by_nvrtc, CUDA_CHIPS),
    ):
        for chip in chips:
            if only in f"{name} {chip}":
                rows += make(chip)
                print(f"{name} {chip}: {len(rows)}", flush=True)
    return {"rows": rows}


def cell(row: dict[str, Any]) -> str:
    """One kernel on one chip."""
    parts = [str(row["registers"]), f"{row['shared'] / 1024:.0f}"]
    if row["products"]:
        parts.append(f"{row['products']} {row['instruction']}")
    if row["spills"]:
        parts.append(f"{row['spills']} spilled")
    return ", ".join(parts)


def table(result: dict[str, Any]) -> str:
    """Markdown: a table for each compiler, a row a kernel, a column a chip."""
    made = []
    for by in dict.fromkeys(row["by"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["by"] == by]
        chips = list(dict.fromkeys(row["chip"] for row in rows))
        cells = {(row["kernel"], row["chip"]): cell(row) for row in rows}
        lines = [
            [f"`{kernel}`", *(cells.get((kernel, chip), "") for chip in chips)]
            for kernel in dict.fromkeys(row["kernel"] for row in rows)
        ]
        made.append(tables.markdown([by, *chips], lines))
    spilled = sum(row["spills"] > 0 for row in result["rows"])
    end = "None spills." if not spilled else f"{spilled} of {len(result['rows'])} spill."
    note = "Registers a thread, shared memory in KiB, and matrix instructions in the code. " + end
    return "\n\n".join([*made, note])
