"""A language model of this machine as judge."""

from __future__ import annotations

from bae_fast.experiments.judges import JudgeOptions
from bae_fast.interpret.judges import TransformersJudge
from bae_fast.lm import DEFAULT_MODEL


def make(options: JudgeOptions, model: str | None, device: str) -> TransformersJudge:
    """The judge with the model named, or SmolLM2-135M-Instruct."""
    return TransformersJudge(DEFAULT_MODEL if model is None else model, device=device)
