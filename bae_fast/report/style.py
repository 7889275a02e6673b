"""How figures look: colours on light and on dark, axes, and the PNG of a figure."""

from __future__ import annotations

import importlib.util
import io
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 160


class Ink(NamedTuple):
    """Colours of one scheme: the page's surfaces, and marks that stand out on them."""

    surface: str
    text: str
    muted: str
    grid: str
    main: str
    second: str
    fill: str
    series: tuple[str, ...]


# Colours of many series, after Okabe and Ito: apart for readers who cannot tell red from green.
_SERIES = (
    "#0072b2", "#009e73", "#56b4e9", "#cc79a7", "#8a6d00", "#5b5fc7", "#6b7280", "#a0522d",
)  # fmt: skip

_LIGHT = Ink("#ffffff", "#1d2330", "#667085", "#e4e7ec", "#1f5fbf", "#c2570c", "#eef1f6", _SERIES)
_DARK = Ink("#171b23", "#e6e9ef", "#98a2b3", "#2c3340", "#7db0ff", "#f5a35c", "#212733", _SERIES)


def ink_of(dark: bool) -> Ink:
    """The colours of a page on a dark or a light ground."""
    return _DARK if dark else _LIGHT


_NEEDS = "figures need matplotlib: pip install 'bae-fast[report]'"


def check_figures() -> None:
    """Find out, before anything slow has run, whether figures can be drawn at its end.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(_NEEDS)


def new_figure(ink: Ink, width: float, height: float) -> Any:
    """An empty figure of a width and height in inches, drawn without a display.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError(_NEEDS) from error
    figure = Figure(
        figsize=(width, height),
        dpi=DPI,
        facecolor=ink.surface,
        layout=ConstrainedLayoutEngine(h_pad=0.09, w_pad=0.06),
    )
    FigureCanvasAgg(figure)
    return figure


def style_axes(ax: Axes, ink: Ink, title: str) -> None:
    """Give axes a title, the page's colours and a faint horizontal grid."""
    ax.set_facecolor(ink.surface)
    ax.set_title(title, loc="left", fontsize=9.5, color=ink.text)
    ax.tick_params(which="both", colors=ink.muted, labelsize=8.5, length=0)
    ax.xaxis.label.set(color=ink.muted, fontsize=9)
    ax.yaxis.label.set(color=ink.muted, fontsize=9)
    ax.grid(True, axis="y", color=ink.grid, linewidth=0.8)
    ax.set_axisbelow(True)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(ink.grid)


def plain_log_axis(axis: Any, ink: Ink) -> None:
    """Ticks at 1, 2 and 5 of every decade, written as plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _position: f"{value:.3g}")
    axis.set_tick_params(colors=ink.muted)


def as_png(figure: Any) -> bytes:
    """The figure as a PNG file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=figure.get_facecolor())
    return buffer.getvalue()
