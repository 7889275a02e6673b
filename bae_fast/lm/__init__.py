"""Language models and their hidden states: load a model, cut text into windows, harvest a hook."""

from __future__ import annotations

from bae_fast.lm.cache import ActivationCache, Split, TokenContext, cache_key
from bae_fast.lm.capture import Engine, match_hooks
from bae_fast.lm.documents import DatasetText, TextFiles, TextWindows, TokenWindows
from bae_fast.lm.gradients import fisher, sensitivity
from bae_fast.lm.harvest import harvest
from bae_fast.lm.hooks import find_module, resolve_hook, running
from bae_fast.lm.identity import model_digest
from bae_fast.lm.inputs import (
    asks_for_bos,
    padding_mask,
    special_tokens,
    text_mask,
    text_tokens,
)
from bae_fast.lm.loading import (
    DEFAULT_MODEL,
    LanguageModel,
    ModelSource,
    find_language_model,
    load_language_model,
    load_tokenizer,
    model_width,
    resolve_dtype,
)
from bae_fast.lm.shard_harvest import harvest_shards
from bae_fast.lm.shards import ShardedCache
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
    "DatasetText",
    "Engine",
    "LanguageModel",
    "ModelSource",
    "ShardedCache",
    "Split",
    "TextFiles",
    "TextWindows",
    "TokenContext",
    "TokenWindows",
    "asks_for_bos",
    "cache_key",
    "find_language_model",
    "find_module",
    "fisher",
    "harvest",
    "harvest_shards",
    "load_language_model",
    "load_tokenizer",
    "match_hooks",
    "model_digest",
    "model_width",
    "padding_mask",
    "read_text",
    "resolve_dtype",
    "resolve_hook",
    "running",
    "sensitivity",
    "special_tokens",
    "standard_library_docstrings",
    "standard_library_text",
    "states_at",
    "text_mask",
    "text_tokens",
    "windows",
]
