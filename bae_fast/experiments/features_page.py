"""The records of the page of features, from a model and the rows that it is looked at on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bae_fast.analysis.layout import layout_directions
from bae_fast.autoencoder import Autoencoder
from bae_fast.interpret.records import FeatureRecord

if TYPE_CHECKING:
    from bae_fast.interpret.comsem import FeatureTokens
    from bae_fast.lm import ActivationCache

# contexts shown of a feature
_CONTEXTS = 10

# points below which there is no map
_LEAST_POINTS = 3


@dataclass(frozen=True)
class Looked:
    """What the page shows of a model.

    Attributes:
        records: one a feature, in order of their numbers; they can be taken once.
        labels: the arguments of :func:`bae_fast.report.browser.browser_page` that say what the
            numbers are.
    """

    records: Iterator[FeatureRecord]
    labels: dict[str, str]


def look_at(
    model: Autoencoder,
    cache: ActivationCache,
    rows: range,
    tokenizer: Any,
    found: FeatureTokens,
    *,
    language_model: Any = None,
    phrases: Mapping[int, str] | None = None,
    scores: Mapping[str, Mapping[int, float]] | None = None,
) -> Looked:
    """Tokens, contexts, neighbours, histograms and places of all features.

    Args:
        model, cache, rows, tokenizer: the model and the rows of a cache that it reads.
        found: :func:`bae_fast.interpret.comsem.feature_tokens` of these rows.
        language_model: the transformers model, for the logit lens; None: no lens.
        phrases, scores: see :func:`bae_fast.interpret.facts.feature_records`.
    """
    from bae_fast.interpret.comsem import ordered_rows
    from bae_fast.interpret.facts import Contexts, feature_records, gather_facts

    part = slice(rows.start, rows.stop)
    windows = cache.row_window[part].long()
    binary = model.ranks_bits
    see = model.preactivation if binary else model.activations
    directions = model.directions()
    gathered = gather_facts(
        found.code,
        row_tokens=cache.tokens[windows, cache.row_position[part].long()],
        windows=windows,
        values=(see(model.as_own(block)) for block in cache.rows[part].split(4096)),
        positive_only=not binary,
        W_dec=None if language_model is None else directions,
        model=language_model,
    )
    records = feature_records(
        gathered,
        tokenizer,
        contexts=Contexts(cache, tokenizer, rows),
        shown=lambda number: [
            (row, None) for row in ordered_rows(found, number, "strongest")[:_CONTEXTS].tolist()
        ],
        code=found.code,
        phrases=phrases,
        scores=scores,
    )
    labels = {"histogram_label": "pre-activation" if binary else "activation where on"}
    if directions is not None and len(directions) >= _LEAST_POINTS and directions.shape[1] > 1:
        layout = layout_directions(directions)
        labels["map_label"] = (
            "Near points have decoder directions with a large cosine: of each feature's ten "
            f"nearest directions, {layout.kept:.0%} are among the nearest 2 % of the points here. "
            "The axes and far distances mean nothing."
        )
        records = _placed(records, layout.places)
    return Looked(records, labels)


def _placed(records: Iterator[FeatureRecord], places: Tensor) -> Iterator[FeatureRecord]:
    for record in records:
        x, y = places[record.feature].tolist()
        yield replace(record, place=(x, y))
