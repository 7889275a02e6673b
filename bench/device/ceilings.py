"""What the device can do at best, measured in the run whose figures are held against it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from bae_fast.ops import registry
from bench import ceilings
from bench.device.chip import request_of
from bench.device.machine import Machine

RATE = Path(__file__).with_name("rate.cu")
# products of the rate of 1-bit instructions: blocks a multiprocessor, threads, turns, a turn's
# independent ones, and the bit-MACs of one
RATE_BLOCKS, RATE_THREADS, RATE_TURNS, RATE_PRODUCTS = 4, 256, 4096, 8
BIT_MACS = 16 * 8 * 256


def measure(machine: Machine) -> dict[str, Any]:
    """The rates of :func:`bench.ceilings.rates`, and those of counting pairs."""
    side = machine.plan.gemm_side
    with torch.device(machine.device):
        dtypes = (torch.float32, torch.bfloat16)
        found = ceilings.rates(machine.best, machine.plan.copy_bytes, side, dtypes)
        a = (torch.rand(side, side) < 0.5).to(torch.int8)
        seconds = machine.best(lambda: torch._int_mm(a, a.t()))
    found["bit_macs"] = {"int8": side**3 / seconds}
    if machine.device == "cuda" and not registry.reasons_against("cuda", request_of("cuda")):
        found["bit_macs"]["b1"] = bit_rate(machine)
    return found


def level_of(found: dict[str, Any]) -> str:
    """The unit that a roofline's counts are taken to run on: the faster one."""
    return max(found["bit_macs"], key=found["bit_macs"].__getitem__)


def bit_rate(machine: Machine) -> float:
    """Bit-MACs a second of the 1-bit instruction, from registers alone."""
    from bae_fast.kernels_cuda import driver

    kernel = driver.Kernel(str(RATE), "bit_rate", 0, RATE_THREADS, "pi")
    properties = torch.cuda.get_device_properties(0)
    blocks = RATE_BLOCKS * properties.multi_processor_count
    out = torch.zeros(blocks * RATE_THREADS, dtype=torch.int32, device="cuda")
    seconds = machine.best(functools.partial(driver.start, kernel, blocks, out, RATE_TURNS))
    products = blocks * RATE_THREADS // 32 * RATE_TURNS * RATE_PRODUCTS
    return float(products * BIT_MACS / seconds)
