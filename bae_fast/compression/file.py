"""The file of a compressed code: how it is written and read, and its size beside plainer forms.

Little-endian::

    magic, version (1: independent columns, 2: tree), header's length
    header      shape, bits a feature, rows a block, classes: p (32 bits) and columns,
                class of each column (range coded), metadata (JSON)
                tree: the number of edges; range coded are whether each column has a parent, the
                parents, and the class of each half, that of an off parent first
    index       for each block of rows: bytes, digest of the bytes, checksum of the bits
    digest      of all the above
    blocks      number of symbols of each class, less what p lets expect (tree: as it is); then
                the range coder's words

A row mask is one column more. Blocks are read one by one: see :class:`CompressedCode`. Both sides
build their tables in integers from the integers in the file: no rounding of one machine's
mathematics library decides what another reads.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import torch
from torch import Tensor

from bae_fast import packing
from bae_fast.arguments import check_int
from bae_fast.codes import BinaryCode
from bae_fast.compression.columns import IndependentColumns, choose_classes
from bae_fast.compression.gaps import categorical, constriction_stream
from bae_fast.compression.tree import Halves, TreeColumns
from bae_fast.files import naming, replacing
from bae_fast.pairs import (
    SAMPLE_PIECE,
    counts_with_parents,
    edges_that_pay,
    sample_starts,
    tree_parents,
)
from bae_fast.progress import tracked
from bae_fast.statistics import entropy_bits

MAGIC = b"\x89BAEbits"
# of independent columns, and along a tree
FORMAT_VERSION = 1
TREE_VERSION = 2

CODERS = ("tree", "columns")

# what makes the bytes of a block of rows, and the rows of its bytes
Model: TypeAlias = IndependentColumns | TreeColumns

# rows that are coded, and read, together
BLOCK_ROWS = 4096

_PREFIX = struct.Struct("<8sII")
_FIXED = struct.Struct("<IHBBIIII")
_ENTRY = struct.Struct("<I8sI")
_DIGEST = 8

# what a file may ask of its reader before a row is seen, that a few bytes may not fill the memory;
# of columns the coder of trees can number no more
_MOST_COLUMNS = 1 << 24
_MOST_BLOCK_BITS = 1 << 32
# log(p / (1-p)) in steps of 1/16 are 712, of columns that vary, are never on and always on
_MOST_CLASSES = 4096


@dataclasses.dataclass(frozen=True)
class CompressedSize:
    """Bytes of a file beside the bound and beside plainer forms.

    Attributes:
        n_rows, n_columns: N (masked rows included) and K.
        file_bytes: the whole file.
        header_bytes: the bytes among them of header, index and digests.
        entropy_bits: N sum_j H2(p_j), the bound for independent columns; rows kept by the mask.
            A file along the tree may lie below it.
        differences: bits that differ from the prototype.
        packed_bytes: one bit a feature.
        edges: columns that are coded given another; 0 where all are independent.
        listed_bytes: for each row the number of differences and their columns, in fields of a
            fixed width (the form of arXiv 2509.20997), and the prototype.
    """

    n_rows: int
    n_columns: int
    file_bytes: int
    header_bytes: int
    entropy_bits: float
    differences: int
    packed_bytes: int
    listed_bytes: int
    edges: int = 0

    @property
    def bits_a_row(self) -> float:
        """8 x file_bytes / N."""
        return 8 * self.file_bytes / max(self.n_rows, 1)

    @property
    def overhead(self) -> float:
        """Share by which the file exceeds the bound of independent columns, negative below it;
        infinite where the bound is zero."""
        return 8 * self.file_bytes / self.entropy_bits - 1 if self.entropy_bits else math.inf

    def summary(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        overhead = self.overhead if self.entropy_bits else None
        return {**dataclasses.asdict(self), "bits_a_row": self.bits_a_row, "overhead": overhead}


# -- the header --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _Header:
    """What a file says of its code before the first block.

    Attributes:
        lead: the code's shape but for the columns.
        n_columns, n_bits, masked: K, bits a feature, and whether a mask is one column more.
        block_rows: rows a block.
        shares: uint32, p of each class.
        members: int64, how many columns, or halves of columns, each class has.
        n_edges: columns that have a parent.
        id_words: the range coder's words: the tree, and the class of each column or half.
        note: the metadata, JSON.
    """

    lead: tuple[int, ...]
    n_columns: int
    n_bits: int
    masked: bool
    block_rows: int
    shares: np.ndarray
    members: np.ndarray
    n_edges: int
    id_words: np.ndarray
    note: bytes

    @property
    def n_rows(self) -> int:
        return math.prod(self.lead)

    @property
    def n_coded(self) -> int:
        """Columns in the blocks, the mask's included."""
        return self.n_columns + self.masked

    def pack(self) -> bytes:
        return b"".join(
            [
                _FIXED.pack(
                    self.n_columns, self.n_bits, len(self.lead), self.masked, self.block_rows,
                    len(self.shares), len(self.id_words), len(self.note),
                ),
                np.array(self.lead, dtype="<u8").tobytes(),
                self.shares.astype("<u4").tobytes(),
                self.members.astype("<u4").tobytes(),
                struct.pack("<I", self.n_edges) if self.n_edges else b"",
                self.id_words.astype("<u4").tobytes(),
                self.note,
            ]
        )  # fmt: skip

    @classmethod
    def parse(cls, head: bytes, at: int, version: int) -> tuple[_Header, int]:
        """Inverse of :meth:`pack`: the header that begins at a byte, and where it ends.

        Raises:
            ValueError, struct.error: it is cut off, or its sizes are no code's.
        """
        columns, n_bits, n_lead, masked, block_rows, n_classes, n_id_words, n_note = (
            _FIXED.unpack_from(head, at)
        )
        at += _FIXED.size

        def numbers(dtype: str, count: int) -> np.ndarray:
            nonlocal at
            found = np.frombuffer(head, dtype=dtype, count=count, offset=at)
            at += found.nbytes
            return found

        lead = tuple(int(n) for n in numbers("<u8", n_lead))
        n_rows, n_coded = math.prod(lead), columns + masked
        if not (
            columns >= 1
            and n_bits >= 1
            and columns % n_bits == 0
            and masked <= 1
            and block_rows >= 1
            and n_rows < 2**31
            and math.prod(max(n, 1) for n in lead) < 2**48
            and n_classes <= _MOST_CLASSES
        ):
            raise ValueError("sizes are out of range")
        if n_coded > _MOST_COLUMNS or min(block_rows, n_rows) * n_coded > _MOST_BLOCK_BITS:
            raise ValueError(
                f"{n_coded:,} columns in blocks of {block_rows:,} rows are more than a file may "
                "have"
            )
        header = cls(
            lead=lead,
            n_columns=columns,
            n_bits=n_bits,
            masked=bool(masked),
            block_rows=block_rows,
            shares=numbers("<u4", n_classes).astype(np.uint32),
            members=numbers("<u4", n_classes).astype(np.int64),
            n_edges=int(numbers("<u4", 1)[0]) if version == TREE_VERSION else 0,
            id_words=numbers("<u4", n_id_words).astype(np.uint32),
            note=head[at : at + n_note],
        )
        if int(header.members.sum()) != n_coded + header.n_edges:
            raise ValueError("sizes do not agree")
        return header, at + n_note


