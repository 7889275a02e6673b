"""How long ``bae_fast.warmup`` takes in a new process: with nothing compiled, and once more."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from bench.checkout import ROOT
from bench.device import processes
from bench.device.deadlines import Limit

PROGRAM = """
import sys, time, torch, bench, bae_fast as bf
begin = time.perf_counter()
bf.warmup(sys.argv[1], device=sys.argv[2])
if sys.argv[2] == "cuda":
    torch.cuda.synchronize()
print("seconds", time.perf_counter() - begin)
"""


def measure_warmup(
    impl: str, device: str, limit: Limit, alive: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Seconds of both, as far as the limit of the two allows."""
    found: dict[str, Any] = {}
    until = time.time() + limit.seconds
    with tempfile.TemporaryDirectory() as folder:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        kept = {"TRITON_CACHE_DIR": folder, "XDG_CACHE_HOME": folder, "PYTHONPATH": path}
        command = [sys.executable, "-c", PROGRAM, impl, device]
        for key in ("cold_seconds", "warm_seconds"):
            done = processes.run_process(command, until - time.time(), kept, alive)
            if done.status is None:
                return found | {"unavailable": f"{limit.over} ({key})"}
            if done.status:
                return found | {"refused": (done.lines or ["no reason"])[-1]}
            found[key] = float(next(x.split()[1] for x in done.lines if x.startswith("seconds ")))
    return found
