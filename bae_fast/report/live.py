"""What the live prompt of the page asks, and what it is answered."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from bae_fast.analysis.text import token_text, visible_text
from bae_fast.causal import Prompt, PromptFeatures

# characters of a text; its tokens are counted by the language model's own tokenizer
MAX_CHARACTERS = 20_000

# features that are set at once, and features shown of a token
MAX_SETTINGS = 64
_SHOWN = 64


def live_facts(prompt: Prompt, usual: Tensor, text: str) -> dict[str, Any]:
    """What the page needs to know of a live prompt.

    Args:
        prompt: the language model and its autoencoder.
        usual: ``[F]``, the value that a feature is set to when it is switched on.
        text: the text that is read first.
    """
    return {
        "value": prompt.model.value_name,
        "usual": [float(f"{value:.4g}") for value in usual.tolist()],
        "text": text,
        "max_characters": MAX_CHARACTERS,
    }


def prompt_call(prompt: Prompt) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The function behind ``/api/prompt``.

    A question has ``text``; it may have ``feature``, whose values at every token are wanted,
    ``at``, the token after which the likeliest are listed, ``settings``, pairs of a feature and
    the value it is set to, and ``only_there``, whether they are set at that token alone. The
    answer has ``tokens`` (text, whether its state is read, the number of features on and the
    strongest of them), ``feature`` (values, on), ``at``, ``kl`` in bits and ``next``: the likeliest
    tokens as it is and changed, with their ids and both probabilities.

    Raises (of the function):
        ValueError: a question that is not one, naming the part.
    """
    names: dict[int, str] = {}

    def text_of(token: int) -> str:
        if token not in names:
            names[token] = visible_text(token_text(prompt.lm.tokenizer, token))
        return names[token]

    def call(question: dict[str, Any]) -> dict[str, Any]:
        asked = _Question(question, prompt.model.d_sae)
        tokens = prompt.tokenize(asked.text)
        if asked.at is not None and asked.at >= len(tokens):
            raise ValueError(f"at must lie in 0 to {len(tokens) - 1}; got {asked.at}")
        found = prompt.features(tokens)
        change = prompt.change(
            tokens, dict(asked.settings), at=asked.at, only_there=asked.only_there
        )
        shown = _strongest(found)
        both = zip(change.tokens, change.before, change.after, strict=True)
        lists = [
            [
                [text_of(token), token, _rounded(p), _rounded(q)]
                for token, p, q in zip(ids.tolist(), p_s.tolist(), q_s.tolist(), strict=True)
            ]
            for ids, p_s, q_s in both
        ]
        return {
            "tokens": [
                {"text": text_of(token), "read": read, **on}
                for token, read, on in zip(tokens, found.read.tolist(), shown, strict=True)
            ],
            "feature": None if asked.feature is None else _one(found, asked.feature),
            "at": len(tokens) - 1 if asked.at is None else asked.at,
            "kl": [_rounded(value) for value in change.kl_bits.tolist()],
            "next": {"before": lists[0], "after": lists[1]},
        }

    return call


class _Question:
    """A question whose parts are of the right kind."""

    def __init__(self, question: dict[str, Any], d_sae: int) -> None:
        known = {"text", "feature", "at", "settings", "only_there"}
        if unknown := sorted(set(question) - known):
            raise ValueError(
                f"a question must have {', '.join(sorted(known))} only; got {unknown[0][:40]!r}"
            )
        text = question.get("text")
        if not isinstance(text, str) or not text:
            raise ValueError("text must be a string that is not empty")
        if len(text) > MAX_CHARACTERS:
            raise ValueError(
                f"text must have at most {MAX_CHARACTERS:,} characters; got {len(text):,}"
            )
        self.text = text
        feature, at = question.get("feature"), question.get("at")
        self.feature = None if feature is None else _number_of("feature", feature, d_sae)
        self.at = None if at is None else _number_of("at", at, None)
        self.only_there = question.get("only_there", False)
        if not isinstance(self.only_there, bool):
            raise ValueError("only_there must be true or false")
        settings = question.get("settings", [])
        if not isinstance(settings, list) or len(settings) > MAX_SETTINGS:
            raise ValueError(f"settings must be a list of at most {MAX_SETTINGS} pairs")
        self.settings: list[tuple[int, float]] = []
        for pair in settings:
            if not isinstance(pair, list) or len(pair) != 2:
                raise ValueError("settings must hold pairs of a feature and a value")
            value = pair[1]
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError("settings must hold numbers as values")
            if not abs(value) <= 1e6:  # NaN is refused too
                raise ValueError(f"settings must hold values of at most 1e6; got {value!r:.40}")
            self.settings.append((_number_of("settings", pair[0], d_sae), float(value)))


def _number_of(name: str, value: Any, below: int | None) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} must be a whole number of at least 0")
    if below is not None and value >= below:
        raise ValueError(f"{name} must be a feature from 0 to {below - 1}; got {str(value)[:40]}")
    return value


def _rounded(value: float) -> float | None:
    """Five digits; None for what is no number, which JSON has no word for."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _strongest(found: PromptFeatures) -> list[dict[str, Any]]:
    """Of every token the number of features on, and the strongest of them with their values."""
    on = found.code.to_dense().bool()
    ranked = found.values.masked_fill(~on, -math.inf)
    best = ranked.topk(min(_SHOWN, ranked.shape[1]), dim=1)
    rows = iter(zip(on.sum(1).tolist(), best.indices.tolist(), best.values.tolist(), strict=True))
    shown: list[dict[str, Any]] = []
    for read in found.read.tolist():
        n_on, ids, values = next(rows) if read else (0, [], [])
        pairs = zip(ids[:n_on], values[:n_on], strict=True)
        shown.append({"n_on": n_on, "on": [[j, _rounded(value)] for j, value in pairs]})
    return shown


def _one(found: PromptFeatures, feature: int) -> dict[str, Any]:
    """One feature's value at every token, None where none is read, and whether it is on."""
    on = iter(found.code.to_dense()[:, feature].bool().tolist())
    values = iter(found.values[:, feature].tolist())
    read = found.read.tolist()
    return {
        "values": [_rounded(next(values)) if one else None for one in read],
        "on": [int(next(on)) if one else 0 for one in read],
    }
