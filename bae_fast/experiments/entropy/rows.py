"""The entropy of the user's own rows."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any, Literal

from bae_fast.entropy.autoregressive import LEAST_ROWS
from bae_fast.entropy.components import rank
from bae_fast.entropy.fit import STARTS, fit_bae, measure
from bae_fast.experiments import runs
from bae_fast.experiments.data import OwnRows, own_rows
from bae_fast.files import write_json, write_text
from bae_fast.progress import Stages, say

# rows that the rank is read from, and least number of features
_RANK_ROWS, _LEAST_FEATURES = 16384, 8


@dataclasses.dataclass(frozen=True)
class Config(OwnRows):
    """Estimate the entropy of your own rows.

    Attributes:
        expansion: The number of features over the dimensions that the rows span. The estimate is
            an upper bound that more features loosen and too few cannot reach: where the FVU stays
            high, raise it.
        d_sae: The number of features, in place of the expansion.
        start: How the features start: components finds independent bits, random is the paper's
            way.
        steps: The number of optimizer steps. Without it that is the start's own.
        bound: The held-out cross-entropy of an autoregressive model of the code stands beside the
            other estimates, where at least 64 rows are held out; it takes up to some minutes.
        seeds: The seeds; the fit is made with each.
        progress: Progress is shown, as a bar on a terminal and as lines elsewhere.
        out: The folder of the results.
    """

    expansion: int = 2
    d_sae: int | None = None
    start: Literal["components", "random"] = "components"
    steps: int | None = None
    bound: bool = True
    seeds: tuple[int, ...] = (0, 1, 2)
    progress: bool = True
    out: Path = Path("results/entropy/rows")


def run(config: Config) -> runs.Result:
    """Fit an autoencoder to the rows and read the entropy of held-out ones off its code.

    Raises:
        ValueError, OSError: naming the field or the file.
    """
    from bae_fast.report import entropy as report

    if config.states is None:
        raise runs.ConfigError("states", "must name a file of rows; got none")
    runs.check_at_least(config, 0, "seeds")
    runs.check_one_of("start", config.start, STARTS)
    runs.check_at_least(config, 1, "expansion")
    source = own_rows(config.states)
    train = source.train_rows.float()
    d_sae = config.d_sae
    if d_sae is None:
        spanned = rank(train[:_RANK_ROWS])
        d_sae = max(config.expansion * spanned, _LEAST_FEATURES)
        say(f"== {len(train):,} rows span {spanned} dimensions: {d_sae} features")
    bound = config.bound and len(source.heldout) >= LEAST_ROWS
    digest = hashlib.sha256(source.rows.contiguous().float().numpy().tobytes()).hexdigest()
    stages = Stages(config.progress)
    found: list[dict[str, Any]] = []
    with stages.stage("fit and measure"):
        for seed in config.seeds:
            constants = dataclasses.replace(STARTS[config.start], seed=seed)
            if config.steps is not None:
                constants = dataclasses.replace(constants, steps=config.steps)
            if len(train) < constants.batch_size:
                constants = dataclasses.replace(constants, batch_size=len(train))
            settings = {
                "rows_sha256": digest,
                "heldout": len(source.heldout),
                "d_sae": d_sae,
                "start": config.start,
                "training": constants.settings(),
                # runs that were made without it keep their name
                **({"bound": True} if bound else {}),
            }

            def make(constants: Any = constants) -> dict[str, Any]:
                bae = fit_bae(train, d_sae, constants, start=config.start, progress=config.progress)
                return {"estimate": measure(bae, source.heldout_rows.float(), bound=bound)}

            name = f"{config.states.stem}-{config.start}-s{seed}"
            found.append(runs.once(config.out / "runs", name, settings, make))
    values = {"environment": runs.environment(), "data": source.facts, "runs": found}
    text = report.rows_table(values)
    with runs.results(config, wait=True) as folder:
        write_json(folder / "rows.json", values)
        write_text(folder / "rows.md", text)
    return runs.Result(values, text, (config.out / "rows.json", config.out / "rows.md"))
