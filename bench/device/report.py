"""Results as lines, tables and a plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bae_fast.files import read_json, write_text
from bae_fast.ops import registry
from bench import eager, tables
from bench.checkout import ROOT
from bench.device.cases import Row, name_of

RESULTS = ROOT / "bench" / "results"

# of a side of which the checks refused an operator
MARK = " †"
# kernels of a step that the table shows
SHOWN = 12

Columns = Mapping[str, Callable[[Row], str]]


def line(row: Row) -> str:
    """A row on one line, for the terminal."""
    sides = (f"{n} {_cell(side)}" for n, side in row["sides"].items())
    return f"{name_of(row['case'])}: " + ", ".join(sides) + row.get("unavailable", "")


def refusals(result: dict[str, Any]) -> list[str]:
    """What was wrong, one line each."""
    found = tables.refusals(result["rows"], lambda row: name_of(row["case"]))
    return found + ([result["error"]] if "error" in result else [])


# -- tables ------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """Markdown: steps, operators at the first density, the covariance against int8 products."""
    parts = [_steps(result), _graphs(result), _operators(result), _pairs(result)]
    kernels = [_kernels(row) for row in result["rows"] if row.get("kernels")]
    return "\n\n".join([*filter(None, parts), *kernels, " ".join(_notes(result))])


def _steps(result: dict[str, Any]) -> str:
    def objective(row: Row) -> str:
        return row["objective"] + (f", planes {row['planes']}" if "planes" in row else "")

    rows = _rows(result, "step")
    return _comparison(
        "A training step in bf16", rows, {"objective": objective, "N, d, F": tables.shape}
    )


def _graphs(result: dict[str, Any]) -> str:
    def objective(row: Row) -> str:
        return row["objective"] + ", graph"

    rows, title = _rows(result, "graph"), "The same replayed from a CUDA graph"
    return _comparison(title, rows, {"objective": objective, "N, d, F": tables.shape})


def _operators(result: dict[str, Any]) -> str:
    rows = _rows(result, "operator")
    rows = [row for row in rows if row["density"] == rows[0]["density"]]
    columns: Columns = {
        "operator": lambda row: row["operator"].replace("_", " "),
        "N, d, F": tables.shape,
        "density": tables.density,
    }
    return _comparison("Operators", rows, columns)


def _pairs(result: dict[str, Any]) -> str:
    columns: Columns = {
        "operator": lambda row: "covariance",
        "N, F": lambda row: f"{row['n']}, {row['f']}",
        "density": tables.density,
    }
    return _comparison("The covariance forward, no signs", _rows(result, "pairs"), columns)


def _rows(result: dict[str, Any], *kinds: str) -> list[Row]:
    return [
        row | row["case"] for row in result["rows"] if row["case"]["kind"] in kinds and row["sides"]
    ]


def _comparison(title: str, rows: list[Row], first: Columns) -> str:
    """Rows by sides; of the first of ours also the peak and the share of the floor."""
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row["sides"]))
    names.sort(key=lambda name: name not in eager.DENSE)
    mine = [name for name in names if name.split()[0] in registry.IMPLS]
    header = [*first, *(f"`{n}`" if n in mine else n for n in names), "peak", "of the floor"]
    body = []
    for row in rows:
        marked = row.get("marked", [])
        cells = [_cell(row["sides"].get(n)) + MARK * (n in marked) for n in names]
        body.append([*(make(row) for make in first.values()), *cells, *_best(row, mine)])
    return f"{title}:\n\n" + tables.markdown(header, body)


def _best(row: Row, mine: list[str]) -> list[str]:
    """Peak and share of the floor of the fastest of ours."""
    ours = [row["sides"][name] for name in mine if "seconds" in row["sides"].get(name, {})]
    best: dict[str, Any] = min(ours, key=lambda side: side["seconds"], default={})
    return [
        tables.mebibytes(best["peak_bytes"]) if "peak_bytes" in best else "",
        f"{best['floor_share']:.0%}" if "floor_share" in best else "",
    ]


def _cell(side: dict[str, Any] | None) -> str:
    if side is None:
        return ""
    if "seconds" in side:
        return tables.cell(side)
    if "refused" in side:
        return "refused"
    return side.get("unavailable", "right")


def _kernels(row: Row) -> str:
    """A step from inside."""
    total = sum(time for _, _, time in row["kernels"])
    launches = sum(count for _, count, _ in row["kernels"])
    body = [
        [f"`{name[:70]}`", str(count), f"{time:,.0f}", f"{time / total:.0%}"]
        for name, count, time in row["kernels"][:SHOWN]
    ]
    return (
        f"A step of `{row['case']['impl']}` from inside ({launches} launches, "
        f"{total / 1e3:.2f} ms):\n\n"
        + tables.markdown(["kernel", "launches", "microseconds", "share"], body)
    )


# -- notes -------------------------------------------------------------------------------------


def _notes(result: dict[str, Any]) -> list[str]:
    """What tables do not say, a sentence or more each."""
    texts = [
        "Medians of device times with a cold L2 cache, in brackets how many times faster than the "
        "first column; every call checked first. peak and share of the floor "
        "(products at the measured bf16 rate, counts at the faster of the rates below, memory and "
        "Adam at the speed of a copy) are those of the fastest of ours."
    ]
    if result.get("ceilings"):
        texts.append(_ceilings(result["ceilings"]))
    for row in _rows(result, "warmup"):
        for name, side in row["sides"].items():
            if "warm_seconds" in side:
                texts.append(
                    f'`bf.warmup("{name}")` takes {side["cold_seconds"]:.0f} s, '
                    f"{side['warm_seconds']:.0f} s with its kernels on disk."
                )
    if any(row.get("marked") for row in result["rows"]):
        texts.append(f"{MARK.strip()}: an operator of this side was refused in the checks.")
    wrong = refusals(result)
    if wrong:
        texts.append(f"Refused: {len(wrong)}; see `bench/results/device.json`.")
    if result["skipped"]:
        texts.append(f"Cases left out for time: {len(result['skipped'])}.")
    for name, reason in result["impls"].items():
        if reason != "available":
            texts.append(f"`{name}`: {reason}.")
    return [*texts, _versions(result["environment"])]


def _ceilings(found: dict[str, Any]) -> str:
    counted = f"int8 products {found['bit_macs']['int8'] / 1e12:,.0f} T multiply-adds/s"
    if "b1" in found["bit_macs"]:
        counted += f", 1-bit ones {found['bit_macs']['b1'] / 1e12:,.0f}"
    return (
        f"Measured there: bf16 product {found['gemm_bfloat16'] / 1e12:,.0f} TFLOP/s, copy "
        f"{found['copy'] / 1e12:.2f} TB/s, {counted}."
    )


def _versions(environment: dict[str, Any]) -> str:
    own = environment["device"]
    versions = f"torch {environment['torch']}"
    if own.get("triton"):
        versions += f", triton {own['triton']}"
    if "driver_version" in own:
        versions += f", driver {own['driver_version']}"
    return f"{own['name']}, {versions}."


# -- plot and files ----------------------------------------------------------------------------

# (N, (milliseconds, least, most)), by name, by (d, F)
Points = list[tuple[int, tuple[float, float, float]]]


def plot(result: dict[str, Any]) -> bytes | None:
    """Milliseconds of the paper's step against N, a panel a (d, F); None without a step."""
    from bae_fast.report.series import Panel, Series, plot_panels

    panels = [
        Panel(
            f"d = {d}, F = {f}", "rows N", "ms a step",
            [
                Series(name, [n for n, _ in found], [y for _, y in found], name == "floor")
                for name, found in ((name, sorted(points)) for name, points in series.items())
            ],
            logarithmic=True,
        )
        for (d, f), series in sorted(_points(result).items())
    ]  # fmt: skip
    return plot_panels(panels) if panels else None


