"""What each ingredient of the sparse recipe is worth: one left out or set back at a time.

The setting of :mod:`bench.recipe`, 2,000 steps. J = mse-like FVU + a_e bits is what training
minimises (rows are normalised, so FVU and mse differ by a constant near one); it ranks runs that
end at different bits. One seed: differences below 0.001 in J are within the spread over seeds.
"""

from __future__ import annotations

from typing import Any

from bae_fast.training import PRESETS
from bench import tables
from bench.recipe import rows, train_bae

STEPS = 2000
CHANGES: dict[str, dict[str, Any]] = {
    "the recipe": {},
    "slopes instead of exact differences": {"multilinear": False},
    "random directions at the start": {"init": "density"},
    "Adam betas 0.9, 0.999": {"betas": (0.9, 0.999)},
    "no revival": {"revive_every": 0},
    "one learning rate": {"decoder_lr_scale": 1.0},
    "entropy of the batch alone": {"bank_batches": 0},
    "no refit": {"refit": False},
}


def run() -> dict[str, Any]:
    """Every change, seed 0."""
    train, heldout = rows()["last rows"]
    results = []
    for name, changes in CHANGES.items():
        found = train_bae("sparse", STEPS, 0, train, heldout, **changes) | {"change": name}
        results.append(found)
        print(found, flush=True)
    return {"rows": results}


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    weight = PRESETS["sparse"].entropy_weight

    def objective(row: dict[str, Any]) -> float:
        return row["fvu"] + weight * row["bits"]

    base = objective(result["rows"][0])
    text = tables.markdown(
        ["change", "FVU", "bits a row", "dead", "FVU + a_e bits"],
        [
            [
                row["change"],
                f"{row['fvu']:.4f}",
                f"{row['bits']:.0f}",
                f"{row['dead_share']:.1%}",
                f"{objective(row):.4f} ({objective(row) - base:+.4f})",
            ]
            for row in result["rows"]
        ],
    )
    return f"{text}\n\nOne change at a time, seed 0, {STEPS:,} steps, last rows held out."
