"""Entropy of the last prompt token's state as demonstrations are added."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from bae_fast.entropy.icl import DRAWS, LABELS, run_task
from bae_fast.experiments import runs
from bae_fast.experiments.entropy.common import (
    Fits,
    finish,
    lazy_model,
    training_config,
    with_revision,
)
from bae_fast.lm.tasks import TASKS, Task, load_task, task_from_dataset


@dataclasses.dataclass(frozen=True)
class Config(Fits):
    """Estimate the entropy of the last prompt token's state as demonstrations are added.

    Attributes:
        hooks: The paths of the modules that are read; * stands for any one part of a path.
        tasks: The package's own tasks that are run.
        dataset: A Hugging Face dataset as a further task, by name or by name:configuration.
        split: The split of the dataset.
        text_column: The column of the dataset that holds the text.
        label_column: The column of the dataset that holds the label.
        shots: The numbers of demonstrations.
        prompts: The number of prompts, half of which are measured.
        fixed_samples: The number of draws of the demonstrations that all prompts share; each is
            measured alone.
        draws: How demonstrations are drawn: anew for each prompt, or fixed for all.
        labels: Which labels the demonstrations have.
        seeds: The seeds; every task is run with each.
        out: The folder of the results.
        report_only: The table and the plot are made from the results in the folder, and nothing
            is run.
    """

    hooks: tuple[str, ...] = ("model.layers.11", "model.layers.23")
    tasks: tuple[str, ...] = tuple(TASKS)
    dataset: str | None = None
    split: str = "train"
    text_column: str = "text"
    label_column: str = "label"
    shots: tuple[int, ...] = tuple(range(9))
    prompts: int = 1024
    fixed_samples: int = 4
    draws: tuple[str, ...] = tuple(DRAWS)
    labels: tuple[str, ...] = tuple(LABELS)
    seeds: tuple[int, ...] = (0, 1, 2)
    out: Path = Path("results/entropy/icl")
    report_only: bool = False


def run(config: Config) -> runs.Result:
    """Run every task that is not done yet and write the table.

    Raises:
        ValueError, ImportError, OSError: naming the field, the package or the file.
    """
    from bae_fast.report import entropy as report

    runs.check_at_least(config, 0, "seeds")
    runs.check_one_of("tasks", config.tasks, TASKS)
    runs.check_one_of("draws", config.draws, DRAWS)
    runs.check_one_of("labels", config.labels, LABELS)
    return finish(
        config, "icl", lambda: _runs(config), report.icl_rows, report.icl_panels, report.icl_table
    )


def settings_of(config: Config, model: str, task: str, examples: int, seed: int) -> dict[str, Any]:
    """All that a run's result depends on; kept runs are known by it."""
    return {
        "model": model,
        "task": task,
        "examples": examples,
        "hooks": list(config.hooks),
        "shots": sorted(set(config.shots)),
        **_options(config),
        "training": training_config(config, seed).settings(),
    }


def _options(config: Config) -> dict[str, Any]:
    return {
        "n_prompts": config.prompts,
        "expansion": config.expansion,
        "draws": list(config.draws),
        "labels": list(config.labels),
        "fixed_samples": config.fixed_samples,
    }


def _hub_task(config: Config, dataset: str) -> Task:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError("--dataset needs datasets: pip install 'bae-fast[datasets]'") from None
    name, _, configuration = dataset.partition(":")
    found = load_dataset(name, configuration or None, split=config.split)
    label = found.features.get(config.label_column)
    return task_from_dataset(
        dataset,
        found,
        text_column=config.text_column,
        label_column=config.label_column,
        label_names=getattr(label, "names", None),
    )


def _runs(config: Config) -> list[dict[str, Any]]:
    from bae_fast.lm import match_hooks

    runs.check_at_least(config, 1, "fixed_samples")
    if any(shots < 0 for shots in config.shots):
        raise runs.ConfigError("shots", f"must not be negative; got {list(config.shots)}")
    tasks = [load_task(name) for name in config.tasks]
    if config.dataset is not None:
        tasks.append(_hub_task(config, config.dataset))
    if not tasks:
        raise runs.ConfigError("tasks", "or --dataset must name at least one task")
    name, load = lazy_model(config)
    found = []
    for task in tasks:
        for seed in config.seeds:

            def make(task: Task = task, seed: int = seed) -> dict[str, Any]:
                lm = load()
                cells = run_task(
                    lm,
                    task,
                    match_hooks(lm, list(config.hooks)),
                    sorted(set(config.shots)),
                    config=training_config(config, seed),
                    progress=config.progress,
                    **_options(config),
                )
                return {"cells": cells}

            label = task.name.replace("/", "-").replace(":", "-")
            settings = settings_of(config, name, task.name, len(task.examples), seed)
            found.append(
                runs.once(
                    config.out / "runs", f"{label}-s{seed}", with_revision(config, settings), make
                )
            )
    return found
