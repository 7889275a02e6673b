"""What every method's dictionary is worth with codes that are searched for, encoders left out.

The Binary Autoencoder's codes are searched at each price of a bit
(:class:`~bae_fast.search.SearchedAutoencoder`), those of a sparse autoencoder by orthogonal
matching pursuit (:class:`~bae_fast.baselines.PursuedAutoencoder`), with the k of its training and
at each price too. Both have their decoders fitted to these codes, by the same rows, or are trained
on with them, for as many steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from bae_fast.analysis.evaluation import activity
from bae_fast.autoencoder import Autoencoder
from bae_fast.baselines import PursuedAutoencoder, SparseAutoencoder
from bae_fast.experiments import methods
from bae_fast.experiments.scorers import Column, Context, Scorer, intruder, probing
from bae_fast.experiments.scorers.description import WRITTEN, describe, rows_of, value_precision
from bae_fast.experiments.scorers.rounded import MEASURED, losses
from bae_fast.progress import say
from bae_fast.search import SearchedAutoencoder
from bae_fast.spacing import evenly
from bae_fast.training import Trainer, fit_search_

ORDER = 0.7

# rows that decoders, ranges of values and coders are fitted to: a pursuit takes a millisecond a row
SEARCHED_ROWS = 131072

# learning rate of directions of unit norm that are trained on with pursued values
VALUES_LR = 3e-3

# features of a row that a pursuit with a price may take, times the k of the training
MOST_FEATURES = 4


def make(context: Context) -> list[Scorer]:
    """Where the configuration names prices of a bit: one scorer, and one of the features that are
    found, where they are measured."""
    config = context.config
    if not config.search_prices:
        return []

    def made(model: Any, method: str, k: int | None) -> list[tuple[dict[str, Any], Autoencoder]]:
        return context.once(model, "searched", lambda: searched(context, model, method, k))

    def score(model: Any, method: str, k: int | None, _seed: int) -> dict[str, Any]:
        train, held, target = rows_of(context, method)
        points = []
        fitted_to = evenly(train, SEARCHED_ROWS)
        for settings, found_by in made(model, method, k):
            precision = value_precision(found_by, fitted_to, held, target)
            found = settings | describe(precision)
            active = activity(precision.code)
            found |= {share: active[share] for share in ("dead_share", "dense_share")}
            if config.substitution_tokens > 0:
                found |= losses(context, found_by, method, precision)
            points.append(found)
        middle = points[len(points) // 2] if points else {}
        return {"points": points, **{key: middle.get(key) for key in ("fvu", "tree", "kl_bits")}}

    columns = [
        Column("fvu", "FVU, searched", "{:.4f}"),
        Column("tree", "bits, tree, searched", "{:.0f}"),
        Column("kl_bits", "KL, searched", "{:.4f}"),
    ]
    tokens = config.substitution_tokens and context.windows(config.substitution_tokens).numel()
    settings: dict[str, Any] = {"prices": list(config.search_prices), "rows": SEARCHED_ROWS}
    if config.search_dense_bits:
        settings["dense_bits"] = config.search_dense_bits
    if config.search_steps:
        settings["steps"] = config.search_steps
    lost = {"value_bits": list(MEASURED), "tokens": tokens, "values": WRITTEN}
    coded = Scorer("search", settings | lost, score, columns)
    return [coded, *_of_features(context, settings, made)]


def _of_features(
    context: Context,
    settings: dict[str, Any],
    made: Callable[[Any, str, int | None], list[tuple[dict[str, Any], Autoencoder]]],
) -> list[Scorer]:
    """What is measured of the features that an encoder finds, of those that a search finds."""
    measures = {"probing": probing.measured(context), "intruder": intruder.measured(context)}
    asked = {name: measure for name, measure in measures.items() if measure is not None}
    if not asked:
        return []
    shown = {
        f"{name}_{column.key}": (name, column)
        for name, measure in asked.items()
        for column in measure.columns
    }

    def score(model: Any, method: str, k: int | None, _seed: int) -> dict[str, Any]:
        points = [
            at | {name: measure.of(found_by, method) for name, measure in asked.items()}
            for at, found_by in made(model, method, k)
        ]
        middle = points[len(points) // 2] if points else {}
        flat = {key: middle.get(name, {}).get(column.key) for key, (name, column) in shown.items()}
        return {"points": points, **flat}

    columns = [
        Column(key, f"{column.header}, searched", column.form) for key, (_, column) in shown.items()
    ]
    of = {name: measure.settings for name, measure in asked.items()}
    return [Scorer("searched_features", settings | of, score, columns)]


def searched(
    context: Context, model: Any, method: str, k: int | None
) -> list[tuple[dict[str, Any], Autoencoder]]:
    """A method's model with searched codes at each setting; none of what no search is known for."""
    if getattr(model, "is_transcoder", False):
        return []
    config = context.config
    fitted_to = evenly(rows_of(context, method)[0], SEARCHED_ROWS)
    steps = {"steps": config.search_steps} if config.search_steps else {}
    made: list[tuple[dict[str, Any], Autoencoder]] = []
    if method in ("bae", "bae_paper"):
        dearer = {"dense_bits": config.search_dense_bits} if config.search_dense_bits else {}
        for price in config.search_prices:
            one = {"bit_price": price} | dearer
            binary = SearchedAutoencoder.of(model, fitted_to, **one)
            if steps:
                _train(context, binary, method, fitted_to, entropy_weight=price)
            else:
                fit_search_(binary, fitted_to)
            made.append((one | steps, binary))
        return made
    if k is None or not isinstance(model, SparseAutoencoder) or model.is_binary:
        return []
    most = min(MOST_FEATURES * k, model.d_sae)
    settings: list[dict[str, Any]] = [] if steps else [{"k": k}]
    settings += [{"k": most, "bit_price": price} for price in config.search_prices]
    for one in settings:
        priced: dict[str, Any] = {"rows": fitted_to} if "bit_price" in one else {}
        found = PursuedAutoencoder(model, **one, **priced).eval()
        if method != "random":  # a dictionary that was not learned is not fitted either
            if steps:
                _train(context, found, method, fitted_to, lr=VALUES_LR)
            else:
                found.fit_(fitted_to)
        made.append((one | steps, found))
    return made


def _train(
    context: Context,
    model: SearchedAutoencoder | PursuedAutoencoder,
    method: str,
    fitted_to: Tensor,
    **constants: Any,
) -> None:
    """Train a model on with the codes that it searches for, on the rows of its training, and take
    the shares that price its features from ``fitted_to``."""
    config = context.config
    training = dataclasses.replace(
        methods.method(method).training.going_on(),
        steps=config.search_steps,
        batch_size=config.batch_size,
        precision=config.precision,
        **constants,
    )
    rows = context.cache.rows[context.train.start : context.train.stop]
    say(f"   {config.search_steps:,} steps with searched codes")
    model.train()
    Trainer(model, rows, training).fit(progress=config.progress)
    model.eval().fit_density_(fitted_to)
