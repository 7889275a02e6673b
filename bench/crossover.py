"""Where lists and bits take the same time for the covariance and its gradient.

    cost = GAIN (seconds of lists / sum_r l_r^2) / (seconds of bits / (N F^2))

Everything is listed, also where that is the slower form, so that both sides of the crossover are
seen. Of each size the density counts at which the two forms are nearest to each other, and
``LIST_COST`` of ``bae_fast/backends/cpp/covariance.py`` is the median over the sizes.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch

from bae_fast.backends.cpp import extension
from bench import tables
from bench.sparse import ALWAYS, LEFT_COLUMNS, NEVER, Code
from bench.timing import Side, interleaved

# larger ones would take bits minutes on one thread; scalar takes the first size alone
SIZES = ((512, 2304), (512, 8192), (4096, 2304))
DENSITIES = {"scalar": (0.03, 0.06)}
OTHERS = (0.01, 0.02, 0.03)
GAIN = 0.5  # what the choice takes for the advantage of lists (kGain of csrc/pair_lists.cpp)
SECONDS = 2.0


def measure(level: str, n: int, f: int, density: float, seconds: float) -> dict[str, Any]:
    """A row; the results of both forms are equal, or none is timed."""
    code = Code.make(n, f, density * f)
    left = torch.randn(n, LEFT_COLUMNS, generator=torch.Generator().manual_seed(2))
    forms = {"lists": ALWAYS, "bits": NEVER}
    row: dict[str, Any] = {
        "level": level, "n": n, "f": f, "density": density, "visited": code.visited,
    }  # fmt: skip
    parts: dict[str, Callable[[float], Any]] = {
        "forward": lambda cost: code.covariance(cost, keep=True),
        "both": functools.partial(code.both, left),
    }
    lists, bits = (code.both(left, cost) for cost in forms.values())
    if not all(map(torch.equal, lists, bits)):
        return row | {"refused": "lists and bits differ"}
    del lists, bits
    for part, run in parts.items():
        sides = {name: Side(functools.partial(run, cost)) for name, cost in forms.items()}
        times = interleaved(sides, seconds)
        medians = {name: statistics.median(values) for name, values in times.items()}
        each = medians["lists"] / code.visited, medians["bits"] / (n * f * f)
        row[part] = medians | {"cost": GAIN * each[0] / each[1]}
    return row


def line(row: dict[str, Any]) -> str:
    """A row on one line."""
    parts = [
        f"{part}: lists {tables.milliseconds(row[part]['lists'])}, bits "
        f"{tables.milliseconds(row[part]['bits'])}, cost {row[part]['cost']:,.0f}"
        for part in ("forward", "both")
        if part in row
    ]
    head = f"{row['level']} N {row['n']} F {row['f']} density {row['density']:g}"
    return "; ".join([head, *parts, *([row["refused"]] if "refused" in row else [])])


def run(
    only: str = "",
    seconds: float = SECONDS,
    sizes: tuple[tuple[int, int], ...] = SIZES,
    densities: tuple[float, ...] | None = None,
) -> dict[str, Any]:
    """Every level of this machine and size whose LEVEL-N-F holds ``only``."""
    rows = []
    try:
        for level in sorted(extension.LEVELS, key=extension.LEVELS.__getitem__, reverse=True):
            if extension.op("simd")(extension.LEVELS[level]) < 0:
                continue
            for n, f in sizes[:1] if level == "scalar" else sizes:
                if only not in f"{level}-{n}-{f}":
                    continue
                usual = DENSITIES.get(level, OTHERS)
                for density in usual if densities is None else densities:
                    rows.append(measure(level, n, f, density, min(seconds, SECONDS)))
                    print(line(rows[-1]), flush=True)
    finally:
        extension.use_simd(None)
    return {"rows": rows, "cost": costs(rows)}


def costs(rows: list[dict[str, Any]]) -> dict[str, float]:
    """By level."""
    nearest: dict[tuple[str, int, int], tuple[float, float]] = {}
    for row in rows:
        if "both" in row:
            both = row["both"]
            found = abs(math.log(both["lists"] / both["bits"])), both["cost"]
            key = row["level"], row["n"], row["f"]
            nearest[key] = min(found, nearest.get(key, found))
    return {
        level: statistics.median(cost for key, (_, cost) in nearest.items() if key[0] == level)
        for level in dict.fromkeys(key[0] for key in nearest)
    }


def table(result: dict[str, Any]) -> str:
    """The measured costs."""
    return "\n".join(f"LIST_COST at {k}: {v:,.0f}" for k, v in result["cost"].items())
