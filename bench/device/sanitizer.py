"""Small checks of the layer in a process under ``compute-sanitizer``, and what it finds."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bae_fast.codes import ENV_SIGN_PLANES
from bae_fast.ops.nvidia import ENV_PAIRS, ENV_SIGNS
from bae_fast.ops.products import ENV_SCRATCH
from bench.device import processes
from bench.device.cases import PANELS
from bench.device.deadlines import Limit
from bench.device.layer import check_layer, lists_serve, variables

# compute-sanitizer's exit status where it found something
FOUND = 9


def tool(name: str) -> str | None:
    """A program of CUDA's toolkit: on the PATH, or where the toolkit usually lies."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    homes += sorted(map(str, Path("/usr/local").glob("cuda-*")), reverse=True)
    places = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    return shutil.which(name, path=os.pathsep.join(places))


def check_small(impl: str, device: str) -> int:
    """A few small whole layers: what runs under a checker that slows everything down."""
    if impl == PANELS:  # enough rows that a left panel is several tiles
        with torch.device(device), variables(**{ENV_PAIRS: "wgmma", ENV_SIGNS: "wgmma"}):
            check_layer("cuda", torch.bfloat16, 2100, 24, 331, surrogate="identity")
        return 1
    with torch.device(device):
        for dtype in (torch.bfloat16, torch.float32):
            check_layer(impl, dtype, 66, 24, 331, surrogate="rectangle", surrogate_width=2.5)
            with variables(**{ENV_SIGN_PLANES: "0", ENV_SCRATCH: "0"}):
                check_layer(impl, dtype, 66, 24, 331, surrogate="identity")
            with lists_serve(impl):
                check_layer(impl, dtype, 66, 24, 331, surrogate="rectangle", surrogate_width=2.5)
    return 6


def sanitize(
    tool_name: str, impl: str, limit: Limit, alive: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """:func:`check_small` in a process under one of compute-sanitizer's tools."""
    checker = tool("compute-sanitizer")
    if checker is None:
        return {"unavailable": "compute-sanitizer is not found"}
    command = [checker, "--tool", tool_name, "--error-exitcode", str(FOUND)]
    if tool_name == "memcheck":
        # libraries ask the driver what may fail; our own calls check what they are answered
        command += ["--report-api-errors", "no"]
    command += [sys.executable, "-m", "bench", "device", "--small", "--impl", impl]
    # every tensor is an allocation of its own: its ends are known
    own = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = processes.run_process(command, limit.seconds, own, alive)
    if done.status is None:
        return {"unavailable": limit.over}
    if done.status == 0:
        return {"checked": tool_name}
    wrong = [x for x in done.lines if x.startswith("refused: ")]
    # any other end is the tool's own: there are machines on which it finds no device
    key = "refused" if done.status == FOUND or wrong else "unavailable"
    return {key: (wrong[0] if wrong else finding(done.lines))[:300]}


def finding(lines: list[str]) -> str:
    """What a checker says first, with the two lines behind it: there it names the kernel."""
    found = [i for i, x in enumerate(lines) if "ERROR" in x or "hazard" in x or "Invalid" in x]
    first = found[0] if found else 0
    text = [x.strip("= ") for x in lines[first : first + (3 if found else 1)]]
    return "; ".join(x for x in text if x) or "no reason"
