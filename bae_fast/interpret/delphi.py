"""Features as delphi's cache of latents, so that its explainers and scorers read them.

delphi (EleutherAI) keeps, in one folder a module, ``<first>_<last>.safetensors`` for each run of
features with ``locations`` (window, position, feature - first), ``activations`` (fp16) and
``tokens``, and ``config.json``. Its samplers divide the activations of a feature into quantiles,
which bits alone do not have: here a bit's activation is its margin, the pre-activation.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import torch

from bae_fast.autoencoder import Autoencoder
from bae_fast.files import publishing, write_json, write_safetensors
from bae_fast.lm.cache import ActivationCache

_SMALLEST = torch.finfo(torch.float16).tiny


@torch.no_grad()
def write_delphi_cache(
    folder: str | os.PathLike[str],
    model: Autoencoder,
    cache: ActivationCache,
    rows: range | None = None,
    *,
    n_splits: int = 5,
) -> Path:
    """Write the features of harvested rows as delphi reads them.

    Args:
        folder: the folder of all modules; the files go into ``folder/<hook name>``.
        model: an autoencoder in eval mode, one bit a feature.
        cache: harvested hidden states and their tokens. Rows that it dropped (the first of a
            window, outlying norms) have no features on.
        rows: row numbers, in steps of 1; None: all.
        n_splits: files the features are divided into.

    Returns:
        ``folder/<hook name>``.

    Raises:
        ValueError: rows outside the cache, n_splits out of range, or several bits a feature.
    """
    rows = range(cache.n_rows) if rows is None else rows
    cache.check_rows(rows)
    n_features = model.d_sae
    if not 1 <= n_splits <= n_features:
        raise ValueError(f"n_splits must lie in [1, {n_features}]; got {n_splits!r}")
    if model.n_bits != 1:
        raise ValueError(f"model must have n_bits=1; got {model.n_bits}")

    first_window = int(cache.row_window[rows.start])
    places, values = [], []
    start = rows.start
    for block in model.blocks(cache.rows[rows.start : rows.stop]):
        part = slice(start, start + len(block))
        start += len(block)
        strength = model.strength(block)
        at = strength.nonzero().cpu()
        window, position = cache.row_window[part][at[:, 0]], cache.row_position[part][at[:, 0]]
        places.append(torch.stack([window - first_window, position, at[:, 1].int()], dim=1))
        values.append(strength[strength > 0].cpu().half().clamp_min(_SMALLEST))
    locations, activations = torch.cat(places), torch.cat(values)
    tokens = cache.tokens[first_window : int(cache.row_window[rows.stop - 1]) + 1].contiguous()

    manifest: dict[str, Any] = cache.manifest
    target = Path(folder) / str(manifest["hook_name"])
    edges = torch.linspace(0, n_features, steps=n_splits + 1, dtype=torch.float32).long().tolist()
    with publishing(target, fresh=True) as made:
        for first, stop in itertools.pairwise(edges):
            kept = (locations[:, 2] >= first) & (locations[:, 2] < stop)
            own = locations[kept]
            own[:, 2] -= first
            write_safetensors(
                made / f"{first}_{stop - 1}.safetensors",
                {"locations": own, "activations": activations[kept], "tokens": tokens},
                {},
            )
        config = {
            "dataset_repo": str(manifest.get("dataset_path", "")),
            "dataset_split": "",
            "dataset_name": "",
            "dataset_column": "text",
            "batch_size": 1,
            "cache_ctx_len": cache.context_size,
            "n_tokens": tokens.numel(),
            "n_splits": n_splits,
            "model_name": str(manifest["model_name"]),
        }
        write_json(made / "config.json", config)
    return target
