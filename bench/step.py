"""Seconds of one forward and backward: packed against the dense program, all in one process.

Random data of stated shape; sides alternate and medians are compared. Before anything is timed,
the packed sides' bits and integer covariance are checked against the dense ones: a wrong side
gets no figure.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from bae_fast import binary_autoencoder
from bae_fast.ops import registry
from bench.eager import eager_loss

# (N, d, F): F/d of 4 and 16
SHAPES = [(512, 576, 2304), (512, 512, 8192)]
REPEATS = 7


def tensors(n: int, d: int, f: int) -> list[torch.Tensor]:
    """x and parameters with about half of the bits on, as the paper's program starts."""
    torch.manual_seed(0)
    shapes = [(d, f), (f,), (f, d), (d,)]
    parameters = [(torch.randn(s) * s[0] ** -0.5).requires_grad_() for s in shapes]
    return [torch.randn(n, d), *parameters]


def implementations() -> list[str]:
    """The packed implementations that can run on a CPU here, the default first."""
    request = registry.Request("cpu", torch.float32)
    return [n for n in registry.AUTO_ORDER["cpu"] if not registry.reasons_against(n, request)]


def packed(impl: str, covariance: bool) -> Callable[..., None]:
    """One step of a packed implementation."""

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> None:
        out = binary_autoencoder(
            x, *parameters, surrogate="identity", covariance=covariance, impl=impl
        )
        loss = (x - out.recon).square().mean() + 1e-7 * out.entropy
        (loss if out.covariance is None else loss + 1e-7 * out.covariance).backward()

    return run


def dense(covariance: bool) -> Callable[..., None]:
    """One step of the dense program."""

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> None:
        eager_loss(x, *parameters, covariance_weight=1e-7 if covariance else None).backward()

    return run


def check(impl: str, x: torch.Tensor, *parameters: torch.Tensor) -> None:
    """Raise AssertionError where the packed side is wrong; sampled columns, exact integers."""
    with torch.no_grad():
        out = binary_autoencoder(x, *parameters, covariance=True, impl=impl)
        bits = out.code.to_dense()
        pre = x.double() @ parameters[0].double() + parameters[1].double()
        unsure = pre.abs() < 1e-4
        assert torch.equal(bits | unsure, (pre > 0) | unsure)
        b = bits[:, :512].double()
        n, counts = len(b), b.sum(0)
        v = n * b.T @ b - torch.outer(counts, counts)
        numerator = int(v.abs().sum() - v.diagonal().abs().sum())
        sample = type(out.code).from_dense(bits[:, :512]).statistics(covariance=True, impl=impl)
        assert int(sample.numerator) == numerator  # type: ignore[arg-type]


def run() -> list[dict[str, Any]]:
    """Medians of every shape, with and without the covariance."""
    rows = []
    for n, d, f in SHAPES:
        inputs = tensors(n, d, f)
        for impl in implementations():
            check(impl, *inputs)
        for covariance in (False, True):
            sides = {impl: packed(impl, covariance) for impl in implementations()}
            sides["dense"] = dense(covariance)
            seconds: dict[str, list[float]] = {name: [] for name in sides}
            for turn in range(REPEATS + 1):
                for name, side in sides.items():
                    start = time.perf_counter()
                    side(*inputs)
                    if turn:  # the first warms up
                        seconds[name].append(time.perf_counter() - start)
                    for parameter in inputs[1:]:
                        parameter.grad = None
            medians = {name: statistics.median(values) for name, values in seconds.items()}
            rows.append(
                {"n": n, "d": d, "f": f, "covariance": covariance, "dtype": "float32"}
                | {f"{name}_seconds": round(value, 4) for name, value in medians.items()}
                | {
                    f"{name}_speedup": round(medians["dense"] / value, 2)
                    for name, value in medians.items()
                    if name != "dense"
                }
            )
    return rows


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    environment = result["environment"]
    names = [k.removesuffix("_speedup") for k in result["rows"][0] if k.endswith("_speedup")]
    lines = [
        "| N, d, F | covariance | dense eager | "
        + " | ".join(f"`{name}` (ratio)" for name in names)
        + " |",
        "|---|---|---" + "|---" * len(names) + "|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['n']}, {row['d']}, {row['f']} | {'yes' if row['covariance'] else 'no'} "
            f"| {row['dense_seconds'] * 1e3:.0f} ms | "
            + " | ".join(
                f"{row[f'{name}_seconds'] * 1e3:.0f} ms ({row[f'{name}_speedup']:.1f})"
                for name in names
            )
            + " |"
        )
    return "\n".join(lines) + (
        f"\n\nfloat32, forward and backward without optimizer, half of the bits on, medians of "
        f"{REPEATS}, both sides alternating in one process; {environment['cpu']}, "
        f"{environment['threads']} threads, torch {environment['torch']}."
    )
