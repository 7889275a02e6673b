"""What every method's dictionary is worth with codes that are searched for, encoders left out.

The Binary Autoencoder's codes are searched at each price of a bit
(:class:`~bae_fast.search.SearchedAutoencoder`), those of a sparse autoencoder by orthogonal
matching pursuit (:class:`~bae_fast.baselines.PursuedAutoencoder`), with the k of its training and
at each price too. Both have their decoders fitted to these codes, by the same rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bae_fast.analysis.evaluation import activity
from bae_fast.autoencoder import Autoencoder
from bae_fast.baselines import PursuedAutoencoder, SparseAutoencoder
from bae_fast.experiments.scorers import Column, Context, Scorer, intruder, probing
from bae_fast.experiments.scorers.description import WRITTEN, describe, rows_of, value_precision
from bae_fast.experiments.scorers.rounded import MEASURED, losses
from bae_fast.search import SearchedAutoencoder
from bae_fast.spacing import evenly
from bae_fast.training import fit_search_

ORDER = 0.7

# rows that decoders, ranges of values and coders are fitted to: a pursuit takes a millisecond a row
SEARCHED_ROWS = 131072

# features of a row that a pursuit with a price may take, times the k of the training
MOST_FEATURES = 4


def make(context: Context) -> list[Scorer]:
    """Where the configuration names prices of a bit: one scorer, and one of the features that are
    found, where they are measured."""
    config = context.config
    if not config.search_prices:
        return []

    def made(model: Any, method: str, k: int | None) -> list[tuple[dict[str, Any], Autoencoder]]:
        rows = evenly(rows_of(context, method)[0], SEARCHED_ROWS)
        return context.once(model, "searched", lambda: searched(context, model, method, k, rows))

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
    context: Context, model: Any, method: str, k: int | None, rows: Any
) -> list[tuple[dict[str, Any], Autoencoder]]:
    """A method's model with searched codes, at each setting; none of what no search is known for.

    Args:
        rows: raw rows ``[n, d_in]`` that decoders are fitted to.
    """
    if getattr(model, "is_transcoder", False):
        return []
    config = context.config
    if method in ("bae", "bae_paper"):
        dearer = {"dense_bits": config.search_dense_bits} if config.search_dense_bits else {}
        prices = [{"bit_price": price} | dearer for price in config.search_prices]
        return [
            (price, fit_search_(SearchedAutoencoder.of(model, rows, **price), rows))
            for price in prices
        ]
    if k is None or not isinstance(model, SparseAutoencoder) or model.is_binary:
        return []
    settings: list[dict[str, Any]] = [{"k": k}]
    most = min(MOST_FEATURES * k, model.d_sae)
    settings += [{"k": most, "bit_price": price} for price in config.search_prices]
    made: list[tuple[dict[str, Any], Autoencoder]] = []
    for one in settings:
        priced = {"rows": rows} if "bit_price" in one else {}
        found = PursuedAutoencoder(model, **one, **priced).eval()
        # a dictionary that was not learned is not fitted either
        made.append((one, found if method == "random" else found.fit_(rows)))
    return made
