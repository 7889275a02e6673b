"""The judge that compares words: no model, no cost."""

from __future__ import annotations

from bae_fast.experiments.judges import JudgeOptions
from bae_fast.interpret.judges import RuleJudge


def make(options: JudgeOptions, model: str | None, device: str) -> RuleJudge:
    """The judge; nothing of the options concerns it."""
    return RuleJudge()
