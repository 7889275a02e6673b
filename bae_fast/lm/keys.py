"""Keys and values of earlier tokens, under the names that versions of transformers give them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

# from transformers 5.24 on, and before
NAMES = ("cache", "past_key_values")


def cache_name(model: nn.Module) -> str | None:
    """The argument by which a model's forward goes on from earlier tokens; None where none does."""
    names = inspect.signature(model.forward).parameters
    return next((name for name in NAMES if name in names), None)


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """What a call goes on from, among its arguments by name; None where it goes on from nothing."""
    return next((arguments[name] for name in NAMES if arguments.get(name) is not None), None)


def kept_cache(output: Any) -> Any:
    """What the next call may go on from, of a model's output; None where nothing was kept."""
    return next((output[name] for name in NAMES if name in output), None)
