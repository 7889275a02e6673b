"""How far two next-token distributions are apart, and at which tokens of text they are compared.

With p the next-token distribution of the model as it is and q that of the model with some states
changed:

    JS = KL(p | m) / 2 + KL(q | m) / 2,  m = (p + q) / 2      in bits, at most 1
    KL = KL(p | q)                                            in bits
    loss = -ln q(next token)                                  in nats, the field's unit
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from bae_fast.lm.inputs import check_ids, check_length, excluded_tokens, padding_mask, text_mask
from bae_fast.lm.loading import LanguageModel

# elements of logits compared at a time: 1 MiB in fp32
_CACHED_ELEMENTS = 2**18


class Divergence(NamedTuple):
    """Two next-token distributions at each token; float64 ``[n]`` but for ``same``, bool.

    Attributes:
        js, kl: divergences in bits.
        loss_original, loss: cross-entropy of the next token, in nats; NaN where none is known.
        same: whether the most likely token is the same.
    """

    js: Tensor
    kl: Tensor
    loss_original: Tensor
    loss: Tensor
    same: Tensor


def divergence(original: Tensor, changed: Tensor, targets: Tensor | None = None) -> Divergence:
    """Compare next-token distributions.

    Args:
        original, changed: logits ``[n, V]``; -inf is a probability of zero. Equal rows give
            exactly 0.
        targets: int64 ``[n]``, tokens that came next; -1 where none is known.

    Raises:
        ValueError: shapes that differ, or no ``[n, V]``.
    """
    if original.shape != changed.shape or original.dim() != 2:
        raise ValueError(
            f"original and changed must be [n, V] alike; got {list(original.shape)} and "
            f"{list(changed.shape)}"
        )
    dtype = torch.promote_types(original.dtype, torch.float32)
    original, changed = original.to(dtype), changed.to(dtype)
    total_p, total_q = (x.logsumexp(-1, keepdim=True) for x in (original, changed))
    js = torch.zeros(len(original), dtype=torch.float64, device=original.device)
    kl = torch.zeros_like(js)
    # columns that a core's cache holds: everything below is read and written several times
    step = max(_CACHED_ELEMENTS // max(len(original), 1), 1)
    for a, b in zip(original.split(step, 1), changed.split(step, 1), strict=True):
        p, q = a - total_p, b - total_q
        # two probabilities of zero are equal, one of zero is far away
        gap = (q - p).nan_to_num_(nan=0.0, posinf=1e4, neginf=-1e4)
        p_exp, q_exp = p.exp_(), q.exp_()
        kl -= torch.linalg.vecdot(p_exp, gap)
        # ln(p / m) = ln 2 - softplus(gap), ln(q / m) = that + gap: 0 where the two are equal
        below = math.log(2) - torch.nn.functional.softplus(gap)
        js += torch.linalg.vecdot(p_exp, below) + torch.linalg.vecdot(q_exp, below.add_(gap))
    if targets is None:
        loss_original = loss = torch.full((len(js),), math.nan, dtype=torch.float64)
    else:
        loss_original, loss = (
            next_token_loss(x, total, targets)
            for x, total in ((original, total_p), (changed, total_q))
        )
    return Divergence(
        js.cpu().clamp_min(0).abs() / (2 * math.log(2)),
        kl.cpu().clamp_min(0).abs() / math.log(2),
        loss_original,
        loss,
        (original.argmax(-1) == changed.argmax(-1)).cpu(),
    )


def next_token_loss(logits: Tensor, total: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats, float64 ``[n]`` on the CPU; NaN where the target is below 0."""
    targets = targets.to(logits.device)
    loss = total - logits.gather(1, targets.clamp_min(0)[:, None])
    return torch.where(targets >= 0, loss[:, 0], math.nan).double().cpu()


class JudgedText(NamedTuple):
    """Windows of text, and at which of their tokens next-token distributions are compared.

    Attributes:
        windows: token ids, int64 ``[n_windows, length]`` on the CPU.
        mask: bool of that shape, false at padding; None: there is none.
        exclude_tokens: ids that are no text.
        judged: bool of that shape, tokens of text behind the first ones of their window.
        has_next: bool of that shape, tokens with a known next one.
    """

    windows: Tensor
    mask: Tensor | None
    exclude_tokens: list[int]
    judged: Tensor
    has_next: Tensor


def judged_text(
    lm: LanguageModel,
    windows: Tensor,
    *,
    mask: Tensor | None = None,
    exclude_tokens: Iterable[int] | None = None,
    drop_positions: int = 1,
) -> JudgedText:
    """Check windows and find the tokens that count.

    Args:
        lm, windows, mask, exclude_tokens, drop_positions: see
            :class:`bae_fast.causal.SubstitutionTest`.

    Raises:
        TypeError: windows that are no integers.
        ValueError: windows or a mask of another shape, ids or a length that the model does not
            take, or no token of text with a known next one.
    """
    if not isinstance(windows, Tensor) or windows.is_floating_point():
        raise TypeError("windows must be an integer tensor [n_windows, length]")
    if windows.dim() != 2 or len(windows) < 1 or windows.shape[1] < drop_positions + 2:
        raise ValueError(
            f"windows must be [n_windows, length], length at least {drop_positions + 2}; "
            f"got {list(windows.shape)}"
        )
    windows = windows.to("cpu", torch.int64)
    check_ids(lm.model, windows, "windows")
    check_length(lm.model, windows.shape[1], "windows")
    excluded = excluded_tokens(lm.tokenizer, exclude_tokens)
    mask = padding_mask(lm.tokenizer, windows) if mask is None else mask
    text = text_mask(lm.tokenizer, windows, mask=mask, exclude_tokens=excluded)
    place = torch.arange(windows.shape[1]).expand(windows.shape)
    real = torch.ones_like(windows, dtype=torch.bool)
    if mask is not None:
        mask = real = mask.cpu() != 0
        place = place - mask.int().argmax(1, keepdim=True)
    judged = place >= drop_positions
    if text is not None:
        judged = judged & text
    has_next = torch.nn.functional.pad(real[:, 1:], (0, 1), value=False)
    if not bool((judged & has_next).any()):
        raise ValueError(
            "windows must hold a token of text whose next token is known, behind the first "
            f"{drop_positions} of its window; got only padding and special tokens"
        )
    return JudgedText(windows, mask, excluded, judged, has_next)
