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
from torch import Tensor

from bae_fast.baselines import SparseAutoencoder
from bae_fast.files import write_json, write_safetensors
from bae_fast.lm.cache import ActivationCache
from bae_fast.model import BinaryAutoencoder

# pre-activations made at a time
_CHUNK_ELEMENTS = 16 * 2**20

_SMALLEST = torch.finfo(torch.float16).tiny


def _strengths(model: BinaryAutoencoder | SparseAutoencoder, x: Tensor) -> Tensor:
    """How strongly each feature is on, float32 ``[n, F]``; 0 where it is off."""
    if isinstance(model, SparseAutoencoder):
        return model.encode(x.to(model.W_enc.dtype)).float()
    x = x.to(model.W_enc.dtype)
    # a bit is on by the encoder's own sum, whose last digits may differ from this one's
    margin = model.preactivation(x).float().clamp_min(_SMALLEST)
    return torch.where(model.encode(x).to_dense(), margin, 0)


@torch.no_grad()
def write_delphi_cache(
    folder: str | os.PathLike[str],
    model: BinaryAutoencoder | SparseAutoencoder,
    cache: ActivationCache,
    rows: range | None = None,
    *,
    n_splits: int = 5,
) -> Path:
    """Write the features of harvested rows as delphi reads them.

    Args:
        folder: of all modules; the files go into ``folder/<hook name>``.
        model: in eval mode, one bit a feature.
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
    if rows.step != 1 or not 0 <= rows.start < rows.stop <= cache.n_rows:
        raise ValueError(
            f"rows must be a range in steps of 1 within the cache's {cache.n_rows:,} rows; "
            f"got {rows!r}"
        )
    n_features = model.config.d_sae
    if not 1 <= n_splits <= n_features:
        raise ValueError(f"n_splits must lie in [1, {n_features}]; got {n_splits!r}")
    if isinstance(model, BinaryAutoencoder) and model.config.n_bits != 1:
        raise ValueError(f"model must have n_bits=1; got {model.config.n_bits}")

    first_window = int(cache.row_window[rows.start])
    places, values = [], []
    step = max(_CHUNK_ELEMENTS // n_features, 1)
    for start in range(rows.start, rows.stop, step):
        part = slice(start, min(start + step, rows.stop))
        strength = _strengths(model, cache.rows[part].to(model.W_enc.device))
        at = strength.nonzero().cpu()
        window, position = cache.row_window[part][at[:, 0]], cache.row_position[part][at[:, 0]]
        places.append(torch.stack([window - first_window, position, at[:, 1].int()], dim=1))
        values.append(strength[strength > 0].cpu().half().clamp_min(_SMALLEST))
    locations, activations = torch.cat(places), torch.cat(values)
    tokens = cache.tokens[first_window : int(cache.row_window[rows.stop - 1]) + 1].contiguous()

    manifest: dict[str, Any] = cache.manifest
    target = Path(folder) / str(manifest["hook_name"])
    edges = torch.linspace(0, n_features, steps=n_splits + 1).long().tolist()
    for first, stop in itertools.pairwise(edges):
        kept = (locations[:, 2] >= first) & (locations[:, 2] < stop)
        own = locations[kept]
        own[:, 2] -= first
        write_safetensors(
            target / f"{first}_{stop - 1}.safetensors",
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
    write_json(target / "config.json", config)  # last: a folder without it is refused
    return target
