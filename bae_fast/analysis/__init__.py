"""What a code is worth and what its features stand for: metrics, and features in context."""

from __future__ import annotations

from bae_fast.analysis.features import (
    ContextExample,
    FeatureSummary,
    TokenLift,
    choose_features,
    describe_features,
    format_feature,
)
from bae_fast.analysis.metrics import (
    DensityHistogram,
    FVUAccumulator,
    covariance_eigenvalues,
    density_histogram,
    fvu,
    gaussian_rate_distortion_bits,
    gaussian_rate_distortion_fvu,
    l0,
)

__all__ = [
    "ContextExample",
    "DensityHistogram",
    "FVUAccumulator",
    "FeatureSummary",
    "TokenLift",
    "choose_features",
    "covariance_eigenvalues",
    "density_histogram",
    "describe_features",
    "format_feature",
    "fvu",
    "gaussian_rate_distortion_bits",
    "gaussian_rate_distortion_fvu",
    "l0",
]
