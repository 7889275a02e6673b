"""Entropy by the chain rule with up to three earlier columns: what a tree cannot take out.

H(b) = sum_j H(b_j | all columns before j), at most sum_j H(b_j | S_j) for any few S_j before j.
With one column each this is the tree. A bit that is a function of two others, their parity
included, has no entropy given both, whatever it shares with each alone; with three, one-of-four
codes come out exactly. The bound holds in any order; the order here is that of the tree.

In codes of more than 128 columns that vary, pairs are sought among the 16 earlier columns of the
most mutual information with b_j: one that tells nothing alone, as in a parity, is then missed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bae_fast import packing
from bae_fast.codes import BinaryCode
from bae_fast.ops import registry
from bae_fast.pairs import KERNEL_ROWS, columns_as_rows, xlog2x

# earlier columns tried for pairs: all of them up to this width, else those of the most mutual
# information
_ALL_UP_TO = 128
_MOST_INFORMATIVE = 16

# float32 values of scratch at a time
_SCRATCH = 1 << 24


def candidates(information: Tensor, order: Tensor) -> Tensor:
    """Columns that may be conditioned on: int64 ``[k, c]``, -1 where there is none.

    Args:
        information: ``[k, k]`` mutual information.
        order: int64 ``[k]``, the columns in the chain's order.
    """
    k = len(order)
    place = torch.empty_like(order)
    place[order] = torch.arange(k, device=order.device)
    if k <= _ALL_UP_TO:
        found = torch.arange(k, device=order.device).expand(k, k)
        return torch.where(place[found] < place[:, None], found, -1)
    found = torch.empty(k, _MOST_INFORMATIVE, dtype=torch.int64, device=order.device)
    step = max(_SCRATCH // k, 1)
    for start in range(0, k, step):
        block = information[start : start + step]
        earlier = place[None] < place[start : start + step, None]
        best = torch.where(earlier, block, -torch.inf).topk(_MOST_INFORMATIVE, dim=1)
        found[start : start + step] = torch.where(best.values > -torch.inf, best.indices, -1)
    return found


def savings(
    code: BinaryCode,
    columns: Tensor,
    among: Tensor,
    parent: Tensor,
    conditional: Tensor,
    false_share: float,
) -> Tensor:
    """Bits by which two or three columns beat one: float64 ``[k]``, 0 where none do.

    A pair counts if its gain over ``conditional`` is beyond chance among all pairs tried over all
    columns, a third column likewise, in ``false_share`` of sets; terms are corrected after Miller
    and Madow.

    Args:
        code: ``[N, K]``.
        columns: int64 ``[k]``, those of the code that vary.
        among: see :func:`candidates`.
        parent: bool ``[k]``, whether ``conditional`` is given one column already.
        conditional: float64 ``[k]``, entropy given none or one, without correction, and
            ``[k]`` its correction in units of 1 / (2 N ln 2): stacked ``[2, k]``.
    """
    rows = code.flatten()
    n, (k, c) = rows.shape[0], among.shape
    unit = 1 / (2 * n * math.log(2))
    table = xlog2x(torch.arange(n + 1, dtype=torch.float64, device=among.device) / n)
    saved = torch.zeros(k, dtype=torch.float64, device=among.device)
    if k < 3:
        return saved
    outcomes = _Outcomes(rows, columns)
    n_pairs = int(((among >= 0).sum(1).double() * ((among >= 0).sum(1) - 1) / 2).sum())
    n_thirds = int((among >= 0).sum())
    step = max(_SCRATCH // (c * c * 4), 1)
    for start in range(0, k, step):
        at = slice(start, start + step)
        js = torch.arange(k, device=among.device)[at]
        mine, valid = among[at].clamp_min(0), among[at] >= 0
        counts = outcomes(js, mine, None)
        entropy, terms = _given_pairs(counts, table)
        allowed = valid[:, :, None] & valid[:, None, :]
        allowed &= torch.ones(c, c, dtype=torch.bool, device=among.device).triu(1)
        entropy = torch.where(allowed, entropy, torch.inf).flatten(1)
        best = entropy.argmin(1)
        h = entropy.gather(1, best[:, None])[:, 0]
        m = terms.flatten(1).gather(1, best[:, None])[:, 0]
        before, before_m = conditional[0, at], conditional[1, at]
        # given none, chance gives chi^2 of 3 degrees; over the best single column at most 2
        degrees = torch.where(parent[at], 2.0, 3.0).double()
        counted = _beyond_chance((before - h) / unit, degrees, false_share / max(n_pairs, 1))
        gain = (before + before_m * unit) - (h + m * unit)
        saved[at] = torch.where(counted, gain, saved[at])
        if not bool(counted.any()):
            continue
        some = counted.nonzero().flatten()
        pair = torch.stack([best[some] // c, best[some] % c], 1)
        mine, valid = mine[some], valid[some].clone()
        valid.scatter_(1, pair, False)
        counts = outcomes(js[some], mine, mine.gather(1, pair))
        entropy, terms = _given_triples(counts, table)
        entropy = torch.where(valid, entropy, torch.inf)
        h3, third = entropy.min(1)
        m3 = terms.gather(1, third[:, None])[:, 0]
        degrees = torch.full_like(h3, 4.0)
        more = _beyond_chance((h[some] - h3) / unit, degrees, false_share / max(n_thirds, 1))
        gain = (h[some] + m[some] * unit) - (h3 + m3 * unit)
        saved[start + some] += torch.where(more, gain, 0.0)
    return saved


def _beyond_chance(statistic: Tensor, degrees: Tensor, tail: float) -> Tensor:
    """Whether a statistic lies in the tail of chi^2."""
    statistic = statistic.nan_to_num(neginf=0.0, posinf=0.0).clamp_min(0)
    return torch.special.gammaincc(degrees / 2, statistic / 2) < tail


class _Outcomes:
    """Counts of rows by the outcomes of columns ``[k]`` of a code ``[N, K]``: exact float32."""

    def __init__(self, rows: BinaryCode, columns: Tensor) -> None:
        self.rows, self.columns = rows, columns
        self.common = registry.extras("auto", rows.device.type).common_ones

    def __call__(self, js: Tensor, among: Tensor, pair: Tensor | None) -> Tensor:
        """``[J, 2, c + 1, c + 1]`` or, given a pair, ``[J, 8, c + 1]``.

        First form: (b_j off or on, a on, b on). Second: (b_j, first, second of the pair; a on). The
        last of the c + 1 is a column that is always on.

        Args:
            js: int64 ``[J]``.
            among: int64 ``[J, c]``.
            pair: int64 ``[J, 2]``, or None.
        """
        c = among.shape[1]
        shape = (len(js), 2, c + 1, c + 1) if pair is None else (len(js), 8, c + 1)
        found = torch.zeros(shape, dtype=torch.float32, device=among.device)
        if self.common is None:
            self._add_by_products(found, js, among, pair)
            return found
        tried = torch.nn.functional.pad(among, (0, 1), value=len(self.columns))
        for words in self.rows.words.split(KERNEL_ROWS):
            # the columns as rows of bits, and one that is always on
            own = columns_as_rows(words, self.rows.n_columns, self.columns)
            always = torch.ones(1, len(words), dtype=torch.bool, device=own.device)
            packed = torch.cat([own, packing.pack_rows(always)])
            step = max(_SCRATCH // (packed.shape[1] * (c + 8)), 1)
            for start in range(0, len(js), step):
                at = slice(start, start + step)
                some = None if pair is None else pair[at]
                found[at] += self._by_bits(self.common, packed, js[at], tried[at], some)
        return found

    @staticmethod
    def _by_bits(
        common: Callable[[Tensor, Tensor, Tensor], Tensor],
        packed: Tensor,
        js: Tensor,
        tried: Tensor,
        pair: Tensor | None,
    ) -> Tensor:
        own = packed[js][:, None]
        if pair is None:
            others = packed[tried]
            on = common(others & own, packed, tried)
            return torch.stack([common(others, packed, tried) - on, on], 1)
        # bits past the last row are on in a complement, and in no column
        first, second = packed[pair[:, :1]], packed[pair[:, 1:]]
        outcomes = [
            a & b & c for a in (~own, own) for b in (~first, first) for c in (~second, second)
        ]
        return common(torch.cat(outcomes, 1), packed, tried)

    def _add_by_products(
        self, found: Tensor, js: Tensor, among: Tensor, pair: Tensor | None
    ) -> None:
        rows = self.rows
        n_js, c = among.shape
        step = max(_SCRATCH // (n_js * (c + 1) * 2), 16)
        for start in range(0, rows.shape[0], step):
            words = rows.words[start : start + step]
            dense = packing.unpack_rows(words, rows.n_columns, torch.uint8)
            dense = dense[:, self.columns].T.float()
            # [J, c + 1, rows]
            tried = torch.nn.functional.pad(dense[among], (0, 0, 0, 1), value=1.0)
            own = dense[js][:, None]
            if pair is None:
                on = (tried * own) @ tried.mT
                found[:, 1] += on
                found[:, 0] += tried @ tried.mT - on
            else:
                first, second = dense[pair[:, :1]][:, 0], dense[pair[:, 1:]][:, 0]
                state = 4 * own[:, 0] + 2 * first + second
                which = state[:, None] == torch.arange(8, device=among.device)[:, None]
                found += which.float() @ tried.mT


def _given_pairs(counts: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """H(b_j | a, b) and how many more outcomes occur with b_j than without: ``[J, c, c]``."""
    both = counts[..., :-1, :-1]
    only_a = counts[..., :-1, -1:] - both
    only_b = counts[..., -1:, :-1] - both
    neither = counts[..., -1:, -1:] - both - only_a - only_b
    entropy = torch.zeros(both.shape[:1] + both.shape[2:], dtype=table.dtype, device=table.device)
    terms = torch.zeros(entropy.shape, dtype=torch.int8, device=table.device)
    for cell in (both, only_a, only_b, neither):
        for part, sign in ((cell.sum(1), 1), (cell[:, 0], -1), (cell[:, 1], -1)):
            entropy.add_(_look_up(table, part), alpha=sign)
            terms.sub_((part > 0).to(torch.int8), alpha=sign)
    return entropy, terms


def _given_triples(counts: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The same given a pair and each third column: ``[J, c]``."""
    on = counts[..., :-1]
    cells = torch.stack([on, counts[..., -1:] - on], 1).unflatten(2, (2, 4))  # a, b_j, pair
    own = cells.sum(2)
    entropy = _look_up(table, own).sum((1, 2)) - _look_up(table, cells).sum((1, 2, 3))
    return entropy, (cells > 0).sum((1, 2, 3)) - (own > 0).sum((1, 2))


def _look_up(table: Tensor, counts: Tensor) -> Tensor:
    return table.index_select(0, counts.flatten().int()).view(counts.shape)
