"""The thoughts of a judge before its answer."""

from __future__ import annotations

import pytest

from bae_fast.interpret.comsem import read_phrase, read_verdict
from bae_fast.interpret.thoughts import close_thoughts, only_thoughts


@pytest.mark.parametrize(
    ("text", "verdict", "phrase"),
    [
        ("<think>\nNo digit, yet a number.\n</think>\n\nYes", True, "Yes"),
        ("Yes, or rather a comma.\n</think>\n\nNo", False, "No"),
        ("[THINK]yes?[/THINK]No", False, "No"),
        ("◁think▷yes◁/think▷ no", False, "no"),
        ("<|begin_of_thought|>yes<|end_of_thought|>\n\nNo", False, "No"),
        ("<|channel|>analysis<|message|>yes<|end|><|channel|>final<|message|>No", False, "No"),
        ("analysisIs it? yes.assistantfinalNo", False, "No"),
        ("<Thinking>yes</Thinking><answer>No</answer>", False, "No"),
        ("No reason to say so. Final answer: yes", True, None),
        ("<think>yes, I think", None, ""),
        ("Yes.", True, "Yes"),
    ],
)
def test_thoughts_are_not_taken_for_the_answer(text, verdict, phrase):
    assert read_verdict(text) is verdict
    if phrase is not None:
        assert read_phrase(text) == phrase
    assert only_thoughts(text) == (verdict is None)


def test_thoughts_begun_by_the_question_are_closed():
    assert close_thoughts("<|assistant|>\n<think>\n") == "\n</think>\n\n"
    assert close_thoughts("<think>\n\n</think>\n\n") == ""
    assert close_thoughts("Answer:") == ""
