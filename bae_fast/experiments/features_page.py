"""The records of the page of features, from one model or two and the rows they are looked at on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bae_fast.analysis.layout import layout_directions
from bae_fast.autoencoder import Autoencoder
from bae_fast.codes import BinaryCode
from bae_fast.experiments import runs
from bae_fast.interpret.records import FeatureRecord, Partner
from bae_fast.progress import tracked

if TYPE_CHECKING:
    from bae_fast.interpret.comsem import FeatureTokens
    from bae_fast.lm import ActivationCache

# contexts shown of a feature
_CONTEXTS = 10

# points below which there is no map
_LEAST_POINTS = 3


@dataclass(frozen=True)
class Beside:
    """A second model on the page of features.

    Attributes:
        beside: The folder of a second autoencoder, which reads the same hidden states. The page
            shows beside each feature the one of this model that is on in most of the same rows.
        beside_names: The file features.jsonl of the second model, whose names are shown.
    """

    beside: Path | None = None
    beside_names: Path | None = None


@dataclass(frozen=True)
class Looked:
    """What the page shows of a model.

    Attributes:
        records: one a feature, in order of their numbers; they can be taken once.
        labels: the arguments of :func:`bae_fast.report.browser.browser_page` that say what the
            numbers are.
        code: which features are on in which rows, ``[n, F]``.
        directions: what each feature adds to the raw reconstruction, float32 ``[F, d_out]``, or
            None.
        notes: sentences about the data.
    """

    records: Iterator[FeatureRecord]
    labels: dict[str, Any]
    code: BinaryCode
    directions: Tensor | None
    notes: tuple[str, ...] = ()


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
    if directions is not None:
        directions = model.in_raw_units(directions).float()
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
    labels: dict[str, Any] = {
        "histogram_label": "pre-activation" if binary else "activation where on"
    }
    if directions is not None and len(directions) >= _LEAST_POINTS and directions.shape[1] > 1:
        layout = layout_directions(directions)
        labels["map_label"] = (
            "Near points have decoder directions with a large cosine: of each feature's nearest "
            f"{min(10, len(directions) - 1)} directions, {layout.kept:.0%} are among the nearest "
            f"{layout.near} points here. The axes and far distances mean nothing."
        )
        records = _placed(records, layout.places)
    records = tracked(records, model.d_sae, "features")
    return Looked(records, labels, found.code, None if directions is None else directions.cpu())


def side_by_side(one: Looked, two: Looked, names: tuple[str, str]) -> Looked:
    """The first model's features, each beside its partner: the feature of the second model that is
    on in most of the same rows.

    Args:
        one, two: what was seen of both models, on the same rows.
        names: what the two models are called.
    """
    from bae_fast.causal import match_codes, shuffled_rows
    from bae_fast.causal.matching import CLASSES

    a, b = one.code.to("cpu"), two.code.to("cpu")
    found, control = match_codes(a, b), match_codes(a, shuffled_rows(b))
    partners, agreement = found.partner_a.tolist(), found.score_a.tolist()
    back, kinds = found.partner_b.tolist(), [CLASSES[i] for i in found.class_a.tolist()]
    cosines = _cosines(one.directions, two.directions, found.partner_a)
    wanted = set(partners)
    others = {record.feature: record for record in two.records if record.feature in wanted}

    def paired() -> Iterator[FeatureRecord]:
        for record in one.records:
            j = record.feature
            partner = None
            if partners[j] >= 0:
                other = others[partners[j]]
                cosine = None if cosines is None else cosines[j]
                partner = Partner(other, agreement[j], kinds[j], back[partners[j]], cosine)
            scores = {**record.scores, "Jaccard": agreement[j]}
            yield replace(record, partner=partner, scores=scores)

    measured, chance = found.summary(), control.summary()
    shares = [
        f"{measured[side]['same']:,} of {measured[side]['features']:,} features of {name} "
        f"({chance[side]['same']:,} by chance)"
        for side, name in zip("ab", names, strict=True)
    ]
    note = (
        "Jaccard is the share of the rows in which either of two features is on that have both on. "
        f"The same in both models, with at least {found.threshold:g} and each other's best: "
        f"{' and '.join(shares)}. By chance: with one model's rows shuffled. Features that are on "
        f"in fewer than {found.min_count} of the {found.n_rows:,} rows are not judged."
    )
    return replace(
        one, records=paired(), labels={**one.labels, "models": names}, notes=(*one.notes, note)
    )


def _cosines(a: Tensor | None, b: Tensor | None, partner: Tensor) -> list[float] | None:
    """Of each feature's direction and its partner's; None where the two lie in other spaces."""
    if a is None or b is None or a.shape[1] != b.shape[1]:
        return None
    return torch.cosine_similarity(a, b[partner.clamp_min(0)], dim=1).tolist()


def read_names(path: Path, field: str) -> dict[int, str]:
    """Phrases by feature, of a file of JSON lines with ``feature`` and ``phrase``.

    Raises:
        ConfigError: naming the field, a file that is not there or is no such file.
    """
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
        return {int(one["feature"]): str(one["phrase"]) for one in lines if one["phrase"]}
    except OSError as error:
        raise runs.ConfigError(field, f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise runs.ConfigError(
            field, f"{path} must hold JSON lines with feature and phrase, as interpret writes"
        ) from error


def _placed(records: Iterator[FeatureRecord], places: Tensor) -> Iterator[FeatureRecord]:
    for record in records:
        x, y = places[record.feature].tolist()
        yield replace(record, place=(x, y))
