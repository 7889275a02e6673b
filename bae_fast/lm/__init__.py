"""Language models and their hidden states: load a model, cut text into windows, harvest a hook."""

from __future__ import annotations

from bae_fast.lm.cache import ActivationCache, Split, TokenContext, cache_key
from bae_fast.lm.harvest import harvest
from bae_fast.lm.hooks import find_module, match_hooks
from bae_fast.lm.loading import (
    DEFAULT_MODEL,
    LanguageModel,
    ModelSource,
    find_language_model,
    load_language_model,
    load_tokenizer,
    resolve_dtype,
)
from bae_fast.lm.states import states_at
from bae_fast.lm.text import (
    read_text,
    standard_library_docstrings,
    standard_library_text,
    windows,
)

__all__ = [
    "DEFAULT_MODEL",
    "ActivationCache",
    "LanguageModel",
    "ModelSource",
    "Split",
    "TokenContext",
    "cache_key",
    "find_language_model",
    "find_module",
    "harvest",
    "load_language_model",
    "load_tokenizer",
    "match_hooks",
    "read_text",
    "resolve_dtype",
    "standard_library_docstrings",
    "standard_library_text",
    "states_at",
    "windows",
]
