"""A model at an OpenAI-compatible server as judge."""

from __future__ import annotations

from bae_fast.experiments.judges import JudgeOptions
from bae_fast.interpret.judges import OpenAIJudge


def make(options: JudgeOptions, model: str | None, device: str) -> OpenAIJudge:
    """The judge with the model named.

    Raises:
        ValueError: no model is named.
    """
    if model is None:
        raise ValueError("the openai judge needs --judge-model, the model's name at the server")
    return OpenAIJudge(
        model,
        base_url=options.base_url,
        api_key_env=options.api_key_env,
        temperature=options.temperature,
        max_tokens=options.max_tokens,
        timeout=options.timeout,
        concurrency=options.concurrency,
    )
