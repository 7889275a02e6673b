"""Kernels compiled ahead of the first case, by a few processes at once."""

from __future__ import annotations

import subprocess
import time
from contextlib import suppress
from typing import Any

import torch

from bench import step
from bench.checkout import ROOT
from bench.device import layer
from bench.device.cases import DTYPES, IMPLS, Plan
from bench.device.processes import end

# what compiles the kernels of most cases, each in a process of its own
PARTS = (*DTYPES, *step.OBJECTIVES)


def compile_part(part: str, impls: list[str], device: str, plan: Plan) -> None:
    """Run what starts most kernels of a dtype's checks, or of an objective's step, once.

    What is wrong is not said here: the cases themselves find it.
    """

    def unchecked(*arguments: Any, **options: Any) -> None:
        with suppress(Exception):
            layer.check_layer(*arguments, **options)

    for impl in [name for name in IMPLS if name in impls] or impls:
        with suppress(Exception), torch.device(device):
            if part in DTYPES:
                layer.check_whole_layer(impl, DTYPES[part], plan, unchecked)
            else:
                names = [f"{impl} bf16"]
                step.build(part, *plan.head, names).sides[names[0]].run()


def compile_ahead(command: list[str], seconds: float) -> float:
    """Compile kernels by a process a part, for so long at most; how long it took.

    Kernels stay in triton's folder on disk and in the package's own. A part that fails or hangs
    leaves its kernels to the cases.
    """
    begin = time.time()
    processes = [
        subprocess.Popen(
            [*command, "--compile", part], cwd=ROOT, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for part in PARTS
    ]  # fmt: skip
    try:
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(begin + seconds - time.time(), 0.0))
    finally:
        for process in processes:
            end(process)
            process.wait()
    return time.time() - begin