# -- writing -----------------------------------------------------------------------------------


def compress(
    code: BinaryCode,
    path: str | os.PathLike[str],
    *,
    block_rows: int = BLOCK_ROWS,
    coder: str = "columns",
    metadata: dict[str, Any] | None = None,
) -> CompressedSize:
    """Write a code; :func:`decompress` gives back every bit, shape, mask and bits a feature.

    The file appears whole or not at all. Needs ``constriction``. Scratch memory: about
    40 bytes for each difference of a block and 64 MiB; to find the tree 4 K'^2 bytes for K'
    columns that vary, at most 1 GiB.

    Args:
        code: ``[..., K]`` on any device, fewer than 2^31 rows and at most 2^24 columns, the mask's
            included; read block by block.
        block_rows: rows coded together: fewer are read faster on their own, and cost a byte or
            two more for each class of columns.
        coder: "columns" codes each column on its own; "tree" codes it given the one it shares most
            with, where that pays: a smaller file, some times slower to write and to read.
        metadata: JSON values, kept in the header; see :class:`CompressedCode`.

    Raises:
        ImportError: no ``constriction``.
        TypeError: metadata is no dict of JSON values.
        ValueError: a code that is too large, block_rows below 1 or of more than 2^32 bits in a
            block, another coder, or bits past the last column.
    """
    check_int("block_rows", block_rows, 1, 2**31 - 1)
    if coder not in CODERS:
        raise ValueError(f"coder must be one of {', '.join(CODERS)}; got {coder!r}")
    if not isinstance(metadata or {}, dict):
        raise TypeError(f"metadata must be a dict; got {type(metadata).__name__}")
    note = json.dumps(metadata or {}, allow_nan=False).encode()
    flat = code.flatten()
    n_rows, masked = len(flat), flat.row_mask is not None
    if n_rows >= 2**31 or code.n_bits >= 2**16:
        raise ValueError(f"code must have fewer than 2^31 rows and 2^16 bits; got {code!r}")
    n_columns = code.n_columns + masked
    if n_columns > _MOST_COLUMNS:
        raise ValueError(f"code must have at most 2^24 columns, the mask's included; got {code!r}")
    if min(block_rows, n_rows) * n_columns > _MOST_BLOCK_BITS:
        raise ValueError(
            f"block_rows must be at most {_MOST_BLOCK_BITS // n_columns:,} for {n_columns:,} "
            f"columns, 2^32 bits a block; got {block_rows}"
        )
    tops = range(0, n_rows, block_rows)
    counts = torch.zeros(n_columns, dtype=torch.int64)
    for top in tops:
        block = _block(flat, top, block_rows)
        if not packing.tail_is_zero(block, n_columns):
            raise ValueError(f"code has bits past column {n_columns}")
        counts += packing.column_counts(block, n_columns)
    model, id_words = _choose_model(flat, n_columns, counts, coder, len(tops))
    header = _Header(
        lead=tuple(code.shape[:-1]),
        n_columns=code.n_columns,
        n_bits=code.n_bits,
        masked=masked,
        block_rows=block_rows,
        shares=model.shares,
        members=np.bincount(model.ids, minlength=len(model.shares)),
        n_edges=model.n_edges,
        id_words=id_words,
        note=note,
    ).pack()
    prefix = _PREFIX.pack(MAGIC, TREE_VERSION if model.n_edges else FORMAT_VERSION, len(header))
    index = []
    with replacing(path) as temporary, open(temporary, "wb") as file:
        start = len(prefix) + len(header) + len(tops) * _ENTRY.size + _DIGEST
        file.seek(start)
        for top in tracked(tops, n_rows, "rows", by=block_rows):
            block = _block(flat, top, block_rows)
            data = model.encode_rows(block)
            index.append(_ENTRY.pack(len(data), _digest(data), _checksum(block)))
            file.write(data)
        size = file.tell()
        head = b"".join([prefix, header, *index])
        file.seek(0)
        file.write(head + _digest(head))
    return _size(flat, counts[: code.n_columns], size, start, model.n_edges)


