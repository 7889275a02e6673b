"""One self-contained HTML page about a training run: no request leaves it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from bae_fast.analysis.features import (
    ContextExample,
    FeatureSummary,
    TokenLift,
)
from bae_fast.analysis.text import format_lift, visible_text, visible_token
from bae_fast.files import write_text
from bae_fast.report.plots import Point, plot_density, plot_fvu_bits, plot_training, save_png


class Metric(NamedTuple):
    """A row of the table: a name, a value as it is to be read, and what it means."""

    name: str
    value: str
    note: str = ""


class Figure(NamedTuple):
    """A figure of the page: PNG contents for a light page and, if any, for a dark one."""

    title: str
    caption: str
    png: bytes
    dark_png: bytes | None = None


def write_report(
    folder: str | Path,
    *,
    title: str,
    subtitle: str = "",
    metrics: Sequence[Metric],
    log: Sequence[Mapping[str, Any]],
    density: Tensor,
    eigenvalues: Tensor,
    points: Sequence[Point],
    features: Sequence[FeatureSummary] = (),
    notes: Sequence[str] = (),
) -> dict[str, Path]:
    """Draw the three figures and write them as PNG files and in one HTML page.

    Args:
        folder: where to write; made where it is missing.
        title: the page's heading.
        subtitle: a line under it.
        metrics: rows of the table of results.
        log: rows of the training log, see `plot_training`; without any curve the figure is left
            out.
        density: [F], the share of rows each feature is on in.
        eigenvalues: [d], of the rows' covariance, for the Gaussian bound.
        points: codes to show beside the bound.
        features: features to show in context.
        notes: paragraphs under the table.

    Returns:
        The files written: `page`, `density`, `fvu_bits`, and `training` where there is a log.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: see the plots.
    """
    folder = Path(folder)
    figures = {
        "fvu_bits": Figure(
            "FVU against bits",
            "Each point is a code: the share of variance it leaves unexplained, and the entropy "
            "of its bits. The line is what no code can pass if the hidden states were Gaussian; "
            "they are not, so a good code may lie below it.",
            plot_fvu_bits(eigenvalues, points),
            plot_fvu_bits(eigenvalues, points, dark=True),
        ),
        "density": Figure(
            "Density of features",
            "How many features are on in which share of the rows.",
            plot_density(density),
            plot_density(density, dark=True),
        ),
    }
    files = {"page": folder / "report.html"}
    if log:
        figures["training"] = Figure(
            "Training",
            "Per batch (faint) and as a running mean. The entropy is that of the rows counted, the "
            "batch and a bank of past ones; the table's is of the held-out rows.",
            plot_training(log),
            plot_training(log, dark=True),
        )
    names = {
        "fvu_bits": "fvu_bits.png",
        "density": "density_histogram.png",
        "training": "training_curves.png",
    }
    for key, figure in figures.items():
        files[key] = save_png(folder / names[key], figure.png)
    write_page(
        files["page"],
        title=title,
        subtitle=subtitle,
        metrics=metrics,
        figures=list(figures.values()),
        features=features,
        notes=notes,
    )
    return files


def write_page(
    path: str | Path,
    *,
    title: str,
    subtitle: str = "",
    metrics: Sequence[Metric] = (),
    figures: Sequence[Figure] = (),
    features: Sequence[FeatureSummary] = (),
    notes: Sequence[str] = (),
) -> Path:
    """Write the page, whole or not at all.

    Every text is escaped. Images are data URIs and the styles are inline; the page's own policy
    forbids every other source, scripts included.

    Args:
        path: the file to write.
        title: heading.
        subtitle: a line under it.
        metrics: rows of the table of results.
        figures: figures in the order shown.
        features: features in the order shown, the firing token marked in each context.
        notes: paragraphs under the table.
    """
    body = [f"<header><h1>{escape(title)}</h1>"]
    if subtitle:
        body.append(f"<p class=subtitle>{escape(subtitle)}</p>")
    body.append("</header>")
    if metrics:
        rows = "".join(
            f"<tr><th scope=row>{escape(m.name)}</th><td class=value>{escape(m.value)}</td>"
            f"<td class=note>{escape(m.note)}</td></tr>"
            for m in metrics
        )
        body.append(f"<section><h2>Results</h2><table><tbody>{rows}</tbody></table>")
        body += [f"<p class=note>{escape(note)}</p>" for note in notes]
        body.append("</section>")
    body += [_figure_html(figure) for figure in figures]
    if features:
        body.append(
            "<section><h2>Features in context</h2><p class=note>Chosen evenly over the range of "
            "densities, rarest first, not by hand. A token is listed with its lift (how much more "
            "often the feature is on there than elsewhere) and how many of its occurrences the "
            "feature is on in. The marked token is the one on which the feature is on.</p>"
        )
        body += [_feature_html(feature) for feature in features]
        body.append("</section>")
    return write_text(path, _PAGE.format(title=escape(title), style=STYLE, body="\n".join(body)))


def _figure_html(figure: Figure) -> str:
    image = f'<img src="{_data_uri(figure.png)}" alt="{escape(figure.title, quote=True)}">'
    if figure.dark_png is not None:
        image = (
            '<picture><source media="(prefers-color-scheme: dark)" '
            f'srcset="{_data_uri(figure.dark_png)}">{image}</picture>'
        )
    return (
        f"<section><h2>{escape(figure.title)}</h2><figure><div>{image}</div>"
        f"<figcaption>{escape(figure.caption)}</figcaption></figure></section>"
    )


def _feature_html(feature: FeatureSummary) -> str:
    tokens = "".join(map(_token_html, feature.tokens))
    contexts = "".join(map(_context_html, feature.contexts))
    return (
        f"<article><h3>Feature {feature.feature}"
        f"<span>on in {100 * feature.density:.3g} % of rows "
        f"({feature.n_on:,} of {feature.n_rows:,})</span></h3>"
        f"<ul class=tokens>{tokens}</ul><ul class=contexts>{contexts}</ul></article>"
    )


def _token_html(token: TokenLift) -> str:
    return (
        f"<li><code>{escape(visible_token(token.text))}</code> "
        f"&times;{format_lift(token.lift)} <small>{token.n_on:,}/{token.n_total:,}</small></li>"
    )


def _context_html(context: ContextExample) -> str:
    return (
        f"<li>{escape(visible_text(context.before).lstrip(' '))}"
        f"<mark>{escape(visible_token(context.token))}</mark>"
        f"{escape(visible_text(context.after))}</li>"
    )


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


STYLE = """
:root {
  color-scheme: light dark;
  --page: #f5f6f8; --surface: #ffffff; --text: #1d2330; --muted: #5a6478; --line: #e4e7ec;
  --mark: #ffe08a; --mark-text: #1d2330; --chip: #eef1f6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0e1117; --surface: #171b23; --text: #e6e9ef; --muted: #98a2b3; --line: #2c3340;
    --mark: #8a5a12; --mark-text: #fff3d6; --chip: #212733;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 58rem;
  background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0.5rem 0 0.25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 0.75rem; }
