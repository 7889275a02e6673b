"""Features in context: for chosen features, the tokens they fire on and where.

Only the chosen columns of a packed code are ever unpacked, and the only Python loop is over the
chosen features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bae_fast.analysis.text import (
    cells,
    context_text,
    fit_left,
    fit_right,
    format_lift,
    token_text,
    visible_text,
    visible_token,
)
from bae_fast.arguments import check_int
from bae_fast.codes import BinaryCode
from bae_fast.lm.cache import ActivationCache

_BLOCK_BYTES = 1 << 26  # of unpacked bits at a time
_CANDIDATES = 16  # contexts looked at for each one shown, so that repeats can be passed over


@dataclass(frozen=True)
class TokenLift:
    """A token on which a feature fires more often than on others.

    Attributes:
        text: the token, as decoded.
        token: its id.
        lift: share of the token's occurrences on which the feature is on, over its share in all
            rows.
        n_on: occurrences of the token on which the feature is on.
        n_total: occurrences of the token in the rows looked at.
    """

    text: str
    token: int
    lift: float
    n_on: int
    n_total: int


@dataclass(frozen=True)
class ContextExample:
    """One place where a feature is on.

    Attributes:
        before: the text before the token, from the same window.
        token: the token on which the feature is on.
        after: the text after it, from the same window.
        row: row number in the cache.
        margin: the score the contexts are ranked by, or None.
    """

    before: str
    token: str
    after: str
    row: int
    margin: float | None


@dataclass(frozen=True)
class FeatureSummary:
    """What is shown of one feature.

    Attributes:
        feature: its column in the code.
        n_on: rows it is on in.
        n_rows: rows looked at.
        tokens: its most over-represented tokens.
        contexts: places where it is on.
    """

    feature: int
    n_on: int
    n_rows: int
    tokens: tuple[TokenLift, ...]
    contexts: tuple[ContextExample, ...]

    @property
    def density(self) -> float:
        """Share of the rows it is on in."""
        return self.n_on / self.n_rows


def choose_features(
    density: Tensor, k: int = 10, *, generator: torch.Generator | None = None
) -> Tensor:
    """Choose live features evenly over the range of densities, without looking at what they are.

    The features that are on at least once are put in order of density (ties in order of their
    number) and cut into k equal parts; the middle one of each part is taken. So the choice shows
    rare and common features in the proportion in which they occur, and is the same every time.

    Args:
        density: [F], the share of rows each feature is on in.
        k: how many; all live features if there are fewer.
        generator: on the CPU; where given, the one taken of each part is drawn at random.

    Returns:
        int64 [min(k, live features)], rarest first.

    Raises:
        ValueError: k below 1, or density not one-dimensional.
    """
    if density.dim() != 1:
        raise ValueError(f"density must have shape [F]; got {list(density.shape)}")
    check_int("k", k, 1)
    p = density.detach().cpu()
    order = p.argsort(stable=True)
    live = order[p[order] > 0]
    k = min(k, len(live))
    if generator is not None:
        edges = torch.arange(k + 1) * len(live) // max(k, 1)
        spot = torch.rand(k, generator=generator, dtype=torch.float64)
        return live[edges[:-1] + (spot * edges.diff()).long()]
    # floor((i + 1/2) n / k), in integers
    return live[(2 * torch.arange(k) + 1) * len(live) // (2 * max(k, 1))]


def describe_features(
    code: BinaryCode,
    cache: ActivationCache,
    rows: range,
    feature_ids: Tensor | Sequence[int],
    tokenizer: Any,
    *,
    margins: Callable[[Tensor], Tensor] | None = None,
    n_tokens: int = 6,
    n_contexts: int = 5,
    before: int = 16,
    after: int = 8,
) -> list[FeatureSummary]:
    """Tokens and contexts of some features.

    Tokens are ranked by n_on log2(lift), their share of what the feature says about the token,
    in bits: neither the most frequent token nor one that occurs once comes out on top by that
    alone. Only tokens with a lift above 1 are listed.

    Contexts are ranked by margin, largest first, or in the order of the text where no margins are
    given. A context whose text was shown already is passed over.

    Args:
        code: the code of the rows, [len(rows), F]; row i belongs to row rows[i] of the cache.
        cache: where the rows and their tokens come from.
        rows: the rows looked at, in steps of 1.
        feature_ids: columns of the code.
        tokenizer: a transformers tokenizer.
        margins: given int64 [k] feature numbers, returns a score [len(rows), k], larger is
            stronger: the pre-activation is the natural one.
        n_tokens: tokens listed for each feature.
        n_contexts: contexts listed for each feature.
        before: tokens of context before the firing one.
        after: tokens of context after it.

    Returns:
        One summary per feature, in the order given.

    Raises:
        ValueError: a code, rows, feature numbers or margins that do not fit together.
    """
    features = torch.as_tensor(feature_ids, dtype=torch.int64).reshape(-1).cpu()
    _check(code, cache, rows, features)
    on = active_columns(code, features)
    score = None
    if margins is not None:
        score = margins(features).detach().cpu()
        if score.shape != on.shape:
            raise ValueError(f"margins must give shape {list(on.shape)}; got {list(score.shape)}")
    part = slice(rows.start, rows.stop)
    window, position = cache.row_window[part].long(), cache.row_position[part].long()
    row_tokens = cache.tokens[window, position].long()
    vocabulary, row_token_index = row_tokens.unique(return_inverse=True)
    n_total = torch.bincount(row_token_index, minlength=len(vocabulary))

    out = []
    for column, feature in enumerate(features.tolist()):
        firing = on[:, column].nonzero().squeeze(1)
        n_on = torch.bincount(row_token_index[firing], minlength=len(vocabulary))
        lifts = _lifts(n_on, n_total, len(rows), n_tokens)
        if score is None:
            ranked = firing
        else:
            ranked = firing[score[firing, column].argsort(descending=True, stable=True)]
        contexts: list[ContextExample] = []
        shown: set[tuple[str, str, str]] = set()
        for i in ranked[: n_contexts * _CANDIDATES].tolist():
            if len(contexts) == n_contexts:
                break
            row = rows.start + i
            text = context_text(tokenizer, *cache.token_context(row, before, after))
            if text not in shown:
                shown.add(text)
                margin = None if score is None else float(score[i, column])
                contexts.append(ContextExample(*text, row=row, margin=margin))
        tokens = tuple(
            TokenLift(
                text=token_text(tokenizer, int(vocabulary[i])),
                token=int(vocabulary[i]),
                lift=lift,
                n_on=int(n_on[i]),
                n_total=int(n_total[i]),
            )
            for i, lift in lifts
        )
        out.append(FeatureSummary(feature, len(firing), len(rows), tokens, tuple(contexts)))
    return out


def format_feature(summary: FeatureSummary, width: int = 100) -> str:
    """A feature as text: its density, its tokens, and its contexts with the firing token marked.

    The contexts are lined up on the firing token, which stands between « and »; what does not fit
    is cut at the outer ends and shown as an ellipsis. Whitespace that would be lost is drawn: a
    space at the edge of a token as ␣, a line break as ↵, a tab as →; three spaces or more are
    shortened to one ␣. No line is wider than `width` columns, 40 at least.
    """
    width = max(width, 40)
    lines = [
        f"feature {summary.feature}: on in {100 * summary.density:.3g} % of rows "
        f"({summary.n_on:,} of {summary.n_rows:,})"
    ]
    line = "  tokens"
    for t in summary.tokens:
        item = f"  {visible_token(t.text)} x{format_lift(t.lift)} ({t.n_on:,}/{t.n_total:,})"
        if cells(line + item) > width:
            lines.append(line)
            line = "        "
        line += item
    lines.append(fit_left(line, width))
    half = (width - 4) * 3 // 5
    for c in summary.contexts:
        token = fit_left(visible_token(c.token), width // 3)
        left = fit_right(visible_text(c.before), half - cells(token) - 2)
        pad = " " * (half - cells(left) - cells(token) - 2)
        right = fit_left(visible_text(c.after), width - 4 - half)
        lines.append(f"    {pad}{left}«{token}»{right}".rstrip())
    return "\n".join(fit_left(line, width) for line in lines)


def _check(code: BinaryCode, cache: ActivationCache, rows: range, features: Tensor) -> None:
    cache.check_rows(rows)
    if len(code.shape) != 2 or code.shape[0] != len(rows):
        raise ValueError(
            f"code must have shape [{len(rows)}, F], a row for each of rows={rows!r}; "
            f"got {list(code.shape)}"
        )
    if features.numel() and not 0 <= int(features.min()) <= int(features.max()) < code.shape[1]:
        raise ValueError(
            f"feature_ids must lie between 0 and {code.shape[1] - 1}; got "
            f"{int(features.min())} to {int(features.max())}"
        )


def active_columns(code: BinaryCode, features: Tensor) -> Tensor:
    """The chosen columns, bool [n, k] on the CPU, unpacked block by block."""
    n, width = code.shape
    step = max(_BLOCK_BYTES // max(width, 1), 1)
    blocks = []
    for start in range(0, n, step):
        dense = code[start : start + step].to_dense(torch.bool)
        blocks.append(dense[:, features.to(dense.device)].cpu())
    return torch.cat(blocks)


def token_lifts(n_on: Tensor, n_total: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
    """Lift of tokens and what they are ranked by, n_on log2(lift): float64 of n_on's shape.

    Args:
        n_on: ``[..., V]``, occurrences of each token on which a feature is on.
        n_total: ``[V]``, occurrences of each token.
        n_rows: all occurrences.

    Returns:
        The lift, and the rank; -inf where n_on is 0.
    """
    density = n_on.sum(-1, keepdim=True).double() / n_rows
    lift = n_on / n_total.double() / density
    # An n_on of 0 makes 0 times minus infinity: not a candidate.
    return lift, torch.where(n_on > 0, n_on * lift.clamp_min(1e-300).log2(), -torch.inf)


def _lifts(n_on: Tensor, n_total: Tensor, n_rows: int, k: int) -> list[tuple[int, float]]:
    """The k tokens with the largest n_on log2(lift), as (index into the counts, lift)."""
    lift, rank = token_lifts(n_on, n_total, n_rows)
    best = rank.argsort(descending=True, stable=True)[:k]
    return [(i, float(lift[i])) for i in best.tolist() if float(rank[i]) > 0]
