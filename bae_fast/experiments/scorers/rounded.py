"""What the language model loses with values written with few bits, as a code length counts them.

A code length that charges a value two or three bits says nothing of a model whose values stay
whole. So they are read here as :mod:`bae_fast.experiments.scorers.description` reads them.
"""

from __future__ import annotations

from typing import Any

from bae_fast.experiments.scorers import Column, Context, Scorer
from bae_fast.experiments.scorers.description import WRITTEN, Precision, precision_of
from bae_fast.experiments.scorers.substitution import substituted

ORDER = 0.5

# bits of a value whose loss is measured beside the best number: which is best for the language
# model need not be the one that is best for the squared error
MEASURED = (1, 2, 3)


def make(context: Context) -> list[Scorer]:
    """One scorer where the configuration asks for code lengths and for the language model."""
    config = context.config
    if config.substitution_tokens < 1 or not config.description:
        return []
    tokens = context.windows(config.substitution_tokens).numel()

    def score(model: Any, method: str, _k: int | None, _seed: int) -> dict[str, Any]:
        return losses(context, model, method, precision_of(context, model, method))

    columns = [
        Column("js_bits", "JS, values of these bits", "{:.4f}"),
        Column("kl_bits", "KL, values of these bits", "{:.4f}"),
    ]
    settings = {"tokens": tokens, "value_bits": list(MEASURED), "values": WRITTEN}
    return [Scorer("rounded", settings, score, columns)]


def losses(context: Context, model: Any, method: str, precision: Precision) -> dict[str, Any]:
    """What the language model loses with values of each number of bits, and at the best one."""
    path, source = context.place(method)
    best, steps = precision.bits, precision.steps
    tried = sorted({best, *MEASURED}) if steps else [best]
    kl, js = {}, {}
    for bits in tried:
        if steps:
            found = context.substitution().run(path, model, steps[bits].read, source=source)
        else:  # no value is there to be rounded
            found = substituted(context, model, method)
        kl[str(bits)], js[str(bits)] = found.kl_bits, found.js_bits
    return {
        "value_bits": best,
        "kl_bits": kl[str(best)],
        "js_bits": js[str(best)],
        "kl_by_value_bits": kl,
        "js_by_value_bits": js,
    }
