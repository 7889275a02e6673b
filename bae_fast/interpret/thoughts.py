"""Answers of models that think first: the thoughts are no answer.

Thoughts stand between tags (``<think>``, ``[THINK]``, ``◁think▷`` and others of that kind), often
without the opening one, which the format of the question holds (DeepSeek-R1); or in a channel of
their own (gpt-oss). What follows the last closing tag is the answer. Thoughts that were cut off
before they ended are followed by none.
"""

from __future__ import annotations

import re

_NAMES = (
    r"(?:seed:)?(?:think(?:ing)?|thoughts?|reason(?:ing)?|reflection|analysis|scratchpad|"
    r"inner[_ ]monologue)"
)
_OPENING = re.compile(
    rf"<\|?{_NAMES}\|?>|\[{_NAMES}\]|◁{_NAMES}▷|<\|(?:begin|start)_of_{_NAMES}\|>|"
    r"<\|channel\|?>\s*(?:analysis|commentary|thought)",
    re.IGNORECASE,
)
_CLOSING = re.compile(
    rf"<\|?/{_NAMES}\|?>|\[/{_NAMES}\]|◁/{_NAMES}▷|<\|end_of_{_NAMES}\|>|"
    r"<\|channel\|>\s*final\s*<\|message\|>|<channel\|>",
    re.IGNORECASE,
)
# the same channels where a server left the marks out
_BARE_CHANNELS = re.compile(r"\A\s*analysis(?=[^a-z]).*?assistant\s*final", re.DOTALL)
_MARKS = re.compile(
    r"</?(?:answer|solution|response|output)>|<\|(?:begin|end)_of_(?:answer|solution)\|>|"
    r"<\|(?:return|end|im_end|message)\|>|\A\s*◁.*?▷",
    re.IGNORECASE,
)


def without_thoughts(text: str) -> str:
    """An answer without the thoughts before it and without marks around it; may be empty."""
    closings = list(_CLOSING.finditer(text))
    bare = _BARE_CHANNELS.match(text)
    if closings:
        text = text[closings[-1].end() :]
    elif bare is not None:
        text = text[bare.end() :]
    opening = _OPENING.search(text)
    if opening is not None:
        text = text[: opening.start()]
    return _MARKS.sub("", text).strip()


def only_thoughts(text: str) -> bool:
    """Whether an answer ends before its thoughts do."""
    return _OPENING.search(text) is not None and not without_thoughts(text)


def close_thoughts(prompt: str) -> str:
    """What to put behind a question whose format begins the thoughts, so that they end there.

    Empty where no thoughts are begun.
    """
    opening = re.search(rf"(<\|?|\[|◁)({_NAMES})(\|?>|\]|▷)\s*\Z", prompt, re.IGNORECASE)
    if opening is None:
        return ""
    left, name, right = opening.groups()
    return f"\n{left}/{name}{right}\n\n"
