"""H, D and the slopes of H: kernels of their own, so that a step has fewer starts."""

from bae_fast.kernels.counts import slopes, terms

__all__ = ["slopes", "terms"]
