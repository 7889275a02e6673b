"""How well a judge can name the features, beside what it says of other features' names."""

from __future__ import annotations

import dataclasses
from typing import Any

from bae_fast.experiments.data import pick_device
from bae_fast.experiments.judges import JUDGES, make_judge
from bae_fast.experiments.runs import ConfigError, check_one_of
from bae_fast.experiments.scorers import Column, Context, Scorer

ORDER = 1


def make(context: Context) -> list[Scorer]:
    """One scorer for each judge of the configuration."""
    config = context.config
    numbers, wanted = config.judge_features, config.judge
    check_one_of("judge", wanted, JUDGES)
    if wanted and len(numbers) not in (1, len(wanted)):
        raise ConfigError(
            "judge_features",
            f"must be one number or {len(wanted)}, one a judge; got {len(numbers)}",
        )
    features = dict(zip(wanted, tuple(numbers) * len(wanted), strict=False))
    return [_scorer(context, kind, features[kind]) for kind in wanted]


def _scorer(context: Context, kind: str, n_features: int) -> Scorer:
    from bae_fast.interpret.comsem import ComSemConfig, score_model

    config = context.config
    constants = ComSemConfig(n_features=n_features, n_negatives=8, shuffled=True)
    judge = make_judge(config, kind, config.judge_model, pick_device(config))

    def score(model: Any, method: str, _k: int | None, _seed: int) -> dict[str, Any]:
        cache = context.read_by(method)
        # the same windows of either module
        first = int(context.cache.row_window[context.heldout.start])
        rows = range(int((cache.row_window < first).sum()), cache.n_rows)
        found = score_model(
            model,
            cache,
            rows,
            context.tokenizer,
            judge,
            config=constants,
            answers=config.out / "answers.sqlite",
            progress=config.progress,
        )
        scores: dict[str, Any] = {"counts": found["counts"]}
        for name in ("comsem", "shuffled", "detection", "auc"):
            value = found[name] or {"mean": None, "low": None, "high": None}
            scores |= {name: value["mean"], f"{name}_interval": [value["low"], value["high"]]}
        return scores

    columns = [
        Column("comsem", f"ComSem, {kind}", "{:.2f}"),
        Column("shuffled", "others' names", "{:.2f}"),
        Column("detection", "detection", "{:.2f}"),
    ]
    settings = {"judge": judge.identity, "config": dataclasses.asdict(constants)}
    return Scorer(f"comsem-{kind}", settings, score, columns)
