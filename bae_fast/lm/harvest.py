"""Harvest hidden states: run a language model up to one module and keep that module's output.

What is kept is a `bae_fast.lm.cache.ActivationCache`. Harvesting holds one batch of its rows. Its
folder is written under a temporary name and renamed at the end, so an interrupted harvest leaves
nothing that looks like a cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bae_fast.arguments import check_int
from bae_fast.files import cache_folder, check_writable, locked, naming, write_safetensors
from bae_fast.lm.cache import (
    DTYPE_NAMES,
    FORMAT,
    FORMAT_VERSION,
    INDEX_NAME,
    MANIFEST_NAME,
    MAX_NORM_RATIO,
    ROWS_NAME,
    SPLIT_RULE,
    USUAL_OUTLIERS,
    ActivationCache,
    RowsFile,
    cache_key,
    row_norms,
    tokens_digest,
)
from bae_fast.lm.capture import Engine, text_places
from bae_fast.lm.hooks import in_order, resolve_hook
from bae_fast.lm.identity import own_hooks
from bae_fast.lm.inputs import (
    beginning_token,
    check_ids,
    check_length,
    excluded_tokens,
    padding_mask,
    text_mask,
)
from bae_fast.lm.loading import LanguageModel
from bae_fast.progress import progress_bar

# a harvest touches its folder at every batch; one that nothing touched for a day, and that no
# process on this machine holds, belongs to nobody
_ABANDONED_SECONDS = 24 * 3600


def harvest(
    lm: LanguageModel,
    token_windows: Tensor,
    hook: str = "model.layers.11",
    *,
    folder: str | Path | None = None,
    mask: Tensor | None = None,
    exclude_tokens: Iterable[int] | None = None,
    batch_size: int = 8,
    drop_positions: int = 1,
    max_norm_ratio: float = MAX_NORM_RATIO,
    progress: bool = True,
) -> ActivationCache:
    """Run the model over the windows and keep the output of one module, or open what is there.

    Example::

        lm = load_language_model()
        tokens = windows(lm.tokenizer, standard_library_text(), n_tokens=100_000)
        cache = harvest(lm, tokens, "model.layers.11")
        rows = cache.rows  # [n_rows, d_in]

    The model stops after the hooked module: later blocks and the output head cost nothing. It runs
    in evaluation mode, whatever mode it is in. Rows are dropped at the first `drop_positions`
    positions of each window (there many models keep a state hundreds of times the usual norm: one
    such row outweighs a batch), at tokens that are no text, where they are not finite, and where
    their norm is over `max_norm_ratio` times the median of the rest. How many went for which
    reason is in the manifest; a warning says it where rows are not finite or many are outlying.

    What is there is opened only if it came from this model as it is now: from the same weights,
    buffers, configuration and adapters, every byte of which goes into the key (see
    `bae_fast.lm.identity`, which reads all of them at every call). The
    effect of forward hooks of the user's own cannot be compared: with any of them in the model, or
    with a replaced forward, the rows are made anew at every call and the manifest lists the hooks.

    Args:
        lm: the model.
        token_windows: integers [n_windows, context_size], as `windows` makes them.
        hook: path of the module whose output is kept, as `model.named_modules()` spells it, or its
            name in TransformerLens; the output, or its first part if it is a tuple, is
            [batch, context_size, d].
        folder: where caches lie; this one becomes the folder `cache_key(...)` in it. None:
            ``$XDG_CACHE_HOME/bae_fast/activations`` (``~/.cache``).
        mask: [n_windows, context_size], false (or 0) at padding; given to the model. None: padding
            is where the tokenizer's padding token is, if that token means nothing else.
        exclude_tokens: ids whose rows are dropped; None: the tokenizer's special tokens; empty:
            none.
        batch_size: windows per run of the model.
        drop_positions: tokens dropped at the start of each window, padding before them not counted.
        max_norm_ratio: rows over this many median norms are dropped; infinity keeps all.
        progress: draw a tqdm bar, if tqdm is installed and stderr is a terminal.

    Raises:
        ValueError: an argument out of range, windows longer than the model has positions, no such
            module, an output of another shape, or no row left.
        RuntimeError: the model finished without calling the module.
        OSError: the folder cannot be written.
    """
    _check_arguments(lm, token_windows, batch_size, drop_positions, max_norm_ratio, exclude_tokens)
    hook = resolve_hook(lm.model, hook)
    engine = Engine(lm, [hook])
    asked = _Asked.of(lm, token_windows, hook, mask, exclude_tokens, drop_positions, max_norm_ratio)
    root = (cache_folder("activations") if folder is None else Path(folder)).expanduser()
    cached = ActivationCache.open_or_none(root, asked.key)
    if cached is not None:
        return cached

    _check_folder(root)
    _remove_abandoned(root)
    temporary, final = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=root)), root / asked.key
    try:
        with (
            naming(final),
            locked(temporary, wait=False),
            RowsFile(temporary / ROWS_NAME) as file,
        ):
            norms = _run(engine, asked, file, batch_size, progress)
            keep, dropped = asked.keep(norms)
            file.finish(keep)
        write_safetensors(temporary / INDEX_NAME, asked.index(keep), {})
        manifest = asked.manifest(file, int(keep.sum()), dropped)
        (temporary / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n")
        _publish(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    cache = ActivationCache.open(final)
    outliers = dropped["norm"] > USUAL_OUTLIERS * (cache.n_rows + dropped["norm"])
    if dropped["not_finite"] or outliers:
        warnings.warn(f"harvest of {hook}: {cache.dropped_rows()}", RuntimeWarning, stacklevel=2)
    return cache


# ---------------------------------------------------------------------------------------------
# what is asked for


@dataclasses.dataclass(frozen=True, eq=False)
class _Asked:
    """What the rows of a harvest depend on, and so what its key and its manifest say.

    Attributes:
        lm, tokens, drop_positions, max_norm_ratio: as :func:`harvest` has them.
        hook: path of the module.
        mask, text: [n_windows, context_size], false at padding, and at tokens that are no text;
            None: there are none.
        excluded: ids whose rows are dropped; None: the tokenizer's special tokens.
        own_hooks: forward hooks of the user's own in the model.
        revision: the model's; with own hooks one that no other harvest has.
    """

    lm: LanguageModel
    tokens: Tensor
    hook: str
    mask: Tensor | None
    text: Tensor | None
    excluded: list[int] | None
    drop_positions: int
    max_norm_ratio: float
    own_hooks: list[str]
    revision: str

    @classmethod
    def of(
        cls,
        lm: LanguageModel,
        tokens: Tensor,
        hook: str,
        mask: Tensor | None,
        exclude_tokens: Iterable[int] | None,
        drop_positions: int,
        max_norm_ratio: float,
    ) -> _Asked:
        # once: it may be an iterator, or hold NumPy's numbers
        excluded = None if exclude_tokens is None else sorted({int(i) for i in exclude_tokens})
        if mask is None:
            mask = padding_mask(lm.tokenizer, tokens)
        text = text_mask(lm.tokenizer, tokens, mask=mask, exclude_tokens=excluded)
        hooks = own_hooks(lm.model)
        revision = lm.current_revision()
        if hooks:
            revision = f"{revision}+hooks-{uuid.uuid4().hex}"
        return cls(
            lm=lm,
            tokens=tokens,
            hook=hook,
            mask=mask,
            text=text,
            excluded=excluded,
            drop_positions=drop_positions,
            max_norm_ratio=float(max_norm_ratio),
            own_hooks=hooks,
            revision=revision,
        )

    @functools.cached_property
    def key(self) -> str:
        """The name of the cache's folder."""
        return cache_key(
            self.lm.name,
            self.revision,
            self.lm.dtype,
            self.tokens,
            self.hook,
            drop_positions=self.drop_positions,
            max_norm_ratio=self.max_norm_ratio,
            mask=self.mask,
            text=self.text,
        )

    def keep(self, norms: Tensor) -> tuple[Tensor, dict[str, int]]:
        """Which candidate rows stay, bool [n], and how many go for which reason.

        Candidates are all rows but those of the first positions of a window.
        """
        wanted = text_places(self.tokens, self.mask, self.text, self.drop_positions)
        if not bool(wanted.any()):
            raise ValueError("token_windows: no token is text: all are special tokens or padding")
        finite = norms.isfinite() & wanted
        if not bool(finite.any()):
            raise ValueError("token_windows: no hidden state is finite; try dtype='float32'")
        limit = self.max_norm_ratio * norms[finite].median()
        keep = finite & (norms <= limit)
        dropped = {
            "not_text": int((~wanted).sum()),
            "not_finite": int((wanted & ~finite).sum()),
            "norm": int((finite & ~keep).sum()),
            "position": len(self.tokens) * self.drop_positions,
        }
        return keep, dropped

    def index(self, keep: Tensor) -> dict[str, Tensor]:
        """The tensors of index.safetensors, of the candidate rows that stay."""
        n_windows, context_size = self.tokens.shape
        places = torch.arange(n_windows * context_size).view(n_windows, context_size)
        kept = places[:, self.drop_positions :].reshape(-1)[keep]
        return {
            "row_window": (kept // context_size).to(torch.int32),
            "row_position": (kept % context_size).to(torch.int32),
            "tokens": self.tokens.to("cpu", torch.int32).contiguous(),
        }

    def manifest(self, file: RowsFile, n_rows: int, dropped: dict[str, int]) -> dict[str, Any]:
        """The contents of manifest.json."""
        n_windows, context_size = self.tokens.shape
        bos = beginning_token(self.lm.tokenizer)
        bounded = np.isfinite(self.max_norm_ratio)
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "key": self.key,
            "model_name": self.lm.name,
            "model_label": self.lm.label,
            "model_revision": self.revision,
            "hook_name": self.hook,
            "own_hooks": self.own_hooks,
            "context_size": context_size,
            "n_windows": n_windows,
            "tokens_sha256": tokens_digest(self.tokens),
            "prepend_bos": bos is not None and bool((self.tokens[:, 0] == bos).all()),
            "padding_masked": self.mask is not None,
            "exclude_tokens": excluded_tokens(self.lm.tokenizer, self.excluded),
            "dtype": DTYPE_NAMES[file.dtype],
            "d_in": file.width,
            "n_rows": n_rows,
            "drop_positions": self.drop_positions,
            "max_norm_ratio": self.max_norm_ratio if bounded else None,
            "dropped": dropped,
            "split_rule": SPLIT_RULE,
        }


