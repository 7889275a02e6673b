"""Hidden states on disk: an `ActivationCache` is a folder of three files.

    manifest.json       what the rows are: model, hook, tokens, dtype, sizes, what was dropped
    rows.safetensors    rows [n_rows, d_in], in the dtype the model ran in (nothing is lost)
    index.safetensors   row_window, row_position int32 [n_rows]; tokens int32 [n_windows, context]

The rows are one memory-mapped tensor of any size: opening a cache reads none of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bae_fast.arguments import check_int

FORMAT = "bae_fast.activation_cache"
FORMAT_VERSION = 1
SPLIT_RULE = (
    "held out: the whole windows among the last n_heldout kept rows; "
    "left out: the window before them; training: everything before that window"
)

MEND = "remove that folder and harvest again"
MANIFEST_NAME, ROWS_NAME, INDEX_NAME = "manifest.json", "rows.safetensors", "index.safetensors"
DTYPE_NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64",
}
_SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}


class Split(NamedTuple):
    """Rows to train on and rows to evaluate on, as ranges of row numbers; see `SPLIT_RULE`."""

    train: range
    heldout: range

    def as_dict(self) -> dict[str, Any]:
        """The split as plain numbers, to be written beside the results it led to."""
        return {
            "rule": SPLIT_RULE,
            "train": [self.train.start, self.train.stop],
            "heldout": [self.heldout.start, self.heldout.stop],
            "n_train": len(self.train),
            "n_heldout": len(self.heldout),
            "n_left_out": self.heldout.start - self.train.stop,
        }


class TokenContext(NamedTuple):
    """A row's token and its neighbours in the window, as token ids in reading order."""

    before: list[int]
    token: int
    after: list[int]


