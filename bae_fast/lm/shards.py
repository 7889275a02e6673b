"""Hidden states of several modules on disk, in shards that many processes can make.

    harvest.json                     what is harvested; a harvest of other settings is refused
    limits.json                      the largest norm that is kept, of each hook
    <hook>/shard-00017.safetensors   rows [n, d], in the dtype the model ran in
    index/shard-00017.safetensors    row_window, row_position int32 [n]; tokens int32 [w, context];
                                     a checksum of every block of rows, of each hook
    manifest.json                    written last: sizes, and a digest of every file

A shard is a fixed range of windows. Its index is written behind its rows, and under its final name
the shard is done. Any process can make a missing one, in one pass of the model for all hooks, and a
process that is killed loses the shard that it was making. Rows stay in the order of the text.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import threading
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bae_fast.arguments import check_int
from bae_fast.files import (
    file_digest,
    locked,
    naming,
    parse_safetensors,
    read_json,
    replacing,
    write_json,
    write_safetensors,
)
from bae_fast.lm.cache import (
    DTYPE_NAMES,
    MANIFEST_NAME,
    MAX_NORM_RATIO,
    SPLIT_RULE,
    RowsFile,
    Split,
    rows_header,
)
from bae_fast.lm.capture import Candidates, Capture, within
from bae_fast.lm.documents import TokenWindows, Windows
from bae_fast.lm.hooks import in_order
from bae_fast.lm.identity import own_hooks
from bae_fast.lm.inputs import check_ids, check_length, excluded_tokens
from bae_fast.lm.loading import LanguageModel
from bae_fast.progress import progress_bar

FORMAT, FORMAT_VERSION = "bae_fast.sharded_cache", 1
SETTINGS_NAME, LIMITS_NAME, INDEX_FOLDER, LOCKS = "harvest.json", "limits.json", "index", ".locks"

# rows that are read, checked and shuffled as one
BLOCK_ROWS = 256

# tokens whose norms say what an outlying norm is
LIMIT_TOKENS = 65_536

# files of rows that a reader keeps open
_OPEN_FILES = 64

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class OtherHarvestError(ValueError):
    """A folder that holds a harvest of other settings.

    Attributes:
        folder: it.
        difference: what is otherwise there.
    """

    def __init__(self, folder: Path, difference: str) -> None:
        super().__init__(
            f"folder={str(folder)!r} must hold a harvest of the same settings; {difference}"
        )
        self.folder, self.difference = folder, difference


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


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
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


def _size(value: Any, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**48:
        raise ValueError(f"a size must be an int from {least} to 2^48; got {value!r}")
    return value


def _read_limits(path: Path, hooks: Iterable[str]) -> dict[str, float]:
    """The largest norms that are kept, by hook.

    Raises:
        ValueError: a file that does not hold a positive number for each hook.
    """
    with _readable(path):
        limits = {hook: read_json(path)["limits"][hook] for hook in hooks}
        for limit in limits.values():
            if not isinstance(limit, (int, float)) or not 0 < limit < float("inf"):
                raise ValueError(f"a limit must be a number over 0; got {limit!r}")
        return {hook: float(limit) for hook, limit in limits.items()}


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
        with _readable(self.folder / MANIFEST_NAME):
            self.widths = {str(hook): _size(d) for hook, d in self.manifest["hooks"].items()}
            self.dtype = _DTYPES[self.manifest["dtype"]]
            self.context_size = _size(self.manifest["context_size"])
            self.shards = [Shard(**shard) for shard in self.manifest["shards"]]
            for number, shard in enumerate(self.shards):
                _size(shard.n_windows), _size(shard.n_rows, 0)
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


_MEND = "remove the shard's files and manifest.json, and harvest again"


# -- harvesting --------------------------------------------------------------------------------


def harvest_shards(
    lm: LanguageModel,
    text: Windows | Tensor,
    hooks: Sequence[str],
    folder: str | Path,
    *,
    shard_windows: int | None = None,
    batch_size: int = 8,
    drop_positions: int = 1,
    max_norm_ratio: float = MAX_NORM_RATIO,
    exclude_tokens: Iterable[int] | None = None,
    rank: int = 0,
    world: int = 1,
    progress: bool = True,
) -> ShardedCache:
    """Keep the outputs of several modules for all windows of a text, or open what is there.

    A call goes on where an earlier one was stopped or killed. Several processes may call it with
    the same folder at the same time, on one machine or on a shared file system with locks: each
    makes the shards that nobody has made or is making, and all return when the cache is finished.

    Rows are dropped as :func:`bae_fast.lm.harvest` drops them, except that the median norm is that
    of the first 65,536 tokens; a row is kept where every hook keeps it.

    Args:
        lm: the model, without forward hooks of your own.
        text: token windows ``[n, context]``, or what reads them from documents.
        hooks: modules, see :func:`bae_fast.lm.harvest`.
        folder: the folder of this cache.
        shard_windows: windows a shard; None: those that hold 65,536 tokens.
        batch_size: windows a forward pass.
        drop_positions, max_norm_ratio, exclude_tokens: see :func:`bae_fast.lm.harvest`.
        rank, world: shard k is begun by rank k mod world. Ranks that are done help the others.
        progress: show a bar.

    Raises:
        ValueError: an argument out of range, a folder with a harvest of other settings (the
            first that differs is named), forward hooks of your own, or text without a window.
        OSError: a file cannot be written, for instance on a full disk; it is named.
    """
    return _Harvest(
        Capture(
            lm,
            hooks,
            exclude_tokens=exclude_tokens,
            drop_positions=drop_positions,
            max_norm_ratio=max_norm_ratio,
        ),
        TokenWindows(text) if isinstance(text, Tensor) else text,
        Path(folder),
        shard_windows,
        batch_size,
    ).run(rank, world, progress)


class _Harvest:
    """One process's part of a harvest."""

    def __init__(
        self,
        capture: Capture,
        text: Windows,
        folder: Path,
        shard_windows: int | None,
        batch_size: int,
    ) -> None:
        lm, length = capture.lm, text.context_size
        if shard_windows is None:
            shard_windows = -(-LIMIT_TOKENS // length)
        for name, value in (("shard_windows", shard_windows), ("batch_size", batch_size)):
            check_int(name, value, 1)
        if capture.drop_positions >= length:
            raise ValueError(
                f"drop_positions must be below context_size={length}; got {capture.drop_positions}"
            )
        check_length(lm.model, length, "text")
        hooks = own_hooks(lm.model)
        if hooks:
            raise ValueError(
                "lm must have no forward hooks of your own, whose effect cannot be compared "
                f"between processes; got {', '.join(hooks)}"
            )
        self.capture, self.text, self.folder = capture, text, folder
        self.shard_windows, self.batch_size = shard_windows, batch_size
        self._start = text.state_dict()
        first = text.read(1)
        text.load_state_dict(self._start)
        if not len(first):
            raise ValueError("text must give at least one window; got none")
        excluded = capture.exclude_tokens
        self.settings = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "model_name": lm.name,
            "model_label": lm.label,
            "model_revision": lm.current_revision(),
            "model_dtype": DTYPE_NAMES.get(lm.dtype, str(lm.dtype)),
            "hook_names": capture.hooks,
            "text": text.identity(),
            "first_window": first[0].tolist(),
            "context_size": length,
            "drop_positions": capture.drop_positions,
            "max_norm_ratio": (
                capture.max_norm_ratio if np.isfinite(capture.max_norm_ratio) else None
            ),
            "exclude_tokens": excluded_tokens(lm.tokenizer, excluded),
            "shard_windows": shard_windows,
            "block_rows": BLOCK_ROWS,
            "split_rule": SPLIT_RULE,
        }

    def run(self, rank: int, world: int, progress: bool) -> ShardedCache:
        self._agree()
        if (self.folder / MANIFEST_NAME).is_file():
            return ShardedCache(self.folder)
        number, n_shards = rank, None
        with (
            self.capture.engine,
            progress_bar(
                self.text.n_windows or 0, what="harvest", unit="win", show=progress
            ) as bar,
        ):
            # first this rank's own shards, then what is missing, then those that others hold
            while n_shards is None:
                n_windows = self._shard(number, wait=False, progress=bar.update)
                if n_windows is not None and n_windows < self.shard_windows:
                    n_shards = number + (n_windows > 0)
                number += world
            while n_shards and self._shard(n_shards - 1, wait=True, progress=bar.update) == 0:
                n_shards -= 1  # this rank's last one lay beyond the end
            for wait in (False, True):
                for number in range(n_shards):
                    self._shard(number, wait=wait, progress=bar.update)
        self._finish(n_shards)
        return ShardedCache(self.folder)

    def _agree(self) -> None:
        """Write the settings, or compare them with those that are there."""
        path = self.folder / SETTINGS_NAME
        with self._lock("settings", wait=True):
            if not path.is_file():
                write_json(path, self.settings)
        theirs = read_json(path)
        for name in {**theirs, **self.settings}:
            there, here = theirs.get(name), self.settings.get(name)
            if there != here:
                raise OtherHarvestError(
                    self.folder, f"its {name} is {_short(there)}, here it is {_short(here)}"
                )

    def _lock(self, name: str, *, wait: bool) -> AbstractContextManager[bool]:
        """Hold a lock for as long as this process lives: True, or False where another has it.

        Without locks shards may be made twice, to the same end.
        """
        path = self.folder / LOCKS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return locked(path, wait=wait)

    # -- one shard ---------------------------------------------------------------------------

    def _shard(self, number: int, *, wait: bool, progress: Callable[[int], Any]) -> int | None:
        """Make a shard unless it is there: its windows, or None where another process makes it."""
        done = self._done(number)
        if done is not None:
            return done
        with self._lock(f"shard-{number:05d}", wait=wait) as held:
            if not held:
                return None
            done = self._done(number)
            if done is not None:
                return done
            tokens = self._windows(number)
            if len(tokens):
                self._make(number, tokens, progress)
            return len(tokens)

    def _index_path(self, number: int) -> Path:
        return self.folder / INDEX_FOLDER / shard_name(number)

    def _about(self, number: int) -> dict[str, Any]:
        from safetensors import safe_open

        path = self._index_path(number)
        with _readable(path), safe_open(str(path), framework="pt") as file:
            about: dict[str, Any] = json.loads(file.metadata()["shard"])
            for name in ("n_windows", "n_rows"):
                _size(about[name], 0)
            for name in ("files", "dropped", "hooks"):
                dict(about[name])
            str(about["dtype"])
        return about

    def _done(self, number: int) -> int | None:
        """Windows of a shard that is there."""
        if not self._index_path(number).is_file():
            return None
        return int(self._about(number)["n_windows"])

    def _windows(self, number: int) -> Tensor:
        """The windows of a shard, read on from the nearest place before it that is known."""
        first = number * self.shard_windows
        here = self.text.state_dict()
        states = [self._start] if here["window"] > first else [here, self._start]
        before = [n for n in range(number) if self._index_path(n).is_file()]
        if before:
            states.append(self._about(before[-1])["text_state"])
        state = max(states, key=lambda state: int(state["window"]))
        if state is not here:
            self.text.load_state_dict(state)
        skip = first - int(state["window"])
        while skip > 0:
            read = len(self.text.read(min(skip, 1024)))
            if not read:
                break
            skip -= read
        tokens = self.text.read(self.shard_windows)
        if len(tokens):
            check_ids(self.capture.lm.model, tokens, "text")
        return tokens

    def _ends(self, tokens: Tensor) -> bool:
        """Whether the text, read up to the end of these windows of a shard, ends with them."""
        if len(tokens) < self.shard_windows:
            return True
        here = self.text.state_dict()
        try:
            return not len(self.text.read(1))
        finally:
            self.text.load_state_dict(here)

    def _candidates(self, tokens: Tensor) -> Iterator[Candidates]:
        batches = tokens.split(self.batch_size)
        kind = self.capture.lm.device.type
        with contextlib.closing(in_order(self.capture.candidates, batches, kind)) as results:
            yield from results

    def _make(self, number: int, tokens: Tensor, progress: Callable[[int], Any]) -> None:
        first = number * self.shard_windows
        text_state = self.text.state_dict()
        parts = []
        with contextlib.ExitStack() as stack:
            enough = tokens.numel() >= LIMIT_TOKENS
            first_norms = number == 0 and (enough or self._ends(tokens))
            if first_norms:  # others that want the limits wait for them
                stack.enter_context(self._lock("limits", wait=False))
            paths = {hook: self.folder / hook / shard_name(number) for hook in self.capture.hooks}
            temporary = {hook: stack.enter_context(_rows_file(p)) for hook, p in paths.items()}
            done = 0
            for part in self._candidates(tokens):
                for hook, rows in part.x.items():
                    with naming(paths[hook]):
                        temporary[hook].append(rows)
                n = min(self.batch_size, len(tokens) - done)
                # rows are on disk: of them only places and norms are kept
                parts.append(part._replace(x={}, places=part.places + done * tokens.shape[1]))
                done += n
                progress(n)
            norms = {h: torch.cat([part.norms[h] for part in parts]) for h in self.capture.hooks}
            limits = self._limits(norms if first_norms else None, tokens.shape[1])
            before = {
                reason: sum(part.dropped[reason] for part in parts) for reason in parts[0].dropped
            }
            keep, dropped = within(norms, limits, before)
            files, sums, widths = {}, {}, {}
            for hook, file in temporary.items():
                with naming(paths[hook]):
                    file.finish(keep)
                digest, sums[f"crc32 {hook}"] = _sums(file)
                files[f"{hook}/{shard_name(number)}"] = digest
                widths[hook] = file.width
            dtype = DTYPE_NAMES[next(iter(temporary.values())).dtype]
        # the rows are under their final names from here on
        places = torch.cat([part.places for part in parts])[keep]
        length = tokens.shape[1]
        index = {
            "row_window": (first + places // length).to(torch.int32),
            "row_position": (places % length).to(torch.int32),
            "tokens": tokens.to(torch.int32).contiguous(),
            **sums,
        }
        about = {
            "n_windows": len(tokens),
            "n_rows": len(places),
            "hooks": widths,
            "dtype": dtype,
            "dropped": dropped,
            "files": files,
            "text_state": text_state,
        }
        write_safetensors(self._index_path(number), index, {"shard": json.dumps(about)})

    def _limits(self, norms: dict[str, Tensor] | None, length: int) -> dict[str, float]:
        """The largest norms that are kept, by the first rows of the text.

        Args:
            norms: those of the first rows, where this process has them.
            length: tokens a window.
        """
        path = self.folder / LIMITS_NAME
        if not np.isfinite(self.capture.max_norm_ratio):
            return dict.fromkeys(self.capture.hooks, float("inf"))
        if norms is None:
            if path.is_file():
                return _read_limits(path, self.capture.hooks)
            # waits for the process that makes the first shard; if that one died, makes them here
            with self._lock("limits", wait=True):
                if path.is_file():
                    return _read_limits(path, self.capture.hooks)
                here = self.text.state_dict()
                self.text.load_state_dict(self._start)
                tokens = self.text.read(-(-LIMIT_TOKENS // length))
                self.text.load_state_dict(here)
                parts = [part.norms for part in self._candidates(tokens)]
                norms = {hook: torch.cat([p[hook] for p in parts]) for hook in self.capture.hooks}
                return self._limits(norms, length)
        if not path.is_file():
            limits = {hook: self.capture.limit(norm) for hook, norm in norms.items()}
            write_json(path, {"limits": limits, "tokens": LIMIT_TOKENS})
        return _read_limits(path, self.capture.hooks)

    # -- the end -----------------------------------------------------------------------------

    def _finish(self, n_shards: int) -> None:
        """Write the manifest; what it holds is the same whoever writes it."""
        shards, first_row, first_window = [], 0, 0
        dropped: dict[str, int] = {}
        abouts = [self._about(number) for number in range(n_shards)]
        for number, about in enumerate(abouts):
            index = f"{INDEX_FOLDER}/{shard_name(number)}"
            files = {**about["files"], index: file_digest(self.folder / index)}
            shard = Shard(first_window, about["n_windows"], first_row, about["n_rows"], files)
            shards.append(shard._asdict())
            first_row += shard.n_rows
            first_window += shard.n_windows
            for reason, n in about["dropped"].items():
                dropped[reason] = dropped.get(reason, 0) + n
        if not first_row:
            raise ValueError("text must hold text: all tokens are special ones or padding")
        bounded = np.isfinite(self.capture.max_norm_ratio)
        path = self.folder / LIMITS_NAME
        limits = _read_limits(path, self.capture.hooks) if bounded else None
        manifest = {
            **self.settings,
            # not compared with other calls: the same text may have been moved
            "text_source": getattr(self.text, "source", dict)(),
            "hooks": abouts[0]["hooks"],
            "dtype": abouts[0]["dtype"],
            "n_windows": first_window,
            "n_rows": first_row,
            "limits": limits,
            "dropped": dropped,
            "shards": shards,
        }
        with self._lock("manifest", wait=True):
            if (self.folder / MANIFEST_NAME).is_file():
                return
            write_json(self.folder / MANIFEST_NAME, manifest)
        if dropped["not_finite"] or dropped["norm"] > 0.05 * (first_row + dropped["norm"]):
            warnings.warn(
                f"harvest: dropped {dropped['not_finite']:,} rows that are not finite and "
                f"{dropped['norm']:,} of outlying norms, of {first_row:,} kept",
                RuntimeWarning,
                stacklevel=3,
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


@contextlib.contextmanager
def _rows_file(path: Path) -> Iterator[RowsFile]:
    """Rows that get their final name when the block has ended well.

    What a killed process left of this file is removed: its name is locked.

    Raises:
        OSError: naming the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        left.unlink(missing_ok=True)
    with replacing(path) as temporary, RowsFile(temporary) as file:
        yield file


def _sums(file: RowsFile) -> tuple[str, Tensor]:
    """SHA-256 of a finished file, and CRC-32 of every block of its rows."""
    digest = hashlib.sha256()
    sums = []
    size = BLOCK_ROWS * file.width * file.dtype.itemsize
    with file.path.open("rb") as written:
        digest.update(written.read(RowsFile.HEADER))
        while part := written.read(size):
            digest.update(part)
            sums.append(zlib.crc32(part))
    return digest.hexdigest(), torch.tensor(sums, dtype=torch.int64)
