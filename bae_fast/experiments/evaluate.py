"""The held-out evaluation of everything that a run trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from bae_fast.analysis import evaluate
from bae_fast.autoencoder import load_autoencoder
from bae_fast.experiments import runs
from bae_fast.experiments.supplies import rows_for
from bae_fast.experiments.train import read_jobs, resolved_config
from bae_fast.files import write_json
from bae_fast.progress import Stages
from bae_fast.report import tables

_COLUMNS = ("fvu", "bits", "l0", "dead_share", "n_rows")


@dataclasses.dataclass(frozen=True)
class Config:
    """Evaluate the autoencoders of a run of bae-fast train on its held-out rows.

    Attributes:
        folder: The folder of the run.
        states: Another file of hidden states; its last rows are taken as those of a run on a file
            are.
        out: The file of the result. Without it that is evaluation.json in the folder of the run.
        progress: Progress is shown, as a bar on a terminal and as lines elsewhere.
    """

    folder: Path
    states: Path | None = None
    out: Path | None = None
    progress: bool = True


def run(config: Config) -> runs.Result:
    """Evaluate every model in the folder and write the numbers as JSON.

    Raises:
        ValueError, OSError: naming the folder, the field or the file.
    """
    made_with = dataclasses.replace(resolved_config(config.folder), progress=config.progress)
    if config.states is not None:
        made_with = dataclasses.replace(made_with, states=config.states, cache=None, live=False)
    jobs = {
        name: None if config.states is not None else one.hook
        for name, one in read_jobs(made_with).items()
        if (config.folder / name / "cfg.json").is_file()
    }
    if not jobs:
        raise FileNotFoundError(
            f"{config.folder} holds no trained model: has the run of bae-fast train ended?"
        )
    found: dict[str, Any] = {}
    order = {"seed": made_with.seed, "streams": made_with.streams}
    with rows_for(made_with, jobs.values(), order=order) as source:
        blocks = list(source.supply.heldout())
    stages = Stages(config.progress)
    for name, hook in sorted(jobs.items()):
        with stages.stage(f"evaluate {name}"):
            rows = torch.cat([block.x[source.hooks[hook]] for block in blocks])
            found[name] = evaluate(load_autoencoder(config.folder / name), rows).summary()
    out = config.out or config.folder / "evaluation.json"
    write_json(out, found)
    lines = tables.table(
        ["job", *_COLUMNS],
        ([name, *(f"{numbers[key]:.4g}" for key in _COLUMNS)] for name, numbers in found.items()),
    )
    return runs.Result(found, "\n".join(lines), (out,))
