"""The held-out evaluation of everything that a run trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from bae_fast.analysis import evaluate
from bae_fast.autoencoder import load_autoencoder
from bae_fast.experiments import runs
from bae_fast.experiments.train import FILE_HOOK, resolved_config, supply_of
from bae_fast.files import write_json

_COLUMNS = ("fvu", "bits", "l0", "dead_share", "n_rows")


@dataclasses.dataclass(frozen=True)
class Config:
    """Evaluate the autoencoders of a run of bae-fast train on its held-out rows.

    Attributes:
        folder: The folder of the run.
        states: Another file of hidden states; its last rows are taken as those of the run's are.
        out: The file of the result. Without it that is evaluation.json in the folder of the run.
    """

    folder: Path
    states: Path | None = None
    out: Path | None = None


def run(config: Config) -> runs.Result:
    """Evaluate every model in the folder and write the numbers as JSON.

    Raises:
        ValueError, OSError: naming the folder, the field or the file.
    """
    made_with = resolved_config(config.folder)
    if config.states is not None:
        made_with = dataclasses.replace(made_with, states=config.states)
    supply = supply_of(made_with)
    rows = torch.cat([block.x[FILE_HOOK] for block in supply.heldout()])
    found: dict[str, Any] = {}
    for path in sorted(config.folder.glob("*/cfg.json")):
        found[path.parent.name] = evaluate(load_autoencoder(path.parent), rows).summary()
    if not found:
        raise FileNotFoundError(f"{config.folder} holds no trained model: has the run ended?")
    out = config.out or config.folder / "evaluation.json"
    write_json(out, found)
    lines = ["| job | " + " | ".join(_COLUMNS) + " |", "|---" * (len(_COLUMNS) + 1) + "|"]
    for name, numbers in found.items():
        shown = " | ".join(f"{numbers[key]:.4g}" for key in _COLUMNS)
        lines.append(f"| {name} | {shown} |")
    return runs.Result(found, "\n".join(lines), (out,))
