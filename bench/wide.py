"""What the start's share of ones does in wide dictionaries: as in narrow ones, or falling as 1 / F.

The demo's rows on their first 64 principal axes, so that F = 256 d fits beside them: 200 steps of
the preset without the refit, held-out rows as in :mod:`bench.recipe`. ``constant`` keeps the
preset's density of 0.02 for every F, ``1 / F`` is the rule of
:meth:`bae_fast.training.TrainingConfig.for_sizes`, which begins at F = 16 d. One seed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from bae_fast import BinaryAutoencoder
from bae_fast.analysis.evaluation import evaluate
from bae_fast.training import PRESETS, Trainer
from bench import tables
from bench.recipe import rows

WIDTH = 64
STEPS = 200
EXPANSIONS = (16, 64, 256)
RULES: dict[str, dict[str, Any]] = {"1 / F": {}, "constant": {"wide_from": 0.0}}


def principal(train: Tensor, heldout: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Both on the principal axes of the first, ``[n, width]``."""
    mean = train.double().mean(0)
    centred = train.double() - mean
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -width:]
    return (centred @ axes).float(), ((heldout.double() - mean) @ axes).float()


def train_one(
    expansion: int, rule: str, train: Tensor, heldout: Tensor, steps: int
) -> dict[str, Any]:
    """Train and evaluate one module."""
    torch.manual_seed(0)
    d = train.shape[1]
    bae = BinaryAutoencoder(d, expansion * d).fit_normalization_(train)
    config = dataclasses.replace(PRESETS["sparse"], steps=steps, refit=False, **RULES[rule])
    trainer = Trainer(bae, train, config)
    density = float(bae.encode(train[:4096]).density().mean())
    trainer.fit()
    return {
        "f": expansion * d,
        "expansion": expansion,
        "rule": rule,
        "first_ones": density * expansion * d,
        **evaluate(bae, heldout).summary(),
    }


def run() -> dict[str, Any]:
    """Every width by every rule; one run where they agree."""
    splits = principal(*rows()["last rows"], WIDTH)
    results = []
    for expansion in EXPANSIONS:
        for rule in RULES if expansion > EXPANSIONS[0] else list(RULES)[:1]:
            results.append(train_one(expansion, rule, *splits, STEPS))
            print(results[-1], flush=True)
    return {"rows": results}


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    weight = PRESETS["sparse"].entropy_weight
    text = tables.markdown(
        ["F", "density at the start", "ones a row at the start", "FVU", "bits a row", "ones a row",
         "dead", "FVU + a_e bits"],
        [
            [
                f"{row['f']:,} = {row['expansion']} d",
                row["rule"] if row["expansion"] > EXPANSIONS[0] else "0.02",
                f"{row['first_ones']:.0f}",
                f"{row['fvu']:.3f}",
                f"{row['bits']:.0f}",
                f"{row['l0']:.0f}",
                f"{row['dead_share']:.1%}",
                f"{row['fvu'] + weight * row['bits']:.4f}",
            ]
            for row in result["rows"]
        ],
    )  # fmt: skip
    return (
        f"{text}\n\nd = {WIDTH}, seed 0, {STEPS:,} steps of {PRESETS['sparse'].batch_size} rows. "
        f"{tables.machine(result)}"
    )
