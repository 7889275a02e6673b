"""Entropy over a language model's layers and token positions."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any, Literal

from bae_fast.experiments import runs
from bae_fast.experiments.data import own_text
from bae_fast.experiments.entropy.common import (
    Fits,
    finish,
    lazy_model,
    training_config,
    with_revision,
)
from bae_fast.progress import say
from bae_fast.spacing import even_numbers


@dataclasses.dataclass(frozen=True)
class Config(Fits):
    """Estimate the entropy of a language model's states by layer and token position.

    Attributes:
        hooks: The paths of the modules that are read; * stands for any one part of a path.
        text: Text files, files of JSON lines, and folders of them, which the model reads. Without
            them it reads the topics and docstrings of Python's standard library.
        field: The field of JSON lines that holds the text.
        context: The number of tokens in a window of text.
        windows: The number of windows, evenly spaced in the text. Without it all are read.
        positions: The positions in a window, from 0. At 0 many models keep a state of outlying
            norm.
        fits: Which autoencoders are fitted: shared is one for all positions, own is one for each.
        seeds: The seeds; every fit is made with each.
        out: The folder of the results.
        report_only: The table and the plot are made from the results in the folder, and nothing
            is run.
    """

    hooks: tuple[str, ...] = ("model.layers.*",)
    text: tuple[str, ...] | None = None
    field: str = "text"
    context: int = 64
    windows: int | None = None
    positions: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 63)
    fits: tuple[Literal["shared", "own"], ...] = ("shared", "own")
    seeds: tuple[int, ...] = (0, 1, 2)
    out: Path = Path("results/entropy/layers")
    report_only: bool = False


def run(config: Config) -> runs.Result:
    """Fit every layer that is not done yet and write the table.

    Raises:
        ValueError, ImportError, OSError: naming the field, the package or the file.
    """
    from bae_fast.report import entropy as report

    runs.check_at_least(config, 0, "seeds")
    runs.check_one_of("fits", config.fits, ("shared", "own"))
    return finish(
        config,
        "layers",
        lambda: _runs(config),
        report.layers_rows,
        report.layers_panels,
        report.layers_table,
    )


def settings_of(
    config: Config, *, model: str, text: str, text_sha256: str, windows: int, hook: str, seed: int
) -> dict[str, Any]:
    """All that a run's result depends on; kept runs are known by it."""
    return {
        "model": model,
        "text": text,
        "text_sha256": text_sha256,
        "context": config.context,
        "windows": windows,
        "hook": hook,
        "positions": list(config.positions),
        "expansion": config.expansion,
        "fits": sorted(config.fits),
        "training": training_config(config, seed).settings(),
    }


def _runs(config: Config) -> list[dict[str, Any]]:
    from bae_fast import lm as lm_tools
    from bae_fast.entropy.layers import run_layer

    positions = list(config.positions)
    if max(positions) >= config.context or min(positions) < 0:
        raise runs.ConfigError(
            "positions", f"must lie in 0 to {config.context - 1}; got {positions}"
        )
    name, load = lazy_model(config)
    tokenizer = lm_tools.load_tokenizer(name, revision=config.revision)
    if config.text is None:
        text = lm_tools.standard_library_text() + "\n\n" + lm_tools.standard_library_docstrings()
        text_name = "the standard library's topics and docstrings"
    else:
        text = own_text(config.text, config.field)
        text_name = " ".join(Path(path).name for path in config.text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    windows = lm_tools.windows(tokenizer, text, config.context)
    if config.windows is not None and config.windows < len(windows):
        windows = windows[even_numbers(len(windows), config.windows)]
    sequences = windows[:, : max(positions) + 1].tolist()
    hooks = list(config.hooks)
    if any(set(hook) & set("*?[") for hook in hooks):
        hooks = lm_tools.match_hooks(load(), hooks)
    kept: dict[str, Any] = {}

    def states(hook: str) -> Any:
        if not kept:
            say(f"== {len(sequences):,} windows, {len(hooks)} modules")
            kept.update(
                lm_tools.states_at(
                    load(), sequences, hooks, positions=positions, progress=config.progress
                )[0]
            )
        return kept[hook]

    found = []
    for hook in hooks:
        for seed in config.seeds:
            settings = settings_of(
                config, model=name, text=text_name, text_sha256=digest, windows=len(sequences),
                hook=hook, seed=seed,
            )  # fmt: skip
            settings = with_revision(config, settings)

            def make(hook: str = hook, seed: int = seed) -> dict[str, Any]:
                return run_layer(
                    states(hook),
                    positions,
                    expansion=config.expansion,
                    config=training_config(config, seed),
                    shared="shared" in config.fits,
                    own="own" in config.fits,
                )

            found.append(runs.once(config.out / "runs", f"{hook}-s{seed}", settings, make))
    return found
