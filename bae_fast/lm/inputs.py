"""Which tokens a model is given and which of them are text: BOS, special tokens, padding, length.

What a tokenizer does when it is left alone is what its model was trained on. It says whether texts
begin with a beginning-of-text token; its special tokens are no text.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def asks_for_bos(tokenizer: Any) -> bool:
    """Whether a tokenizer by itself begins a text with its beginning-of-text token."""
    bos = getattr(tokenizer, "bos_token_id", None)
    if not isinstance(bos, int):
        return False
    try:
        ids = tokenizer("a")["input_ids"]
    except TypeError:  # a stand-in that takes other arguments
        return False
    return len(ids) > 1 and ids[0] == bos


def bos_to_prepend(tokenizer: Any, prepend_bos: bool | None = None) -> int | None:
    """The id to put before a text, or None.

    Args:
        prepend_bos: None: as the tokenizer asks for.

    Raises:
        ValueError: True, and the tokenizer has no beginning-of-text token.
    """
    if prepend_bos is None:
        prepend_bos = asks_for_bos(tokenizer)
    if not prepend_bos:
        return None
    bos = getattr(tokenizer, "bos_token_id", None)
    if not isinstance(bos, int):
        raise ValueError("prepend_bos=True is not allowed: this tokenizer has no bos_token_id")
    return bos


def text_tokens(tokenizer: Any, text: str, *, prepend_bos: bool | None = None) -> list[int]:
    """Token ids of one text, with BOS before it where that is asked for and not there already.

    Args:
        prepend_bos: None: as the tokenizer asks for.

    Raises:
        ValueError: True, and the tokenizer has no beginning-of-text token.
    """
    bos = bos_to_prepend(tokenizer, prepend_bos)
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def special_tokens(tokenizer: Any) -> list[int]:
    """Ids of a tokenizer's special tokens (BOS, EOS, padding, marks of a chat), rising.

    The token for what is unknown is no special one: text stands behind it. Empty where nothing is
    known.
    """
    found = set(getattr(tokenizer, "all_special_ids", None) or ())
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    found |= {i for i, token in added.items() if getattr(token, "special", False)}
    found.discard(getattr(tokenizer, "unk_token_id", None))
    return sorted(i for i in found if isinstance(i, int))


def text_mask(
    tokenizer: Any,
    token_windows: Tensor,
    *,
    mask: Tensor | None = None,
    exclude_tokens: Iterable[int] | None = None,
) -> Tensor | None:
    """Which tokens of windows are text: bool ``[n_windows, context_size]``; None: all of them.

    Args:
        mask: bool or 0 and 1, of that shape: false at padding; None: no padding.
        exclude_tokens: ids that are no text; None: the tokenizer's special tokens.

    Raises:
        ValueError: a mask of another shape.
    """
    chosen = special_tokens(tokenizer) if exclude_tokens is None else list(exclude_tokens)
    keep = torch.ones(token_windows.shape, dtype=torch.bool)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.shape != token_windows.shape:
            shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"mask must be {list(token_windows.shape)}, one a token; got {shape}")
        keep &= mask.cpu() != 0
    if chosen:
        keep &= ~torch.isin(token_windows.cpu(), torch.tensor(chosen))
    return None if bool(keep.all()) else keep


def padding_mask(tokenizer: Any, token_windows: Tensor) -> Tensor | None:
    """Which tokens are no padding, bool ``[n, length]``, by the padding token; None: all of them.

    A padding token that also ends or begins texts, or stands for the unknown, tells nothing.
    """
    pad = getattr(tokenizer, "pad_token_id", None)
    names = ("bos_token_id", "eos_token_id", "unk_token_id")
    if not isinstance(pad, int) or pad in [getattr(tokenizer, name, None) for name in names]:
        return None
    real = token_windows != pad
    return None if bool(real.all()) else real


def masked(model: Any, mask: Tensor) -> dict[str, Tensor]:
    """Arguments for a model's forward that keep padding out, ``mask`` false there.

    With padding before the text they also say the positions, which then begin at the first real
    token, where the model takes them.
    """
    real = mask != 0
    options = {"attention_mask": real.long()}
    takes = inspect.signature(getattr(model, "forward", model)).parameters
    if not bool(real[:, 0].all()) and "position_ids" in takes:
        options["position_ids"] = (real.long().cumsum(1) - 1).clamp_min(0)
    return options


def max_positions(model: Any) -> int | None:
    """The most tokens a model takes at once, as its configuration says; None: no bound."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def check_length(model: Any, length: int, name: str) -> None:
    """Refuse more tokens at once than a model has positions.

    Raises:
        ValueError: naming the argument.
    """
    most = max_positions(model)
    if most is not None and length > most:
        raise ValueError(
            f"{name} must have at most {most:,} tokens a sequence, the positions of "
            f"{type(model).__name__}; got {length:,}: give a smaller context"
        )


def check_ids(model: Any, ids: Tensor, name: str) -> None:
    """Refuse token ids that a model has no embedding for.

    Raises:
        ValueError: naming the argument.
    """
    low, high = int(ids.min()), int(ids.max())
    n_vocabulary = model.get_input_embeddings().weight.shape[0]
    if low < 0 or high >= n_vocabulary:
        raise ValueError(
            f"{name} has ids from {low} to {high}: 0 to {n_vocabulary - 1} are allowed"
        )
