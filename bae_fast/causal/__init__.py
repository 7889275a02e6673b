"""An autoencoder inside a running model: what it costs, what its features cause, and which features
of two models are the same."""

from __future__ import annotations

from bae_fast.causal.distributions import Divergence, divergence
from bae_fast.causal.matching import Matching, match_codes, shuffled_rows
from bae_fast.causal.prompt import Prompt, PromptChange, PromptFeatures
from bae_fast.causal.splice import Splice, replaced_output, spliced
from bae_fast.causal.steering import (
    Differences,
    FeatureDifference,
    feature_differences,
    generate,
    matched_controls,
    next_token,
    next_token_shifted,
    prompt_tokens,
    set_distance,
    set_features,
    steering_edit,
)
from bae_fast.causal.substitution import FeatureEffect, Substitution, SubstitutionTest
from bae_fast.causal.tail import InPlaceDivergence, Tail, TailConfig, TailObjective

__all__ = [
    "Differences",
    "Divergence",
    "FeatureDifference",
    "FeatureEffect",
    "InPlaceDivergence",
    "Matching",
    "Prompt",
    "PromptChange",
    "PromptFeatures",
    "Splice",
    "Substitution",
    "SubstitutionTest",
    "Tail",
    "TailConfig",
    "TailObjective",
    "divergence",
    "feature_differences",
    "generate",
    "match_codes",
    "matched_controls",
    "next_token",
    "next_token_shifted",
    "prompt_tokens",
    "replaced_output",
    "set_distance",
    "set_features",
    "shuffled_rows",
    "spliced",
    "steering_edit",
]
