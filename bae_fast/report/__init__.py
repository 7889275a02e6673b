"""Figures and a self-contained HTML page of a training run."""

from __future__ import annotations

from bae_fast.report.page import Figure, Metric, write_page, write_report
from bae_fast.report.plots import (
    Point,
    plot_density,
    plot_fvu_bits,
    plot_training,
)

__all__ = [
    "Figure",
    "Metric",
    "Point",
    "plot_density",
    "plot_fvu_bits",
    "plot_training",
    "write_page",
    "write_report",
]
