"""Who names features and judges the names: one file a judge, found by its name.

A judge is added as a file here with ``make(options, model, device)``; the options that choose it
are shared.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING

from bae_fast.experiments.runs import check_one_of

if TYPE_CHECKING:
    from bae_fast.interpret.judges import Judge

JUDGES = tuple(name for _, name, _ in pkgutil.iter_modules([str(Path(__file__).parent)]))


@dataclasses.dataclass(frozen=True)
class JudgeOptions:
    """How a judge is reached.

    Attributes:
        judge_model: The judge's model: for local as --model, by default SmolLM2-135M-Instruct; for
            openai the name at the server.
        base_url: The address of an OpenAI-compatible server.
        api_key_env: The environment variable that holds the server's key.
        temperature: The temperature of the openai judge; null sends none.
        max_tokens: The longest answer of the openai judge, in tokens.
        timeout: The seconds that a request may take.
        concurrency: The number of requests under way at once.
    """

    judge_model: str | None = None
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    temperature: float | None = 0.0
    max_tokens: int | None = None
    timeout: float = 60.0
    concurrency: int = 8


def make_judge(options: JudgeOptions, kind: str, model: str | None, device: str) -> Judge:
    """The judge of that name.

    Raises:
        ImportError, ValueError: it cannot be made.
    """
    check_one_of("judge", kind, JUDGES)
    module = importlib.import_module(f"{__name__}.{kind}")
    judge: Judge = module.make(options, model, device)
    return judge
