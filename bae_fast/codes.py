"""Packed codes as users hold them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bae_fast import packing
from bae_fast.arguments import check_int
from bae_fast.files import read_safetensors, write_safetensors
from bae_fast.ops import registry
from bae_fast.ops.limits import fits_any
from bae_fast.statistics import CodeStatistics, entropy_bits

FORMAT = "bae_fast.binary_code"
FORMAT_VERSION = "1"

# rows unpacked at a time where a dense block is needed on the way (indices)
_ROW_BLOCK = 4096
# words whose ones are counted at a time, which takes several numbers a word
_L0_WORDS = 2**20

# where sign planes would take more than this, they are recomputed in backward instead: so many MiB,
# or on a GPU this share of its memory, where making them again costs more than the rest of a step
_SIGN_PLANES_MB = 256
_SIGN_PLANES_SHARE = 32
ENV_SIGN_PLANES = "BAE_FAST_SIGN_PLANES_MB"


def sign_planes_megabytes(device: torch.device) -> int:
    """Memory that the sign planes may take on a device, in MiB, where the user does not say."""
    if device.type != "cuda":
        return _SIGN_PLANES_MB
    total = int(torch.cuda.get_device_properties(device).total_memory)
    return max(total // _SIGN_PLANES_SHARE // 2**20, _SIGN_PLANES_MB)


def keep_signs(n_columns: int, device: torch.device) -> bool:
    """Whether the two sign planes of the covariance, K^2 / 4 bytes, fit the device's budget."""
    megabytes = registry.environment_megabytes(ENV_SIGN_PLANES, sign_planes_megabytes(device))
    return 2 * n_columns * packing.n_words(n_columns) * 4 <= megabytes * 2**20


def check_covariance_size(n_rows: int, n_columns: int, device_type: str = "cpu") -> None:
    """Refuse a covariance that is undefined or whose integer sum could leave int64.

    On a CPU the operators bound the sum by the ones at hand, which sparse codes of any number of
    columns pass. A GPU's are not read back: there only the sizes decide.

    Raises:
        ValueError: fewer than two rows, or on another device K^2 N^2 / 4 >= 2^63.
    """
    if n_rows < 2:
        raise ValueError(f"covariance needs at least 2 rows; got N={n_rows}")
    if device_type != "cpu" and not fits_any(n_rows, n_columns):
        raise ValueError(
            f"covariance needs (F N)^2 / 4 < 2^63 on {device_type}; "
            f"got N={n_rows}, F={n_columns} columns"
        )


_INDEX_HELP = "a code is indexed by rows: an int, a slice, 1-D integers or a bool mask; "


def check_strided(name: str, tensor: Tensor) -> None:
    """Refuse sparse, nested and other tensors that are no rectangle of numbers in memory.

    Raises:
        TypeError: naming the layout.
    """
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a dense tensor; got a {kind} one")


def check_tail(name: str, words: Tensor, n_columns: int) -> None:
    """Refuse bits behind the last column, which kernels would take for columns; on a CPU only.

    Raises:
        ValueError: some are set.
    """
    # a subclass (a fake tensor) may have no numbers, and a device is not waited for
    readable = words.device.type == "cpu" and type(words) is Tensor
    if not readable or torch.compiler.is_compiling():
        return
    if not packing.tail_is_zero(words, n_columns):
        raise ValueError(f"{name} must have no bits past column {n_columns}; some are set")


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


