"""Figures of a training run, as PNG.

Drawn through matplotlib's object interface on the Agg canvas: no display, no global state.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bae_fast.analysis.metrics import (
    ALWAYS_ON_ABOVE,
    DENSE_ABOVE,
    density_histogram,
    gaussian_rate_distortion_fvu,
)
from bae_fast.files import replacing
from bae_fast.report.style import Ink, as_png, ink_of, new_figure, plain_log_axis, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The rows of a log may carry more, and need not carry all of these.
_CURVES: tuple[tuple[tuple[str, ...], str, bool], ...] = (
    (("mse",), "reconstruction error (mse)", True),
    (("entropy_bits", "entropy"), "entropy, bits per row", False),
    (("l0", "L0"), "L0, features on per row", False),
    (("dead_share", "dead"), "dead features, share", False),
    (("density", "mean_density"), "mean density", False),
)

# of series in one figure, with the colours of `Ink.series`
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")


class Point(NamedTuple):
    """A code in the plane of FVU and bits.

    Attributes:
        name: its label.
        fvu: fraction of variance unexplained.
        bits: bits per row.
        highlight: drawn as the run that the figure is about.
        series: what it has in common with others. They are joined, in one colour, and the series
            stands in the legend in place of a label at each point.
    """

    name: str
    fvu: float
    bits: float
    highlight: bool = False
    series: str | None = None


def plot_training(log: Sequence[Mapping[str, Any]], *, dark: bool = False) -> bytes:
    """Training curves against the step: error, entropy, L0, dead share, density, where logged.

    Args:
        log: the rows of the training log in order; keys `step`, `mse`, `entropy_bits`, `l0`,
            `dead_share`, `density`. Rows and values that are missing or not finite are passed
            over; a key that no row has draws nothing.
        dark: whether the page is dark.

    Returns:
        A PNG file's contents.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no row has a step and any of the values.
    """
    curves = []
    for keys, title, logarithmic in _CURVES:
        key = next((k for k in keys if any(_number(row.get(k)) for row in log)), None)
        pairs = [
            (float(row["step"]), float(row[key]))
            for row in log
            if key is not None and _number(row.get("step")) and _number(row.get(key))
        ]
        if pairs:
            curves.append((title, logarithmic, np.array(pairs)))
    if not curves:
        raise ValueError("log has no row with a step and one of mse, entropy_bits, l0, dead_share")

    ink = ink_of(dark)
    curves = curves[:4]
    n_columns = 1 if len(curves) == 1 else 2
    n_rows = -(-len(curves) // n_columns)
    figure = new_figure(ink, 6.6, 2.2 * n_rows + 0.3)
    for i, (title, logarithmic, xy) in enumerate(curves):
        ax = figure.add_subplot(n_rows, n_columns, i + 1)
        style_axes(ax, ink, title)
        x, y = xy[:, 0], xy[:, 1]
        window = max(len(y) // 40, 1)
        if window > 1:
            ax.plot(x, y, color=ink.main, alpha=0.22, linewidth=0.8)
            y = _running_mean(y, window)
        ax.plot(x, y, color=ink.main, linewidth=1.8, marker="o" if len(x) == 1 else None)
        # Under a factor of four a logarithmic axis has too few round numbers to read.
        if logarithmic and xy[:, 1].min() > 0 and xy[:, 1].max() > 4 * xy[:, 1].min():
            ax.set_yscale("log")
            plain_log_axis(ax.yaxis, ink)
        else:
            ax.set_ylim(bottom=0)
        if i >= len(curves) - n_columns:
            ax.set_xlabel("step")
        ax.margins(x=0.01)
    return as_png(figure)


def plot_density(density: Tensor, *, dark: bool = False) -> bytes:
    """Histogram of feature densities on a logarithmic axis, dead features apart on the left.

    Args:
        density: [F], the share of rows each feature is on in.
        dark: whether the page is dark.

    Returns:
        A PNG file's contents.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: see `density_histogram`.
    """
    histogram = density_histogram(density, bins_per_decade=6)
    ink = ink_of(dark)
    figure = new_figure(ink, 6.6, 3.1)
    ax = figure.add_subplot()
    style_axes(ax, ink, "")
    edges, counts = np.array(histogram.edges), np.array(histogram.counts)
    filled = counts.nonzero()[0]
    first = min(int(filled[0]), len(counts) - 12) if len(filled) else len(counts) - 12
    first = max(first - 1, 0)
    edges, counts = edges[first:], counts[first:]
    ax.set_xscale("log")
    ax.bar(
        edges[:-1], counts, np.diff(edges), align="edge",
        color=ink.main, edgecolor=ink.surface, linewidth=0.8,
    )  # fmt: skip
    n_dead = round(histogram.dead * histogram.n_features)
    ratio = edges[1] / edges[0]
    low = edges[0] / ratio**2.2
    ax.bar(
        low, n_dead, low * (ratio - 1), align="edge",
        color=ink.second, edgecolor=ink.surface, linewidth=0.8,
    )  # fmt: skip
    most = max(counts.max(), n_dead, 1)
    ax.set_ylim(0, most * 1.22)
    ax.annotate(
        f"never on\n{n_dead:,}", (low * math.sqrt(ratio), n_dead), (0, 3),
        textcoords="offset points", ha="center", va="bottom", color=ink.second, fontsize=8.5,
    )  # fmt: skip
    for at, share, name in (
        (DENSE_ABOVE, histogram.dense, "dense"),
        (ALWAYS_ON_ABOVE, histogram.always_on, "always on"),
    ):
        ax.axvline(at, color=ink.muted, linewidth=0.9, linestyle=(0, (4, 3)))
        ax.annotate(
            f"{name}: {100 * share:.2g} %", (at, most * 1.2), (-3, 0),
            textcoords="offset points", ha="right", va="top", rotation=90,
            color=ink.muted, fontsize=8,
        )  # fmt: skip
    ax.set_xlim(low / ratio**0.8, 1.15)
    ax.set_xticks([10.0**e for e in range(-6, 1) if 10.0**e >= edges[0]])
    ax.xaxis.set_major_formatter(lambda value, _position: _share(value))
    ax.set_xlabel("density: share of rows in which a feature is on")
    ax.set_ylabel("features")
    return as_png(figure)


def plot_fvu_bits(
    eigenvalues: Tensor, points: Sequence[Point] = (), *, dark: bool = False
) -> bytes:
    """FVU against bits per row: the Gaussian bound as a curve, codes as points.

    Args:
        eigenvalues: [d], of the rows' covariance, or the covariance [d, d]; see
            `gaussian_rate_distortion_bits`.
        points: codes to show; those with `highlight` are drawn last and larger.
        dark: whether the page is dark.

    Returns:
        A PNG file's contents.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a point that is not finite or without bits, or see
            `gaussian_rate_distortion_fvu`.
    """
    for point in points:
        if not (_number(point.fvu) and _number(point.bits)) or point.bits <= 0 or point.fvu < 0:
            raise ValueError(
                f"points must have a finite FVU of at least 0 and positive bits; got {point!r}"
            )
    ink = ink_of(dark)
    all_bits = [p.bits for p in points] or [300.0]
    low, high = min([100.0, *all_bits]) / 1.4, max([1000.0, *all_bits]) * 1.5
    bits = np.geomspace(low, high, 300)
    bound = gaussian_rate_distortion_fvu(eigenvalues, torch.from_numpy(bits)).cpu().numpy()

    series: dict[str, list[Point]] = {}
    for point in points:
        if point.series is not None and not point.highlight:
            series.setdefault(point.series, []).append(point)
    figure = new_figure(ink, 8.2 if series else 6.6, 3.9)
    ax = figure.add_subplot()
    style_axes(ax, ink, "")
    ax.set_xscale("log")
    ax.fill_between(bits, bound, color=ink.fill, linewidth=0)
    ax.plot(bits, bound, color=ink.muted, linewidth=1.6)
    top = min(max([float(bound[0]), *(p.fvu for p in points)]) * 1.08, 1.1)
    top = min(top, max([0.3, *(p.fvu * 1.35 for p in points)]))
    ax.set_ylim(0, top)
    ax.set_xlim(low, high)
    # Few bits and little error: the corner where no code is.
    ax.text(
        0.015, 0.03, "below the line: out of reach\nfor Gaussian hidden states",
        transform=ax.transAxes, va="bottom", color=ink.muted, fontsize=8.5,
    )  # fmt: skip
    alone = [p for p in points if p.highlight or p.series is None]
    for point in sorted(alone, key=lambda p: p.highlight):
        ax.scatter(
            point.bits, point.fvu, s=70 if point.highlight else 34, zorder=4 + point.highlight,
            color=ink.second if point.highlight else ink.main,
            edgecolor=ink.surface, linewidth=1.2,
        )  # fmt: skip
    for (name, members), (colour, marker) in zip(
        series.items(), itertools.cycle(zip(ink.series, _MARKERS, strict=True)), strict=False
    ):
        members = sorted(members, key=lambda p: p.bits)
        ax.plot(
            [p.bits for p in members], [p.fvu for p in members], label=name, zorder=3,
            color=colour, marker=marker, markersize=6.5, linewidth=1.1,
            markeredgecolor=ink.surface, markeredgewidth=0.8,
        )  # fmt: skip
    _label_points(ax, ink, alone, points, bits, bound)
    if series:
        ax.legend(
            loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8.5,
            labelcolor=ink.text,
        )  # fmt: skip
    ticks = [m * 10.0**e for e in range(6) for m in (1, 2, 5)]
    ax.set_xticks([t for t in ticks if low <= t <= high])
    ax.xaxis.set_major_formatter(lambda value, _position: f"{value:,.0f}")
    ax.set_xlabel("bits per row")
    ax.set_ylabel("FVU, fraction of variance unexplained")
    return as_png(figure)


def save_png(path: str | Path, png: bytes) -> Path:
    """Write a figure, whole or not at all; the folder is made where it is missing."""
    with replacing(path) as temporary:
        temporary.write_bytes(png)
    return Path(path)


def _label_points(
    ax: Axes,
    ink: Ink,
    labelled: Sequence[Point],
    points: Sequence[Point],
    bits: np.ndarray,
    bound: np.ndarray,
) -> None:
    """Name points beside them, moved up or down until a name covers no point, name or curve."""
    low, high = ax.get_xlim()
    bottom, top = ax.get_ylim()
    taken: list[tuple[float, float, float, float]] = []

    def place(at_bits: float, at_fvu: float) -> tuple[float, float]:
        x = math.log(at_bits / low) / math.log(high / low)
        return x, (at_fvu - bottom) / (top - bottom)

    line = 0.052  # height of a line of text, as a share of the axes
    for point in points:
        x, y = place(point.bits, point.fvu)
        taken.append((x - 0.012, x + 0.012, y - line / 3, y + line / 3))
    for at_bits, at_fvu in zip(bits.tolist(), bound.tolist(), strict=True):
        x, y = place(at_bits, at_fvu)
        taken.append((x - 0.004, x + 0.004, y - 0.008, y + 0.008))
    for point in sorted(labelled, key=lambda p: (not p.highlight, p.fvu)):
        x, y = place(point.bits, point.fvu)
        width = 0.0148 * len(point.name) + 0.01
        best = None
        for step in (0, 1, -1, 2, -2, 3, -3, 4, 5, 6):
            for right in (True, False):
                left_edge = x + 0.018 if right else x - 0.018 - width
                box = (left_edge, left_edge + width, y + (step - 0.5) * line,
                       y + (step + 0.5) * line)  # fmt: skip
                inside = box[0] > 0 and box[1] < 1 and box[2] > 0 and box[3] < 1
                clear = all(
                    box[1] < b[0] or box[0] > b[1] or box[3] <= b[2] or box[2] >= b[3]
                    for b in taken
                )
                if inside and clear:
                    best = box
                    break
            if best is not None:
                break
        if best is None:
            best = (x + 0.018, x + 0.018 + width, y - line / 2, y + line / 2)
        taken.append(best)
        ax.text(
            best[0], (best[2] + best[3]) / 2, point.name, transform=ax.transAxes, va="center",
            fontsize=8.5, color=ink.second if point.highlight else ink.text,
            fontweight="bold" if point.highlight else "normal",
        )  # fmt: skip


def _running_mean(y: np.ndarray, window: int) -> np.ndarray:
    """Centred mean; at either end over the part of the window that exists."""
    kernel = np.ones(window)
    return np.convolve(y, kernel, "same") / np.convolve(np.ones_like(y), kernel, "same")


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _share(value: float) -> str:
    return f"{100 * value:.4g} %"
