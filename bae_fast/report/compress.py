"""What ``compress`` measured: the file of codes beside other forms of the same rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bae_fast.report import tables
from bae_fast.report.plots import Point, plot_fvu_bits


def table(result: dict[str, Any]) -> str:
    """Markdown: one line a form, all in bits a row."""
    raw, size, fvu = result["raw_bits_a_row"], result["size"], result["fvu"]
    rows: list[list[str]] = []

    def line(name: str, bits: float, error: float | None) -> None:
        shown = "" if error is None else f"{error:.4f}"
        # the Gaussian bound at an FVU of 1 or more is 0
        ratio = f"1 / {raw['bfloat16'] / bits:.1f}" if bits else "0"
        rows.append([name, f"{bits:,.1f}", ratio, shown])

    line("raw, float32", raw["float32"], 0)
    line("raw, bfloat16", raw["bfloat16"], 0)
    line("**code, on disk**", size["bits_a_row"], fvu)
    line("bound of independent columns, sum of entropies", result["bound_bits_a_row"], None)
    line("entropy along a tree (estimate)", result["tree_bits_a_row"], None)
    names = {
        "packed": "one bit a feature",
        "listed": "lists of differing columns",
        "gzip": "packed bits, gzip -6",
        "xz": "packed bits, xz -6",
    }
    for key, name in names.items():
        line(name, result["plain_bits_a_row"][key], fvu)
    line("Gaussian bound at this FVU", result["gaussian_bound_bits"], fvu)
    for row in result["quantised"]:
        line(f"raw states, {row['name']}", row["bits"], row["fvu"])
    data, seconds = result["data"], result["seconds"]
    overhead = "all above"
    if size["overhead"] is not None:
        overhead = f"{abs(size['overhead']):.2%} {'below' if size['overhead'] < 0 else 'above'}"
    edges = size.get("edges", 0)
    how = f"coded along a tree of {edges:,} edges, " if edges else ""
    lines = tables.table(["form", "bits a row", "of bf16", "FVU"], rows)
    lines += [
        "",
        f"{data['model_label']}, `{data['hook_name']}`, {result['rows']:,} rows of "
        f"{result['d_in']}, {result['d_sae']} features. The file: {size['file_bytes']:,} bytes, "
        f"{how}{overhead} the bound of independent columns, header and index "
        f"{size['header_bytes']:,} bytes; every bit "
        f"compared after reading. {_searched(result)}FVU of the held-out rows "
        f"{result['fvu_heldout']:.4f}. Not counted: the decoder, "
        f"{result['decoder_bytes'] / 1e6:.1f} MB in float32, once for any number of rows. "
        f"Seconds: encode {seconds['encode']:.1f}, compress "
        f"{seconds['compress']:.1f}, decompress {seconds['decompress']:.1f}, decode "
        f"{seconds['decode']:.1f}. Entropy coded: empirical entropy of the levels of each "
        "dimension, no file; its axes and tables are not counted. The tree and xz go below the "
        "bound where groups of features, and xz where rows, repeat.",
    ]
    return "\n".join(lines) + "\n"


def _searched(result: dict[str, Any]) -> str:
    price = result.get("bit_price")
    return "" if price is None else f"Codes are searched for, at {price:g} a bit. "


def plot(result: dict[str, Any], spectrum: Tensor) -> bytes:
    """FVU against bits a row: the file, and the quantisers; PNG."""
    points = [Point("BAE, on disk", result["fvu"], result["size"]["bits_a_row"], True)]
    points += [
        Point(one["name"], one["fvu"], one["bits"]) for one in result["quantised"] if one["fvu"] < 1
    ]
    return plot_fvu_bits(spectrum, points)
