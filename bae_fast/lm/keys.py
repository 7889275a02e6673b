"""Keys and values of earlier tokens, under the names that versions of transformers give them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from bae_fast.lm.logits import causal_model

# from transformers 5.24 on, and before
NAMES = ("cache", "past_key_values")


def cache_name(model: nn.Module) -> str | None:
    """The argument by which a model's forward goes on from earlier tokens; None where none does."""
    names = inspect.signature(model.forward).parameters
    return next((name for name in NAMES if name in names), None)


def keys_name(model: nn.Module) -> str | None:
    """The same, of a causal language model, where what it goes on from are keys and values of plain
    attention, which can be given to every sequence of a batch.

    Recurrent models (Mamba) have a state; decoders of encoder-decoder models (BART) and some others
    want a cache of their own kind; a rope that changes with the length of the text (Phi-3's long
    one) would have turned the keys by other angles.
    """
    from transformers import DynamicCache

    inner: Any = causal_model(model)
    rope = getattr(inner.config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    cache = DynamicCache(config=inner.config)
    plain = not (
        hasattr(inner.config, "decoder_layers")
        or getattr(inner, "_is_stateful", False)
        or kinds & {"dynamic", "longrope"}
        # states of convolutions beside attention (LFM2) cannot be given to every sequence
        or not all(hasattr(layer, "batch_repeat_interleave") for layer in cache.layers)
        or not getattr(inner, "_supports_default_dynamic_cache", lambda: True)()
    )
    return cache_name(inner) if plain else None


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """What a call goes on from, among its arguments by name; None where it goes on from nothing."""
    return next((arguments[name] for name in NAMES if arguments.get(name) is not None), None)


def kept_cache(output: Any) -> Any:
    """What the next call may go on from, of a model's output; None where nothing was kept."""
    return next((output[name] for name in NAMES if name in output), None)


def repeated(kept: Mapping[str, Any], n: int) -> dict[str, Any]:
    """The argument with keys and values of one sequence, for n that go on from it: a copy, which a
    batch extends. Nothing for nothing."""
    made = {name: copy.deepcopy(cache) for name, cache in kept.items()}
    for cache in made.values():
        cache.batch_repeat_interleave(n)
    return made
