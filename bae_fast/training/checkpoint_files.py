"""The files that torch writes of a checkpoint, each part of them with its CRC-32.

torch's archives have checksums that its own reader does not look at. A part is one tensor, or the
share that one process had of it; who reads it compares it, and reads no part but its own.
"""

from __future__ import annotations

import dataclasses
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from bae_fast.files import CHANGED, part_checksum

# name of a file -> first byte of a part -> its CRC-32
Sums = dict[str, dict[str, int]]


@dataclasses.dataclass(frozen=True)
class _Summed(WriteResult):
    """A part that was written, as the first process hears of it."""

    crc32: int = 0  # without a default it could not follow one that torch may add


class SummingWriter(FileSystemWriter):
    """torch's writer; each process also reads the parts that it has written.

    Attributes:
        sums: those of all processes' parts, on the first process once it has written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self.sums: Sums = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this process's parts and find their checksums."""
        written = super().write_data(plan, planner)
        found: list[WriteResult] = []
        for one in written.wait():
            info = one.storage_data
            crc32 = part_checksum(self.path / info.relative_path, info.offset, info.length)
            found.append(_Summed(one.index, one.size_in_bytes, info, crc32))
        summed: Future[list[WriteResult]] = Future()
        summed.set_result(found)
        return summed

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the table of contents; on the first process."""
        super().finish(metadata, results)
        sums: defaultdict[str, dict[str, int]] = defaultdict(dict)
        for one in (one for some in results for one in some):
            assert isinstance(one, _Summed)
            sums[one.storage_data.relative_path][str(one.storage_data.offset)] = one.crc32
        self.sums = dict(sums)


class CheckingReader(FileSystemReader):
    """torch's reader; each part that this process reads is compared with its checksum."""

    def __init__(self, path: str | os.PathLike[str], sums: Sums | None) -> None:
        """
        Args:
            path: the folder.
            sums: see :data:`Sums`; None: the checkpoint has none.
        """
        super().__init__(path)
        self._sums = sums

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read this process's parts.

        Raises:
            ValueError: naming the file and the tensor of which a bit has changed.
        """
        for item in plan.items if self._sums is not None else ():
            self._check(item.storage_index.fqn, self.storage_data[item.storage_index])
        return super().read_data(plan, planner)

    def _check(self, name: str, part: Any) -> None:
        path = Path(self.path) / part.relative_path
        kept = (self._sums or {}).get(path.name, {}).get(str(part.offset))
        if part_checksum(path, part.offset, part.length) != kept:
            raise ValueError(
                f"{path.name} is damaged: the checksum of {name} is another than the one that was "
                f"kept; {CHANGED}"
            )
