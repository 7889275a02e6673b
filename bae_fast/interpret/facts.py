"""Facts about every feature at once, from the packed rows in which each is on.

``density``     share of rows.
``burstiness``  how much more often a feature is on where it was on a short while ago: the share of
                its firings that have another among the ``reach`` rows before them in the same
                window, over that share for independent firing of the same density. It is the
                adaptation of Church (2000), Pr(w in the text | w in its history) over the prior,
                for features in place of words. Not the magnitude of ComSem that shares the name.
``tokens``      by n_on log2(lift), as :func:`bae_fast.analysis.describe_features`.
``lens``        vocabulary tokens whose unembedding is nearest to the decoder direction behind the
                final norm (nostalgebraist 2020): cosine, of unembeddings less their mean, which
                softmax does not see.
``neighbours``  by the phi coefficient of firing together, from exact counts of pairs.
``histogram``   of pre-activations, or of an SAE's activations where it is on.

A sparse autoencoder's feature is on where its activation is positive: ``model.active(rows)``.
Everything goes by blocks; nothing of [N, F] or [F, F] floats is ever whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bae_fast import packing
from bae_fast.analysis.features import TokenLift, token_lifts
from bae_fast.analysis.text import token_text
from bae_fast.arguments import all_finite, check_int
from bae_fast.codes import BinaryCode
from bae_fast.interpret.records import FeatureContext, FeatureRecord, Histogram
from bae_fast.lm.cache import ActivationCache
from bae_fast.lm.logits import final_norm
from bae_fast.pairs import MAX_COLUMNS, joint_counts, pair_counts
from bae_fast.spacing import even_numbers

# elements of a dense block at a time
_BLOCK_ELEMENTS = 2**24
# columns taken together where a table of columns by tokens is made; whole words
_TOKEN_COLUMNS = 256
# columns whose pairs, or whose products with the vocabulary, are made together
_PAIR_BLOCK = 1024
_LENS_BLOCK = 256


@dataclass(frozen=True)
class Burstiness:
    """Figures of every feature, each ``[F]`` float64.

    Attributes:
        observed: share of its firings that follow another; NaN where it is never on.
        expected: that share for independent firing.
    """

    observed: Tensor
    expected: Tensor

    @property
    def ratio(self) -> Tensor:
        """observed / expected; 1 for independent firing, NaN where there is nothing to tell."""
        return self.observed / self.expected


@dataclass(frozen=True)
class Ranked:
    """The best few for every feature: indices int64 ``[F, k]`` (-1: no further) and scores."""

    indices: Tensor
    scores: Tensor

    def of(self, feature: int) -> list[tuple[int, float]]:
        """(index, score) of one feature, best first."""
        pairs = zip(self.indices[feature].tolist(), self.scores[feature].tolist(), strict=True)
        return [(index, score) for index, score in pairs if index >= 0]


@dataclass(frozen=True)
class TopTokens:
    """Over-represented tokens of every feature: int64 ``[F, k]``, id -1 where there is none."""

    tokens: Tensor
    n_on: Tensor
    n_total: Tensor
    lift: Tensor

    def of(self, feature: int, tokenizer: Any) -> list[TokenLift]:
        """One feature's tokens as text, best first."""
        columns = (self.tokens, self.n_on, self.n_total, self.lift)
        rows = zip(*(column[feature].tolist() for column in columns), strict=True)
        return [
            TokenLift(token_text(tokenizer, token), token, lift, n_on, n_total)
            for token, n_on, n_total, lift in rows
            if token >= 0
        ]


@dataclass(frozen=True)
class Histograms:
    """Equal bins from ``low`` to ``high``, ``[F]`` each; counts int64 ``[F, bins]``."""

    low: Tensor
    high: Tensor
    counts: Tensor

    def of(self, feature: int) -> Histogram:
        """One feature's."""
        low, high = float(self.low[feature]), float(self.high[feature])
        return Histogram(low, high, tuple(self.counts[feature].tolist()))


# -- burstiness --------------------------------------------------------------------------------