def _points(result: dict[str, Any]) -> dict[tuple[int, int], dict[str, Points]]:
    found: dict[tuple[int, int], dict[str, Points]] = {}
    for row in _rows(result, "step", "graph"):
        timed = {name: side for name, side in row["sides"].items() if "seconds" in side}
        if row["objective"] != "paper" or not timed:
            continue
        panel = found.setdefault((row["d"], row["f"]), {})
        for name, side in timed.items():
            label = name + (", graph" if row["kind"] == "graph" else "")
            times = (side["seconds"] * 1e3, side["least"] * 1e3, side["most"] * 1e3)
            panel.setdefault(label, []).append((row["n"], times))
            if name.split()[0] in registry.IMPLS and "floor_seconds" in side:
                points = panel.setdefault("floor", [])
                if row["n"] not in [n for n, _ in points]:
                    points.append((row["n"], (side["floor_seconds"] * 1e3,) * 3))
    return found


def report(folder: Path, readme: Path) -> None:
    """Plot and table from the JSON; the README's only for the committed results."""
    result = read_json(folder / "device.json")
    try:
        image = plot(result)
    except Exception as error:  # no matplotlib, or rows that it cannot draw: the table counts
        print(f"no plot: {type(error).__name__}: {error}")
    else:
        if image is not None:
            (folder / "device.png").write_bytes(image)
    print(table(result))
    if folder.resolve() == RESULTS.resolve() and readme.is_file():
        text = readme.read_text(encoding="utf-8")
        if "<!-- bench:device -->" in text:
            write_text(readme, tables.splice(text, "device", table(result)))
