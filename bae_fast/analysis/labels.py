"""Labels of tokens that need nobody: read off the text itself.

A label is a property that a token has or has not. They serve to ask how well a few features tell it
(:mod:`bae_fast.analysis.probing`):

``capital``        its first letter is a capital
``digit``          it holds a digit
``punctuation``    it holds neither letter nor digit, and something visible
``inside a word``  it begins with a letter and goes on with a word that the token before it began
``quoted``         it stands between double quotation marks of its line
``line start``     nothing visible stands before it in its line
``code``           its line is indented by three blanks or more, or begins as Python's prompt: what
                   is code, and not prose, in the documentation of the standard library

and five classes of English words, ``determiner``, ``pronoun``, ``preposition``, ``conjunction`` and
``auxiliary``: it is a whole word of this class. Only classes whose words can be listed are taken
(:data:`WORD_CLASSES`); a word of several classes has the label of each, whatever it is in its
sentence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bae_fast.analysis.text import token_text

#: The words of each class, in small letters. Old forms are those of the King James Bible.
WORD_CLASSES: dict[str, frozenset[str]] = {
    name: frozenset(words.split())
    for name, words in {
        "determiner": "a an the this that these those each every some any no all both either "
        "neither another such what which whose my your his her its our their thy",
        "pronoun": "i you he she it we they me him her us them mine yours hers ours theirs myself "
        "yourself himself herself itself ourselves themselves who whom whoever someone anyone "
        "everyone somebody anybody everybody nobody something anything everything nothing none "
        "thou thee ye",
        "preposition": "of in to for with on at by from into upon about over under between "
        "through against during before after without within among toward towards across behind "
        "beyond near above below along around beside besides despite except inside outside onto "
        "per since until unto via like as off up down",
        "conjunction": "and or but nor yet so if because although though while unless until "
        "whereas whether since than as that when where lest",
        "auxiliary": "be am is are was were been being have has had having do does did will would "
        "shall should can could may might must cannot hath doth hast dost wilt shalt",
    }.items()
}

_OF_A_TOKEN = ("capital", "digit", "punctuation")
_OF_A_LINE = ("quoted", "line start", "code")

LABELS = (*_OF_A_TOKEN, "inside a word", *_OF_A_LINE, *WORD_CLASSES)

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
    used, which = tokens.flatten().unique(return_inverse=True)
    special = set(getattr(tokenizer, "all_special_ids", ()) or ())
    texts = ["" if i in special else token_text(tokenizer, i) for i in used.tolist()]
    found = {**_of_words(texts, which), **_of_lines(texts, which.tolist())}
    return {name: found[name].view(tokens.shape) for name in LABELS}


def _of_words(texts: list[str], which: Tensor) -> dict[str, Tensor]:
    """What a token and its neighbours tell, bool ``[n]``; ``which`` is the text of each token."""

    def each(holds: Callable[[str], bool]) -> Tensor:
        return torch.tensor([holds(text) for text in texts], dtype=torch.bool)[which]

    begins, ends = each(lambda text: text[:1].isalpha()), each(lambda text: text[-1:].isalpha())
    goes_on = begins & ends.roll(1)  # with the word of the token before
    goes_on[:1] = False
    broken = goes_on.roll(-1)  # its own word goes on
    whole = ~goes_on & ~broken
    found = {
        "capital": each(lambda text: next(filter(str.isalpha, text), "").isupper()),
        "digit": each(lambda text: any(map(str.isdigit, text))),
        "punctuation": each(lambda text: bool(text.strip()) and not any(map(str.isalnum, text))),
        "inside a word": goes_on,
    }
    bare = [text.strip().lower() for text in texts]
    for name, words in WORD_CLASSES.items():
        found[name] = whole & torch.tensor([word in words for word in bare])[which]
    return found


def _of_lines(texts: list[str], which: list[int]) -> dict[str, Tensor]:
    """What the line of a token tells, up to the token or, of code, by how it begins."""
    found = {name: torch.zeros(len(which), dtype=torch.bool) for name in _OF_A_LINE}
    line: list[int] = []  # tokens that begin in the line
    text = ""  # of the line, up to here

    def end_line() -> None:
        stripped = text.lstrip()
        if text.startswith(_CODE_INDENT) or stripped.startswith(_PROMPTS):
            found["code"][line] = True
        line.clear()

    for at, i in enumerate(which):
        token = texts[i]
        # of a token with a line break, what is visible belongs before it, or begins the next line
        before, *after = token.split("\n")
        found["quoted"][at] = text.count('"') % 2 == 1 and '"' not in before
        starts = not text.strip() if before.strip() else bool(after and after[-1].strip())
        found["line start"][at] = bool(token.strip()) and starts
        if before.strip() or not after:
            line.append(at)
        text += before
        if after:
            end_line()
            text = after[-1]
            if after[-1].strip() and not before.strip():
                line.append(at)
    end_line()
    return found
