"""Which tokens a model is given and which of them are text: BOS, special tokens, padding, length.

What a tokenizer does when it is left alone is what its model was trained on. It says whether texts
begin with a beginning-of-text token; its special tokens are no text.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bae_fast.lm.hooks import in_own_dtype, running
from bae_fast.lm.identity import own_hooks
from bae_fast.lm.logits import causal_model


def _beginning(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer by itself puts before a text."""
    marks = {*special_tokens(tokenizer), getattr(tokenizer, "bos_token_id", None)} - {None}
    if not marks:
        return []
    try:
        ids = list(tokenizer("a")["input_ids"])
    except TypeError:  # a stand-in that takes other arguments
        return []
    first = next((i for i, token in enumerate(ids) if token not in marks), len(ids) - 1)
    return ids[: max(first, 0)]


def asks_for_bos(tokenizer: Any) -> bool:
    """Whether a tokenizer by itself begins a text with a token of its own, which most call BOS."""
    return len(_beginning(tokenizer)) == 1


def beginning_token(tokenizer: Any) -> int | None:
    """The token that a window begins with where one is asked for; None: there is none.

    What the tokenizer itself puts before a text, which need not be its ``bos_token_id`` (XGLM puts
    its end-of-text token there, BERT ``[CLS]``); else that id.
    """
    own = _beginning(tokenizer)
    if len(own) == 1:
        return own[0]
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos if isinstance(bos, int) else None


def bos_to_prepend(tokenizer: Any, prepend_bos: bool | None = None) -> int | None:
    """The id to put before a text, or None.

    A warning says so where a tokenizer by itself begins with several tokens: none of them is put.

    Args:
        prepend_bos: None: as the tokenizer asks for.

    Raises:
        ValueError: True, and the tokenizer has no beginning-of-text token.
    """
    if prepend_bos is None:
        own = _beginning(tokenizer)
        if len(own) > 1:
            warnings.warn(
                f"the tokenizer begins a text with the tokens {own}, and none of them is put "
                "before the text here; make windows of your own that begin with them",
                UserWarning,
                stacklevel=3,
            )
        return own[0] if len(own) == 1 else None
    if not prepend_bos:
        return None
    bos = beginning_token(tokenizer)
    if bos is None:
        raise ValueError(
            "prepend_bos must be False, as this tokenizer has no bos_token_id; got True"
        )
    return bos


