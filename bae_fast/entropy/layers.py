"""Entropy over a language model's layers and token positions.

One autoencoder a layer for all positions gives codes that can be compared between positions; one
a position sees that position's rows alone. Entropy at a position is that of the codes of held-out
windows there; windows are whole, so no text is on both sides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from bae_fast.entropy.fit import fit_bae, measure
from bae_fast.lm.cache import MAX_NORM_RATIO
from bae_fast.model import PRESETS as MODEL_PRESETS
from bae_fast.training import PRESETS, TrainingConfig

# the recipe of the demo
TRAINING = dataclasses.replace(PRESETS["sparse"], refit=False)


def usual_rows(states: Tensor, limit: float | None = None) -> tuple[Tensor, float]:
    """Finite rows of at most ``limit`` norm (None: 5 medians of these rows), and that limit.

    Args:
        states: ``[n, d]``.
    """
    norms = states.norm(dim=1)
    if limit is None:
        limit = MAX_NORM_RATIO * float(norms[norms.isfinite()].median())
    return states[norms <= limit], limit


def run_layer(
    states: Tensor,
    positions: Sequence[int],
    *,
    expansion: int,
    config: TrainingConfig,
    heldout_share: float = 0.5,
    shared: bool = True,
    own: bool = True,
) -> dict[str, Any]:
    """Entropy at every position of one layer.

    Args:
        states: ``[n_windows, P, d]``, the windows in the order of the text.
        positions: what the P are called.
        expansion: F / d.
        config: training; the preset's recipe with other steps, weights or seeds.
        heldout_share: share of the windows that is held out, from the end.
        shared, own: which autoencoders to fit: one for all positions, one for each.

    Returns:
        For "shared" and "own" a list with an entry a position (see :func:`measure`), and
        ``"all"``: the shared code over all positions together.

    Raises:
        ValueError: another shape, a share out of range, or a position without rows of usual norm.
    """
    if states.dim() != 3 or states.shape[1] != len(positions):
        raise ValueError(
            f"states must have shape [n_windows, {len(positions)}, d]; got {list(states.shape)}"
        )
    if not 0 < heldout_share < 1:
        raise ValueError(f"heldout_share must lie between 0 and 1; got {heldout_share!r}")
    n_train = round(len(states) * (1 - heldout_share))
    train, heldout = states[:n_train], states[n_train:]
    d_sae = expansion * states.shape[2]
    result: dict[str, Any] = {}

    def fit(rows: Tensor) -> tuple[Any, float]:
        rows, limit = usual_rows(rows)
        batch = min(config.batch_size, len(rows) // 2)
        bae = fit_bae(
            rows,
            d_sae,
            dataclasses.replace(config, batch_size=batch),
            start="random",
            surrogate_width=MODEL_PRESETS["sparse"]["surrogate_width"],
        )
        return bae, limit

    def measure_at(bae: Any, rows: Tensor, limit: float, position: int) -> dict[str, Any]:
        rows, _ = usual_rows(rows, limit)
        if len(rows) < 2:
            raise ValueError(
                f"positions must have rows of usual norm: position {position} has {len(rows)} of "
                f"at most {limit:.3g}"
            )
        return measure(bae, rows)

    if shared:
        bae, limit = fit(train.flatten(0, 1))
        result["all"] = measure(bae, usual_rows(heldout.flatten(0, 1), limit)[0])
        result["shared"] = [
            {"position": p, **measure_at(bae, heldout[:, i], limit, p)}
            for i, p in enumerate(positions)
        ]
    if own:
        result["own"] = []
        for i, p in enumerate(positions):
            bae, limit = fit(train[:, i])
            found = measure_at(bae, heldout[:, i], limit, p)
            result["own"].append({"position": p, **found})
    return result
