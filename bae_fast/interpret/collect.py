"""Which tokens a feature is to be named by: for every token its k most salient features.

The magnitude of a bit is its burstiness, s(b, p) = log2(|b - p| + 1e-6) for the feature's density
p (Cho et al., arXiv 2509.20997, and the released program); that of a sparse autoencoder's feature
is its activation. Every token goes to the k features of largest magnitude in it.

A bit has two magnitudes, so all rows share one table of 2 F entries (feature, bit), sorted once by
falling |b - p|: the k largest of a row are the first k entries that hold in it. Entries of bits
that are off come before those of rare bits that are on where p is nearly 1, and fill up the rows
that have fewer than k bits on; the released program counts both, and so does :func:`collect_code`
unless ``on_only``.

Ties: |b - p| is compared in float64, of which s is a rising function; equal ones go to the lower
feature number. Nothing dense of [N, F] is made: rows are taken in blocks.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bae_fast import packing
from bae_fast.arguments import check_int
from bae_fast.codes import BinaryCode
from bae_fast.files import read_safetensors, write_safetensors
from bae_fast.ops import registry

FORMAT = "bae_fast.salient_tokens"
FORMAT_VERSION = "1"

# added to |b - p| before the logarithm, as in the released program
EPSILON = 1e-6

# elements of a block at a time: 64 MiB of int32
_BLOCK_ELEMENTS = 2**24


@dataclass(frozen=True)
class SalientTokens:
    """The rows (tokens) of every feature in which it is among the k most salient ones.

    Attributes:
        offsets: int64 ``[F + 1]``; the entries of feature f are offsets[f] : offsets[f + 1].
        rows: int32 or int64 ``[n]``, row numbers, rising within a feature: the order of the text.
        salience: float32 ``[n]``, the magnitude of the feature in that row.
        k: features a row went to at most.
        n_rows: rows looked at; row numbers are below it.

    Raises:
        ValueError: shapes, dtypes or offsets that do not fit each other.
    """

    offsets: Tensor
    rows: Tensor
    salience: Tensor
    k: int
    n_rows: int

    def __post_init__(self) -> None:
        shapes = [tuple(t.shape) for t in (self.offsets, self.rows, self.salience)]
        if any(len(shape) != 1 for shape in shapes) or shapes[1] != shapes[2] or not shapes[0][0]:
            raise ValueError(f"offsets, rows and salience must be [F + 1], [n], [n]; got {shapes}")
        if self.offsets.dtype != torch.int64 or self.rows.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                "offsets must be int64 and rows int32 or int64; "
                f"got {self.offsets.dtype} and {self.rows.dtype}"
            )
        first, last = int(self.offsets[0]), int(self.offsets[-1])
        if first != 0 or last != len(self.rows) or bool((self.offsets.diff() < 0).any()):
            raise ValueError(f"offsets must rise from 0 to {len(self.rows)}; got {first} to {last}")

    @property
    def n_features(self) -> int:
        """F."""
        return len(self.offsets) - 1

    def counts(self) -> Tensor:
        """Rows that went to each feature, int64 ``[F]``."""
        return self.offsets.diff()

    def _slice(self, feature: int) -> slice:
        if not 0 <= feature < self.n_features:
            raise IndexError(f"feature must lie between 0 and {self.n_features - 1}; got {feature}")
        return slice(int(self.offsets[feature]), int(self.offsets[feature + 1]))

    def of(self, feature: int) -> tuple[Tensor, Tensor]:
        """Rows of one feature in the order of the text, and its salience in them.

        Raises:
            IndexError: no such feature.
        """
        part = self._slice(feature)
        return self.rows[part], self.salience[part]

    def strongest(self, feature: int, n: int) -> Tensor:
        """At most n rows of one feature, by falling salience; equal ones in the order of the text.

        Raises:
            IndexError: no such feature.
        """
        rows, salience = self.of(feature)
        return rows[salience.argsort(descending=True, stable=True)[:n]]

    # -- files ---------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a safetensors file; it appears whole or not at all."""
        names = ("offsets", "rows", "salience")
        tensors = {name: getattr(self, name).detach().cpu().contiguous() for name in names}
        header = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "k": str(self.k),
            "n_rows": str(self.n_rows),
        }
        return write_safetensors(path, tensors, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SalientTokens:
        """Read a file written by :meth:`save`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a safetensors file, another format or version, or inconsistent.
        """
        tensors, header = read_safetensors(path)
        kind = (header.get("format"), header.get("version"))
        if kind != (FORMAT, FORMAT_VERSION):
            raise ValueError(f"{path} must be of {FORMAT} version {FORMAT_VERSION}; got {kind}")
        try:
            found = cls(
                offsets=tensors["offsets"],
                rows=tensors["rows"],
                salience=tensors["salience"],
                k=int(header["k"]),
                n_rows=int(header["n_rows"]),
            )
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} is not a valid file of salient tokens: {error}") from error
        if len(found.rows) and not 0 <= int(found.rows.min()) <= int(found.rows.max()) < (
            found.n_rows
        ):
            raise ValueError(f"{path} has rows outside of its {found.n_rows}")
        return found


