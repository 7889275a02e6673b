"""Hidden states of several modules on disk, in shards that many processes can make.

    harvest.json                     what is harvested; a harvest of other settings is refused
    limits.json                      the largest norm that is kept, of each hook
    <hook>/shard-00017.safetensors   rows [n, d], in the dtype the model ran in
    index/shard-00017.safetensors    row_window, row_position int32 [n]; tokens int32 [w, context];
                                     a checksum of every block of rows, of each hook
    manifest.json                    written last: sizes, and a digest of every file

A shard is a fixed range of windows, and rows stay in the order of the text. Here the cache is read;
:mod:`bae_fast.lm.shard_harvest` makes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bae_fast.arguments import check_int
from bae_fast.files import file_digest, parse_safetensors, read_json
from bae_fast.lm.cache import DTYPE_NAMES, MANIFEST_NAME, Split, rows_header
from bae_fast.lm.loading import LanguageModel

FORMAT, FORMAT_VERSION = "bae_fast.sharded_cache", 1
SETTINGS_NAME, LIMITS_NAME, INDEX_FOLDER, LOCKS = "harvest.json", "limits.json", "index", ".locks"

# rows that are read, checked and shuffled as one
BLOCK_ROWS = 256

# files of rows that a reader keeps open
_OPEN_FILES = 64

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class Shard(NamedTuple):
    """What the manifest says of one shard.

    Attributes:
        first_window, n_windows: which windows of the text it holds.
        first_row, n_rows: among all rows.
        files: path in the folder -> SHA-256 of the file.
    """

    first_window: int
    n_windows: int
    first_row: int
    n_rows: int
    files: dict[str, str]


class ShardIndex(NamedTuple):
    """Which tokens a shard's rows belong to.

    Attributes:
        row_window: int32 ``[n]``, numbers of windows among all.
        row_position: int32 ``[n]``.
        tokens: int32 ``[n_windows, context_size]``, the shard's windows.
    """

    row_window: Tensor
    row_position: Tensor
    tokens: Tensor


_MEND = "remove the shard's files and manifest.json, and harvest again"


@contextlib.contextmanager
def naming_corrupt(path: Path) -> Iterator[None]:
    """One error for whatever a damaged file of JSON or of tensors makes of itself."""
    from safetensors import SafetensorError

    try:
        yield
    except (
        ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, SafetensorError
    ) as error:  # fmt: skip
        reason = (str(error).splitlines() or [""])[0]
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ValueError(f"{path} is corrupt ({kind}{reason}); {_MEND}") from error


def check_size(value: Any, least: int = 1) -> int:
    """A size that a file states; ValueError where it can be none."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**48:
        raise ValueError(f"a size must be an int from {least} to 2^48; got {value!r}")
    return value


def shard_name(number: int) -> str:
    """The name of a shard's files."""
    return f"shard-{number:05d}.safetensors"


# -- reading -----------------------------------------------------------------------------------


