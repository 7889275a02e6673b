"""What features stand for: the tokens they are named by, and facts about each."""

from __future__ import annotations

from bae_fast.interpret.collect import SalientTokens, collect_code, collect_scores

__all__ = ["SalientTokens", "collect_code", "collect_scores"]