@torch.no_grad()
def collect_code(
    code: BinaryCode,
    *,
    k: int = 10,
    density: Tensor | None = None,
    on_only: bool = False,
    impl: str = "auto",
) -> SalientTokens:
    """Give every row of a code to its k most salient features.

    Args:
        code: ``[..., F]`` of one bit a feature; row numbers are those of its flattened rows.
            Masked rows go to no feature.
        k: features a row; all F where there are fewer.
        density: ``[F]`` in [0, 1], the p of the burstiness; None: that of the code. Compared in
            float64.
        on_only: give a row only to features that are on in it, at most k of them. The released
            way, the default, counts a bit that is off as well, by p: a feature that is nearly
            always on then collects the tokens on which it is off, and a row with fewer than k
            bits on goes to the most common features among those that are off.
        impl: the implementation, see :func:`bae_fast.binary_autoencoder`; all give the same.

    Raises:
        ValueError: more than one bit a feature, k below 1, or a density that does not fit.
        BackendUnavailableError: the implementation named cannot run here.
    """
    if code.n_bits != 1:
        raise ValueError(f"code must have one bit a feature; got n_bits={code.n_bits}")
    check_int("k", k, 1)
    code = code.flatten()
    n, f = code.shape
    faster = registry.extras(impl, code.device.type)
    if density is None:
        count = faster.column_counts or _column_counts
        density = count(code.words, f).double() / code.n_rows()
        density = density.nan_to_num()  # no row: no entry either
    order, keys = _table(density.to(code.device), f, on_only)
    k = min(k, f)
    select = faster.salient or _select
    places = select(code.words, order, f, k)
    if code.row_mask is not None:
        places[~code.row_mask] = len(order)
    # one entry more: where a row has no further
    features = torch.cat([order >> 1, order.new_tensor([f])]).to(torch.int32)
    group = faster.grouped or _grouped
    offsets, at = group(features[places].flatten(), f)
    salience = (keys + EPSILON).log2().float()[places.flatten()[at]]
    return SalientTokens(offsets, (at // k).to(_row_dtype(n)), salience, k, n)


@torch.no_grad()
def collect_scores(blocks: Iterable[Tensor], *, k: int = 10) -> SalientTokens:
    """Give every row of dense scores to its k most salient features, among those above zero.

    Args:
        blocks: ``[rows, F]`` each, in the order of the text: the activations of a sparse
            autoencoder (``scores`` of a baseline). Held one at a time.
        k: features a row; fewer where fewer are positive. Equal scores go to the lower feature
            number.

    Raises:
        ValueError: k below 1, no block, blocks of another shape, or NaN.
    """
    check_int("k", k, 1)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    n, f = 0, None
    for block in blocks:
        if block.dim() != 2 or not block.shape[1] or (f is not None and block.shape[1] != f):
            raise ValueError(
                f"blocks must be [rows, {'F' if f is None else f}]; got {list(block.shape)}"
            )
        f = block.shape[1]
        at, features, scores = _largest(block, min(k, f))
        parts.append((features.to(torch.int32), at + n, scores.float()))
        n += len(block)
    if f is None:
        raise ValueError("blocks must not be empty")
    features, rows, scores = (torch.cat(list(kind)) for kind in zip(*parts, strict=True))
    faster = registry.extras("auto", features.device.type)
    offsets, at = (faster.grouped or _grouped)(features, f)
    return SalientTokens(offsets, rows[at].to(_row_dtype(n)), scores[at], min(k, f), n)


def _table(density: Tensor, f: int, on_only: bool) -> tuple[Tensor, Tensor]:
    """Entries 2 f + b by falling |b - p|, int64, and |b - p| in that order, float64.

    ``[2 F]``, or ``[F]`` of ones only.
    """
    if density.shape != (f,):
        raise ValueError(f"density must have shape [{f}]; got {list(density.shape)}")
    p = density.double()
    if not bool(((p >= 0) & (p <= 1)).all()):
        raise ValueError("density must lie in [0, 1]")
    keys = torch.stack([p, 1 - p], dim=1)  # the stable sort keeps lower features first
    entries = torch.arange(2 * f, device=p.device).view(f, 2)
    if on_only:
        keys, entries = keys[:, 1:], entries[:, 1:]
    keys, order = keys.flatten().sort(descending=True, stable=True)
    return entries.flatten()[order], keys


def _column_counts(words: Tensor, f: int) -> Tensor:
    """What ``packing.column_counts`` gives, transposed a block of rows at a time."""
    total = torch.zeros(f, dtype=torch.int64, device=words.device)
    for block in words.split(max(8 * _BLOCK_ELEMENTS // f, 1)):
        total += packing.column_counts(block, f)
    return total


def _select(words: Tensor, order: Tensor, f: int, k: int) -> Tensor:
    """Places in ``order`` of the first k entries that hold in each row.

    Args:
        words: int32 ``[N, W]``, row-packed.
        order: int64 ``[m]``, entries 2 f + b.
        k: how many, at most F.

    Returns:
        int32 ``[N, k]``, rising; m where a row has fewer.
    """
    n, m = len(words), len(order)
    found = torch.full((n, k), m, dtype=torch.int32, device=words.device)
    # Most rows need only the head of the table; the few that need more look at all of it.
    head = min(max(4 * k, 256), m)
    left = torch.arange(n, device=words.device)
    while len(left):
        column, bit = order[:head] >> 1, (order[:head] & 1).to(torch.int32)
        word, shift = column // packing.WORD_BITS, (column % packing.WORD_BITS).to(torch.int32)
        place = torch.arange(head, dtype=torch.int32, device=words.device)
        short = []
        for part in left.split(max(_BLOCK_ELEMENTS // head, 1)):
            holds = ((words[part][:, word] >> shift) & 1) == bit
            places = torch.where(holds, place, m)
            if head > k:
                places = places.topk(k, dim=1, largest=False, sorted=True).values
            else:
                places = places.sort(dim=1).values
            found[part, : places.shape[1]] = places
            if head < m:
                short.append(part[places[:, -1] == m])
        if head == m:
            break
        left, head = torch.cat(short), min(head * 4, m)
    return found


def _largest(block: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, features and scores of the k largest positive scores of each row of a block."""
    values, features = block.topk(k, dim=1)
    if bool(values.isnan().any()):
        raise ValueError("blocks must not hold NaN")
    # topk picks any of those that equal the k-th; where they are too many, the first are due
    least = values[:, -1:]
    crowded = ((least > 0) & ((block >= least).sum(1, keepdim=True) > k)).flatten()
    if bool(crowded.any()):
        rows, edge = block[crowded], least[crowded]
        above, equal = rows > edge, rows == edge
        room = k - above.sum(1, keepdim=True)
        chosen = above | (equal & (equal.cumsum(1) <= room))
        features[crowded] = chosen.nonzero()[:, 1].view(-1, k)
        values[crowded] = rows[chosen].view(-1, k)
    positive = values > 0
    at = torch.arange(len(block), device=block.device)[:, None].expand_as(positive)
    return at[positive], features[positive], values[positive]


def _grouped(numbers: Tensor, n_groups: int) -> tuple[Tensor, Tensor]:
    """Numbers below n_groups brought together.

    Args:
        numbers: int32 ``[n]``, not negative; those from n_groups on are left out.

    Returns:
        int64 ``[n_groups + 1]``, offsets; int64, the indices of each group, rising.
    """
    offsets = torch.zeros(n_groups + 1, dtype=torch.int64, device=numbers.device)
    counts = torch.bincount(numbers, minlength=n_groups + 1)[:n_groups]
    torch.cumsum(counts, 0, out=offsets[1:])
    return offsets, numbers.sort(stable=True).indices[: int(offsets[-1])]


def _row_dtype(n_rows: int) -> torch.dtype:
    return torch.int32 if n_rows < 2**31 else torch.int64