@torch.no_grad()
def burstiness(code: BinaryCode, windows: Tensor, *, reach: int = 32) -> Burstiness:
    """How much more often a feature is on where it was on a short while ago.

    Church (2000), "Empirical estimates of adaptation: the chance of two Noriegas is closer to p/2
    than p^2", COLING. Expected: a mean over rows of 1 - (1 - p)^m, m the rows before it that are
    looked at, at most ``reach``, fewer near the start of a window.

    Args:
        code: ``[N, F]`` in the order of the text, without a row mask.
        windows: int ``[N]``, the window (stretch of text) of each row; a window's rows adjoin.
        reach: rows looked back.

    Raises:
        ValueError: shapes that do not fit, a row mask, or a reach below 1.
    """
    rows, n = _plain(code)
    if windows.shape != (n,):
        raise ValueError(f"windows must have shape [{n}]; got {list(windows.shape)}")
    check_int("reach", reach, 1)
    windows = windows.to(code.device)
    f = code.n_columns
    both = torch.zeros(f, dtype=torch.int64, device=code.device)
    step = max(_BLOCK_ELEMENTS // (4 * packing.n_words(f)), 4 * reach)
    for start in range(0, n, step):
        top, stop = max(start - reach, 0), min(start + step, n)
        words, window = rows.words[top:stop], windows[top:stop]
        recent = _shifted(words, window, 1)
        covered = 1
        while covered < reach:  # each round doubles the rows looked back; overlaps do no harm
            by = min(covered, reach - covered)
            recent = recent | _shifted(recent, window, by)
            covered += by
        both += packing.column_counts((words & recent)[start - top :], f)
    counts = rows.counts()
    p = counts.double() / max(n, 1)
    looked = _place_in_window(windows).clamp_max(reach)
    expected = torch.zeros_like(p)
    for m, rows_m in enumerate(torch.bincount(looked, minlength=reach + 1).tolist()):
        expected += rows_m / max(n, 1) * -torch.expm1(m * torch.log1p(-p.clamp_max(1 - 1e-12)))
    return Burstiness(both.double() / counts, expected)


def _plain(code: BinaryCode) -> tuple[BinaryCode, int]:
    if code.row_mask is not None:
        raise ValueError("code must have no row_mask: index the kept rows first")
    if len(code.shape) != 2:
        raise ValueError(f"code must have shape [N, F]; got {list(code.shape)}")
    return code, len(code)


def _shifted(words: Tensor, window: Tensor, by: int) -> Tensor:
    """Each row gets the words of the one ``by`` before it in its window, or zeros."""
    out = torch.zeros_like(words)
    if by < len(words):
        same = (window[by:] == window[:-by])[:, None]
        out[by:] = torch.where(same, words[:-by], 0)
    return out


def _place_in_window(windows: Tensor) -> Tensor:
    """How many rows of its window stand before each row, int64 ``[N]``."""
    _, lengths = torch.unique_consecutive(windows, return_counts=True)
    starts = lengths.cumsum(0) - lengths
    return torch.arange(len(windows), device=windows.device) - starts.repeat_interleave(lengths)


# -- tokens ------------------------------------------------------------------------------------


@torch.no_grad()
def top_tokens(code: BinaryCode, row_tokens: Tensor, *, k: int = 6) -> TopTokens:
    """The tokens on which each feature is on more often than elsewhere.

    Only set bits are counted, in a table of 256 features by distinct tokens at a time.

    Args:
        code: ``[N, F]`` without a row mask.
        row_tokens: int ``[N]``, the token of each row.
        k: tokens a feature; those with a lift above 1.

    Raises:
        ValueError: shapes that do not fit or a row mask.
    """
    rows, n = _plain(code)
    if row_tokens.shape != (n,):
        raise ValueError(f"row_tokens must have shape [{n}]; got {list(row_tokens.shape)}")
    vocabulary, index = row_tokens.to(code.device).unique(return_inverse=True)
    v, f = len(vocabulary), code.n_columns
    n_total = torch.bincount(index, minlength=v)
    k_found = min(k, v)
    parts = []
    for first in range(0, f, _TOKEN_COLUMNS):
        width = min(_TOKEN_COLUMNS, f - first)
        some = slice(first // packing.WORD_BITS, packing.n_words(first + width))
        table = torch.zeros(width * v, dtype=torch.int32, device=code.device)
        step = max(_BLOCK_ELEMENTS // width, 1)
        for start in range(0, n, step):
            bits = packing.unpack_rows(rows.words[start : start + step, some], width)
            row, column = bits.nonzero(as_tuple=True)
            key = column * v + index[start + row]
            table.scatter_add_(0, key, table.new_ones(()).expand_as(key))
        n_on = table.view(width, v)
        lift, rank = token_lifts(n_on, n_total, n)
        best = rank.topk(k_found, dim=1)
        none = best.values <= 0
        parts.append(
            (
                vocabulary[best.indices].long().masked_fill(none, -1),
                n_on.gather(1, best.indices).long(),
                n_total[best.indices],
                lift.gather(1, best.indices),
            )
        )
    return TopTokens(*(torch.cat(kind) for kind in zip(*parts, strict=True)))


# -- logit lens --------------------------------------------------------------------------------


@torch.no_grad()
def logit_lens(
    W_dec: Tensor,
    unembedding: Tensor,
    norm: nn.Module | None = None,
    *,
    k: int = 8,
    score: str = "cosine",
) -> Ranked:
    """Vocabulary tokens that each decoder direction points to.

    The norm is applied to the directions themselves and what it makes of zero is taken away, so
    that gains, biases and centring are folded in whatever its formula. A direction has no size
    behind it.

    Args:
        W_dec: ``[F, d]`` decoder rows in units of the residual stream (of normalised x is as good:
            the scale is one number).
        unembedding: ``[V, d]``, e.g. ``model.get_output_embeddings().weight``.
        norm: the norm before it; see :func:`bae_fast.lm.logits.final_norm`.
        k: tokens a feature.
        score: "cosine" of direction and unembedding less the mean unembedding, or "dot", the
            change of the logit above the mean logit along the unit direction: large unembeddings,
            often of rare tokens, come first.

    Raises:
        ValueError: widths that differ, or an unknown score.
    """
    if W_dec.dim() != 2 or unembedding.dim() != 2 or W_dec.shape[1] != unembedding.shape[1]:
        raise ValueError(
            f"W_dec and unembedding must be [F, d] and [V, d]; "
            f"got {list(W_dec.shape)} and {list(unembedding.shape)}"
        )
    if score not in ("cosine", "dot"):
        raise ValueError(f"score must be 'cosine' or 'dot'; got {score!r}")
    out = unembedding.detach().float()
    out = out - out.mean(0)
    if score == "cosine":
        out = nn.functional.normalize(out, dim=1)
    parts = []
    for rows in W_dec.detach().to(unembedding.device).split(_LENS_BLOCK):
        rows = nn.functional.normalize(rows.float(), dim=1)
        if norm is not None:
            # in the norm's dtype, at the size it is made for: eps must not count
            dtype = next((p.dtype for p in norm.parameters()), torch.float32)
            rows = (rows * math.sqrt(rows.shape[1])).to(dtype)
            rows = (norm(rows) - norm(torch.zeros_like(rows))).float()
        best = (nn.functional.normalize(rows, dim=1) @ out.T).topk(min(k, len(out)), dim=1)
        parts.append((best.indices, best.values))
    return Ranked(*(torch.cat(kind) for kind in zip(*parts, strict=True)))


# -- neighbours --------------------------------------------------------------------------------


@torch.no_grad()
def neighbours(code: BinaryCode, *, k: int = 6, max_rows: int = 2**16) -> Ranked:
    """Features that fire together: the largest phi coefficients above 0.

        phi = (N n_ij - n_i n_j) / sqrt(n_i (N - n_i) n_j (N - n_j)),

    the correlation of two bits, from exact counts. Work: N F'^2 products for F' features that
    vary, so rows are limited. Memory: 4 F'^2 bytes, for F' up to 16,384.

    Args:
        code: ``[N, F]`` without a row mask.
        k: neighbours a feature.
        max_rows: rows looked at, evenly spaced; below 2^24.

    Raises:
        ValueError: a row mask, or max_rows out of range.
    """
    rows, n = _plain(code)
    check_int("max_rows", max_rows, 1, 2**24 - 1)
    if n > max_rows:
        rows, n = rows[even_numbers(n, max_rows, rows.device)], max_rows
    f = code.n_columns
    every = rows.counts()
    live = ((every > 0) & (every < n)).nonzero().flatten()
    k = min(k, max(f - 1, 1))
    indices = torch.full((f, k), -1, dtype=torch.int64, device=code.device)
    scores = torch.zeros(f, k, dtype=torch.float64, device=code.device)
    counts = every[live].double()
    spread = (counts * (n - counts)).sqrt()
    # all pairs at once are counted faster, and held where they fit
    whole = pair_counts(rows, live) if len(live) <= MAX_COLUMNS else None
    for start in range(0, len(live), _PAIR_BLOCK):
        left = live[start : start + _PAIR_BLOCK]
        own = slice(start, start + len(left))
        both = joint_counts(rows, left, rows, live) if whole is None else whole[own]
        phi = n * both.double() - counts[own, None] * counts
        phi /= spread[own, None] * spread
        phi.diagonal(start).fill_(-torch.inf)
        best = phi.topk(min(k, len(live)), dim=1)
        some = best.values.shape[1]
        indices[left, :some] = live[best.indices].masked_fill(best.values <= 0, -1)
        scores[left, :some] = best.values.clamp_min(0)
    return Ranked(indices, scores)


# -- histograms --------------------------------------------------------------------------------


@torch.no_grad()
def histograms(
    blocks: Iterable[Tensor], *, bins: int = 40, positive_only: bool = False
) -> Histograms:
    """A histogram of every feature's values.

    The first block sets the range of each feature, a tenth wider on either side; later values
    beyond it count in the outermost bins.

    Args:
        blocks: ``[rows, F]`` each: pre-activations, or activations.
        bins: equal bins a feature.
        positive_only: leave out what is not above 0, as of an SAE's activations; bins start at 0.

    Raises:
        ValueError: no block, blocks of another shape, or NaN or Inf.
    """
    low = high = counts = None
    for block in blocks:
        if block.dim() != 2 or (low is not None and block.shape[1] != len(low)):
            width = "F" if low is None else len(low)
            raise ValueError(f"blocks must be [rows, {width}]; got {list(block.shape)}")
        if not len(block):
            continue
        values = block.float()
        if not all_finite(values):
            raise ValueError("blocks must be finite")
        f = values.shape[1]
        if low is None or high is None or counts is None:
            low, high = values.amin(0), values.amax(0)
            margin = (high - low).clamp_min(1e-6) / 10
            low, high = low - margin, high + margin
            if positive_only:
                low, high = torch.zeros_like(low), high.clamp_min(1e-6)
            counts = torch.zeros(f * bins, dtype=torch.int64, device=values.device)
        place = ((values - low) * (bins / (high - low))).floor_().clamp_(0, bins - 1).long()
        place += torch.arange(f, device=values.device) * bins
        counts += torch.bincount(
            place[values > 0] if positive_only else place.flatten(), minlength=f * bins
        )
    if low is None or high is None or counts is None:
        raise ValueError("blocks must hold a row")
    return Histograms(low, high, counts.view(-1, bins))


# -- together ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class FeatureFacts:
    """Everything above for all features; None: not made."""

    density: Tensor
    n_rows: int
    burstiness: Burstiness | None = None
    tokens: TopTokens | None = None
    lens: Ranked | None = None
    neighbours: Ranked | None = None
    histograms: Histograms | None = None


def gather_facts(
    code: BinaryCode,
    *,
    row_tokens: Tensor | None = None,
    windows: Tensor | None = None,
    W_dec: Tensor | None = None,
    model: Any = None,
    values: Iterable[Tensor] | None = None,
    positive_only: bool = False,
    neighbour_rows: int = 2**16,
) -> FeatureFacts:
    """All facts for which the inputs are given.

    Args:
        code: ``[N, F]``, where each feature is on; see :func:`firing`.
        row_tokens, windows: the token and the window of each row, ``[N]``.
        W_dec, model: decoder rows ``[F, d]`` and the transformers model, for the lens. Left out
            where the widths differ (a transcoder to another place).
        values: dense blocks for the histograms, of any rows.
        positive_only: see :func:`histograms`.
        neighbour_rows: ``max_rows`` of :func:`neighbours`; 0 for none.
    """
    lens = None
    if W_dec is not None and model is not None:
        out = model.get_output_embeddings().weight
        if out.shape[1] == W_dec.shape[1]:
            lens = logit_lens(W_dec, out, final_norm(model))
    return FeatureFacts(
        density=code.density(),
        n_rows=int(code.n_rows()),
        burstiness=None if windows is None else burstiness(code, windows),
        tokens=None if row_tokens is None else top_tokens(code, row_tokens),
        lens=lens,
        neighbours=neighbours(code, max_rows=neighbour_rows) if neighbour_rows else None,
        histograms=None if values is None else histograms(values, positive_only=positive_only),
    )


class Contexts:
    """Stretches of text around rows, in pieces that are each whole characters."""

    def __init__(
        self,
        cache: ActivationCache,
        tokenizer: Any,
        rows: range,
        *,
        before: int = 16,
        after: int = 8,
    ) -> None:
        """Contexts of the rows ``rows`` of a cache, up to some tokens before and after."""
        self.cache, self.tokenizer, self.rows = cache, tokenizer, rows
        self.before, self.after = before, after
        # numbers of Python: they are read one by one, for which a tensor is slow
        part = slice(rows.start, rows.stop)
        self._window = cache.row_window[part].tolist()
        self._position = cache.row_position[part].tolist()
        self._texts: dict[int, str] = {}

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = token_text(self.tokenizer, token)
        return self._texts[token]

    def of(
        self, row: int, score: float | None = None, on: Callable[[int], bool] | None = None
    ) -> FeatureContext:
        """The context of one row, counted from the first of ``rows``.

        Args:
            row: row number.
            score: shown beside it.
            on: whether the feature is on in a row; rows of the context are asked.
        """
        at = self.rows[row]
        context = self.cache.token_context(at, self.before, self.after)
        ids = [*context.before, context.token, *context.after]
        here = len(context.before)
        pieces, place = self._pieces(ids)
        also: set[int] = set()
        if on is not None:
            window, position = self._window, self._position
            stop = min(row + self.after + 1, len(window))
            for i in range(max(row - self.before, 0), stop):
                if i == row or window[i] != window[row]:
                    continue
                offset = here + position[i] - position[row]
                if 0 <= offset < len(ids) and on(i):
                    also.add(place[offset])
        also.discard(place[here])
        return FeatureContext(pieces, place[here], tuple(sorted(also)), row, score)

    def _pieces(self, ids: list[int]) -> tuple[tuple[str, ...], list[int]]:
        """Texts, and which of them each token belongs to.

        Tokens that are parts of a character (bytes) are joined until they decode.
        """
        pieces: list[str] = []
        place: list[int] = []
        waiting: list[int] = []
        for token in ids:
            text = self._text(token)
            # a token of whole characters ends no character that one before it has begun
            if waiting and "\ufffd" not in text:
                pieces.append(self.tokenizer.decode(waiting, clean_up_tokenization_spaces=False))
                waiting = []
            if "\ufffd" in text:
                waiting.append(token)
                joined = self.tokenizer.decode(waiting, clean_up_tokenization_spaces=False)
                if "\ufffd" in joined and len(waiting) < 4:
                    place.append(len(pieces))
                    continue
                text, waiting = joined, []
            place.append(len(pieces))
            pieces.append(text)
        if waiting:
            pieces.append(self.tokenizer.decode(waiting, clean_up_tokenization_spaces=False))
        return tuple(pieces), place


def feature_records(
    facts: FeatureFacts,
    tokenizer: Any,
    *,
    contexts: Contexts | None = None,
    shown: Callable[[int], Iterable[tuple[int, float | None]]] | None = None,
    code: BinaryCode | None = None,
    phrases: Mapping[int, str] | None = None,
    scores: Mapping[str, Mapping[int, float]] | None = None,
) -> Iterator[FeatureRecord]:
    """Records for :func:`bae_fast.report.browser.write_browser`, feature by feature.

    Args:
        facts: the facts of all features.
        tokenizer: a transformers tokenizer.
        contexts: how contexts are cut; with ``shown``.
        shown: the rows to show of a feature and a score each, e.g. its most salient ones.
        code: to mark further tokens of a context on which the feature is on.
        phrases: names by feature.
        scores: values by name, then by feature.
    """
    texts: dict[int, str] = {}
    bursts = None if facts.burstiness is None else facts.burstiness.ratio.tolist()
    for feature, density in enumerate(facts.density.tolist()):
        stretches = []
        if contexts is not None and shown is not None:
            on = None if code is None else _bit_reader(code, feature)
            stretches = [contexts.of(row, score, on) for row, score in shown(feature)]
        lens = []
        for token, score in facts.lens.of(feature) if facts.lens is not None else ():
            if token not in texts:
                texts[token] = token_text(tokenizer, token)
            lens.append((texts[token], score))
        burst = None if bursts is None or not math.isfinite(bursts[feature]) else bursts[feature]
        yield FeatureRecord(
            feature=feature,
            density=density,
            burstiness=burst,
            tokens=() if facts.tokens is None else facts.tokens.of(feature, tokenizer),
            contexts=stretches,
            lens=lens,
            neighbours=() if facts.neighbours is None else facts.neighbours.of(feature),
            histogram=None if facts.histograms is None else facts.histograms.of(feature),
            phrase=None if phrases is None else phrases.get(feature),
            scores={name: found.get(feature) for name, found in (scores or {}).items()},
        )


def _bit_reader(code: BinaryCode, feature: int) -> Callable[[int], bool]:
    word, shift = feature // packing.WORD_BITS, feature % packing.WORD_BITS
    words = code.words[:, word].cpu().numpy()
    return lambda row: bool((words[row] >> shift) & 1)