# ---------------------------------------------------------------------------------------------
# folders


def _check_folder(root: Path) -> None:
    try:
        check_writable(root)
    except OSError as error:
        raise type(error)(
            error.errno, f"folder must be one that can be written; {error.strerror}", str(root)
        ) from error


def _publish(temporary: Path, final: Path) -> None:
    """Give a finished cache its name."""
    # mkdtemp makes a folder for this user alone; the cache gets the rights of its parent.
    temporary.chmod(final.parent.stat().st_mode & 0o777)
    try:
        temporary.rename(final)
    except OSError:
        # Another process finished the same harvest first: its cache is as good.
        if not (final / MANIFEST_NAME).is_file():
            raise


def _remove_abandoned(root: Path) -> None:
    """Remove what killed harvests left behind: folders that nobody holds or touched for a day."""
    for folder in root.glob(".unfinished-*"):
        with contextlib.suppress(OSError):  # it is gone, or not ours
            last = max(f.stat().st_mtime for f in (folder, *folder.iterdir()))
            if time.time() - last > _ABANDONED_SECONDS:
                with locked(folder, wait=False) as free:
                    if free:
                        shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------------------------------------
# running the model


def _run(engine: Engine, asked: _Asked, file: RowsFile, batch_size: int, progress: bool) -> Tensor:
    """Write every candidate row to `file`; return their norms [n_candidates]."""

    def forward(part: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
        (out,) = engine.forward(*part).values()
        rows = out[:, asked.drop_positions :].reshape(-1, out.shape[-1]).cpu()
        return rows, row_norms(rows)

    norms = []
    tokens, mask = asked.tokens, asked.mask
    masks = [None] * len(tokens) if mask is None else mask.split(batch_size)
    batches = list(zip(tokens.split(batch_size), masks, strict=False))
    # closing: workers end before the hook that stops the model early is taken away.
    with (
        engine,
        progress_bar(tokens.numel(), what="harvest", unit="tok", show=progress) as bar,
        contextlib.closing(in_order(forward, batches, engine.lm.device.type)) as results,
    ):
        for (batch, _), (rows, norm) in zip(batches, results, strict=True):
            norms.append(norm)
            file.append(rows)
            os.utime(file.path.parent)  # so that another harvest does not take it for abandoned
            bar.update(batch.numel())
    return torch.cat(norms)


def _check_arguments(
    lm: LanguageModel,
    token_windows: Tensor,
    batch_size: int,
    drop_positions: int,
    max_norm_ratio: float,
    exclude_tokens: Iterable[int] | None,
) -> None:
    if not isinstance(token_windows, Tensor) or token_windows.is_floating_point():
        kind = type(token_windows).__name__
        if isinstance(token_windows, Tensor):
            kind = str(token_windows.dtype)
        raise TypeError(f"token_windows must be an integer tensor; got {kind}")
    if token_windows.dim() != 2 or token_windows.numel() == 0:
        raise ValueError(
            "token_windows must have shape [n_windows, context_size], neither zero; got "
            f"{list(token_windows.shape)}"
        )
    check_int("batch_size", batch_size, 1)
    check_int("drop_positions", drop_positions, 0, token_windows.shape[1] - 1)
    if not isinstance(max_norm_ratio, (int, float, np.number)) or not max_norm_ratio > 1:
        raise ValueError(
            f"max_norm_ratio must be over 1, or infinite to keep all; got {max_norm_ratio!r}"
        )
    if exclude_tokens is not None and not isinstance(exclude_tokens, (Iterable, Tensor)):
        raise TypeError(f"exclude_tokens must be token ids, or None; got {exclude_tokens!r}")
    check_ids(lm.model, token_windows, "token_windows")
    check_length(lm.model, token_windows.shape[1], "token_windows")
