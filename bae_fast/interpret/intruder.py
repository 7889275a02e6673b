"""The odd one out: whether contexts of a feature are alike, judged by a sentence encoder.

For a feature, contexts of tokens where it is on and one context of a token where it is off, taken
from where another feature is on, are embedded. The one that is least like the others, by the mean
cosine with them, is called the intruder. The score of a feature is the share of draws in which that
is right: 1 / (n_own + 1) by chance. (After the word intrusion of Chang et al. 2009, with an
encoder in the place of people.) No judge, no names, and the same for all features of all methods.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bae_fast.analysis.text import context_text
from bae_fast.arguments import all_finite, check_int
from bae_fast.codes import BinaryCode
from bae_fast.lm.cache import ActivationCache

# texts embedded at a time
_BATCH = 64

_RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class IntruderConfig:
    """What is drawn.

    Attributes:
        n_features: features that are scored, drawn at random of those that can be.
        n_draws: draws a feature.
        n_own: contexts of the feature in a draw.
        least: rows that a feature must be on in, ``n_own`` or more.
        before, after: tokens of a context.
        seed: the seed of all draws.

    Raises:
        ValueError: a number of another type or out of its range.
    """

    n_features: int = 100
    n_draws: int = 10
    n_own: int = 4
    least: int = 10
    before: int = 8
    after: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        lowest = {"n_features": 1, "n_draws": 1, "n_own": 2, "least": 2, "before": 0, "after": 0}
        for name, least in lowest.items():
            value = getattr(self, name)
            check_int(name, value, least)
        if self.least < self.n_own:
            raise ValueError(f"least must be at least n_own={self.n_own}; got {self.least}")


class SentenceEncoder:
    """A sentence encoder of transformers: the mean of the last states of a text's tokens.

    Attributes:
        folder: the folder of the model and its tokenizer.
    """

    def __init__(self, folder: Path | str) -> None:
        """Load it, on the CPU in float32.

        Raises:
            ImportError: no transformers.
            ValueError: no such folder, or none of a model.
        """
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            raise ImportError(
                f"a sentence encoder needs transformers: pip install 'bae-fast[lm]' ({error})"
            ) from error
        self.folder = Path(folder)
        if not (self.folder / "config.json").is_file():
            raise ValueError(f"encoder must be the folder of a sentence encoder; got {folder}")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            self._model = AutoModel.from_pretrained(self.folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"encoder {folder} cannot be loaded: {reason}") from error
        self._model = self._model.float().eval()

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors, float32 ``[n, width]``."""
        parts = []
        for start in range(0, len(texts), _BATCH):
            batch = self._tokenizer(
                list(texts[start : start + _BATCH]),
                padding=True,
                truncation=True,
                max_length=128,
                return_tensors="pt",
            )
            batch.pop("token_type_ids", None)
            states = self._model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None].float()
            parts.append((states * mask).sum(1) / mask.sum(1).clamp_min(1))
        return torch.nn.functional.normalize(torch.cat(parts), dim=1)


@dataclasses.dataclass(frozen=True)
class IntruderScore:
    """Share of draws in which the intruder was found.

    Attributes:
        mean: over features.
        low, high: 95 % interval, features drawn with replacement.
        chance: 1 / (n_own + 1).
        n_features: features scored.
        by_feature: the share of each.
    """

    mean: float
    low: float
    high: float
    chance: float
    n_features: int
    by_feature: dict[int, float]

    def summary(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        values = dataclasses.asdict(self)
        values["by_feature"] = {str(f): share for f, share in self.by_feature.items()}
        return values


class _Set(NamedTuple):
    """Rows that a feature is on in, and one that it is off in and another feature on."""

    feature: int
    own: list[int]
    foreign: int


def _draw_sets(code: BinaryCode, able: list[int], config: IntruderConfig) -> list[_Set]:
    """Sets of features drawn among those that can be scored; none where no row is foreign."""
    draw = random.Random(config.seed)
    # a feature and those that its intruders come from
    dense: dict[int, Tensor] = {}

    def on(feature: int) -> Tensor:
        if feature not in dense:
            word, bit = divmod(feature, 32)
            dense[feature] = ((code.words[:, word].cpu() >> bit) & 1).bool()
        return dense[feature]

    sets = []
    for feature in sorted(draw.sample(able, min(config.n_features, len(able)))):
        rows_on = on(feature).nonzero().flatten().tolist()
        for _ in range(config.n_draws):
            for _attempt in range(20):
                other = draw.choice(able)
                elsewhere = (on(other) & ~on(feature)).nonzero().flatten().tolist()
                if other != feature and elsewhere:
                    own = draw.sample(rows_on, config.n_own)
                    sets.append(_Set(feature, own, draw.choice(elsewhere)))
                    break
    return sets


def intruder_scores(
    code: BinaryCode,
    cache: ActivationCache,
    rows: range,
    tokenizer: Any,
    encoder: Callable[[Sequence[str]], Tensor],
    config: IntruderConfig | None = None,
) -> IntruderScore:
    """Score features of a code of some rows of a cache.

    Args:
        code: ``[n, F]``, the code of the rows ``rows`` of the cache.
        encoder: texts to unit vectors ``[n, width]``, such as :class:`SentenceEncoder`.

    Raises:
        ValueError: a code of another length, vectors that are not finite, or fewer than two
            features that can be scored: on in ``least`` rows at least, and not in half of them or
            more; or all that can be are on in the same rows, so that none has an intruder.
    """
    config = config or IntruderConfig()
    flat = code.flatten()
    if len(flat) != len(rows):
        raise ValueError(f"code must have {len(rows)} rows; got {len(flat)}")
    counts = flat.counts().cpu()
    able = ((counts >= config.least) & (counts * 2 < len(rows))).nonzero().flatten().tolist()
    if len(able) < 2:
        raise ValueError(
            f"code must have two features that are on in {config.least} rows or more and in less "
            f"than half of all; got {len(able)}"
        )
    sets = _draw_sets(flat, able, config)
    if not sets:
        raise ValueError(
            f"code must have two features that are on in different rows; got {len(able)} that are "
            "on in the same"
        )
    needed = sorted({row for one in sets for row in (*one.own, one.foreign)})
    texts = []
    for row in needed:
        context = cache.token_context(rows.start + row, config.before, config.after)
        texts.append("".join(context_text(tokenizer, *context)))
    vectors = encoder(texts)
    if not all_finite(vectors):
        raise ValueError("encoder must give finite vectors; got NaN or Inf")
    place = {row: i for i, row in enumerate(needed)}
    right: dict[int, list[float]] = {}
    for one in sets:
        among = vectors[torch.tensor([place[row] for row in (*one.own, one.foreign)])]
        likeness = among @ among.T
        likeness.fill_diagonal_(0)
        total = likeness.sum(1)
        least = total <= total.min() + 1e-5  # equal ones are drawn from: each is as good a guess
        right.setdefault(one.feature, []).append(float(least[-1]) / int(least.sum()))
    shares = {feature: sum(said) / len(said) for feature, said in right.items()}
    values = torch.tensor(list(shares.values()), dtype=torch.float64)
    generator = torch.Generator().manual_seed(config.seed)
    drawn = torch.randint(len(values), (_RESAMPLES, len(values)), generator=generator)
    quantiles = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = values[drawn].mean(1).quantile(quantiles).tolist()
    return IntruderScore(
        mean=float(values.mean()),
        low=low,
        high=high,
        chance=1 / (config.n_own + 1),
        n_features=len(values),
        by_feature=shares,
    )