h3 { font-size: 1rem; margin: 0 0 0.5rem; }
h3 span { margin-left: 0.6em; font-weight: 400; font-size: 0.875rem; color: var(--muted); }
.subtitle { margin: 0 0 1.5rem; color: var(--muted); overflow-wrap: anywhere; }
section {
  margin: 0 0 1rem; padding: 1.1rem 1.25rem;
  background: var(--surface); border: 1px solid var(--line); border-radius: 0.6rem;
}
table { width: 100%; border-collapse: collapse; }
th, td {
  padding: 0.4rem 0.9rem 0.4rem 0; border-top: 1px solid var(--line);
  text-align: left; vertical-align: baseline;
}
tr:first-child > * { border-top: 0; }
th { font-weight: 500; }
.value { font-weight: 650; font-variant-numeric: tabular-nums; white-space: nowrap; }
.note { color: var(--muted); font-size: 0.875rem; }
figure { margin: 0; }
figure div { overflow-x: auto; }
img { display: block; width: 100%; height: auto; }
figcaption { margin-top: 0.6rem; color: var(--muted); font-size: 0.875rem; }
article { padding: 1rem 0; border-top: 1px solid var(--line); }
ul { margin: 0; padding: 0; list-style: none; }
.tokens { display: flex; flex-wrap: wrap; gap: 0.35rem; margin-bottom: 0.6rem; }
.tokens li {
  padding: 0.1rem 0.5rem; border-radius: 0.4rem; background: var(--chip); font-size: 0.8125rem;
}
.tokens small { color: var(--muted); }
code, .contexts { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono",
  monospace; }
.contexts { font-size: 0.8125rem; color: var(--muted); }
.contexts li { padding: 0.15rem 0; overflow-wrap: anywhere; white-space: pre-wrap; }
mark {
  padding: 0.05em 0.15em; border-radius: 0.2em;
  background: var(--mark); color: var(--mark-text); font-weight: 600;
}
@media (max-width: 34rem) {
  body { padding: 0.5rem 0.5rem 3rem; }
  section { padding: 0.9rem; }
  tr { display: grid; grid-template-columns: 1fr auto; border-top: 1px solid var(--line); }
  tr:first-child { border-top: 0; }
  th, td { border: 0; }
  td.note { grid-column: 1 / -1; padding-top: 0; }
  td.value { padding-right: 0; }
  h3 span { display: block; margin: 0; }
  img { min-width: 27rem; }
}
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
