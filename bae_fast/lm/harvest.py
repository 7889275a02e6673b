"""Harvest hidden states: run a language model up to one module and keep that module's output.

What is kept is a `bae_fast.lm.cache.ActivationCache`. Harvesting holds one batch of its rows. Its
folder is written under a temporary name and renamed at the end, so an interrupted harvest leaves
nothing that looks like a cache.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bae_fast.files import write_safetensors
from bae_fast.lm.cache import (
    DTYPE_NAMES,
    FORMAT,
    FORMAT_VERSION,
    INDEX_NAME,
    MANIFEST_NAME,
    ROWS_NAME,
    SPLIT_RULE,
    ActivationCache,
    RowsFile,
    cache_key,
    tokens_digest,
)
from bae_fast.lm.hooks import StopForward, find_module, in_order, stop_here
from bae_fast.lm.loading import LanguageModel
from bae_fast.progress import progress_bar

# a harvest writes all the time; its folder that nothing wrote to for a day belongs to nobody
_ABANDONED_SECONDS = 24 * 3600


def harvest(
    lm: LanguageModel,
    token_windows: Tensor,
    hook: str = "model.layers.11",
    *,
    folder: str | Path,
    batch_size: int = 8,
    drop_positions: int = 1,
    max_norm_ratio: float = 5.0,
    progress: bool = True,
) -> ActivationCache:
    """Run the model over the windows and keep the output of one module, or open what is there.

    The model stops after the hooked module: later blocks and the output head cost nothing. Rows
    are dropped at the first `drop_positions` positions of each window (there many models keep a
    state hundreds of times the usual norm: one such row outweighs a batch), where they are not
    finite, and where their norm is over `max_norm_ratio` times the median of the rest.

    Args:
        lm: the model.
        token_windows: integers [n_windows, context_size], as `windows` makes them.
        hook: path of the module whose output is kept, as `model.named_modules()` spells it; the
            output, or its first part if it is a tuple, is [batch, context_size, d].
        folder: where caches lie; this one becomes the folder `cache_key(...)` in it.
        batch_size: windows per run of the model.
        drop_positions: positions dropped at the start of each window.
        max_norm_ratio: rows over this many median norms are dropped; infinity keeps all.
        progress: draw a tqdm bar, if tqdm is installed and stderr is a terminal.

    Raises:
        ValueError: an argument out of range, no such module, an output of another shape, or no
            row left.
        RuntimeError: the model finished without calling the module.
    """
    _check_arguments(lm, token_windows, batch_size, drop_positions, max_norm_ratio)
    module = find_module(lm.model, hook)
    key = cache_key(
        lm.name,
        lm.revision,
        lm.dtype,
        token_windows,
        hook,
        drop_positions=drop_positions,
        max_norm_ratio=max_norm_ratio,
    )
    root = Path(folder).expanduser()
    cached = ActivationCache.open_or_none(root, key)
    if cached is not None:
        return cached

    root.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(root)
    temporary = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=root))
    try:
        n_windows, context_size = token_windows.shape
        with RowsFile(temporary / ROWS_NAME) as file:
            norms = _run(
                lm, module, hook, token_windows, file, batch_size, drop_positions, progress
            )
            keep, dropped = _keep(norms, max_norm_ratio)
            dropped["position"] = n_windows * drop_positions
            file.finish(keep)
        places = torch.arange(n_windows * context_size).view(n_windows, context_size)
        kept = places[:, drop_positions:].reshape(-1)[keep]
        index = {
            "row_window": (kept // context_size).to(torch.int32),
            "row_position": (kept % context_size).to(torch.int32),
            "tokens": token_windows.to("cpu", torch.int32).contiguous(),
        }
        manifest = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "key": key,
            "model_name": lm.name,
            "model_label": lm.label,
            "model_revision": lm.revision,
            "hook_name": hook,
            "context_size": context_size,
            "n_windows": n_windows,
            "tokens_sha256": tokens_digest(token_windows),
            "dtype": DTYPE_NAMES[file.dtype],
            "d_in": file.width,
            "n_rows": len(kept),
            "drop_positions": drop_positions,
            "max_norm_ratio": max_norm_ratio if np.isfinite(max_norm_ratio) else None,
            "dropped": dropped,
            "split_rule": SPLIT_RULE,
        }
        write_safetensors(temporary / INDEX_NAME, index, {})
        (temporary / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n")
        # mkdtemp makes a folder for this user alone; the cache gets the rights of its parent.
        temporary.chmod(root.stat().st_mode & 0o777)
        try:
            temporary.rename(root / key)
        except OSError:
            # Another process finished the same harvest first: its cache is as good.
            if not (root / key / MANIFEST_NAME).is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return ActivationCache.open(root / key)


def _remove_abandoned(root: Path) -> None:
    """Remove what killed harvests left: temporary folders that nothing wrote to for a day."""
    for folder in root.glob(".unfinished-*"):
        if time.time() - folder.stat().st_mtime > _ABANDONED_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def _run(
    lm: LanguageModel,
    module: torch.nn.Module,
    hook: str,
    token_windows: Tensor,
    file: RowsFile,
    batch_size: int,
    drop_positions: int,
    progress: bool,
) -> Tensor:
    """Write every candidate row to `file`; return their norms, float32 [n_candidates]."""

    def forward(batch: Tensor) -> tuple[Tensor, Tensor]:
        try:
            with torch.inference_mode():
                lm.model(input_ids=batch.to(lm.device, torch.int64), use_cache=False)
        except StopForward as stop:
            out = stop.output
        else:
            raise RuntimeError(f"hook={hook!r}: the model's forward never called this module")
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        if not isinstance(out, Tensor) or out.dim() != 3 or shape[:2] != tuple(batch.shape):
            raise ValueError(
                f"hook={hook!r} gives {shape}: a module is needed whose output is "
                f"[batch, context_size, d], here [{len(batch)}, {batch.shape[1]}, d]"
            )
        rows = out[:, drop_positions:].reshape(-1, out.shape[-1]).cpu()
        return rows, torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)

    norms = []
    handle = module.register_forward_hook(stop_here)
    try:
        batches = token_windows.split(batch_size)
        # closing: workers end before the hook that stops the model early is taken away.
        with (
            progress_bar(token_windows.numel(), what="harvest", unit="tok", show=progress) as bar,
            contextlib.closing(in_order(forward, batches, lm.device.type)) as results,
        ):
            for batch, (rows, norm) in zip(batches, results, strict=True):
                norms.append(norm)
                file.append(rows)
                bar.update(batch.numel())
    finally:
        handle.remove()
    return torch.cat(norms)


def _keep(norms: Tensor, max_norm_ratio: float) -> tuple[Tensor, dict[str, int]]:
    """Which candidate rows stay, bool [n], and how many go for which reason."""
    finite = norms.isfinite()
    if not bool(finite.any()):
        raise ValueError("token_windows: no hidden state is finite; try dtype='float32'")
    limit = max_norm_ratio * norms[finite].median()
    keep = finite & (norms <= limit)
    dropped = {"not_finite": int((~finite).sum()), "norm": int((finite & ~keep).sum())}
    return keep, dropped


def _check_arguments(
    lm: LanguageModel,
    token_windows: Tensor,
    batch_size: int,
    drop_positions: int,
    max_norm_ratio: float,
) -> None:
    if not isinstance(token_windows, Tensor) or token_windows.is_floating_point():
        kind = getattr(token_windows, "dtype", type(token_windows).__name__)
        raise TypeError(f"token_windows is {kind}: an integer tensor is needed")
    if token_windows.dim() != 2 or token_windows.numel() == 0:
        raise ValueError(
            f"token_windows has shape {tuple(token_windows.shape)}: [n_windows, context_size] "
            "is needed, neither zero"
        )
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} is not allowed: an integer of at least 1")
    context_size = token_windows.shape[1]
    if not isinstance(drop_positions, int) or not 0 <= drop_positions < context_size:
        raise ValueError(
            f"drop_positions={drop_positions!r} is not allowed: an integer from 0 to "
            f"context_size - 1 = {context_size - 1}"
        )
    if not max_norm_ratio > 1:
        raise ValueError(f"max_norm_ratio={max_norm_ratio!r} is not allowed: a number over 1")
    low, high = int(token_windows.min()), int(token_windows.max())
    n_vocabulary = lm.model.get_input_embeddings().weight.shape[0]
    if low < 0 or high >= n_vocabulary:
        raise ValueError(
            f"token_windows has ids from {low} to {high}: 0 to {n_vocabulary - 1} are allowed"
        )
