"""Results as text: lines while a suite runs, and tables in Markdown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bae_fast.report import tables as report
from bench.eager import PROGRAMS


def name(case: tuple[Any, ...]) -> str:
    """A case as one word, for ``--only`` and test names."""
    return "-".join(str(part) for part in case)


def splice(text: str, suite: str, table: str) -> str:
    """Replace what stands between the markers of one suite.

    Raises:
        ValueError: the markers are missing.
    """
    begin, end = f"<!-- bench:{suite} -->", f"<!-- /bench:{suite} -->"
    if begin not in text or end not in text:
        raise ValueError(f"text must hold {begin} and {end}")
    before, rest = text.split(begin, 1)
    return before + begin + "\n" + table.strip() + "\n" + end + rest.split(end, 1)[1]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table."""
    return "\n".join(report.table(header, rows))


def milliseconds(seconds: float) -> str:
    """Three digits, whole from 100 on."""
    value = seconds * 1e3
    return f"{value:,.0f} ms" if value >= 99.5 else f"{value:.3g} ms"


def mebibytes(size: float) -> str:
    """Whole."""
    return f"{size / 2**20:,.0f} MiB"


def density(row: dict[str, Any]) -> str:
    """The asked share of ones."""
    return f"{row['density']:g}"


def shape(row: dict[str, Any]) -> str:
    """N, d, F."""
    return f"{row['n']}, {row['d']}, {row['f']}"


def cell(side: dict[str, Any] | None) -> str:
    """Time and how many times faster than the first side, or why there is none."""
    if side is None:
        return ""
    if "seconds" not in side:
        return "refused" if "refused" in side else "does not compile"
    ratio = f" ({side['ratio']:.1f})" if "ratio" in side else ""
    return milliseconds(side["seconds"]) + ratio


def ours(rows: list[dict[str, Any]]) -> list[str]:
    """Names of the packed sides in some rows, the default implementation first."""
    return list(dict.fromkeys(n for row in rows for n in row["sides"] if n not in PROGRAMS))


def comparison(
    rows: list[dict[str, Any]], first: dict[str, Callable[[dict[str, Any]], str]]
) -> str:
    """Rows by sides, every side with its ratio to eager, and the default's share of the floor."""
    programs = [name for name in PROGRAMS if any(name in row["sides"] for row in rows)]
    names = [*programs, *ours(rows)]
    header = [*first, *(n if n in PROGRAMS else f"`{n}`" for n in names), "of the floor"]
    body = []
    for row in rows:
        default = row["sides"].get(ours(rows)[0], {})
        share = f"{default['floor_share']:.0%}" if "floor_share" in default else ""
        body.append(
            [
                *(make(row) for make in first.values()),
                *(
                    milliseconds(row["sides"][n]["seconds"])
                    if n == PROGRAMS[0] and "seconds" in row["sides"].get(n, {})
                    else cell(row["sides"].get(n))
                    for n in names
                ),
                share,
            ]
        )
    return markdown(header, body)


def line(row: dict[str, Any]) -> str:
    """A row on one line, for the terminal."""
    sides = (f"{n} {cell(side)}" for n, side in row["sides"].items())
    return f"{case_of(row)}: " + ", ".join(sides)


def case_of(row: dict[str, Any]) -> str:
    """What a row is of, in a few words."""
    return " ".join(str(v) for k, v in row.items() if k not in ("work", "sides"))


def refusals(rows: list[dict[str, Any]], name_of: Callable[[dict[str, Any]], str]) -> list[str]:
    """What was refused in some rows, one line each."""
    return [
        f"{name_of(row)}: {name}: {side['refused']}"
        for row in rows
        for name, side in row.get("sides", {}).items()
        if "refused" in side
    ]


def machine(result: dict[str, Any]) -> str:
    """One sentence on where the figures come from."""
    e = result["environment"]
    level = f", `cpp` at {e['simd']}" if e.get("simd") else ""
    return (
        f"{e['cpu']}, {e['threads']} thread{'s' * (e['threads'] != 1)}, torch {e['torch']}{level}."
    )


def ceilings(result: dict[str, Any]) -> str:
    """The ceilings of a run in one sentence."""
    c = result["ceilings"]
    bits = c["bit_macs"].get(result["environment"].get("simd"))
    counted = f", {bits / 1e12:.2f} T bit-MAC/s" if bits else ""
    half = c.get("gemm_bfloat16")  # only where it is native
    halves = f", in bfloat16 {half / 1e9:,.0f}" if half else ""
    return (
        f"Measured there: torch's GEMM {c['gemm_float32'] / 1e9:,.0f} GFLOP/s{halves}; "
        f"copy {c['copy'] / 1e9:,.0f} GB/s{counted}."
    )