def _choose_model(
    flat: BinaryCode, n_columns: int, counts: Tensor, coder: str, n_blocks: int
) -> tuple[Model, np.ndarray]:
    """What codes the blocks, and the range coder's words of its tree and its classes."""
    encoder = constriction_stream().queue.RangeEncoder()
    parents, both = _choose_parents(flat, n_columns, counts, coder)
    model: Model
    if bool((parents >= 0).any()):
        halves = Halves(parents.numpy())
        ones, length = halves.counts(counts, both, len(flat))
        model = TreeColumns(*choose_classes(ones, length, n_blocks, number_bits=20), halves)
        halves.encode(encoder)
    else:
        length = np.full(n_columns, len(flat))
        model = IndependentColumns(
            *choose_classes(counts.numpy(), length, n_blocks, number_bits=12)
        )
    if len(model.shares) > 1:
        encoder.encode(model.ids, categorical(np.bincount(model.ids).astype(np.float64)))
    return model, encoder.get_compressed()


def _choose_parents(
    flat: BinaryCode, n_columns: int, counts: Tensor, coder: str
) -> tuple[Tensor, Tensor]:
    """The parent of each column, the mask's included, and the rows in which both are on.

    Int64 ``[K]`` each; without a parent -1, and the column's own ones.
    """
    n_rows = len(flat)
    none = torch.full((n_columns,), -1, dtype=torch.int64)
    if coder == "columns" or n_rows < 2:
        return none, counts
    live = int(((counts > 0) & (counts < n_rows)).sum())
    starts = sample_starts(n_rows, live)
    words = torch.cat([_block(flat, start, SAMPLE_PIECE) for start in starts])
    parents = tree_parents(BinaryCode(words, n_columns))
    both = _joint_counts(flat, parents)
    parents = edges_that_pay(parents, counts, both, n_rows)
    return parents, torch.where(parents >= 0, both, counts)


