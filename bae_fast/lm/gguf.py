"""A GGUF file is dequantised once: its weights are kept in safetensors, which load in seconds.

    $XDG_CACHE_HOME/bae_fast/models/<name>-<digest>-<dtype>/   as `save_pretrained` writes it

The digest is the SHA-256 of the file's bytes, so another file of the same name has a copy of its
own. It is kept as long as the file is not written, see `bae_fast.lm.known`. A copy is written under
a temporary name and renamed when it is whole. It holds what the dequantised model held, bit for
bit; removing it costs one slow load.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import shutil
import struct
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
        dtype: the dtype of the weights; None: any, for the tokenizer alone.
    """
    try:
        _root()
    except OSError:  # a user without a home: no copy was kept
        return None
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
    try:
        root = _root()
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


# -- the header --------------------------------------------------------------------------------

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
# kinds of values: bytes of a number, and what has a length before it
_NUMBER_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_UINT32, _STRING, _ARRAY = 4, 8, 9
# models' files have arrays of numbers and strings, and tensors of four dimensions at most; whoever
# reads deeper arrays calls itself for each, and a size of a million factors takes hours
_MOST_NESTED, _MOST_DIMENSIONS = 8, 8

# files whose headers were walked in this process, as they were then
_walked: set[tuple[str, int, int, int, int]] = set()


def check_header(path: Path) -> None:
    """Refuse a GGUF file whose header counts more than the file holds; each is walked once.

    The library that reads these files believes the counts: a length of 10^19 would keep it going
    until memory is full.

    Raises:
        ValueError: the file does not begin as one of GGUF, or ends before what its header counts.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        now = os.fstat(file.fileno())
        as_it_is = (str(path), now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)
        if as_it_is in _walked:
            return
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ValueError(f"{path} does not begin as a GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Header(data, path).check()
    _walked.add(as_it_is)


class _Header:
    """A place in a GGUF file, which never leaves it."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data, self._path, self._at, self._order = data, path, len(_MAGIC), "<"

    def check(self) -> None:
        from gguf import GGML_QUANT_SIZES

        version = self._number("I")
        if not version & 0xFFFF:  # written on a machine of the other order of bytes
            self._order, self._at = ">", len(_MAGIC)
            version = self._number("I")
        if version not in _VERSIONS:
            raise ValueError(
                f"{self._path} must be of GGUF version {' or '.join(map(str, _VERSIONS))}; "
                f"got {version}"
            )
        n_tensors, n_values = self._number("Q"), self._number("Q")
        alignment = 32
        for _ in range(n_values):
            key = self._string()
            kind, at = self._number("I"), self._at
            self._value(kind)
            if key == b"general.alignment" and kind == _UINT32:
                (alignment,) = struct.unpack_from(f"{self._order}I", self._data, at)
        sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
        ends = [self._tensor(sizes) for _ in range(n_tensors)]
        start = -(-self._at // max(alignment, 1)) * alignment
        missing = start + max(ends, default=0) - len(self._data)
        if missing > 0:
            raise ValueError(
                f"{self._path} is cut off or damaged: its header counts {missing:,} bytes of "
                "weights more than it has"
            )

    def _skip(self, n_bytes: int) -> int:
        """The place before these bytes."""
        at = self._at
        if n_bytes > len(self._data) - at:
            raise ValueError(
                f"{self._path} is cut off or damaged: at byte {at:,} its header counts "
                f"{n_bytes:,} bytes, and {len(self._data) - at:,} are left"
            )
        self._at += n_bytes
        return at

    def _number(self, form: str) -> int:
        at = self._skip(struct.calcsize(form))
        return int(struct.unpack_from(self._order + form, self._data, at)[0])

    def _string(self) -> bytes:
        at = self._skip(self._number("Q"))
        return self._data[at : self._at]

    def _value(self, kind: int, depth: int = 0) -> None:
        if kind == _STRING:
            self._string()
        elif kind == _ARRAY:
            if depth == _MOST_NESTED:
                raise ValueError(
                    f"{self._path} is damaged: before byte {self._at:,} arrays lie in more than "
                    f"{_MOST_NESTED} others"
                )
            inner, length = self._number("I"), self._number("Q")
            if inner in _NUMBER_BYTES:
                self._skip(length * _NUMBER_BYTES[inner])
            else:
                for _ in range(length):
                    self._value(inner, depth + 1)
        elif kind in _NUMBER_BYTES:
            self._skip(_NUMBER_BYTES[kind])
        else:
            raise ValueError(
                f"{self._path} is damaged: a value before byte {self._at:,} is of the kind {kind}, "
                "which GGUF lacks"
            )

    def _tensor(self, sizes: dict[int, tuple[int, int]]) -> int:
        """Where a tensor ends, in bytes after the header; its start if the kind is unknown.

        Args:
            sizes: numbers and bytes of a block, by kind.
        """
        self._string()
        n_dimensions = self._number("I")
        if n_dimensions > _MOST_DIMENSIONS:
            raise ValueError(
                f"{self._path} is damaged: a tensor before byte {self._at:,} has {n_dimensions:,} "
                f"dimensions, and {_MOST_DIMENSIONS} are allowed"
            )
        start = self._skip(8 * n_dimensions)
        shape = struct.unpack_from(f"{self._order}{n_dimensions}Q", self._data, start)
        block, n_bytes = sizes.get(self._number("I"), (1, 0))
        return self._number("Q") + math.prod(shape) // block * n_bytes
