"""Peak memory of one forward and backward with covariance: packed against dense.

    python -m bench.memory --n 2048 --d 512 --f 16384

Each side runs in a fresh process and reports its resident high-water mark above a baseline taken
when x, the parameters and their gradients are allocated and touched and every library is warm.
The gradients are then dropped, as ``zero_grad()`` does, and the step makes them again; so the
figure is what the step needs beyond parameters and gradients. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIDES = ("packed", "dense")
_ROOT = Path(__file__).resolve().parent.parent


def resident_bytes(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (highest so far) of this process, in bytes; Linux only.

    Not getrusage: its high-water mark survives exec, so a fresh process would inherit its
    parent's.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _step(side: str, impl: str, surrogate: str) -> Callable[..., None]:
    if side == "dense":
        from bench.eager import eager_loss

        def run(x: Any, *parameters: Any) -> None:
            eager_loss(x, *parameters).backward()

        return run

    from bae_fast import binary_autoencoder

    def run_packed(x: Any, *parameters: Any) -> None:
        out = binary_autoencoder(x, *parameters, surrogate=surrogate, covariance=True, impl=impl)
        loss = (x - out.recon).square().mean() + 1e-7 * out.entropy + 1e-7 * out.covariance
        loss.backward()

    return run_packed


def measure(
    side: str, n: int, d: int, f: int, impl: str, surrogate: str, threads: int
) -> dict[str, Any]:
    """Run one side in this process, which should be fresh: peak bytes and seconds."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)

    def tensors(n: int, d: int, f: int) -> list[Any]:
        parameters = [
            torch.randn(d, f) / d**0.5,
            torch.zeros(f),
            torch.randn(f, d) / f**0.5,
            torch.zeros(d),
        ]
        return [torch.randn(n, d), *(p.requires_grad_() for p in parameters)]

    step = _step(side, impl, surrogate)
    for _ in range(2):
        step(*tensors(32, 8, 64))

    x, *parameters = tensors(n, d, f)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    baseline = resident_bytes("VmRSS")
    for parameter in parameters:
        parameter.grad = None
    start = time.perf_counter()
    step(x, *parameters)
    seconds = time.perf_counter() - start
    assert all(parameter.grad is not None for parameter in parameters)
    return {
        "side": side,
        "baseline_bytes": baseline,
        "peak_bytes": max(resident_bytes("VmHWM") - baseline, 0),
        "seconds": round(seconds, 3),
    }


def compare(
    n: int, d: int, f: int, *, impl: str = "torch", surrogate: str = "rectangle", threads: int = 1
) -> dict[str, Any]:
    """Both sides, each in a fresh process; ``ratio`` is packed / dense."""
    result: dict[str, Any] = {
        "n": n, "d": d, "f": f, "impl": impl, "surrogate": surrogate, "threads": threads,
    }  # fmt: skip
    for side in SIDES:
        command = [
            sys.executable, "-m", "bench.memory", "--side", side, "--impl", impl,
            "--surrogate", surrogate, "--threads", str(threads),
            "--n", str(n), "--d", str(d), "--f", str(f),
        ]  # fmt: skip
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"side {side!r} failed:\n{done.stderr}")
        result[side] = json.loads(done.stdout)
    result["ratio"] = result["packed"]["peak_bytes"] / max(result["dense"]["peak_bytes"], 1)
    return result


def run() -> list[dict[str, Any]]:
    """The suite of ``python -m bench memory``."""
    from bench.step import implementations  # imports torch: not in the processes that are measured

    return [
        compare(2048, 512, 16384, impl=impl, surrogate="identity", threads=2)
        for impl in implementations()
    ]


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| N, d, F | `impl=` | dense eager | packed | ratio |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        dense, packed = (row[side]["peak_bytes"] / 2**20 for side in ("dense", "packed"))
        lines.append(
            f"| {row['n']}, {row['d']}, {row['f']} | `{row['impl']}` | {dense:,.0f} MiB "
            f"| {packed:,.0f} MiB | 1 / {1 / row['ratio']:.0f} |"
        )
    return "\n".join(lines) + (
        "\n\nPeak resident memory above x, parameters and gradients of one forward and backward "
        "with covariance, float32, a fresh process a side."
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--n", type=int, default=2048, help="rows")
    parser.add_argument("--d", type=int, default=512, help="width of a row")
    parser.add_argument("--f", type=int, default=16384, help="features")
    parser.add_argument("--impl", default="torch", help="implementation of the packed side")
    parser.add_argument("--surrogate", default="rectangle", help="surrogate of the packed side")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--side", choices=SIDES, help="run this side only, in this process")
    a = parser.parse_args(arguments)
    if a.side:
        result = measure(a.side, a.n, a.d, a.f, a.impl, a.surrogate, a.threads)
    else:
        result = compare(a.n, a.d, a.f, impl=a.impl, surrogate=a.surrogate, threads=a.threads)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