def without_surrogates(text: str) -> str:
    """A text that tokenizers take: halves of characters, as broken JSON brings, become U+FFFD.

    Two halves that belong together become the character that they stand for.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def text_tokens(tokenizer: Any, text: str, *, prepend_bos: bool | None = None) -> list[int]:
    """Token ids of one text, with BOS before it where that is asked for and not there already.

    Args:
        prepend_bos: None: as the tokenizer asks for.

    Raises:
        ValueError: True, and the tokenizer has no beginning-of-text token.
    """
    bos = bos_to_prepend(tokenizer, prepend_bos)
    ids = list(tokenizer(without_surrogates(text), add_special_tokens=False)["input_ids"])
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


def excluded_tokens(tokenizer: Any, given: Iterable[int] | None) -> list[int]:
    """Ids that are no text: those given, or the tokenizer's special tokens where none are."""
    return special_tokens(tokenizer) if given is None else [int(i) for i in given]


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
    chosen = excluded_tokens(tokenizer, exclude_tokens)
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

    A padding token that also ends or begins texts, or stands for the unknown, tells nothing; a
    warning says so where texts begin with several of them.
    """
    pad = getattr(tokenizer, "pad_token_id", None)
    names = ("bos_token_id", "eos_token_id", "unk_token_id")
    if not isinstance(pad, int):
        return None
    if pad in [getattr(tokenizer, name, None) for name in names]:
        if bool((token_windows[:, :2] == pad).all(1).any()) and token_windows.shape[1] > 1:
            warnings.warn(
                f"the tokens begin with several of the padding token {pad}, which has another "
                "meaning too, and are taken for text: give a mask, or put padding behind the text",
                UserWarning,
                stacklevel=3,
            )
        return None
    real = token_windows != pad
    return None if bool(real.all()) else real


# of the trial: tokens of text, and of padding before them
_TRIAL_TEXT, _TRIAL_PADDING = 8, 16


class Padding:
    """The arguments by which a model keeps padding out.

    Behind a text padding changes nothing, as attention is causal. Before it, positions must begin
    at the first real token. Whether a model counts so by itself, wants to be told, or cannot, is
    tried once, on a few tokens: what a signature says is hidden by wrappers (peft), and some models
    count from another number than 0.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._lock = threading.Lock()
        self._tell: bool | None = None

    def arguments(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Keywords for the model's forward.

        Args:
            ids: token ids ``[batch, length]``.
            mask: the same shape, false (or 0) at padding.

        Raises:
            ValueError: padding before the text, and the model's states are other ones then.
        """
        real = mask != 0
        if bool(real[:, 0].all()):
            return {"attention_mask": real.long()}
        with self._lock:
            if self._tell is None:
                self._tell = self._try(int(ids[~real][0]))
        return _told(real, self._tell)

    @torch.no_grad()
    def _try(self, pad: int) -> bool:
        device = next(self.model.parameters()).device
        table: Any = getattr(self.model, "get_input_embeddings", lambda: None)()
        n_vocabulary = _TRIAL_TEXT + 1 if table is None else table.weight.shape[0]
        ids = torch.arange(1, 1 + _TRIAL_TEXT, device=device)[None] % n_vocabulary
        most = max_positions(self.model) or 2**30
        n_text = max(min(_TRIAL_TEXT, most // 2), 1)
        ids = ids[:, :n_text]
        n = max(min(_TRIAL_PADDING, most - n_text), 1)
        padded = torch.nn.functional.pad(ids, (n, 0), value=pad)
        real = torch.arange(padded.shape[1], device=device)[None] >= n

        def states(ids: Tensor, **options: Tensor) -> Tensor:
            found = self.model(input_ids=ids, use_cache=False, **options)
            return (found if isinstance(found, Tensor) else found[0])[:, -n_text:].float()

        with running(self.model), in_own_dtype(device):
            alone = states(ids)
            share = 1e-3 if next(self.model.parameters()).dtype.itemsize >= 4 else 5e-2
            bound = share * float(alone.abs().max())
            gaps = {}
            takes = inspect.signature(causal_model(self.model).forward).parameters
            for tell in (True, False) if "position_ids" in takes else (False,):
                gaps[tell] = float((states(padded, **_told(real, tell)) - alone).abs().max())
                if gaps[tell] <= bound:
                    return tell
        if own_hooks(self.model):  # such as a splice, which may look at positions
            return min(gaps, key=lambda tell: gaps[tell])
        raise ValueError(
            f"mask: {type(causal_model(self.model)).__name__} gives other states where padding "
            "stands before a text; put padding behind it (padding_side='right')"
        )


def _told(real: Tensor, tell: bool) -> dict[str, Tensor]:
    """A mask, and positions from the first real token on."""
    options = {"attention_mask": real.long()}
    if tell:
        options["position_ids"] = (real.long().cumsum(1) - 1).clamp_min(0)
    return options


def padded(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences as one tensor, padded at the end, which nothing before it looks at: (ids, which are
    no padding, lengths)."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    width = int(lengths.max())
    ids = torch.zeros(len(sequences), width, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.as_tensor(sequence)
    return ids, torch.arange(width) < lengths[:, None], lengths


def text_config(config: Any) -> Any:
    """The part of a model's configuration that is of text; itself where it names none."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def max_positions(model: Any) -> int | None:
    """The most tokens a model takes at once, as its configuration says; None: no bound."""
    config = text_config(getattr(model, "config", None))
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
            f"{name} must have ids between 0 and {n_vocabulary - 1}; got {low} to {high}"
        )
