"""Labels of tokens that need nobody: read off the text itself.

A label is a property that a token has or has not. They serve to ask how well a few features tell it
(:mod:`bae_fast.analysis.probing`):

``capital``      its first letter is a capital
``digit``        it holds a digit
``punctuation``  it holds neither letter nor digit, and something visible
``quoted``       it stands between double quotation marks of its line
``line start``   nothing visible stands before it in its line
``code``         its line is indented by three blanks or more, or begins as Python's prompt: what is
                 code, and not prose, in the documentation of the standard library
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bae_fast.analysis.text import token_text

LABELS = ("capital", "digit", "punctuation", "quoted", "line start", "code")

_CODE_INDENT = " " * 3
_PROMPTS = (">>>", "...")


def token_labels(tokenizer: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Labels of the tokens of windows that follow one another in a text.

    Args:
        tokenizer: a transformers tokenizer; its special tokens have no label.
        tokens: token ids, int ``[n_windows, length]``.

    Returns:
        For each name of :data:`LABELS` bool ``[n_windows, length]``.

    Raises:
        ValueError: tokens of another number of dimensions.
    """
    if tokens.dim() != 2:
        raise ValueError(f"tokens must have shape [n_windows, length]; got {list(tokens.shape)}")
    ids = tokens.flatten().tolist()
    special = set(getattr(tokenizer, "all_special_ids", ()) or ())
    texts = {i: "" if i in special else token_text(tokenizer, i) for i in set(ids)}
    found = {name: torch.zeros(len(ids), dtype=torch.bool) for name in LABELS}
    line: list[int] = []  # tokens that begin in the line
    text = ""  # of the line, up to here

    def end_line() -> None:
        stripped = text.lstrip()
        if text.startswith(_CODE_INDENT) or stripped.startswith(_PROMPTS):
            found["code"][line] = True
        line.clear()

    for at, i in enumerate(ids):
        token = texts[i]
        visible = token.strip()
        # of a token with a line break, what is visible belongs before it, or begins the next line
        before, *after = token.split("\n")
        letters = [character for character in visible if character.isalpha()]
        found["capital"][at] = bool(letters) and letters[0].isupper()
        found["digit"][at] = any(character.isdigit() for character in visible)
        found["punctuation"][at] = bool(visible) and not any(c.isalnum() for c in visible)
        found["quoted"][at] = text.count('"') % 2 == 1 and '"' not in before
        starts = not text.strip() if before.strip() else bool(after and after[-1].strip())
        found["line start"][at] = bool(visible) and starts
        if before.strip() or not after:
            line.append(at)
        text += before
        if after:
            end_line()
            text = after[-1]
            if after[-1].strip() and not before.strip():
                line.append(at)
    end_line()
    return {name: label.view(tokens.shape) for name, label in found.items()}
