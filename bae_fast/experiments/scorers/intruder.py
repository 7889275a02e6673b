"""Whether contexts of a feature are alike: the odd one out by a sentence encoder; no judge."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

from bae_fast.experiments.runs import ConfigError
from bae_fast.experiments.scorers import Column, Context, Measure, Scorer
from bae_fast.interpret.intruder import IntruderConfig, SentenceEncoder, intruder_scores

ORDER = 3


def make(context: Context) -> list[Scorer]:
    """One scorer, where the configuration names an encoder."""
    measure = measured(context)
    return [] if measure is None else [measure.scorer("intruder")]


def measured(context: Context) -> Measure | None:
    """How often the intruder is found, of any features; None where no encoder is named.

    Raises:
        ConfigError: the encoder's folder holds none.
    """
    folder = context.config.encoder
    if folder is None:
        return None
    constants = IntruderConfig()
    try:
        encoder = context.once(context, "sentence encoder", lambda: SentenceEncoder(folder))
    except ValueError as error:
        raise ConfigError("encoder", str(error).removeprefix("encoder ")) from error

    def of(model: Any, method: str) -> dict[str, Any]:
        cache = context.read_by(method)
        first = int(context.cache.row_window[context.heldout.start])
        rows = range(int((cache.row_window < first).sum()), cache.n_rows)
        code = model.active(cache.rows[rows.start : rows.stop])
        found = intruder_scores(code, cache, rows, context.tokenizer, encoder, constants)
        return found.summary()

    config = (folder / "config.json").read_bytes()
    settings = {
        "encoder": folder.name,
        "encoder_config": hashlib.sha256(config).hexdigest()[:16],
        "config": dataclasses.asdict(constants),
    }
    columns = [Column("mean", "intruder found", "{:.3f}")]
    return Measure(settings, of, columns)
