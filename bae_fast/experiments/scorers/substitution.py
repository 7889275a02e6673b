"""What the language model loses with the reconstruction in the state's place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bae_fast.experiments.scorers import Column, Context, Scorer

if TYPE_CHECKING:
    from bae_fast.causal import Substitution

ORDER = 0


def make(context: Context) -> list[Scorer]:
    """One scorer where the configuration names held-out tokens to run on."""
    config = context.config
    if config.substitution_tokens < 1:
        return []
    tokens = context.windows(config.substitution_tokens).numel()

    def score(model: Any, method: str, _k: int | None, _seed: int) -> dict[str, Any]:
        return substituted(context, model, method).summary()

    columns = [
        Column("js_bits", "JS, bits", "{:.4f}"),
        Column("kl_bits", "KL, bits", "{:.4f}"),
        # that beside zeros is near 1 for anything: in the file only
        Column("recovered_mean", "loss recovered", "{:.4f}"),
    ]
    return [Scorer("substitution", {"tokens": tokens}, score, columns)]


def substituted(context: Context, model: Any, method: str) -> Substitution:
    """The language model with a model's reconstruction, run once for all scorers."""
    path, source = context.place(method)
    return context.once(
        model, "substitution", lambda: context.substitution().run(path, model, source=source)
    )
