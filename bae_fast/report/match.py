"""The table of ``match``."""

from __future__ import annotations

import math

from bae_fast.causal.matching import CLASSES, Matching
from bae_fast.report import tables


def table(found: Matching, control: Matching, names: tuple[str, str]) -> str:
    """Markdown: shares of the classes, in brackets those of the control."""
    measured, chance = found.summary(), control.summary()
    rows = []
    for side, name in zip("ab", names, strict=True):
        one, other = measured[side], chance[side]
        cells = [
            f"{one[kind] / one['features']:.1%} ({other[kind] / one['features']:.1%})"
            for kind in CLASSES
        ]
        scores = [math.nan if s["mean_score"] is None else s["mean_score"] for s in (one, other)]
        rows.append([name, str(one["features"]), *cells, f"{scores[0]:.3f} ({scores[1]:.3f})"])
    lines = tables.table(["code", "features", *CLASSES, "mean best score"], rows)
    lines += [
        "",
        f"Best partner by {found.score}, threshold {found.threshold:g}, {found.n_rows} rows, rare "
        f"below {found.min_count}; in brackets the same with one code's rows shuffled.",
    ]
    return "\n".join(lines) + "\n"
