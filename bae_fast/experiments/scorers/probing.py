"""How well the best 1, 2 and 5 features tell properties of tokens, held out; no judge."""

from __future__ import annotations

from typing import Any

from bae_fast.analysis.labels import LABELS, token_labels
from bae_fast.analysis.probing import sparse_probes
from bae_fast.experiments.scorers import Column, Context, Measure, Scorer
from bae_fast.spacing import evenly_from

ORDER = 2

NUMBERS = (1, 2, 5)

# training rows that features are chosen and weights are fitted on, evenly over all
_TRAIN_ROWS = 16384


def make(context: Context) -> list[Scorer]:
    """One scorer, where the configuration asks for it."""
    measure = measured(context)
    return [] if measure is None else [measure.scorer("probing")]


def measured(context: Context) -> Measure | None:
    """The accuracy of probes on any features; None where the configuration does not ask for it."""
    if not context.config.probe:
        return None

    def of(model: Any, method: str) -> dict[str, Any]:
        cache = context.read_by(method)
        # the same windows for each module that is read
        last = int(context.cache.row_window[context.train.stop - 1])
        first = int(context.cache.row_window[context.heldout.start])
        made = context.once(
            cache, "labels of tokens", lambda: token_labels(context.tokenizer, cache.tokens)
        )
        window, position = cache.row_window.long(), cache.row_position.long()
        train = (window <= last).nonzero().flatten()
        train = evenly_from(train, _TRAIN_ROWS)
        held = (window >= first).nonzero().flatten()
        labels = [
            {name: label[window[rows], position[rows]] for name, label in made.items()}
            for rows in (train, held)
        ]
        numbers = tuple(n for n in NUMBERS if n <= model.d_sae)
        found = sparse_probes(
            model,
            cache.rows[train],
            labels[0],
            cache.rows[held],
            labels[1],
            k=numbers,
            groups=window[held],
        )
        scores: dict[str, Any] = {}
        for n, probes in found.items():
            scores[f"probe_{n}"] = sum(p.accuracy for p in probes) / len(probes)
            scores[f"labels_{n}"] = [probe.summary() for probe in probes]
        return scores

    settings = {"labels": list(LABELS), "k": list(NUMBERS), "train_rows": _TRAIN_ROWS}
    columns = [
        Column(f"probe_{n}", f"probe, {n} feature{'s' if n > 1 else ''}", "{:.3f}") for n in NUMBERS
    ]
    return Measure(settings, of, columns)