@dataclass(frozen=True, eq=False)  # its tensors have no one truth of equality
class ActivationCache:
    """Hidden states of one module over a text, and the token each of them belongs to.

    Attributes:
        folder: where it lies.
        manifest: the contents of manifest.json.
        rows: [n_rows, d_in] in the harvest dtype, memory-mapped, in the order of the text. The
            mapping is private: writing to the tensor does not change the file.
        row_window: int32 [n_rows], the window a row comes from.
        row_position: int32 [n_rows], its position in that window.
        tokens: int32 [n_windows, context_size], the windows the model was run on.
    """

    folder: Path
    manifest: dict[str, Any]
    rows: Tensor
    row_window: Tensor
    row_position: Tensor
    tokens: Tensor

    @property
    def n_rows(self) -> int:
        """Number of rows kept."""
        return int(self.rows.shape[0])

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return int(self.rows.shape[1])

    @property
    def context_size(self) -> int:
        """Tokens per window."""
        return int(self.tokens.shape[1])

    @property
    def n_windows(self) -> int:
        """Number of windows the model was run on."""
        return int(self.tokens.shape[0])

    def __len__(self) -> int:
        return self.n_rows

    def __repr__(self) -> str:
        m = self.manifest
        return (
            f"ActivationCache({self.n_rows:,} rows of {self.d_in}, {m['dtype']}, "
            f"{m['model_name']} {m['hook_name']}, {self.n_windows:,} windows of "
            f"{self.context_size})"
        )

    def dropped_rows(self) -> str:
        """One line: how many rows were kept, and how many were dropped for which reason."""
        reasons = {
            "position": "at the start of windows",
            "not_text": "at padding or special tokens",
            "not_finite": f"not finite in {self.manifest['dtype']}",
            "norm": f"of a norm over {self.manifest.get('max_norm_ratio')} medians",
        }
        dropped = self.manifest["dropped"]
        parts = [f"{dropped[k]:,} {said}" for k, said in reasons.items() if dropped.get(k)]
        total = self.n_rows + sum(dropped.get(k, 0) for k in reasons)
        gone = "; dropped " + ", ".join(parts) if parts else ""
        return f"{self.n_rows:,} of {total:,} rows kept{gone}"

    def split(self, n_heldout: int = 4096) -> Split:
        """Divide the rows so that no window, and so no text, is on both sides.

        Held out are the whole windows among the last `n_heldout` kept rows: they begin with the
        first window that starts at row n_rows - n_heldout or later. The window before them, which
        is the one cut by that bound if any is, belongs to neither side. Everything before it is
        for training. With windows of 256, position 0 dropped, and 4096, that is 16 windows
        (4080 rows where no norm outlier was dropped) and one window left out.

        Args:
            n_heldout: rows looked at, from the end; at least one window's worth.

        Raises:
            ValueError: the bound leaves no whole window held out, or none to train on.
        """
        check_int("n_heldout", n_heldout, 1)
        window = self.row_window
        starts = torch.ones(self.n_rows, dtype=torch.bool)
        starts[1:] = window[1:] != window[:-1]
        first_rows = starts.nonzero().squeeze(1)  # the first kept row of every window
        k = int(torch.searchsorted(first_rows, max(self.n_rows - n_heldout, 0)))
        if k >= len(first_rows) or k < 2:
            side = "hold out" if k >= len(first_rows) else "train on"
            raise ValueError(
                f"n_heldout={n_heldout} leaves no whole window to {side}: this cache has "
                f"{self.n_rows:,} rows in {len(first_rows):,} windows"
            )
        return Split(
            train=range(int(first_rows[k - 1])), heldout=range(int(first_rows[k]), self.n_rows)
        )

    def check_rows(self, rows: range) -> None:
        """Raise ValueError where a range of row numbers has steps or leaves the cache."""
        if rows.step != 1 or not 0 <= rows.start < rows.stop <= self.n_rows:
            raise ValueError(
                f"rows must be a range in steps of 1 within the cache's {self.n_rows:,} rows; "
                f"got {rows!r}"
            )

    def token_context(self, row: int, before: int = 8, after: int = 4) -> TokenContext:
        """The token of a row with up to `before` and `after` neighbours from its own window.

        Raises:
            IndexError: no such row.
        """
        if not -self.n_rows <= row < self.n_rows:
            raise IndexError(f"row must be one of this cache's {self.n_rows:,} rows; got {row}")
        window = self.tokens[int(self.row_window[row])].tolist()
        at = int(self.row_position[row])
        return TokenContext(
            before=window[max(at - before, 0) : at],
            token=window[at],
            after=window[at + 1 : at + 1 + after],
        )

    @classmethod
    def open(cls, folder: str | Path) -> ActivationCache:
        """Open a cache; the rows are mapped, not read.

        Raises:
            ValueError: no such folder, not a cache, another format version, or files that do not
                agree with the manifest.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder)
        shapes = {
            ROWS_NAME: {"rows": [manifest["n_rows"], manifest["d_in"]]},
            INDEX_NAME: {
                "row_window": [manifest["n_rows"]],
                "row_position": [manifest["n_rows"]],
                "tokens": [manifest["n_windows"], manifest["context_size"]],
            },
        }
        dtypes = {ROWS_NAME: _SAFETENSORS_DTYPES.get(manifest["dtype"]), INDEX_NAME: "I32"}
        found: dict[str, Tensor] = {}
        for name, expected in shapes.items():
            found.update(_read_tensors(folder, name, expected, dtypes[name]))
        cache = cls(
            folder=folder,
            manifest=manifest,
            rows=found["rows"],
            row_window=found["row_window"],
            row_position=found["row_position"],
            tokens=found["tokens"],
        )
        cache._check_index()
        return cache

    @classmethod
    def open_or_none(cls, folder: str | Path, key: str) -> ActivationCache | None:
        """Open the cache that `harvest` would make under this key, or None where there is none.

        Args:
            folder: the folder given to `harvest`.
            key: see `cache_key`.

        Raises:
            ValueError: something lies there that is not that cache.
        """
        path = Path(folder) / key
        if not path.exists():
            return None
        cache = cls.open(path)
        if cache.manifest["key"] != key:
            raise ValueError(
                f"folder={str(path)!r} holds the cache {cache.manifest['key']!r}: "
                "remove it, or give another folder"
            )
        return cache

    def _check_index(self) -> None:
        w, p = self.row_window.long(), self.row_position.long()
        place = w * self.context_size + p
        fine = (
            self.n_rows > 0
            and tokens_digest(self.tokens) == self.manifest["tokens_sha256"]
            and bool(((w >= 0) & (w < self.n_windows)).all())
            and bool(((p >= 0) & (p < self.context_size)).all())
            and bool((place[1:] > place[:-1]).all())
        )
        if not fine:
            raise ValueError(f"folder={str(self.folder)!r}: {INDEX_NAME} is corrupt; {MEND}")


# rows over this many median norms are left out wherever rows of a model are used: harvests, fits,
# tokens that a splice replaces
MAX_NORM_RATIO = 5.0

# a larger share of outlying norms is said aloud: a few rows in a thousand are usual
USUAL_OUTLIERS = 0.05


def row_norms(rows: Tensor) -> Tensor:
    """Norms of rows ``[..., d]``, in float32 or wider: those that the ratio is of."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return torch.linalg.vector_norm(rows.detach(), dim=-1, dtype=dtype)


