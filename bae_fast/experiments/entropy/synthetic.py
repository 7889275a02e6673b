"""Sets of known entropy: the estimate against the truth."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any, Literal

from bae_fast.entropy.fit import run_synthetic
from bae_fast.entropy.synthetic import KINDS, SyntheticSpec
from bae_fast.experiments import runs
from bae_fast.experiments.entropy.common import finish
from bae_fast.progress import Stages


@dataclasses.dataclass(frozen=True)
class Config:
    """Estimate the entropy of sets of known entropy.

    Attributes:
        kinds: The kinds of sets.
        r: The numbers of bits.
        d: The widths of a row.
        expansion: The number of features over the dimensions that the rows span.
        start: How the features start.
        steps: The number of optimizer steps. Without it that is the start's own.
        rows: The number of rows that are trained on.
        heldout: The number of rows that are measured.
        p: The share of ones of sparse bits.
        group: The number of bits that depend on each other.
        flip: The share of copies that are flipped.
        noise: The variance of the noise over the signal's.
        bound: The held-out cross-entropy of an autoregressive model of the code stands beside the
            other estimates.
        seeds: The seeds; every set is drawn and fitted with each.
        progress: Progress is shown, as a bar on a terminal and as lines elsewhere.
        out: The folder of the results.
        report_only: The table and the plot are made from the results in the folder, and nothing
            is run.
    """

    kinds: tuple[str, ...] = tuple(KINDS)
    r: tuple[int, ...] = (16, 32, 64, 96, 128, 192, 256)
    d: tuple[int, ...] = (64, 256, 1024)
    expansion: int = 2
    start: Literal["components", "random"] = "components"
    steps: int | None = None
    rows: int = 65536
    heldout: int = 8192
    p: float = 0.1
    group: int = 4
    flip: float = 0.05
    noise: float = 0.01
    bound: bool = False
    seeds: tuple[int, ...] = (0, 1, 2)
    progress: bool = True
    out: Path = Path("results/entropy/synthetic")
    report_only: bool = False


def run(config: Config) -> runs.Result:
    """Fit every set that is not done yet and write the table.

    Raises:
        ValueError, OSError: naming the field or the file.
    """
    from bae_fast.report import entropy as report

    runs.check_at_least(config, 0, "seeds")
    runs.check_one_of("kinds", config.kinds, KINDS)
    return finish(
        config,
        "synthetic",
        lambda: _runs(config),
        report.synthetic_rows,
        report.synthetic_panels,
        report.synthetic_table,
    )


def settings_of(config: Config, spec: SyntheticSpec, seed: int) -> dict[str, Any]:
    """All that a run's result depends on; kept runs are known by it."""
    return {**dataclasses.asdict(spec), **_options(config, seed)}


def _options(config: Config, seed: int) -> dict[str, Any]:
    return {
        "expansion": config.expansion,
        "seed": seed,
        "n_train": config.rows,
        "n_heldout": config.heldout,
        "start": config.start,
        "steps": config.steps,
        # runs that were made without it keep their name
        **({"bound": True} if config.bound else {}),
    }


def _runs(config: Config) -> list[dict[str, Any]]:
    found = []
    with Stages(config.progress).stage("fit and measure"):
        for kind, d, r in itertools.product(config.kinds, config.d, config.r):
            spec = SyntheticSpec(
                kind, r, d, p=config.p, group=config.group, flip=config.flip, noise=config.noise
            )
            for seed in config.seeds:

                def make(spec: SyntheticSpec = spec, seed: int = seed) -> dict[str, Any]:
                    return run_synthetic(spec, **_options(config, seed))

                name = f"{kind}-r{r}-d{d}-{config.start}-s{seed}"
                settings = settings_of(config, spec, seed)
                found.append(runs.once(config.out / "runs", name, settings, make))
    return found