def _joint_counts(flat: BinaryCode, parents: Tensor) -> Tensor:
    """Rows in which a column and its parent are on: int64 ``[K]``; of a root, its own ones."""
    both = torch.zeros(len(parents), dtype=torch.int64)
    for top in range(0, len(flat), BLOCK_ROWS):
        block = BinaryCode(_block(flat, top, BLOCK_ROWS), len(parents))
        both += counts_with_parents(block, parents)
    return both


def _size(
    code: BinaryCode, own: Tensor, file_bytes: int, header_bytes: int, edges: int
) -> CompressedSize:
    """The file's bytes beside the bound and plainer forms, from the ones of each column."""
    n_rows, kept = len(code), int(code.n_rows())
    differences = int(torch.minimum(own, n_rows - own).sum())
    field = math.ceil(math.log2(code.n_columns)) if code.n_columns > 1 else 1
    listed = n_rows * code.n_columns.bit_length() + differences * field + code.n_columns
    bound = 0.0
    if kept:
        bound = max(float(entropy_bits(own, torch.tensor(kept))) * kept, 0.0)
    return CompressedSize(
        n_rows=n_rows,
        n_columns=code.n_columns,
        file_bytes=file_bytes,
        header_bytes=header_bytes,
        entropy_bits=bound,
        differences=differences,
        packed_bytes=n_rows * -(-code.n_columns // 8),
        listed_bytes=-(-listed // 8),
        edges=edges,
    )


# -- reading -----------------------------------------------------------------------------------


def decompress(path: str | os.PathLike[str]) -> BinaryCode:
    """Read the whole of a file written by :func:`compress`.

    Raises:
        FileNotFoundError: no such file.
        ImportError: no ``constriction``.
        MemoryError: a code of more words than this machine has memory.
        ValueError: a foreign, truncated or corrupt file, or another version.
    """
    return CompressedCode.open(path).code()


class CompressedCode:
    """A compressed file, read by blocks of rows.

    ``compressed[rows]`` takes what :class:`bae_fast.BinaryCode` takes as rows, decodes the blocks
    that they lie in and gives a BinaryCode. Only the header is kept in memory.

    Attributes:
        path: the file.
        shape: the shape of the dense bits, ``[..., K]``.
        n_bits: bits a feature.
        block_rows: rows decoded together, leading dimensions flattened.
        metadata: what :func:`compress` was given.
    """

    def __init__(self, path: str | os.PathLike[str], head: bytes, size: int) -> None:
        """Use :meth:`open`."""
        self.path = Path(path)
        _, version, _ = _PREFIX.unpack_from(head)
        header, at = _Header.parse(head, _PREFIX.size, version)
        self.metadata: dict[str, Any] = json.loads(header.note)
        if not isinstance(self.metadata, dict):
            raise ValueError("metadata is no object")
        self._columns, self._masked = header.n_columns, header.masked
        self.n_bits, self.block_rows = header.n_bits, header.block_rows
        self.shape = torch.Size((*header.lead, header.n_columns))
        n_blocks = -(-header.n_rows // header.block_rows)
        self._entries = [_ENTRY.unpack_from(head, at + i * _ENTRY.size) for i in range(n_blocks)]
        at += n_blocks * _ENTRY.size + _DIGEST
        lengths = (length for length, _, _ in self._entries)
        self._starts = list(itertools.accumulate(lengths, initial=at))
        if self._starts[-1] != size:
            raise ValueError(f"it must be {self._starts[-1]} bytes long; it is {size}")
        self._model = _read_model(header, version)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> CompressedCode:
        """Read the header and the index, and check them; errors as in :func:`decompress`."""
        constriction_stream()
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} does not exist")
        with open(path, "rb") as file, naming(path):
            size = os.fstat(file.fileno()).st_size
            head = cls._read_head(file, path, size)
        try:
            return cls(path, head, size)
        except (ValueError, struct.error, AssertionError, RecursionError) as error:
            raise ValueError(f"{path} is truncated or corrupt: {error}") from error

    @staticmethod
    def _read_head(file: BinaryIO, path: str | os.PathLike[str], size: int) -> bytes:
        prefix = file.read(_PREFIX.size)
        if prefix[: len(MAGIC)] != MAGIC[: len(prefix)] or not prefix:
            raise ValueError(f"{path} is not a compressed code: it begins with {prefix[:8]!r}")
        if len(prefix) < _PREFIX.size:
            raise ValueError(f"{path} is truncated: {size} bytes")
        _, version, length = _PREFIX.unpack(prefix)
        if version not in (FORMAT_VERSION, TREE_VERSION):
            raise ValueError(
                f"{path} has version {version}; can read {FORMAT_VERSION} and {TREE_VERSION}"
            )
        # no more is asked for than the file has: a length of 4 GiB would be set apart first
        header = file.read(min(length, size))
        try:
            fields = _FIXED.unpack_from(header)
            lead = struct.unpack_from(f"<{fields[2]}Q", header, _FIXED.size)
            index = file.read(min(-(-math.prod(lead) // fields[4]) * _ENTRY.size, size))
        except (struct.error, ZeroDivisionError) as error:
            raise ValueError(f"{path} is truncated or corrupt: {error}") from error
        if file.read(_DIGEST) != _digest(prefix, header, index):
            raise ValueError(f"{path} is truncated or corrupt: its header fails the digest")
        return prefix + header + index

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"CompressedCode({str(self.path)!r}, shape={tuple(self.shape)})"

    @property
    def edges(self) -> int:
        """IndependentColumns that are coded given another; 0 in a file of independent columns."""
        return self._model.n_edges

    @property
    def n_blocks(self) -> int:
        """Blocks of rows that can be read on their own."""
        return len(self._entries)

    def block(self, i: int) -> BinaryCode:
        """Rows ``i * block_rows`` on, leading dimensions flattened: ``[<= block_rows, K]``.

        Raises:
            IndexError: no such block.
            ValueError: the block is corrupt, or the file is not the one that was opened.
        """
        if not 0 <= i < self.n_blocks:
            raise IndexError(f"block must be 0 to {self.n_blocks - 1}; got {i}")
        length, digest, checksum = self._entries[i]
        with open(self.path, "rb") as file:
            file.seek(self._starts[i])
            data = file.read(length)
        if _digest(data) != digest:
            raise ValueError(f"{self.path} is truncated or corrupt: block {i} fails its digest")
        n_rows = min(self.block_rows, math.prod(self.shape[:-1]) - i * self.block_rows)
        try:
            words = self._model.decode_rows(data, n_rows)
        except (ValueError, AssertionError) as error:
            raise ValueError(f"{self.path}: block {i} cannot be decoded: {error}") from error
        if _checksum(words) != checksum:
            raise ValueError(
                f"{self.path}: block {i} decodes to other bits than were written; was it written "
                "with another version of constriction?"
            )
        return self._split_mask(words)

    def _split_mask(self, words: Tensor) -> BinaryCode:
        if not self._masked:
            return BinaryCode(words, self._columns, n_bits=self.n_bits)
        word, bit = divmod(self._columns, packing.WORD_BITS)
        mask = (words[:, word] >> bit) & 1 == 1
        words[:, word] &= ~torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
        words = words[:, : packing.n_words(self._columns)].contiguous()
        return BinaryCode(words, self._columns, n_bits=self.n_bits, row_mask=mask)

    def code(self) -> BinaryCode:
        """All rows.

        Raises:
            MemoryError: their words take more than this machine has.
            ValueError: a corrupt block.
        """
        n_rows = math.prod(self.shape[:-1])
        n_bytes, most = n_rows * packing.n_words(self._columns) * 4, _machine_bytes()
        if n_bytes > most:
            raise MemoryError(
                f"{self.path} holds {n_bytes / 2**30:,.1f} GiB of words, and this machine has "
                f"{most / 2**30:,.1f} GiB of memory: read some of its rows at a time"
            )
        words = torch.empty(n_rows, packing.n_words(self._columns), dtype=torch.int32)
        mask = torch.empty(n_rows, dtype=torch.bool) if self._masked else None
        for i in tracked(range(self.n_blocks), self.n_blocks, "blocks"):
            part, rows = self.block(i), slice(i * self.block_rows, (i + 1) * self.block_rows)
            words[rows] = part.words
            if mask is not None and part.row_mask is not None:
                mask[rows] = part.row_mask
        return self._shaped(words, mask, self.shape[:-1])

    def _shaped(self, words: Tensor, mask: Tensor | None, lead: torch.Size) -> BinaryCode:
        return BinaryCode(
            words.reshape(*lead, words.shape[-1]),
            self._columns,
            n_bits=self.n_bits,
            row_mask=None if mask is None else mask.reshape(lead),
        )

    def __getitem__(self, rows: Any) -> BinaryCode:
        """Select along the first dimension, as :meth:`BinaryCode.__getitem__` does."""
        numbers = torch.arange(math.prod(self.shape[:-1]), dtype=torch.int32)
        # a code whose words are row numbers: its indexing is the one that is promised
        chosen = BinaryCode(numbers.view(*self.shape[:-1], 1), packing.WORD_BITS)[rows].words[
            ..., 0
        ]
        flat = chosen.reshape(-1).long()
        words = torch.empty(len(flat), packing.n_words(self._columns), dtype=torch.int32)
        mask = torch.empty(len(flat), dtype=torch.bool) if self._masked else None
        blocks = flat // self.block_rows
        for i in blocks.unique().tolist():
            here, part = blocks == i, self.block(i)
            own = flat[here] - i * self.block_rows
            words[here] = part.words[own]
            if mask is not None and part.row_mask is not None:
                mask[here] = part.row_mask[own]
        return self._shaped(words, mask, chosen.shape)


def _read_model(header: _Header, version: int) -> Model:
    """What decodes the blocks."""
    decoder = constriction_stream().queue.RangeDecoder(header.id_words)
    halves = None
    if version == TREE_VERSION:
        halves = Halves.decode(decoder, header.n_coded, header.n_edges)
    n_parts = header.n_coded + header.n_edges
    n_classes = len(header.shares)
    ids = np.zeros(n_parts, dtype=np.int64)
    if n_classes > 1:
        members = categorical(header.members.astype(np.float64))
        ids = decoder.decode(members, n_parts).astype(np.int64)
    if not np.array_equal(np.bincount(ids, minlength=n_classes), header.members):
        raise ValueError("classes of columns do not agree with their numbers")
    if halves is None:
        return IndependentColumns(header.shares, ids)
    return TreeColumns(header.shares, ids, halves)


# -- bytes -------------------------------------------------------------------------------------


def _machine_bytes() -> int:
    """The memory of the machine; where the system does not say, more than any has."""
    if not hasattr(os, "sysconf"):  # Windows
        return 1 << 62
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _digest(*parts: bytes) -> bytes:
    state = hashlib.blake2b(digest_size=_DIGEST)
    for part in parts:
        state.update(part)
    return state.digest()


def _checksum(words: Tensor) -> int:
    return zlib.crc32(words.contiguous().numpy().tobytes())


def _block(code: BinaryCode, top: int, rows: int) -> Tensor:
    """Rows of a flat code on the CPU, its mask as one column more."""
    words = code.words[top : top + rows].cpu()
    if code.row_mask is None:
        return words.contiguous()
    kept = code.row_mask[top : top + rows].cpu().to(torch.int32)
    word, bit = divmod(code.n_columns, packing.WORD_BITS)
    wide = torch.zeros(len(words), packing.n_words(code.n_columns + 1), dtype=torch.int32)
    wide[:, : words.shape[1]] = words
    wide[:, word] |= kept << bit
    return wide