def cache_key(
    name: str,
    revision: str,
    dtype: torch.dtype,
    token_windows: Tensor,
    hook: str,
    *,
    drop_positions: int = 1,
    max_norm_ratio: float = MAX_NORM_RATIO,
    mask: Tensor | None = None,
    text: Tensor | None = None,
) -> str:
    """The name of the folder that `harvest` makes for these arguments.

    It depends on the model's name, revision and dtype, the hook, the tokens, which of them are
    padding and which are text, and what is dropped; not on the batch size or the device.

    Args:
        revision: as `LanguageModel.current_revision` gives it.
        mask: see `harvest`; as `bae_fast.lm.inputs.padding_mask` gives it where harvest gets none.
        text: as `bae_fast.lm.inputs.text_mask` gives it.
    """
    settings = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "model": name,
        "revision": revision,
        "dtype": DTYPE_NAMES.get(dtype, str(dtype)),
        "hook": hook,
        "tokens": tokens_digest(token_windows),
        "shape": list(token_windows.shape),
        "drop_positions": drop_positions,
        "max_norm_ratio": float(max_norm_ratio),
    }
    for part, flags in (("mask", mask), ("text", text)):
        if flags is not None:
            settings[part] = tokens_digest(flags != 0)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", f"{Path(name).name}-{hook}").strip("-.")[:64]
    return f"{readable}-{digest}"


def rows_header(dtype: torch.dtype, n_rows: int, width: int) -> bytes:
    """What a file of rows begins with: as safetensors has it, ended in spaces."""
    header = {
        "rows": {
            "dtype": _SAFETENSORS_DTYPES[DTYPE_NAMES[dtype]],
            "shape": [n_rows, width],
            "data_offsets": [0, n_rows * width * dtype.itemsize],
        }
    }
    text = json.dumps(header).encode().ljust(RowsFile.HEADER - 8)
    return len(text).to_bytes(8, "little") + text