class ShardedCache:
    """Hidden states of several hooks, row by row of the same tokens, read in checked blocks.

    Nothing is mapped: memory holds what was asked for. Several threads may read.

    Attributes:
        folder: where it lies.
        manifest: the contents of manifest.json.
        widths: hook -> d.
        dtype: the dtype of the rows.
        shards: what lies in each shard.
        n_rows, n_windows, context_size: sizes of all.
        block_sizes: int64 ``[n_blocks]``, rows of each block.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open a finished cache; sizes of all files are checked, contents when they are read.

        Raises:
            ValueError: no such folder, no finished cache, a missing file or a truncated one.
        """
        self.folder = Path(folder)
        where = f"folder={str(folder)!r}"
        if not (self.folder / MANIFEST_NAME).is_file():
            unfinished = (self.folder / SETTINGS_NAME).is_file()
            raise ValueError(
                f"{where} must hold a sharded cache; it has no {MANIFEST_NAME}"
                + (": the harvest is not finished, the same command goes on" if unfinished else "")
            )
        self.manifest = read_json(self.folder / MANIFEST_NAME)
        if self.manifest.get("format") != FORMAT or self.manifest.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"{where} must hold a cache of the format {FORMAT} {FORMAT_VERSION}; got "
                f"{self.manifest.get('format')} {self.manifest.get('version')}"
            )
        with naming_corrupt(self.folder / MANIFEST_NAME):
            self.widths = {str(hook): check_size(d) for hook, d in self.manifest["hooks"].items()}
            self.dtype = _DTYPES[self.manifest["dtype"]]
            self.context_size = check_size(self.manifest["context_size"])
            self.shards = [Shard(**shard) for shard in self.manifest["shards"]]
            for number, shard in enumerate(self.shards):
                check_size(shard.n_windows), check_size(shard.n_rows, 0)
                str(shard.files[f"{INDEX_FOLDER}/{shard_name(number)}"])
            rows = [0, *itertools.accumulate(shard.n_rows for shard in self.shards)]
            if not rows[-1] or rows[:-1] != [shard.first_row for shard in self.shards]:
                raise ValueError("the numbers of rows do not agree")
            for name in ("model_name", "model_revision"):
                str(self.manifest[name])
        self.n_rows = sum(shard.n_rows for shard in self.shards)
        self.n_windows = sum(shard.n_windows for shard in self.shards)
        # of every block: its shard, and its first row among all
        counts = np.array([-(-shard.n_rows // BLOCK_ROWS) for shard in self.shards])
        self._shard = np.repeat(np.arange(len(self.shards)), counts)
        inside = np.arange(len(self._shard)) - np.repeat(counts.cumsum() - counts, counts)
        first_rows = np.array([shard.first_row for shard in self.shards], dtype=np.int64)
        self._starts = first_rows[self._shard] + inside * BLOCK_ROWS
        ends = first_rows + np.array([shard.n_rows for shard in self.shards], dtype=np.int64)
        sizes = np.minimum(BLOCK_ROWS, ends[self._shard] - self._starts)
        self.block_sizes = torch.from_numpy(sizes)
        self._files: OrderedDict[Path, Any] = OrderedDict()
        self._sums: dict[int, dict[str, np.ndarray]] = {}
        self._lock = threading.Lock()
        for number, shard in enumerate(self.shards):
            for hook, d in self.widths.items():
                path = self._path(hook, number)
                want = len(rows_header(self.dtype, shard.n_rows, d))
                want += shard.n_rows * d * self.dtype.itemsize
                have = path.stat().st_size if path.is_file() else None
                if have != want:
                    state = "is missing" if have is None else f"has {have:,} bytes"
                    raise ValueError(f"{path} must have {want:,} bytes; it {state}: {_MEND}")

    def __repr__(self) -> str:
        hooks = ", ".join(f"{hook} ({d})" for hook, d in self.widths.items())
        return (
            f"ShardedCache({self.n_rows:,} rows of {hooks}, {self.manifest['dtype']}, "
            f"{self.manifest['model_name']}, {len(self.shards):,} shards)"
        )

    def _path(self, hook: str, number: int) -> Path:
        return self.folder / hook / shard_name(number)

    @property
    def n_blocks(self) -> int:
        """Blocks of at most 256 rows; none crosses the end of a shard."""
        return len(self._starts)

    def block_range(self, block: int) -> range:
        """Numbers of the rows of a block."""
        start, shard = int(self._starts[block]), self.shards[self._shard[block]]
        return range(start, min(start + BLOCK_ROWS, shard.first_row + shard.n_rows))

    def blocks_of(self, rows: Tensor) -> Tensor:
        """The blocks that rows, by number, lie in: int64 of the same shape."""
        found = np.searchsorted(self._starts, rows.numpy(), side="right") - 1
        return torch.from_numpy(found)

    def read_block(self, block: int, hooks: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The rows of a block: hook -> ``[n, d]``, n at most 256.

        Raises:
            ValueError: bytes that are not those that were written; the file is named.
        """
        number = int(self._shard[block])
        shard = self.shards[number]
        first = int(self._starts[block]) - shard.first_row
        n = min(BLOCK_ROWS, shard.n_rows - first)
        sums = self._checksums(number)
        found = {}
        for hook in self.widths if hooks is None else hooks:
            d = self.widths[hook]
            rows = torch.empty(n, d, dtype=self.dtype)
            data = rows.view(torch.uint8).numpy().data.cast("B")
            path = self._path(hook, number)
            header = len(rows_header(self.dtype, shard.n_rows, d))
            with self._lock:
                file = self._open(path)
                file.seek(header + first * d * self.dtype.itemsize)
                read = file.readinto(data)
            if read != len(data) or zlib.crc32(data) != sums[hook][first // BLOCK_ROWS]:
                raise ValueError(
                    f"{path} is corrupt: rows {first:,} to {first + n - 1:,} are not those that "
                    f"were written; {_MEND}"
                )
            found[hook] = rows
        return found

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            while len(self._files) >= _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            self._files[path] = path.open("rb", buffering=0)
        self._files.move_to_end(path)
        return self._files[path]

    def _checksums(self, number: int) -> dict[str, np.ndarray]:
        if number not in self._sums:
            tensors = self._read_index(number)
            self._sums[number] = {
                hook: tensors[f"crc32 {hook}"].numpy().astype(np.uint32) for hook in self.widths
            }
        return self._sums[number]

    def _read_index(self, number: int) -> dict[str, Tensor]:
        path = self._path(INDEX_FOLDER, number)
        shard = self.shards[number]
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != shard.files[f"{INDEX_FOLDER}/{shard_name(number)}"]:
            raise ValueError(f"{path} is corrupt: its digest is not the manifest's; {_MEND}")
        return parse_safetensors(data, path)[0]

    def index(self, number: int) -> ShardIndex:
        """Which tokens the rows of a shard belong to.

        Raises:
            ValueError: a file that is not the one that was written.
        """
        tensors = self._read_index(number)
        return ShardIndex(tensors["row_window"], tensors["row_position"], tensors["tokens"])

    def split(self, n_heldout: int = 4096) -> Split:
        """Rows to train on and held-out ones, by the rule of :meth:`ActivationCache.split`.

        Raises:
            ValueError: no whole window would be held out, or none be left to train on.
        """
        check_int("n_heldout", n_heldout, 1)
        firsts: list[int] = []  # first rows of windows, from some shard to the end
        bound = max(self.n_rows - n_heldout, 0)
        for number in reversed(range(len(self.shards))):
            shard = self.shards[number]
            window = self.index(number).row_window
            starts = torch.ones(len(window), dtype=torch.bool)
            starts[1:] = window[1:] != window[:-1]
            firsts = [shard.first_row + int(i) for i in starts.nonzero()] + firsts
            if sum(first < bound for first in firsts) >= 2:
                break
        k = sum(first < bound for first in firsts)
        if k >= len(firsts) or k < 1 or firsts[k - 1] == 0:
            side = "hold out" if k >= len(firsts) else "train on"
            raise ValueError(
                f"n_heldout={n_heldout} leaves no whole window to {side}: this cache has "
                f"{self.n_rows:,} rows in {self.n_windows:,} windows"
            )
        return Split(train=range(firsts[k - 1]), heldout=range(firsts[k], self.n_rows))

    def verify(self) -> None:
        """Read every file and compare its digest with the manifest's.

        Raises:
            ValueError: naming the first file that differs.
        """
        for shard in self.shards:
            for name, digest in shard.files.items():
                if file_digest(self.folder / name) != digest:
                    raise ValueError(
                        f"{self.folder / name} is corrupt: its digest is not the manifest's; "
                        f"{_MEND}"
                    )

    def check_model(self, lm: LanguageModel) -> None:
        """Refuse a language model that the rows are not of.

        Raises:
            ValueError: another model, or the same one with other weights; both are named.
        """
        for name, here in (("model_name", lm.name), ("model_revision", lm.current_revision())):
            if self.manifest[name] != here:
                raise ValueError(
                    f"lm must be the model of {self.folder}, whose {name} is "
                    f"{self.manifest[name]!r}; got {here!r}"
                )

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        with self._lock:
            while self._files:
                self._files.popitem()[1].close()
