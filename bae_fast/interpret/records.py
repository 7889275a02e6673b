"""What is known of one feature, gathered to be shown: what it fires on, and what it was named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bae_fast.analysis.features import TokenLift


@dataclass(frozen=True)
class FeatureContext:
    """A stretch of text around a token on which the feature is on.

    Attributes:
        pieces: the text in pieces that join without a gap, one a token as a rule.
        at: which of them is the token that the context is shown for.
        on: further pieces on which the feature is on.
        row: row number of the token, or None.
        score: the margin, activation or salience there, or None.
    """

    pieces: tuple[str, ...]
    at: int
    on: tuple[int, ...] = ()
    row: int | None = None
    score: float | None = None


@dataclass(frozen=True)
class Histogram:
    """Counts in equal bins from low to high, e.g. of pre-activations or activations."""

    low: float
    high: float
    counts: tuple[int, ...]


@dataclass(frozen=True)
class FeatureRecord:
    """What the page shows of one feature; what is empty or None is left out.

    Attributes:
        feature: its number, unique in the file.
        density: share of rows it is on in.
        burstiness: see :mod:`bae_fast.interpret.facts`.
        tokens: over-represented tokens, best first.
        contexts: places where it is on, strongest first.
        lens: vocabulary tokens nearest to its decoder direction and their scores, nearest first.
        neighbours: (feature, score) of those it fires with, closest first.
        histogram: the histogram of its margins or activations.
        phrase: what it was named, or None.
        scores: values by name, e.g. "ComSem"; None where a feature has none. Sorted by in the page.
        place: where the feature stands on the page's map, two numbers.
        partner: the feature of another model that is shown beside it.
    """

    feature: int
    density: float
    burstiness: float | None = None
    tokens: Sequence[TokenLift] = ()
    contexts: Sequence[FeatureContext] = ()
    lens: Sequence[tuple[str, float]] = ()
    neighbours: Sequence[tuple[int, float]] = ()
    histogram: Histogram | None = None
    phrase: str | None = None
    scores: Mapping[str, float | None] = field(default_factory=dict)
    place: tuple[float, float] | None = None
    partner: Partner | None = None


@dataclass(frozen=True)
class Partner:
    """The feature of another model that is on in most of a feature's rows.

    Attributes:
        record: what is known of it.
        agreement: the Jaccard index of the rows in which the two are on.
        kind: what the two are to each other, one of :data:`bae_fast.causal.matching.CLASSES`.
        back: the feature that is the partner's own best.
        cosine: the cosine of their decoder directions, or None where there is none.
    """

    record: FeatureRecord
    agreement: float
    kind: str
    back: int
    cosine: float | None = None