class BinaryCode:
    """Bits of N hidden states, 32 a word: small, exact, without gradient.

    ``code.words`` is int32 ``[..., ceil(K/32)]``, row-packed (see :mod:`bae_fast.packing`); the
    leading dimensions are those of the hidden states. K = ``n_bits`` x features. Rows where
    ``row_mask`` is False hold zero bits and are not counted.

    Nothing here synchronises a GPU but :meth:`indices`, :meth:`save`, ``repr`` and comparison.
    """

    def __init__(
        self,
        words: Tensor,
        n_columns: int,
        *,
        n_bits: int = 1,
        row_mask: Tensor | None = None,
        counts: Tensor | None = None,
        trusted: bool = False,
    ) -> None:
        """Wrap row-packed words; data that is not copied must not change afterwards.

        Args:
            counts: int64 ``[K]``, the ones in each column where an encoder knows them already;
                None: counted when asked for.
            trusted: the words are an encoder's. Others are looked through on a CPU for bits behind
                the last column, which kernels would take for columns, and are copied without the
                bits of rows that the mask drops.

        Raises:
            TypeError: words is not int32.
            ValueError: words' last dimension is not ceil(n_columns / 32), words have bits behind
                the last column, n_columns is not a multiple of n_bits, row_mask is not bool of
                words' leading shape, or counts are not int64 ``[K]``.
        """
        if not isinstance(words, Tensor) or words.dtype != torch.int32:
            raise TypeError(f"words must be an int32 tensor; got {_kind(words)}")
        check_strided("words", words)
        check_int("n_columns", n_columns, 1)
        if words.dim() < 1 or words.shape[-1] != packing.n_words(n_columns):
            raise ValueError(
                f"words must be [..., {packing.n_words(n_columns)}] for {n_columns} columns; "
                f"got shape {tuple(words.shape)}"
            )
        if not isinstance(n_bits, int) or n_bits < 1 or n_columns % n_bits:
            raise ValueError(f"n_bits must divide the {n_columns} columns; got {n_bits!r}")
        if row_mask is not None and (
            row_mask.dtype != torch.bool or row_mask.shape != words.shape[:-1]
        ):
            raise ValueError(
                f"row_mask must be bool {tuple(words.shape[:-1])}; "
                f"got {row_mask.dtype} {tuple(row_mask.shape)}"
            )
        if counts is not None and (counts.dtype != torch.int64 or counts.shape != (n_columns,)):
            raise ValueError(
                f"counts must be int64 [{n_columns}]; got {counts.dtype} {list(counts.shape)}"
            )
        if not trusted:
            check_tail("words", words, n_columns)
            if row_mask is not None:
                words = words.masked_fill(~row_mask[..., None], 0)  # kernels count every bit
        self.words = words
        self.n_columns = n_columns
        self.n_bits = n_bits
        self.row_mask = row_mask
        self._counts = counts

    @classmethod
    def from_dense(cls, bits: Tensor, *, n_bits: int = 1) -> BinaryCode:
        """Pack dense bits ``[..., K]`` of any dtype; every entry must be 0 or 1.

        Raises:
            TypeError: no dense tensor.
            ValueError: an entry is neither 0 nor 1.
        """
        if not isinstance(bits, Tensor):
            raise TypeError(f"bits must be a tensor; got {_kind(bits)}")
        check_strided("bits", bits)
        if bits.dim() < 1 or bits.shape[-1] < 1:
            raise ValueError(f"bits must have shape [..., K], K >= 1; got {list(bits.shape)}")
        if not bool(((bits == 0) | (bits == 1)).all()):
            raise ValueError("bits must hold only 0 and 1")
        return cls(packing.pack_rows(bits), bits.shape[-1], n_bits=n_bits, trusted=True)

    # -- shape ---------------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        """Shape of the dense bits, ``[..., K]``."""
        return torch.Size((*self.words.shape[:-1], self.n_columns))

    @property
    def n_features(self) -> int:
        """F = K / n_bits."""
        return self.n_columns // self.n_bits

    @property
    def device(self) -> torch.device:
        """Where the words lie."""
        return self.words.device

    @property
    def nbytes(self) -> int:
        """Bytes of the words."""
        return self.words.numel() * 4

    @property
    def _rows(self) -> Tensor:
        return self.words.reshape(-1, self.words.shape[-1])

    def _like(self, words: Tensor, row_mask: Tensor | None) -> BinaryCode:
        return BinaryCode(
            words, self.n_columns, n_bits=self.n_bits, row_mask=row_mask, trusted=True
        )

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, rows: Any) -> BinaryCode:
        """Select along the first dimension: an index, a slice, indices or a bool mask.

        Args:
            rows: an int, a slice, or a list, array or tensor of integers (1-D) or of bools, whose
                dimensions are the first of the leading ones.

        Raises:
            TypeError: an index of another kind, or a code of a single state.
            IndexError: out of range, or a bool mask of another length.
        """
        if self.words.dim() < 2:
            raise TypeError("a code of one hidden state cannot be indexed by row")
        if not isinstance(rows, slice):
            if not isinstance(rows, Tensor):
                if isinstance(rows, (str, tuple)):
                    raise TypeError(_INDEX_HELP + f"got {type(rows).__name__}")
                try:
                    rows = torch.as_tensor(rows)
                except (TypeError, ValueError, RuntimeError) as error:
                    raise TypeError(_INDEX_HELP + f"got {type(rows).__name__}") from error
            if rows.numel() == 0 and rows.dtype != torch.bool:
                rows = rows.to(torch.int64)
            most = self.words.dim() - 1 if rows.dtype == torch.bool else 1
            scalar_mask = rows.dim() == 0 and rows.dtype == torch.bool
            if rows.dim() > most or rows.dtype.is_floating_point or scalar_mask:
                raise TypeError(_INDEX_HELP + f"got {rows.dtype} {list(rows.shape)}")
            # uint8 would be taken for a mask, with a warning
            rows = (rows if rows.dtype == torch.bool else rows.to(torch.int64)).to(self.device)
        mask = None if self.row_mask is None else self.row_mask[rows]
        return self._like(self.words[rows], mask)

    @staticmethod
    def cat(codes: Iterable[BinaryCode]) -> BinaryCode:
        """Concatenate along the first dimension.

        Raises:
            ValueError: no code, or codes of unequal columns, bits or trailing shape.
        """
        codes = list(codes)
        if not codes:
            raise ValueError("codes must not be empty")
        first = codes[0]
        if first.words.dim() < 2:
            raise ValueError(
                "codes must have rows; got a code of one hidden state: BinaryCode.stack joins those"
            )
        for code in codes:
            kind = (code.n_columns, code.n_bits, code.shape[1:])
            if kind != (first.n_columns, first.n_bits, first.shape[1:]):
                raise ValueError(
                    f"codes must agree beyond the first dimension and in n_bits; "
                    f"got {first} and {code}"
                )
        mask = None
        if any(code.row_mask is not None for code in codes):
            mask = torch.cat([code._kept() for code in codes])
        return first._like(torch.cat([code.words for code in codes]), mask)

    @staticmethod
    def stack(codes: Iterable[BinaryCode]) -> BinaryCode:
        """Join codes of one shape along a new first dimension, such as single states.

        A ``DataLoader`` over a code takes it as ``collate_fn``.

        Raises:
            ValueError: no code, or codes of unequal shape or bits a feature.
        """
        codes = list(codes)
        lifted = [
            code._like(code.words[None], None if code.row_mask is None else code.row_mask[None])
            for code in codes
        ]
        return BinaryCode.cat(lifted)

    def _kept(self) -> Tensor:
        if self.row_mask is not None:
            return self.row_mask
        return torch.ones(self.words.shape[:-1], dtype=torch.bool, device=self.device)

    def flatten(self) -> BinaryCode:
        """The same rows with one leading dimension: ``[N, K]``."""
        mask = None if self.row_mask is None else self.row_mask.reshape(-1)
        flat = self._like(self._rows, mask)
        flat._counts = self._counts
        return flat

    def to(self, device: torch.device | str) -> BinaryCode:
        """Copy to a device.

        Raises:
            TypeError: a dtype, which bits do not have.
        """
        if isinstance(device, torch.dtype):
            raise TypeError(f"device must be a device; got {device}: to_dense({device}) has it")
        mask = None if self.row_mask is None else self.row_mask.to(device)
        return self._like(self.words.to(device), mask)

    # -- statistics ----------------------------------------------------------------------------

    def n_rows(self) -> Tensor:
        """Rows counted, int64 ``[]`` (masked rows are not)."""
        if self.row_mask is not None:
            return self.row_mask.sum()
        return torch.full((), self.words.shape[:-1].numel(), dtype=torch.int64, device=self.device)

    def counts(self) -> Tensor:
        """Ones in each column, int64 ``[K]``."""
        if self._counts is not None:
            return self._counts.clone()  # a caller's arithmetic in place must not reach it
        return _column_counts(self.device.type)(self._rows, self.n_columns)

    def density(self) -> Tensor:
        """Share of ones in each column, float64 ``[K]``."""
        return self.counts().double() / self.n_rows()

    def entropy(self) -> Tensor:
        """Sum over columns of the binary entropy of the density, in bits: float64 ``[]``.

        Pooled over all rows of this code. The mean over batches is lower: the estimate is
        biased by about -1 / (2 N ln 2) a column.
        """
        return entropy_bits(self.counts(), self.n_rows())

    def l0(self) -> Tensor:
        """Ones in each row, int64 ``[...]``."""
        rows = self._rows
        each = max(_L0_WORDS // rows.shape[1], 1)  # a block's words are widened, and not all
        blocks = [packing.popcount(part).sum(-1, dtype=torch.int64) for part in rows.split(each)]
        return torch.cat(blocks).view(self.words.shape[:-1])

    def statistics(self, covariance: bool = False, *, impl: str = "auto") -> CodeStatistics:
        """Statistics of these rows, to be passed as ``stats=``.

        Args:
            covariance: also the covariance's integer sum and signs.
            impl: implementation of the covariance, as in :func:`bae_fast.binary_autoencoder`.

        Raises:
            ValueError: the covariance of fewer than two rows, or one too large for int64.
        """
        words, counts, n_rows = self._rows, self.counts(), self.n_rows()
        if not covariance:
            return CodeStatistics(n_rows, counts, words)
        check_covariance_size(len(words), self.n_columns, self.device.type)
        dtype = torch.float32
        device = self.device
        name = registry.choose(impl, device.type, dtype, self.n_columns, self.n_bits, device.index)
        # the reference has no packed operators: its statistics are the plain packed ones
        backend = registry.BACKENDS["torch" if name == "reference" else name]
        keep = keep_signs(self.n_columns, device)
        if backend.may_leave_planes(len(words), self.n_columns):
            keep = False  # planes that are not made carry a mark for a step's own backward alone
        numerator, signs = backend.ops["covariance"](words, counts, n_rows, keep)
        return CodeStatistics(n_rows, counts, words, numerator, signs if signs.numel() else None)

    # -- contents ------------------------------------------------------------------------------

    def to_dense(self, dtype: torch.dtype = torch.bool) -> Tensor:
        """Bits as ``dtype [..., K]``."""
        return packing.unpack_rows(self.words, self.n_columns, dtype)

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Feature values ``dtype [..., F]``: sum_i b_i 2^i / (2^k - 1), bits where k is 1.

        Raises:
            TypeError: an integer dtype for several bits a feature, whose values are fractions.
        """
        if self.n_bits > 1 and not dtype.is_floating_point:
            raise TypeError(f"dtype must be floating point for n_bits={self.n_bits}; got {dtype}")
        bits = self.to_dense(dtype)
        if self.n_bits == 1:
            return bits
        wide = torch.promote_types(dtype, torch.float32)
        weights = packing.bit_weights(self.n_bits, wide, self.device)
        return (bits.unflatten(-1, (-1, self.n_bits)).to(wide) @ weights).to(dtype)

    def indices(self) -> Tensor:
        """Coordinates of the ones, int64 ``[nnz, ndim]``, as ``torch.nonzero`` of the dense bits.

        Dense only ``4096`` rows at a time.
        """
        if self.words.dim() == 1:
            return self.to_dense().nonzero()
        parts = []
        for top in range(0, len(self), _ROW_BLOCK):
            part = self[top : top + _ROW_BLOCK].to_dense().nonzero()
            part[:, 0] += top
            parts.append(part)
        if not parts:
            return torch.empty(0, len(self.shape), dtype=torch.int64, device=self.device)
        return torch.cat(parts)

    def equal(self, other: BinaryCode) -> bool:
        """Whether shape, bits a feature, mask and every bit are the same.

        Raises:
            TypeError: other is no code.
        """
        if not isinstance(other, BinaryCode):
            raise TypeError(f"other must be a BinaryCode; got {type(other).__name__}")
        if self.shape != other.shape:
            return False
        same_mask = torch.equal(self._kept(), other._kept().to(self.device))
        return (
            self.n_bits == other.n_bits
            and same_mask
            and torch.equal(self.words, other.words.to(self.device))
        )

    def __eq__(self, other: object) -> bool:
        """:meth:`equal` of another code: one bool, and not one for each bit as of tensors."""
        return self.equal(other) if isinstance(other, BinaryCode) else NotImplemented

    def __hash__(self) -> int:
        # of what no device is waited for; equal codes have equal ones
        return hash((BinaryCode, self.shape, self.n_bits))

    def __repr__(self) -> str:
        bits = f", n_bits={self.n_bits}" if self.n_bits > 1 else ""
        ones = int(self.counts().sum()) / max(self.words.shape[:-1].numel() * self.n_columns, 1)
        return (
            f"BinaryCode(shape={tuple(self.shape)}, density={ones:.4g}{bits}, device={self.device})"
        )

    # -- files ---------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], metadata: dict[str, str] | None = None) -> Path:
        """Write a safetensors file: ``words`` unpadded, ``row_mask`` where there is one.

        The file appears whole or not at all. Needs ``safetensors``.

        Args:
            metadata: kept in the file's header; :meth:`read_metadata` gives it back.
        """
        tensors = {"words": self.words.detach().cpu().contiguous()}
        if self.row_mask is not None:
            tensors["row_mask"] = self.row_mask.cpu().contiguous()
        header = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "n_columns": str(self.n_columns),
            "n_bits": str(self.n_bits),
            "metadata": json.dumps(metadata or {}),
        }
        return write_safetensors(path, tensors, header, sums=True)

    @staticmethod
    def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
        """What :meth:`save` was given as ``metadata``; errors as in :meth:`load`."""
        _, header = read_safetensors(path)
        if header.get("format") != FORMAT:
            raise ValueError(f"{path} is not a saved BinaryCode: format {header.get('format')!r}")
        try:
            found = json.loads(header.get("metadata", "{}"))
            return {str(name): str(value) for name, value in found.items()}
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} holds metadata that is no JSON object: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BinaryCode:
        """Read a file written by :meth:`save`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a safetensors file, not a code, another version, or inconsistent.
        """
        tensors, header = read_safetensors(path)
        if header.get("format") != FORMAT:
            raise ValueError(f"{path} is not a saved BinaryCode: format {header.get('format')!r}")
        if header.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"{path} has version {header.get('version')!r}; can read {FORMAT_VERSION!r}"
            )
        try:
            n_columns, n_bits = int(header["n_columns"]), int(header["n_bits"])
            code = cls(tensors["words"], n_columns, n_bits=n_bits, row_mask=tensors.get("row_mask"))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a valid BinaryCode: {error}") from error
        return code

    def __reduce__(self) -> Any:
        return _rebuild, (self.words, self.n_columns, self.n_bits, self.row_mask)


def _column_counts(device_type: str) -> Callable[[Tensor, int], Tensor]:
    """The fastest count of ones on a device; every one gives the same integers."""
    if torch.compiler.is_compiling():
        return packing.column_counts  # the compiler sees through plain torch only
    try:
        count = registry.extras("auto", device_type).column_counts
    except registry.BackendUnavailableError:
        # BAE_FAST_IMPL names a backend for another device, and counting needs none
        count = None
    return count or packing.column_counts


def _rebuild(words: Tensor, n_columns: int, n_bits: int, row_mask: Tensor | None) -> BinaryCode:
    return BinaryCode(words, n_columns, n_bits=n_bits, row_mask=row_mask)


# torch.load reads files of torch.save that hold codes, with its default weights_only=True too
torch.serialization.add_safe_globals([_rebuild])
