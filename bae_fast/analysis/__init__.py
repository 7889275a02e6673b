"""What a code is worth and what its features stand for: metrics, and features in context."""

from __future__ import annotations

from bae_fast.analysis.description import DescriptionLength, description_length
from bae_fast.analysis.evaluation import Evaluation, evaluate
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
)

__all__ = [
    "ContextExample",
    "DensityHistogram",
    "DescriptionLength",
    "Evaluation",
    "FVUAccumulator",
    "FeatureSummary",
    "TokenLift",
    "choose_features",
    "covariance_eigenvalues",
    "density_histogram",
    "describe_features",
    "description_length",
    "evaluate",
    "format_feature",
    "fvu",
    "gaussian_rate_distortion_bits",
    "gaussian_rate_distortion_fvu",
]
