"""Panels of curves with the range over seeds, as one PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from bae_fast.report.style import as_png, ink_of, new_figure, plain_log_axis, style_axes

# told apart by hue and by marker, on light and on dark
_HUES = ("#1f5fbf", "#c2570c", "#2e8b57", "#8e44ad", "#b8860b", "#c0395b", "#4a90a4", "#667085")
_MARKERS = "osD^vPX*"


class Series(NamedTuple):
    """One curve.

    Attributes:
        name: the name in the legend.
        x: places.
        y: (mean, least, largest) at each of them; NaN leaves a place out.
        dashed: a reference, drawn without markers.
    """

    name: str
    x: Sequence[float]
    y: Sequence[tuple[float, float, float]]
    dashed: bool = False


class Panel(NamedTuple):
    """One pair of axes.

    Attributes:
        title, x_label, y_label: their texts.
        series: curves; those of the same name have the same colour in all panels.
        logarithmic: both axes.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    logarithmic: bool = False


def plot_panels(panels: Sequence[Panel], *, dark: bool = False) -> bytes:
    """Draw panels in rows of up to three, one legend for all.

    Returns:
        A PNG file's contents.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no panel with a curve.
    """
    panels = [panel for panel in panels if panel.series]
    if not panels:
        raise ValueError("panels must hold at least one curve; got none")
    ink = ink_of(dark)
    n_columns = min(len(panels), 3)
    n_rows = -(-len(panels) // n_columns)
    figure = new_figure(ink, 3.6 * n_columns + 0.6, 2.9 * n_rows + 0.7)
    names = list(dict.fromkeys(s.name for panel in panels for s in panel.series if not s.dashed))
    references = [s.name for panel in panels for s in panel.series if s.dashed]
    handles: dict[str, Any] = {}
    for i, panel in enumerate(panels):
        ax = figure.add_subplot(n_rows, n_columns, i + 1)
        style_axes(ax, ink, panel.title)
        for series in panel.series:
            points = [
                (x, *y) for x, y in zip(series.x, series.y, strict=True) if math.isfinite(y[0])
            ]
            if not points:
                continue
            x, mean, low, high = (list(values) for values in zip(*points, strict=True))
            if series.dashed:
                gap = (0, (4, 3)) if series.name == references[0] else (0, (1, 2))
                (line,) = ax.plot(x, mean, color=ink.muted, linewidth=1.1, linestyle=gap)
            else:
                at = names.index(series.name) % len(_HUES)
                (line,) = ax.plot(
                    x, mean, color=_HUES[at], linewidth=1.6, marker=_MARKERS[at], markersize=4.5
                )
                ax.fill_between(x, low, high, color=_HUES[at], alpha=0.16, linewidth=0)
            handles.setdefault(series.name, line)
        if panel.logarithmic:
            ax.set_xscale("log")
            ax.set_yscale("log")
            plain_log_axis(ax.xaxis, ink)
            plain_log_axis(ax.yaxis, ink)
        ax.set_xlabel(panel.x_label)
        ax.set_ylabel(panel.y_label)
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", frameon=False,
        ncols=min(len(handles), 4), fontsize=8, labelcolor=ink.text,
    )  # fmt: skip
    return as_png(figure)
