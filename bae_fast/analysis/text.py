"""Tokens and contexts as text: decoded, made visible, cut to a width."""

from __future__ import annotations

import unicodedata
from typing import Any

_VISIBLE = {"\n": "↵", "\t": "→", "\r": "␍", "\u00a0": "␣"}


def decode_tokens(tokenizer: Any, ids: list[int]) -> str:
    """Token ids as text, special tokens and spaces as they are."""
    if not ids:
        return ""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def token_text(tokenizer: Any, token: int) -> str:
    """One token as text, with the space that a tokenizer would drop at the start of one."""
    text = decode_tokens(tokenizer, [token])
    raw = tokenizer.convert_ids_to_tokens(token)
    if isinstance(raw, str) and raw.startswith("▁") and not text.startswith(" "):
        text = " " + text
    return text


def context_text(
    tokenizer: Any, before: list[int], token: int, after: list[int]
) -> tuple[str, str, str]:
    """Decode the three parts.

    Together, because tokenizers of the SentencePiece kind drop the space before the first word
    of what they decode; each for itself where a character spans the parts.
    """
    until, with_token = decode_tokens(tokenizer, before), decode_tokens(tokenizer, [*before, token])
    whole = decode_tokens(tokenizer, [*before, token, *after])
    if with_token.startswith(until) and whole.startswith(with_token):
        return until, with_token[len(until) :], whole[len(with_token) :]
    return until, token_text(tokenizer, token), decode_tokens(tokenizer, after)


def visible_text(text: str) -> str:
    """Text on one line: breaks and tabs drawn, runs of spaces shortened, controls escaped."""
    out, i = [], 0
    while i < len(text):
        char = text[i]
        if char == " ":
            end = i
            while end < len(text) and text[end] == " ":
                end += 1
            out.append(" " * (end - i) if end - i < 3 else "␣")
            i = end
            continue
        out.append(_VISIBLE.get(char) or (char if char.isprintable() else _escape(char)))
        i += 1
    return "".join(out)


def visible_token(text: str) -> str:
    """What `visible_text` gives, with the spaces at either end of the token drawn as ␣."""
    core = text.strip(" ")
    if not core:
        return _spaces(len(text))
    head = len(text) - len(text.lstrip(" "))
    tail = len(text) - len(text.rstrip(" "))
    return _spaces(head) + visible_text(core) + _spaces(tail)


def format_lift(lift: float) -> str:
    """A lift to three digits, written out where it is large."""
    return f"{lift:,.0f}" if lift >= 100 else f"{lift:.3g}"


def cells(text: str) -> int:
    """Columns that a terminal gives a text: two for wide characters, none for combining ones."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) != 0 for c in text)


def fit_left(text: str, width: int) -> str:
    """Keep the beginning."""
    if cells(text) <= width:
        return text
    while text and cells(text) > width - 1:
        text = text[:-1]
    return text + "…"


def fit_right(text: str, width: int) -> str:
    """Keep the end."""
    if cells(text) <= width:
        return text
    while text and cells(text) > width - 1:
        text = text[1:]
    return "…" + text


def _spaces(n: int) -> str:
    return "␣" * n if n < 3 else f"␣x{n}"


def _escape(char: str) -> str:
    # A token may hold any character; one that drives the terminal must not reach it.
    return char.encode("unicode_escape").decode("ascii")
