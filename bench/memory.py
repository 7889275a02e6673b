"""Peak memory of one training step with its optimizer: packed against dense.

    python -m bench.memory --n 2048 --d 512 --f 16384

Each side runs the step of :mod:`bench.step` in a fresh process and reports how far it drives
resident memory above a baseline taken after one step, when x, the parameters, their gradients and
the optimizer's state are there and every library is warm. The step drops the gradients and makes
them again; so the figure is what it needs beyond all these. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench import tables
from bench.inputs import implementations, tensors
from bench.step import OBJECTIVES, Objective, parameters_of, step_of
from bench.timing import peak_bytes

SIDES = ("packed", "dense")
_ROOT = Path(__file__).resolve().parent.parent

# (objective, N, d, F)
CASES = [
    ("paper", 512, 2048, 8192),
    ("rectangle", 2048, 512, 16384),
    ("no covariance", 2048, 512, 16384),
    ("paper", 512, 1024, 32768),
]

# the covariance of a code with 32 ones a row of 2^20: measured by bench/sparse.py
MILLION = Objective("rectangle", True, 32 / 2**20)
KNOWN = OBJECTIVES | {"million": MILLION}

# C, its absolute value and the gradients of both: what autograd through torch.cov holds at once
DENSE_SQUARES = 4


def measure(
    side: str, n: int, d: int, f: int, impl: str, objective: str, threads: int
) -> dict[str, Any]:
    """Run one side in this process, which should be fresh: peak bytes."""
    torch.set_num_threads(threads)
    given = tensors(n, d, f, KNOWN[objective].density)
    x, parameters = given[0], parameters_of(given)
    del given
    step = step_of(impl if side == "packed" else "eager", KNOWN[objective], x, parameters)
    step()  # makes the gradients and the optimizer's state
    return {"side": side, "peak_bytes": peak_bytes(step)}


def in_fresh_process(side: str, result: dict[str, Any]) -> dict[str, Any]:
    """:func:`measure` in a process of its own, for the case that ``result`` names."""
    command = [sys.executable, "-m", "bench.memory", "--side", side]
    for name in ("impl", "objective", "threads", "n", "d", "f"):
        command += [f"--{name}", str(result[name])]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"side {side!r} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def available_bytes() -> int:
    """Memory that a process could still take; Linux only."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")


def compare(
    n: int,
    d: int,
    f: int,
    *,
    impl: str = "torch",
    objective: str = "rectangle",
    threads: int = 1,
) -> dict[str, Any]:
    """Both sides, each in a fresh process; ``ratio`` is packed / dense.

    Where the dense side would not fit, its figure is the arithmetic of its F x F floats alone and
    ``"arithmetic"`` is true.
    """
    result: dict[str, Any] = {
        "objective": objective, "n": n, "d": d, "f": f, "impl": impl, "threads": threads,
    }  # fmt: skip
    squares = DENSE_SQUARES * 4 * f * f if KNOWN[objective].covariance else 0
    for side in SIDES:
        # 16 bytes a parameter: itself, its gradient, two of Adam
        if side == "dense" and 1.1 * squares + 16 * 2 * d * f > available_bytes():
            result[side] = {"side": side, "peak_bytes": squares, "arithmetic": True}
        else:
            result[side] = in_fresh_process(side, result)
    result["ratio"] = result["packed"]["peak_bytes"] / max(result["dense"]["peak_bytes"], 1)
    return result


def run(only: str = "", seconds: float = 0.0) -> dict[str, Any]:
    """Every case with the default implementation, the first with every one; nothing is timed."""
    rows = []
    for case in CASES:
        if only not in tables.name(case):
            continue
        objective, n, d, f = case
        for impl in implementations() if case == CASES[0] else implementations()[:1]:
            rows.append(
                compare(n, d, f, impl=impl, objective=objective, threads=torch.get_num_threads())
            )
            print(rows[-1], flush=True)
    return {"rows": rows}


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    body = []
    for row in result["rows"]:
        dense, packed = row["dense"], row["packed"]
        size = tables.mebibytes(dense["peak_bytes"])
        if dense.get("arithmetic"):
            size = f"over {size} (4 F^2 floats, arithmetic)"
        body.append(
            [
                row["objective"],
                tables.shape(row),
                f"`{row['impl']}`",
                size,
                tables.mebibytes(packed["peak_bytes"]),
                f"1 / {1 / row['ratio']:.0f}",
            ]
        )
    header = ["objective", "N, d, F", "`impl=`", "eager", "packed", "ratio"]
    return tables.markdown(header, body) + (
        "\n\nPeak resident memory of a whole float32 step above x, parameters, gradients and the "
        "optimizer's state, a fresh process a side."
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--n", type=int, default=2048, help="The number of rows.")
    parser.add_argument("--d", type=int, default=512, help="The width of a row.")
    parser.add_argument("--f", type=int, default=16384, help="The number of features.")
    parser.add_argument("--impl", default="torch", help="The implementation of the packed side.")
    parser.add_argument("--objective", default="rectangle", choices=[*KNOWN])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--side", choices=SIDES, help="Run this side alone, in this process.")
    a = parser.parse_args(arguments)
    if a.side:
        result = measure(a.side, a.n, a.d, a.f, a.impl, a.objective, a.threads)
    else:
        result = compare(a.n, a.d, a.f, impl=a.impl, objective=a.objective, threads=a.threads)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
