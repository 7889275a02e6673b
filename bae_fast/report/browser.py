"""One self-contained HTML file to look at features: list, search, sort, one feature in full.

    head    strings, and what the list and the map need of every feature; read first
    part i  what is shown of 256 features, strings by number; read when asked for, then in idle time

Both are JSON, deflated, in base64. The page's own policy forbids every request and every script
but its own (with a live prompt it may ask the server that it came from); texts are put in as text
nodes only, so a token may be ``<script>``. It opens from
``file://`` in browsers since 2023 (DecompressionStream).
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from bae_fast.analysis.text import visible_text
from bae_fast.files import write_text
from bae_fast.interpret.records import FeatureRecord, Partner
from bae_fast.report.browser_live import LIVE_MARKUP, LIVE_SCRIPT, LIVE_STYLE
from bae_fast.report.browser_map import MAP_SCRIPT, MAP_STYLE
from bae_fast.report.browser_page import SCRIPT_END, SCRIPT_START, STYLE

_PART = 256  # features of one part


def write_browser(path: str | Path, records: Iterable[FeatureRecord], **options: Any) -> Path:
    """Write the page, whole or not at all; see :func:`browser_page`."""
    return write_text(path, browser_page(records, **options))


def browser_page(
    records: Iterable[FeatureRecord],
    *,
    title: str,
    subtitle: str = "",
    notes: Sequence[str] = (),
    histogram_label: str = "pre-activation",
    lens_label: str = "cosine of the decoder direction and the token's unembedding",
    neighbour_label: str = "phi coefficient of firing together",
    map_label: str = "",
    models: tuple[str, str] = ("", ""),
    live: Mapping[str, Any] | None = None,
) -> str:
    """The page as HTML.

    Args:
        records: features in any order; taken one at a time.
        title: heading.
        subtitle: a line under it.
        notes: paragraphs about the data, under the list of keys.
        histogram_label, lens_label, neighbour_label, map_label: what these numbers are.
        models: names of the two models where features are shown beside their partners of another.
        live: what the live prompt needs, see :func:`bae_fast.report.live.live_facts`; the page
            then calls the server that it came from. None: it calls nobody.

    Raises:
        ValueError: no record, a feature number twice, or a record that is not consistent; named.
    """
    data = _Data()
    for record in records:
        data.add(record)
    head, parts = data.finish(
        {
            "histogram": histogram_label,
            "lens": lens_label,
            "neighbours": neighbour_label,
            "map": map_label,
            "models": list(models),
        },
        None if live is None else dict(live),
    )
    blocks = [_block("head", head)] + [_block(f"part{i}", part) for i, part in enumerate(parts)]
    about = "".join(f"<p class=note>{escape(note)}</p>" for note in notes)
    script = SCRIPT_START + MAP_SCRIPT + LIVE_SCRIPT + SCRIPT_END
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return _PAGE.format(
        title=escape(title),
        subtitle=f"<p class=subtitle>{escape(subtitle)}</p>" if subtitle else "",
        policy=f"script-src 'sha256-{digest}'" + ("" if live is None else "; connect-src 'self'"),
        style=STYLE + MAP_STYLE + LIVE_STYLE,
        notes=about,
        prompt="" if live is None else LIVE_MARKUP,
        data="\n".join(blocks),
        script=script,
    )


class _Data:
    """Columns for the list, parts for the details, one table of strings for both."""

    def __init__(self) -> None:
        self.strings: dict[str, int] = {}
        self.visible: list[str] = []
        self.columns: dict[str, list[Any]] = {
            name: [] for name in ("feature", "density", "burstiness", "phrase", "label")
        }
        self.scores: dict[str, list[float | None]] = {}
        self.places: list[tuple[float, float] | None] = []
        self.seen: set[int] = set()
        self.part: list[Any] = []
        self.parts: list[str] = []

    def string(self, text: str) -> int:
        """Number of a text in the table, which holds it as it is shown."""
        found = self.strings.setdefault(text, len(self.strings))
        if found == len(self.visible):
            self.visible.append(visible_text(text))
        return found

    def add(self, r: FeatureRecord) -> None:
        where = f"feature {r.feature}"
        if r.feature in self.seen:
            raise ValueError(f"records must hold every feature once; got {where} twice")
        if not 0 <= r.density <= 1:
            raise ValueError(f"{where}: density must lie in [0, 1]; got {r.density!r}")
        self.seen.add(r.feature)
        shown, burstiness, phrase = self.shown(r, where)
        self.part.append([*shown, None if r.partner is None else self.beside(r.partner, where)])
        if len(self.part) == _PART:
            self._close()
        label = shown[0][:12:4] or shown[1][:6:2]  # numbers of strings
        row = (int(r.feature), _number(r.density, where), burstiness, phrase, label)
        for column, value in zip(self.columns.values(), row, strict=True):
            column.append(value)
        n = len(self.columns["feature"])
        for name in {*self.scores, *r.scores}:
            column = self.scores.setdefault(name, [None] * (n - 1))
            value = r.scores.get(name)
            column.append(None if value is None else _number(value, where))
        self.places.append(
            None if r.place is None else (_number(r.place[0], where), _number(r.place[1], where))
        )

    def beside(self, partner: Partner, where: str) -> list[Any]:
        """A feature of another model, and what it is to the one beside it."""
        r = partner.record
        there = f"{where}, partner {r.feature}"
        shown, burstiness, phrase = self.shown(r, there)
        cosine = None if partner.cosine is None else _number(partner.cosine, there)
        relation = [_number(partner.agreement, there), partner.kind, int(partner.back), cosine]
        return [int(r.feature), _number(r.density, there), burstiness, phrase, shown, relation]

    def shown(self, r: FeatureRecord, where: str) -> tuple[list[Any], float | None, str]:
        """What is shown of a feature alone, its burstiness and its name."""
        tokens: list[float] = []
        for t in r.tokens:
            tokens += [self.string(t.text), _number(t.lift, where), t.n_on, t.n_total]
        lens: list[float] = []
        for text, score in r.lens:
            lens += [self.string(text), _number(score, where)]
        near: list[float] = []
        for other, score in r.neighbours:
            near += [int(other), _number(score, where)]
        bins: list[float] = []
        if r.histogram is not None:
            h = r.histogram
            if not h.low < h.high or not h.counts or min(h.counts) < 0:
                raise ValueError(f"{where}: histogram needs low < high and counts >= 0; got {h}")
            bins = [_number(h.low, where), _number(h.high, where), *map(int, h.counts)]
        contexts = []
        for c in r.contexts:
            if not all(0 <= i < len(c.pieces) for i in (c.at, *c.on)):
                raise ValueError(
                    f"{where}: at={c.at} and on={c.on} must be below {len(c.pieces)} pieces"
                )
            margin = None if c.score is None else _number(c.score, where)
            pieces = [self.string(text) for text in c.pieces]
            contexts.append([c.at, c.row, margin, list(c.on), pieces])
        burstiness = None if r.burstiness is None else _number(r.burstiness, where)
        phrase = "" if r.phrase is None else visible_text(r.phrase)
        return [tokens, lens, near, bins, contexts], burstiness, phrase

    def _close(self) -> None:
        self.parts.append(_packed(self.part))
        self.part = []

    def finish(self, labels: dict[str, Any], live: dict[str, Any] | None) -> tuple[str, list[str]]:
        if not self.seen:
            raise ValueError("records must not be empty")
        if self.part:
            self._close()
        head = {
            **self.columns, "scores": dict(sorted(self.scores.items())), "labels": labels,
            "strings": self.visible, "part": _PART, "live": live,
            "places": self.places if any(self.places) else None,
        }  # fmt: skip
        return _packed(head), self.parts


def _number(value: float, where: str) -> float:
    """Five digits of a finite number."""
    value = float(value)
    if not math.isfinite(value):
        raise ValueError(f"{where}: numbers must be finite; got {value!r}")
    return float(f"{value:.5g}")


def _packed(value: Any) -> str:
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(zlib.compress(text.encode("ascii"), 6)).decode("ascii")


def _block(name: str, packed: str) -> str:
    return f'<script type="text/plain" id="{name}">{packed}</script>'


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; {policy}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<div class=heading><h1>{title}</h1>{subtitle}</div>
<form id=controls role=search>
<input id=query type=search placeholder="Search text, or #number" aria-label="Search"
 autocomplete=off spellcheck=false>
<select id=scope aria-label="Where to search">
<option value=all>everywhere</option><option value=phrase>names</option>
<option value=tokens>tokens</option><option value=contexts>contexts</option>
</select>
<select id=sort aria-label="Sort by"></select>
<button id=direction type=button aria-label="Direction of the order"></button>
<output id=count></output>
</form>
</header>
<main>
<div id=list role=listbox tabindex=0 aria-label="Features"><div id=spacer></div></div>
<div id=detail tabindex=0 role=region aria-label="Chosen feature">
<button id=back type=button>&larr; List</button>
{prompt}<details id=map hidden><summary>Map</summary>
<div class=tools><label>Colour by <select id=hue></select></label>
<span id=legend></span></div>
<canvas id=plane tabindex=0 role=application aria-label="Map of the features"
 aria-describedby="under mapnote"></canvas>
<p id=under class=note role=status></p>
<p id=mapnote class=note><span id=maplabel></span> Arrow keys go to the nearest feature on that
side, <kbd>+</kbd> <kbd>-</kbd> and the wheel change the scale, <kbd>0</kbd> shows all.</p>
</details>
<div id=feature></div>
<details id=help><summary>Keys and notes</summary>
<p class=note><kbd>/</kbd> search <kbd>j</kbd> <kbd>k</kbd> or arrows next, previous
<kbd>PgDn</kbd> <kbd>PgUp</kbd> <kbd>Home</kbd> <kbd>End</kbd> in the list
<kbd>Enter</kbd> open, where arrows scroll <kbd>s</kbd> next order <kbd>r</kbd> reverse it
<kbd>Esc</kbd> clear, back. The address holds the state and can be kept.</p>{notes}</details>
</div>
</main>
<noscript><p>This page needs scripts: all of them are in this file.</p></noscript>
{data}
<script>{script}</script>
</body>
</html>
"""
