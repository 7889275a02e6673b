"""Folders of checkpoints: every tensor by torch.distributed.checkpoint, plain values as JSON.

A state is a tree of dictionaries, lists, tensors and plain values. Its tensors are written by all
ranks, each its own parts, into ``step-N.tmp``, which is renamed when every rank has written: a
folder under its final name is whole. Written with R ranks, it is read with any other number.
``checksums.json`` has the CRC-32 of every part of every file; a folder without it is an older one.
Nothing in it is unpickled but torch's table of contents, and that only where it asks for torch's
own classes: a stranger's checkpoint can run nothing.

torch promises no compatibility of this format between its versions: results of a run are files of
``save_pretrained``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import os
import pickle
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bae_fast.distributed import Mesh
from bae_fast.files import (
    CHANGED,
    as_json,
    first_line,
    part_checksum,
    read_json,
    torch_reason,
    write_json,
    write_text,
)
from bae_fast.progress import say

VALUES, CHECKSUMS, _TABLE = "run.json", "checksums.json", ".metadata"
_PREFIX, _UNFINISHED = "step-", ".tmp"
# keys of the JSON that stand for something else than an object of JSON
_TENSOR, _ITEMS, _TUPLE = "tensor", "items", "tuple"

# what torch's table of contents is made of; besides, dtypes
_CONTENTS = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "_MEM_FORMAT_ENCODING", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},  # of Python 3.13
}  # fmt: skip

# path of a tensor within the state -> dimensions in which ranks along "data" and along "feature"
# have parts of their own, or None where all ranks of the axis have the same
Dims = Callable[[tuple[Any, ...]], tuple[int | None, int | None]]


def flatten(state: Any, path: tuple[Any, ...] = ()) -> tuple[Any, dict[tuple[Any, ...], Tensor]]:
    """(JSON values with the paths of tensors in their place, tensors by path)."""
    if isinstance(state, Tensor):
        return {_TENSOR: list(map(str, path))}, {path: state}
    tensors: dict[tuple[Any, ...], Tensor] = {}

    def inner(key: Any, value: Any) -> Any:
        found, below = flatten(value, (*path, key))
        tensors.update(below)
        return found

    if isinstance(state, dict):
        return {_ITEMS: [[key, inner(key, value)] for key, value in state.items()]}, tensors
    if isinstance(state, tuple):
        return {_TUPLE: [inner(i, value) for i, value in enumerate(state)]}, tensors
    if isinstance(state, list):
        return [inner(i, value) for i, value in enumerate(state)], tensors
    return state, tensors


def unflatten(values: Any, tensors: dict[str, Tensor]) -> Any:
    """The state of :func:`flatten`, tensors by their joined paths."""
    if isinstance(values, list):
        return [unflatten(value, tensors) for value in values]
    if not isinstance(values, dict):
        return values
    if _TENSOR in values:
        return tensors["/".join(values[_TENSOR])]
    if _TUPLE in values:
        return tuple(unflatten(value, tensors) for value in values[_TUPLE])
    return {key: unflatten(value, tensors) for key, value in values[_ITEMS]}


class _Contents(pickle.Unpickler):
    """torch's table of contents; anything that could run is refused."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in _CONTENTS.get(module, ()):
            raise pickle.UnpicklingError(f"its table of contents asks for {module}.{name}")
        return super().find_class(module, name)


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every whole checkpoint, by rising step."""
    found = []
    for path in folder.glob(_PREFIX + "*"):
        number = path.name.removeprefix(_PREFIX)
        if number.isdecimal() and (path / VALUES).is_file():
            found.append((int(number), path))
    return sorted(found)


@dataclasses.dataclass(frozen=True)
class _Snapshot:
    """What one save writes: copies, which training does not change any more."""

    step: int
    values: dict[str, Any]
    tensors: dict[str, Tensor]
    best: bool


class Checkpoints:
    """Writes and reads the checkpoints of a run, one at a time and in the background.

    Attributes:
        folder: where they lie.
        keep: how many of the last ones stay; the best one stays too.
        failed: saves that could not be written, one after the other.
        error: the last of them, or None.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int, mesh: Mesh | None) -> None:
        self.folder, self.keep, self.mesh = Path(folder), keep, mesh
        self.failed = 0
        self.error: OSError | None = None
        self._first = mesh is None or mesh.is_first
        # a group of its own: the save's messages must not meet those of a step
        self._group = None
        if mesh is not None:
            limit = datetime.timedelta(seconds=mesh.timeout)
            self._group = dist.new_group(backend="gloo", timeout=limit)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._replaced: set[Path] = set()
        if self._first:
            for path in self.folder.glob(_PREFIX + "*" + _UNFINISHED):
                target = path.with_name(path.name.removesuffix(_UNFINISHED))
                # a process killed while it put one of the same step aside leaves a whole one
                named = target.name.removeprefix(_PREFIX).isdecimal()
                if named and (path / VALUES).is_file() and not target.exists():
                    os.replace(path, target)
                shutil.rmtree(path, ignore_errors=True)

    def begin(self, step: int) -> None:
        """Steps after this one are about to be done, maybe again.

        Checkpoints of later steps are of a run that this one replaces. They stay until it has
        written one of its own.
        """
        self._replaced = {path for number, path in checkpoints(self.folder) if number > step}

    def save(self, state: dict[str, Any], step: int, dims: Dims, *, best: bool = False) -> None:
        """Copy a state and write it in the background; a collective.

        An earlier save is waited for. A save that fails leaves the folders before it as they are;
        :meth:`wait` tells.

        Args:
            state: the state of this rank, see the module.
            step: names the folder.
            dims: which tensors are a part of this rank's alone.
            best: that this one stays, whatever comes after.
        """
        self.wait()
        values, tensors = flatten(state)
        copies = {
            "/".join(map(str, path)): self._as_global(tensor.detach().clone(), dims(path))
            for path, tensor in tensors.items()
        }
        snapshot = _Snapshot(step, {"step": step, "best": best, "state": values}, copies, best)
        self._pending = self._worker.submit(self._write, snapshot)

    def _as_global(self, tensor: Tensor, dims: tuple[int | None, int | None]) -> Tensor:
        mesh = self.mesh
        if mesh is None or mesh.world == 1 or dims == (None, None):
            return tensor
        from torch.distributed.tensor import DTensor, Replicate, Shard

        placements = [Replicate() if dim is None else Shard(dim) for dim in dims]
        return DTensor.from_local(tensor, mesh.device_mesh, placements, run_check=False)

    def _write(self, snapshot: _Snapshot) -> None:
        from torch.distributed import checkpoint

        from bae_fast.training.checkpoint_files import SummingWriter

        target = self.path(snapshot.step)
        work = target.with_name(target.name + _UNFINISHED)
        with contextlib.ExitStack() as undo, _naming(target):
            if self._first:  # what is half written would fill the disk for the next save too
                undo.callback(shutil.rmtree, work, ignore_errors=True)
                self.folder.mkdir(parents=True, exist_ok=True)
            writer = SummingWriter(work)
            with _quiet():
                checkpoint.save(
                    snapshot.tensors,
                    storage_writer=writer,
                    process_group=self._group,
                    no_dist=self.mesh is None,
                )
            # the first rank's save ends when those of all have
            if self._first:
                text = as_json(snapshot.values)
                wholes = {_TABLE: part_checksum(work / _TABLE), VALUES: zlib.crc32(text.encode())}
                sums = {name: {"0": crc32} for name, crc32 in wholes.items()}
                write_json(work / CHECKSUMS, sums | writer.sums)
                write_text(work / VALUES, text)  # last, as the folder is whole with it
                # aside, not removed: that takes long, and a process may be killed meanwhile
                aside = target.with_name(f"{target.name}.aside{_UNFINISHED}")
                if target.exists():
                    os.replace(target, aside)
                os.replace(work, target)
                shutil.rmtree(aside, ignore_errors=True)
                self._drop(snapshot)

    def _drop(self, latest: _Snapshot) -> None:
        """Remove what is neither among the last ones nor the best, or of a run before."""
        for path in self._replaced - {self.path(latest.step)}:
            shutil.rmtree(path, ignore_errors=True)
        self._replaced = set()
        found = checkpoints(self.folder)
        stay = {path for _, path in found[-self.keep :]}
        best = [path for _, path in found if _is_best(path)]
        stay |= set(best[-1:])
        for _, path in found:
            if path not in stay:
                shutil.rmtree(path, ignore_errors=True)

    def failures(self) -> int:
        """Saves that failed one after the other, as far as they have ended."""
        if self._pending is not None and self._pending.done():
            self.wait()
        return self.failed

    def wait(self) -> None:
        """Wait for the save in hand; count it where it failed, and say so."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.result()
        except OSError as error:
            self.failed += 1
            self.error = error
            if self._first and self.failed == 1:  # an error that ends the run says it again
                say(f"note: {error.filename}: {error.strerror}; the run goes on")
        else:
            self.failed, self.error = 0, None

    def close(self) -> None:
        """Wait for the save in hand and end the thread."""
        self.wait()
        self._worker.shutdown()

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.folder / f"{_PREFIX}{step}"

    def latest(self) -> Path | None:
        """The last whole checkpoint, or None."""
        found = checkpoints(self.folder)
        return found[-1][1] if found else None

    def load(self, path: Path, dims: Dims) -> dict[str, Any]:
        """A state from a folder, of this rank's parts; a collective.

        Raises:
            FileNotFoundError: no such checkpoint.
            ValueError: a folder that is not whole, or was written by another version of torch; a
                bit of a file has changed.
        """
        from torch.distributed import checkpoint

        from bae_fast.training.checkpoint_files import CheckingReader

        if not (path / VALUES).is_file():
            raise FileNotFoundError(f"{path} holds no whole checkpoint")
        wanted: dict[str, Tensor] = {}
        try:
            sums = _sums(path)
            values = read_json(path / VALUES)
            reader = CheckingReader(path, sums)
            with (path / _TABLE).open("rb") as file:
                _Contents(file).load()
            for name, entry in reader.read_metadata().state_dict_metadata.items():
                wanted[name] = self._room(entry, dims(tuple(name.split("/"))))
            with _quiet():
                checkpoint.load(
                    wanted,
                    storage_reader=reader,
                    process_group=self._group,
                    no_dist=self.mesh is None,
                )
            local = {name: _local(tensor) for name, tensor in wanted.items()}
            state: dict[str, Any] = unflatten(values["state"], local)
        except (Exception, checkpoint.api.CheckpointException) as error:
            raise ValueError(
                f"{path} is not a readable checkpoint: {first_line(_cause(error))}"
            ) from error
        return state

    def _room(self, entry: Any, dims: tuple[int | None, int | None]) -> Tensor:
        shape, dtype = list(entry.size), entry.properties.dtype
        if self.mesh is not None:
            for dim, processes in zip(dims, (self.mesh.data, self.mesh.feature), strict=True):
                if dim is not None:
                    shape[dim] //= processes
        return self._as_global(torch.empty(shape, dtype=dtype), dims)


def _is_best(path: Path) -> bool:
    """Whether a checkpoint stays as the best one; a damaged one does not, and harms no other."""
    with contextlib.suppress(OSError, ValueError):
        return read_json(path / VALUES).get("best") is True
    return False


def _sums(path: Path) -> dict[str, dict[str, int]] | None:
    """The checksums of a checkpoint's parts, once those of whole files are compared; None for a
    checkpoint from before there were any.

    Raises:
        ValueError: naming the file of which a bit has changed.
    """
    if not (path / CHECKSUMS).is_file():
        return None
    sums = read_json(path / CHECKSUMS)
    if not all(isinstance(parts, dict) for parts in sums.values()):
        raise ValueError(f"{CHECKSUMS} must hold an object for each file")
    for name in (VALUES, _TABLE):
        if part_checksum(path / name) != sums.get(name, {}).get("0"):
            raise ValueError(
                f"{name} is damaged: its checksum is another than {CHECKSUMS} has; {CHANGED}"
            )
    return sums


def _cause(error: BaseException) -> BaseException:
    """What happened, where torch says on which processes: on the first of them."""
    failures = getattr(error, "failures", None)  # rank -> (error, where)
    found: BaseException = next(iter(failures.values()))[0] if failures else error
    return found


def _local(tensor: Tensor) -> Tensor:
    found: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that a process is alone, which is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@contextlib.contextmanager
def _naming(target: Path) -> Iterator[None]:
    """Every failure as an OSError that names the checkpoint."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        inner: Any = _cause(error)
        unwritten = torch_reason(inner)
        number = getattr(inner, "errno", None) or (errno.ENOSPC if unwritten else errno.EIO)
        lines = str(inner).strip().splitlines()
        reason = getattr(inner, "strerror", None) or unwritten
        reason = reason or (lines[0] if lines else type(inner).__name__)
        raise OSError(number, f"the checkpoint cannot be written: {reason}", str(target)) from error
