"""The covariance on every instruction set the compiled kernels have, against the dense program.

The level is chosen by ``BAE_FAST_SIMD`` when the backend is loaded, so each has a process of its
own, with the dense program in the same process beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bae_fast.backends.cpp.extension import ENV_SIMD, LEVELS
from bae_fast.ops import registry
from bench import ceilings, operators, tables
from bench.eager import PROGRAMS
from bench.inputs import simd
from bench.timing import SECONDS, compare

_ROOT = Path(__file__).resolve().parent.parent
SHAPE = (512, 512, 8192)
DENSITY = 0.5
PARTS = ("covariance", "covariance_backward")


def measure(shape: tuple[int, int, int], seconds: float) -> list[dict[str, Any]]:
    """Both parts at the level in use, in this process, beside that level's ceiling."""
    level = simd()
    assert level is not None  # this process was started for a level of the compiled kernels
    ceiling = {"bit_macs": {level: ceilings.bit_macs(level)}}
    rows = []
    for part in PARTS:
        comparison = operators.build(part, *shape, DENSITY)
        sides = {name: comparison.sides[name] for name in (PROGRAMS[0], "cpp")}
        case = {"level": level} | comparison.case
        rows.append(compare(comparison._replace(case=case, sides=sides), ceiling, seconds))
    return rows


def run(
    only: str = "", seconds: float = SECONDS, shape: tuple[int, int, int] = SHAPE
) -> dict[str, Any]:
    """Every level this machine has, the fastest first; why not, for the others."""
    rows: list[dict[str, Any]] = []
    missing = {}
    for level in sorted(LEVELS, key=LEVELS.__getitem__, reverse=True):
        if only not in level:
            continue
        command = [sys.executable, "-m", "bench.levels", json.dumps([shape, seconds])]
        environment = os.environ | {ENV_SIMD: level}
        done = subprocess.run(
            command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"level {level!r} failed:\n{done.stderr}")
        found = json.loads(done.stdout.splitlines()[-1])
        if isinstance(found, str):
            missing[level] = found
            print(f"{level}: {found}", flush=True)
            continue
        rows += found
        for row in found:
            print(tables.line(row), flush=True)
    return {"rows": rows, "missing": missing}


def table(result: dict[str, Any]) -> str:
    """Markdown: a line a level."""
    by_level: dict[str, dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        by_level.setdefault(row["level"], {})[row["operator"]] = row["sides"]
    body = []
    for level, parts in by_level.items():
        line = [f"`{level}`"]
        for part in PARTS:
            ours = parts[part]["cpp"]
            rate = ours.get("bit_macs_per_second")
            share = ours.get("bit_macs_share")
            line += [
                tables.cell(ours),
                f"{rate / 1e12:.2f} T ({share:.0%})" if rate is not None else "",
            ]
        body.append(line)
    n, _, f = SHAPE
    header = ["`BAE_FAST_SIMD=`", "forward", "bit-MAC/s", "backward", "bit-MAC/s"]
    eager = [
        tables.milliseconds(max(s[part][PROGRAMS[0]].get("seconds", 0) for s in by_level.values()))
        for part in PARTS
        if by_level
    ]
    return tables.markdown(header, body) + (
        f"\n\nThe covariance alone, N = {n}, F = {f}, half of the bits on: time (times faster than "
        f"eager, {' and '.join(eager)}), rate (share of the level's instruction ceiling). Forward "
        "counts every pair of features once; backward is bits times signs in {-1, 0, 1}, two "
        "counts each where there is no matrix unit."
    )


def main() -> None:
    reason = registry.BACKENDS["cpp"].unavailable
    if reason is not None:
        print(json.dumps(reason))
        return
    shape, seconds = json.loads(sys.argv[1])
    print(json.dumps(measure(tuple(shape), seconds)))


if __name__ == "__main__":
    main()