class RowsFile:
    """rows.safetensors, written row by row without holding the rows.

    safetensors' own writer takes whole tensors in memory. The format is a little-endian uint64,
    the length of a JSON header, then the header, then the data; the header may end in spaces. So
    its place is kept free, rows are appended, those to be dropped are closed up in place, and the
    header is written last, when the number of rows is known.
    """

    HEADER = 512  # bytes, the leading length included: keeps the data aligned
    _CHUNK = 1 << 16  # rows moved at a time when closing up

    def __init__(self, path: Path) -> None:
        self.path = path
        self.dtype = torch.float32
        self.width = 0
        self.n_rows = 0
        self._file = path.open("w+b")
        self._file.write(bytes(self.HEADER))

    def __enter__(self) -> RowsFile:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._file.close()

    @property
    def _row_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    def append(self, rows: Tensor) -> None:
        """Write further rows ``[n, d]``; the first ones decide dtype and width.

        Raises:
            ValueError: first rows of a dtype that a cache does not keep.
        """
        if self.n_rows == 0:
            if rows.dtype not in DTYPE_NAMES:
                allowed = ", ".join(DTYPE_NAMES.values())
                raise ValueError(f"hook must give {allowed}; got {rows.dtype}")
            self.dtype, self.width = rows.dtype, rows.shape[1]
        # NumPy has no bfloat16: the rows go as bytes.
        self._file.write(rows.contiguous().view(torch.uint8).numpy().data)
        self.n_rows += len(rows)

    def finish(self, keep: Tensor) -> None:
        """Drop the rows where `keep` (bool [n_rows]) is false and write the header."""
        n_kept = int(keep.sum())
        if n_kept < self.n_rows:
            self._file.flush()
            data = np.memmap(
                self._file,
                dtype=np.uint8,
                mode="r+",
                offset=self.HEADER,
                shape=(self.n_rows, self._row_bytes),
            )
            mask, end = keep.numpy(), 0
            for start in range(0, self.n_rows, self._CHUNK):
                # The target never lies behind the source, and the selection is a copy.
                chunk = data[start : start + self._CHUNK][mask[start : start + self._CHUNK]]
                data[end : end + len(chunk)] = chunk
                end += len(chunk)
            data.flush()
            del data
        self._file.seek(0)
        self._file.write(rows_header(self.dtype, n_kept, self.width))
        self._file.truncate(self.HEADER + n_kept * self._row_bytes)
        self._file.flush()
        os.fsync(self._file.fileno())


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_NAME
    where = f"folder={str(folder)!r}"
    if not folder.is_dir():
        raise ValueError(f"{where} must be the folder of an activation cache; it is no folder")
    if not path.is_file():
        raise ValueError(f"{where} has no {MANIFEST_NAME}: not an activation cache")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {MANIFEST_NAME} is corrupt ({error}); {MEND}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{where}: {MANIFEST_NAME} is not of an activation cache ({FORMAT})")
    if manifest.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{where} has format version {manifest.get('version')!r}: this program reads "
            f"{FORMAT_VERSION}; {MEND}"
        )
    kinds: dict[str, type] = {
        "key": str, "model_name": str, "hook_name": str, "tokens_sha256": str, "dtype": str,
        "context_size": int, "n_windows": int, "d_in": int, "n_rows": int, "dropped": dict,
    }  # fmt: skip
    wrong = [name for name, kind in kinds.items() if not isinstance(manifest.get(name), kind)]
    if not wrong and not all(isinstance(n, int) for n in manifest["dropped"].values()):
        wrong = ["numbers of dropped rows"]
    if wrong:
        raise ValueError(f"{where}: {MANIFEST_NAME} lacks {', '.join(wrong)}; {MEND}")
    return manifest


def _read_tensors(
    folder: Path, name: str, shapes: dict[str, list[int]], dtype: str | None
) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    where = f"folder={str(folder)!r}"
    if not (folder / name).is_file():
        raise ValueError(f"{where} has no {name}; {MEND}")
    try:
        with safe_open(str(folder / name), framework="pt") as file:
            have = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            for key, shape in shapes.items():
                if key not in have:
                    raise ValueError(f"{where}: {name} has no {key}; {MEND}")
                found = (list(have[key].get_shape()), have[key].get_dtype())
                if found != (shape, dtype):
                    raise ValueError(
                        f"{where}: {key} is {found[1]} {found[0]}, but {MANIFEST_NAME} says "
                        f"{dtype} {shape}; {MEND}"
                    )
            return {key: file.get_tensor(key) for key in shapes}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{where}: {name} is corrupt ({error}); {MEND}") from error


def tokens_digest(tokens: Tensor) -> str:
    """SHA-256 of token ids, the same for every integer dtype and device."""
    plain = tokens.to("cpu", torch.int32).contiguous()
    return hashlib.sha256(plain.numpy().astype("<i4").tobytes()).hexdigest()
