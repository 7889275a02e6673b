"""Harvest hidden states of several modules into shards that many processes can make.

A shard is a fixed range of windows. Its index is written behind its rows, and under its final name
the shard is done. Any process can make a missing one, in one pass of the model for all hooks, and a
process that is killed loses the shard that it was making. The files are those that
:mod:`bae_fast.lm.shards` describes and reads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bae_fast.arguments import check_int
from bae_fast.files import (
    file_digest,
    locked,
    naming,
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
    USUAL_OUTLIERS,
    RowsFile,
)
from bae_fast.lm.capture import Candidates, Capture, within
from bae_fast.lm.documents import TokenWindows, Windows
from bae_fast.lm.hooks import in_order
from bae_fast.lm.identity import own_hooks
from bae_fast.lm.inputs import check_ids, check_length, excluded_tokens
from bae_fast.lm.loading import LanguageModel
from bae_fast.lm.shards import (
    BLOCK_ROWS,
    FORMAT,
    FORMAT_VERSION,
    INDEX_FOLDER,
    LIMITS_NAME,
    LOCKS,
    SETTINGS_NAME,
    Shard,
    ShardedCache,
    check_size,
    naming_corrupt,
    shard_name,
)
from bae_fast.progress import progress_bar

# tokens whose norms say what an outlying norm is
LIMIT_TOKENS = 65_536


def _limit_windows(length: int) -> int:
    """Windows of so many tokens that hold them."""
    return -(-LIMIT_TOKENS // length)


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
            shard_windows = _limit_windows(length)
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
        with naming_corrupt(path), safe_open(str(path), framework="pt") as file:
            about: dict[str, Any] = json.loads(file.metadata()["shard"])
            for name in ("n_windows", "n_rows"):
                check_size(about[name], 0)
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
        first = int(self._start["window"]) + number * self.shard_windows
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
            early = None
            if first_norms:  # of the same windows as where another process makes the limits
                n_first = _limit_windows(tokens.shape[1]) * tokens.shape[1]
                some = torch.cat([part.places for part in parts]) < n_first
                early = {hook: norm[some] for hook, norm in norms.items()}
            limits = self._limits(early, tokens.shape[1])
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
                tokens = self.text.read(_limit_windows(length))
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
        if dropped["not_finite"] or dropped["norm"] > USUAL_OUTLIERS * (
            first_row + dropped["norm"]
        ):
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


def _read_limits(path: Path, hooks: Iterable[str]) -> dict[str, float]:
    """The largest norms that are kept, by hook.

    Raises:
        ValueError: a file that does not hold a positive number for each hook.
    """
    with naming_corrupt(path):
        limits = {hook: read_json(path)["limits"][hook] for hook in hooks}
        for limit in limits.values():
            if not isinstance(limit, (int, float)) or not 0 < limit < float("inf"):
                raise ValueError(f"a limit must be a number over 0; got {limit!r}")
        return {hook: float(limit) for hook, limit in limits.items()}
