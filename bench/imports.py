"""Seconds that ``import bae_fast`` costs beyond ``import torch``, each in a fresh process.

python -m bench.imports
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_PROGRAM = """
import time, torch
start = time.perf_counter()
import bae_fast
print(time.perf_counter() - start)
"""


def seconds(repeats: int = 7) -> list[float]:
    """One figure a process; the first also reads the files into the system's cache."""
    environment = os.environ | {"PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"}
    found = []
    for _ in range(repeats):
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(float(done.stdout))
    return found


if __name__ == "__main__":
    times = seconds()
    print(
        f"import bae_fast: {statistics.median(times):.2f} s (from {min(times):.2f} to "
        f"{max(times):.2f} s) beyond torch, {len(times)} processes"
    )
