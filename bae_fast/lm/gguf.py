"""A GGUF file is dequantised once: its weights are kept in safetensors, which load in seconds.

    $XDG_CACHE_HOME/bae_fast/models/<name>-<digest>-<dtype>/   as `save_pretrained` writes it

The digest is the SHA-256 of the file's bytes, so another file of the same name has a copy of its
own. It is kept as long as the file is not written, see `bae_fast.lm.known`. A copy is written under
a temporary name and renamed when it is whole. It holds what the dequantised model held, bit for
bit; removing it costs one slow load.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from bae_fast.files import cache_folder
from bae_fast.lm.known import content_digest

# beside the weights: configuration and tokenizer
_OTHER_BYTES = 64 * 2**20


def copy_of(path: Path, dtype: torch.dtype | None = None) -> Path | None:
    """The folder of the copy of a GGUF file that was made before, or None.

    Args:
        path: the file.
        dtype: of the weights; None: any, for the tokenizer alone.
    """
    if dtype is not None:
        folder = _folder(path, dtype)
        return folder if (folder / "config.json").is_file() else None
    found = sorted(_root().glob(f"{_stem(path)}-*/config.json"))
    return found[0].parent if found else None


def keep_copy(path: Path, model: Any, tokenizer: Any, dtype: torch.dtype) -> None:
    """Write the copy of a GGUF file that was just dequantised.

    Where it cannot be written a warning says why, and nothing stays behind.
    """
    folder = _folder(path, dtype)
    temporary = None
    try:
        temporary = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder.parent))
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.chmod(folder.parent.stat().st_mode & 0o777)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process made the same copy first
                raise
    except Exception as error:  # safetensors has an exception of its own for a full disk
        _warn(path, f"{type(error).__name__}: {error}")
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def can_keep_copy(path: Path, n_bytes: int) -> bool:
    """Whether there is a place for a copy of so many bytes; a warning says why not."""
    root = _root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not os.access(root, os.W_OK):
            raise PermissionError(f"{root} cannot be written")
        free = shutil.disk_usage(root).free
        if free < n_bytes + _OTHER_BYTES:
            raise OSError(f"{root} has {free:,} bytes free and {n_bytes:,} are needed")
    except OSError as error:
        _warn(path, str(error))
        return False
    return True


def _warn(path: Path, reason: str) -> None:
    line = " ".join(reason.split())
    warnings.warn(
        f"the dequantised copy of {path.name} is not kept, so every load takes as long as this "
        f"one ({line}); XDG_CACHE_HOME may name another folder",
        RuntimeWarning,
        stacklevel=3,
    )


def _root() -> Path:
    return cache_folder("models")


def _folder(path: Path, dtype: torch.dtype) -> Path:
    return _root() / f"{_stem(path)}-{str(dtype).removeprefix('torch.')}"


def _stem(path: Path) -> str:
    name = re.sub(r"[^A-Za-z0-9.]+", "-", path.stem).strip("-.")[:64]
    return f"{name}-{content_digest(path)[:16]}"
