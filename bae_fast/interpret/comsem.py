"""ComSem: features named from tokens and scored by a judge who sees no numbers.

As released (Cho et al., arXiv 2509.20997, and the authors' program), the default:

    every token goes to its 10 most salient features (see :mod:`bae_fast.interpret.collect`);
    a feature with at least 6 tokens is named from its first 5 in the order of the text;
    up to 8 further tokens are each judged Yes or No against that phrase, one call each;
    score = share of Yes.

The score of a model here is the mean over features of each feature's share, so a feature with 1
judged token counts as much as one with 8; ``pooled`` is the share over all judged tokens. What the
released way leaves open, as options: tokens on which the feature is off (detection: balanced
accuracy), the strongest tokens in place of the first, several draws and a second judge (Cohen's
kappa), and phrases of other features (shuffled: the score this judge gives to nonsense).
Intervals are bootstrapped over features.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bae_fast.analysis.features import active_columns, choose_features
from bae_fast.analysis.text import context_text, visible_text
from bae_fast.arguments import check_int
from bae_fast.autoencoder import Autoencoder, as_code
from bae_fast.codes import BinaryCode
from bae_fast.interpret.answers import Answers, Asker, Prices
from bae_fast.interpret.collect import SalientTokens, collect_code, collect_scores
from bae_fast.interpret.judges import JUDGE_TOKENS, NAME_TOKENS, Answer, Judge, Request
from bae_fast.interpret.thoughts import without_thoughts
from bae_fast.lm.cache import ActivationCache
from bae_fast.normalization import check_rows

NAMING = """\
Below are passages of text. In each of them one token is marked, «like this».

{passages}

What do the marked tokens have in common? Answer with one short phrase and nothing else."""

JUDGING = """\
Below is a description and a passage of text in which one token is marked, «like this». \
Does the marked token fit the description?

Description: {phrase}

Passage: {passage}

Answer with one word, Yes or No."""

ORDERS = ("corpus", "strongest")

_RESAMPLES = 10_000
_PHRASE_CHARACTERS = 200
_QUOTES = "\"'`*\u201c\u201d\u2018\u2019 "
# what a phrase is taken to be long before there is one
_PLACEHOLDER = "words that stand for a quantity or a size"


@dataclasses.dataclass(frozen=True)
class ComSemConfig:
    """How features are named and judged; the defaults are the released way.

    Attributes:
        n_features: the largest number of features. They are taken evenly over the range of
            densities of those with enough tokens.
        n_named: tokens that a feature is named from.
        least: tokens that a feature must have to be named.
        n_judged: further tokens judged, at most.
        n_negatives: tokens judged on which the feature is off; 0: no detection score.
        order: "corpus": the first tokens of the text; "strongest": those of the largest salience,
            and among equal ones of the largest margin.
        draws: judgments of each token; draw 0 is the judge's best answer, the score their mean.
        shuffled: also judge the tokens against another feature's phrase.
        seed: the seed of the choice of features (0: the middle of every part, else drawn), of
            negatives, of the shuffling and of the bootstrap.
        before, after: tokens of context shown.

    Raises:
        ValueError: a number of another type or out of its range, or an unknown order.
    """

    n_features: int = 100
    n_named: int = 5
    least: int = 6
    n_judged: int = 8
    n_negatives: int = 0
    order: str = "corpus"
    draws: int = 1
    shuffled: bool = False
    seed: int = 0
    before: int = 16
    after: int = 8

    def __post_init__(self) -> None:
        bounds = {
            "n_features": 1, "n_named": 1, "n_judged": 1, "n_negatives": 0, "draws": 1, "seed": 0,
            "before": 0, "after": 0, "least": self.n_named + 1,
        }  # fmt: skip
        for name, least in bounds.items():
            value = getattr(self, name)
            check_int(name, value, least)
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}; got {self.order!r}")


@dataclasses.dataclass(frozen=True)
class FeatureTokens:
    """A model's features on some rows: what naming and judging need of them.

    Attributes:
        tokens: the rows that went to each feature.
        code: which features are on in which rows, ``[n, F]``.
        strength: given a feature and rows int64 ``[m]``, a score ``[m]``, larger is stronger: it
            orders rows of equal salience. None: they stay in the order of the text.
        either_way: whether a bit that is off can be the salient one, as with the burstiness.
    """

    tokens: SalientTokens
    code: BinaryCode
    strength: Callable[[int, Tensor], Tensor] | None = None
    either_way: bool = False


@torch.no_grad()
def feature_tokens(model: Autoencoder, rows: Tensor, *, k: int = 10) -> FeatureTokens:
    """Give every row to its k most salient features: by burstiness, or by a baseline's scores.

    Args:
        model: an autoencoder in eval mode.
        rows: raw hidden states ``[n, d_in]``, any floating dtype; read in blocks.
        k: features a row.

    Raises:
        TypeError: rows that are no tensor of floats.
        ValueError: rows of another width, a model in training mode or of several bits a feature.
    """
    if model.training:
        raise ValueError("model must be in eval mode: call model.eval() first")
    check_rows("rows", rows, model.d_in)
    if model.n_bits != 1:
        raise ValueError(f"model must have n_bits=1; got {model.n_bits}")
    if model.ranks_bits:
        code = model.active(rows)

        def margin(feature: int, chosen: Tensor) -> Tensor:
            """How far the state lies from the threshold, on either side."""
            states = model.as_own(rows[chosen])
            column = torch.tensor([feature], device=states.device)
            return model.preactivation(states, column)[:, 0].abs().cpu()

        return FeatureTokens(collect_code(code, k=k), code, margin, either_way=True)
    codes: list[BinaryCode] = []

    def scores() -> Iterator[Tensor]:
        for block in model.blocks(rows):
            features = model.activations(block)
            codes.append(as_code(features))
            yield model.scores(block, features)

    tokens = collect_scores(scores(), k=k)
    return FeatureTokens(tokens, BinaryCode.cat(codes))


@dataclasses.dataclass(frozen=True)
class ChosenTokens:
    """The rows of one feature that are shown to the judge."""

    feature: int
    density: float
    n_tokens: int
    named: tuple[int, ...]
    judged: tuple[int, ...]
    negatives: tuple[int, ...]


def choose_tokens(found: FeatureTokens, config: ComSemConfig) -> list[ChosenTokens]:
    """Choose features evenly over densities, and of each the rows that the judge will see.

    Negatives are drawn evenly from the rows that did not go to the feature and in which it is off.
    A bit that is on in most rows stands out where it is off: of such a feature they are rows in
    which it is on.
    """
    counts = found.tokens.counts().cpu()
    density = found.code.density().cpu()
    # features that never change can be given rows that have too few others: they stand for nothing
    eligible = torch.where((counts >= config.least) & (density < 1), density, 0)
    generator = torch.Generator().manual_seed(config.seed) if config.seed else None
    features = choose_features(eligible, config.n_features, generator=generator)
    usual = None
    if config.n_negatives and len(features):
        on = active_columns(found.code, features)
        usual = on == (density[features] > 0.5) if found.either_way else ~on
    chosen = []
    for column, feature in enumerate(features.tolist()):
        rows = ordered_rows(found, feature, config.order).tolist()
        negatives: list[int] = []
        if usual is not None:
            own = found.tokens.of(feature)[0].long().cpu()
            free = usual[:, column].clone()
            free[own] = False
            candidates = free.nonzero()[:, 0]
            draw = torch.Generator().manual_seed(_seed(config.seed, feature))
            picked = torch.randperm(len(candidates), generator=draw)[: config.n_negatives]
            negatives = candidates[picked].sort().values.tolist()
        stop = config.n_named + config.n_judged
        chosen.append(
            ChosenTokens(
                feature,
                float(density[feature]),
                len(rows),
                tuple(rows[: config.n_named]),
                tuple(rows[config.n_named : stop]),
                tuple(negatives),
            )
        )
    return chosen


def ordered_rows(found: FeatureTokens, feature: int, order: str) -> Tensor:
    """The rows that went to a feature, int64, in one of :data:`ORDERS`."""
    rows, salience = (part.cpu() for part in found.tokens.of(feature))
    rows = rows.long()
    if order == "strongest":
        if found.strength is not None:
            first = found.strength(feature, rows).argsort(descending=True, stable=True)
            rows, salience = rows[first], salience[first]
        rows = rows[salience.argsort(descending=True, stable=True)]
    return rows


def _seed(seed: int, feature: int) -> int:
    digest = hashlib.sha256(f"{seed} {feature}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


# -- questions ---------------------------------------------------------------------------------


class Passages:
    """Rows as text: the token in its context, between « and »."""

    def __init__(
        self, cache: ActivationCache, rows: range, tokenizer: Any, config: ComSemConfig
    ) -> None:
        self.cache, self.rows, self.tokenizer = cache, rows, tokenizer
        self.before, self.after = config.before, config.after

    def __call__(self, row: int) -> tuple[str, str]:
        """(passage, token) of row rows[row] of the cache."""
        ids = self.cache.token_context(self.rows[row], self.before, self.after)
        before, token, after = context_text(self.tokenizer, *ids)
        bare = token.strip(" ")
        if bare:  # spaces of the token stand outside of the marks
            head = len(token) - len(token.lstrip(" "))
            before, after = before + token[:head], token[head + len(bare) :] + after
        else:
            bare = token
        left, mark, right = (visible_text(_unmarked(text)) for text in (before, bare, after))
        return f"{left}«{mark}»{right}".strip(), token


def _unmarked(text: str) -> str:
    """The text's own quotation marks, not to be taken for ours."""
    return text.replace("«", "\u2039").replace("»", "\u203a")


def naming_request(passages: Passages, one: ChosenTokens) -> Request:
    """The question for a feature's phrase."""
    shown = [passages(row) for row in one.named]
    text = "\n".join(f"- {passage}" for passage, _ in shown)
    return Request("name", NAMING.format(passages=text), tokens=tuple(t for _, t in shown))


def judging_request(passages: Passages, phrase: str, row: int, draw: int = 0) -> Request:
    """The question whether a row's token fits a phrase."""
    passage, token = passages(row)
    return Request(
        "judge",
        JUDGING.format(phrase=phrase, passage=passage),
        draw=draw,
        phrase=phrase,
        tokens=(token,),
    )


def read_phrase(text: str) -> str:
    """The phrase in an answer: its first line, without quotation marks and a full stop at the end.

    Empty where the answer has no letter or digit. Thoughts before the answer are left out.
    """
    text = without_thoughts(text)
    for line in text.splitlines():
        phrase = re.sub(r"^\s*(\d+[.)]|[-*])\s+", "", line)  # an item of a list
        phrase = " ".join(phrase.split()).strip(_QUOTES)
        phrase = re.sub(r"^(phrase|answer|description)\s*:\s*", "", phrase, flags=re.IGNORECASE)
        phrase = phrase.rstrip(".").strip(_QUOTES)[:_PHRASE_CHARACTERS]
        if any(c.isalnum() for c in phrase):
            return phrase
    # a phrase may be a sign: what the marked tokens have in common can be a comma
    return text.strip()[:_PHRASE_CHARACTERS] if not any(c.isalnum() for c in text) else ""


def read_verdict(text: str) -> bool | None:
    """Whether the first of the words yes and no is yes; None where there is neither.

    Thoughts before the answer are left out; where the answer names itself ("Final answer: no"),
    the last such name counts.
    """
    text = without_thoughts(text)
    named = re.findall(r"\b(?:answer|verdict|boxed)\W*(?:is\W*)?\b(yes|no)\b", text, re.IGNORECASE)
    found = named[-1:] or re.findall(r"\b(yes|no)\b", text, re.IGNORECASE)[:1]
    return found[0].lower() == "yes" if found else None


def count_questions(
    chosen: Sequence[ChosenTokens],
    passages: Passages,
    config: ComSemConfig,
    count_tokens: Callable[[str], int],
) -> dict[str, int]:
    """How much scoring would ask, and about how many tokens it takes, asking nothing.

    The phrases are not known yet: a phrase of ordinary length stands for each. Answers on disk are
    not taken off.

    Returns:
        ``features``, ``naming_calls``, ``judging_calls``, ``calls``, ``prompt_tokens`` and, at
        most, ``completion_tokens``.
    """
    naming = [naming_request(passages, one) for one in chosen]
    prompt_tokens = sum(count_tokens(request.prompt) for request in naming)
    judging = 0
    for one in chosen:
        for rows, times in (
            (one.judged, config.draws + (config.shuffled and len(chosen) > 1)),
            (one.negatives, config.draws),
        ):
            for row in rows:
                request = judging_request(passages, _PLACEHOLDER, row)
                prompt_tokens += times * count_tokens(request.prompt)
                judging += times
    return {
        "features": len(chosen),
        "naming_calls": len(naming),
        "judging_calls": judging,
        "calls": len(naming) + judging,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": len(naming) * NAME_TOKENS + judging * JUDGE_TOKENS,
    }


# -- scores ------------------------------------------------------------------------------------


def score_model(
    model: Autoencoder,
    cache: ActivationCache,
    rows: range,
    tokenizer: Any,
    judge: Judge,
    *,
    config: ComSemConfig | None = None,
    k: int = 10,
    second: Judge | None = None,
    answers: str | os.PathLike[str] | None = None,
    budget_calls: int | None = None,
    prices: Prices | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Name and score a model's features.

    Args:
        model: a Binary Autoencoder of one bit a feature or a baseline, in eval mode.
        cache: hidden states of the module that the model reads.
        rows: rows looked at, in steps of 1.
        tokenizer: the tokenizer of the language model that was harvested.
        judge: names and judges.
        config: None: the released way.
        k: features a row goes to.
        second: judges the same tokens against the same phrases; only the agreement is reported.
        answers: file of answers, see :class:`Answers`; None: none is kept.
        budget_calls, prices, progress: see :class:`Asker`.

    Returns:
        JSON values, see :func:`score_features`.

    Raises:
        ValueError: arguments that do not fit together, or no feature with enough tokens.
        JudgeError: the judge cannot be reached; what it answered is kept.
    """
    cache.check_rows(rows)
    config = config or ComSemConfig()
    found = feature_tokens(model, cache.rows[rows.start : rows.stop], k=k)
    with Answers(answers) as kept:
        asker = Asker(kept, budget_calls=budget_calls, prices=prices, progress=progress)
        passages = Passages(cache, rows, tokenizer, config)
        return score_features(found, passages, judge, asker, config=config, second=second)


def score_features(
    found: FeatureTokens,
    passages: Passages,
    judge: Judge,
    asker: Asker,
    *,
    config: ComSemConfig,
    second: Judge | None = None,
) -> dict[str, Any]:
    """Name features and score them.

    Features are left out of the means where an answer is missing (the budget, a failure) or the
    judge gave no phrase; ``counts`` says how many. A judgment that is neither Yes nor No is No.

    Returns:
        ``comsem``, ``shuffled``, ``above_shuffled`` (the difference of the two, feature by
        feature), ``detection`` and ``auc`` (of a judge that gives probabilities: how often a
        token of the feature gets a larger one than another token; a leaning to Yes does not
        count): None or ``{mean, low, high, n}``, 95 % intervals; ``comsem`` also ``pooled``.
        ``sensitivity`` and ``specificity``, the shares of Yes on tokens of the
        feature and of No on the others. ``agreement``: Cohen's kappa between ``draws`` and
        between ``judges``, or None. ``counts``, ``usage``, ``settings``. ``features``: one entry
        a feature.

    Raises:
        ValueError: no feature has enough tokens.
        JudgeError: see :meth:`Asker.ask`.
    """
    chosen = choose_tokens(found, config)
    counts = found.tokens.counts()
    if not chosen:
        raise ValueError(
            f"no feature has {config.least} tokens: the {found.tokens.n_rows:,} rows are too few, "
            f"or one goes to too few features (k={found.tokens.k})"
        )
    phrases = _name(chosen, passages, judge, asker)
    features = _judge(chosen, phrases, passages, judge, asker, config, second)
    complete = [one for one in features if one["comsem"] is not None]
    judged = [yes for one in complete for yes in _flat(one["yes"])]
    result: dict[str, Any] = {
        name: _interval([one[name] for one in complete], config.seed)
        for name in ("comsem", "shuffled", "above_shuffled", "detection", "auc")
    }
    if result["comsem"] is not None:
        result["comsem"]["pooled"] = sum(judged) / len(judged)
    detected = [one for one in complete if one["detection"] is not None]
    result["sensitivity"] = _mean([one["comsem"] for one in detected]) if detected else None
    result["specificity"] = _mean([1 - one["false_yes"] for one in detected]) if detected else None
    draws = [
        (verdict[0], other)
        for one in complete
        for verdict in [*one["yes"], *(one["no"] or [])]
        for other in verdict[1:]
    ]
    judges = [pair for one in complete for pair in one.pop("_second")]
    for one in features:
        one.pop("_second", None)
    result["agreement"] = {"draws": cohen_kappa(draws), "judges": cohen_kappa(judges)}
    result["counts"] = {
        "features": found.tokens.n_features,
        "dead": int((found.code.counts() == 0).sum()),
        "with_enough_tokens": int((counts >= config.least).sum()),
        "chosen": len(chosen),
        "scored": len(complete),
        "without_phrase": sum(one["phrase"] == "" for one in features),
        "incomplete": sum(one["comsem"] is None and one["phrase"] != "" for one in features),
        "judgments": len(judged),
        "unclear": sum(one["unclear"] for one in features),
    }
    result["budget_spent"] = asker.spent
    result["usage"] = asker.usage.summary(asker.prices)
    result["settings"] = {
        **dataclasses.asdict(config),
        "k": found.tokens.k,
        "rows": found.tokens.n_rows,
        "judge": judge.identity,
        "second_judge": None if second is None else second.identity,
    }
    result["features"] = features
    return result


def _name(
    chosen: Sequence[ChosenTokens], passages: Passages, judge: Judge, asker: Asker
) -> list[str | None]:
    requests = [naming_request(passages, one) for one in chosen]
    answers = asker.ask(judge, requests, "name")
    return [None if answer is None else read_phrase(answer.text) for answer in answers]


def _judge(
    chosen: Sequence[ChosenTokens],
    phrases: Sequence[str | None],
    passages: Passages,
    judge: Judge,
    asker: Asker,
    config: ComSemConfig,
    second: Judge | None,
) -> list[dict[str, Any]]:
    """Ask for every verdict and put each feature together."""
    others = _other_phrases(phrases, config.seed) if config.shuffled else [None] * len(chosen)
    # feature by feature: where the budget ends, those before it are complete
    requests: list[Request] = []
    again: list[Request] = []
    for one, phrase, other in zip(chosen, phrases, others, strict=True):
        if not phrase:
            continue
        for row in (*one.judged, *one.negatives):
            verdicts = [
                judging_request(passages, phrase, row, draw) for draw in range(config.draws)
            ]
            requests += verdicts
            again.append(verdicts[0])
        if other:
            requests += [judging_request(passages, other, row) for row in one.judged]
    answers = iter(asker.ask(judge, requests, "judge"))
    seconds: Iterator[Answer | None] = iter(
        [] if second is None else asker.ask(second, again, "second judge")
    )
    features = []
    for one, phrase, other in zip(chosen, phrases, others, strict=True):
        entry = _unjudged(one, phrase, other)
        features.append(entry)
        if not phrase:
            continue
        n_rows = len(one.judged) + len(one.negatives)
        verdicts_of = [[next(answers) for _ in range(config.draws)] for _ in range(n_rows)]
        nonsense = [next(answers) for _ in one.judged] if other else []
        checked = [next(seconds) for _ in verdicts_of] if second is not None else []
        if all(answer is not None for part in (*verdicts_of, nonsense) for answer in part):
            _score(entry, len(one.judged), verdicts_of, nonsense, checked)
    return features


def _unjudged(one: ChosenTokens, phrase: str | None, other: str | None) -> dict[str, Any]:
    """What is said of a feature before a judge has answered."""
    return {
        "feature": one.feature,
        "density": one.density,
        "n_tokens": one.n_tokens,
        "phrase": phrase,
        "comsem": None,
        "shuffled": None,
        "above_shuffled": None,
        "detection": None,
        "auc": None,
        "false_yes": None,
        "unclear": 0,
        "shuffled_phrase": other if phrase else None,
        "rows": {"named": one.named, "judged": one.judged, "negatives": one.negatives},
        "yes": None,
        "no": None,
        "_second": [],
    }


def _score(
    entry: dict[str, Any],
    n_judged: int,
    verdicts_of: Sequence[Sequence[Answer | None]],
    nonsense: Sequence[Answer | None],
    checked: Sequence[Answer | None],
) -> None:
    """Put the verdicts on a feature into its entry.

    Args:
        n_judged: how many of the rows are the feature's; those behind them are negatives.
        verdicts_of: the answers on each row, by draws.
        nonsense: those on the feature's rows by another feature's phrase.
        checked: the second judge's answers on each row, None where it gave none.
    """
    read = [[_read(answer, entry) for answer in part] for part in verdicts_of]
    positive, negative = read[:n_judged], read[n_judged:]
    entry["yes"], entry["comsem"] = positive, _mean(_flat(positive))
    if nonsense:
        entry["shuffled"] = _mean([_read(answer, entry) for answer in nonsense])
        entry["above_shuffled"] = entry["comsem"] - entry["shuffled"]
    if negative:
        entry["no"], entry["false_yes"] = negative, _mean(_flat(negative))
        entry["detection"] = (entry["comsem"] + 1 - entry["false_yes"]) / 2
        chances = [part[0].p_yes for part in verdicts_of if part[0] is not None]
        if None not in chances:
            entry["auc"] = _auc(chances[:n_judged], chances[n_judged:])
    entry["_second"] = [
        (verdict[0], bool(read_verdict(answer.text)))
        for verdict, answer in zip(read, checked, strict=False)
        if answer is not None
    ]


def _read(answer: Answer | None, entry: dict[str, Any]) -> bool:
    assert answer is not None
    verdict = read_verdict(answer.text)
    entry["unclear"] += verdict is None
    return bool(verdict)


def _flat(parts: Sequence[Sequence[bool]]) -> list[bool]:
    return [yes for part in parts for yes in part]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _auc(positive: Sequence[float | None], negative: Sequence[float | None]) -> float:
    """Share of pairs in which the first is larger; equal ones count half."""
    a, b = (torch.tensor(part, dtype=torch.float64) for part in (positive, negative))
    difference = a[:, None] - b
    return float(((difference > 0).double() + (difference == 0).double() / 2).mean())


def _other_phrases(phrases: Sequence[str | None], seed: int) -> list[str | None]:
    """The phrase of another feature for each one, at a drawn distance, different in words."""
    n = len(phrases)
    start = int(torch.randint(max(n - 1, 1), (), generator=torch.Generator().manual_seed(seed)))
    others: list[str | None] = []
    for i, own in enumerate(phrases):
        at = ((i + 1 + (start + step) % (n - 1)) % n for step in range(n - 1))
        different = (
            phrase for j in at if (phrase := phrases[j]) and phrase.lower() != (own or "").lower()
        )
        others.append(next(different, None) if own else None)
    return others


def _interval(values: Sequence[float | None], seed: int) -> dict[str, Any] | None:
    """Mean over features and a 95 % interval: percentiles of means of bootstrap samples."""
    known = torch.tensor([v for v in values if v is not None], dtype=torch.float64)
    n = len(known)
    if not n:
        return None
    generator = torch.Generator().manual_seed(seed)
    means = torch.stack(
        [
            known[torch.randint(n, (part, n), generator=generator)].mean(1)
            for part in [_RESAMPLES // 10] * 10
        ]
    ).flatten()
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"mean": known.mean().item(), "low": low, "high": high, "n": n}


def cohen_kappa(pairs: Sequence[tuple[bool, bool]]) -> float | None:
    """Agreement of two judges beyond chance: (p_o - p_e) / (1 - p_e).

    None where there is no pair, or both gave one and the same answer throughout.
    """
    if not pairs:
        return None
    n = len(pairs)
    observed = sum(a == b for a, b in pairs) / n
    first, other = sum(a for a, _ in pairs) / n, sum(b for _, b in pairs) / n
    chance = first * other + (1 - first) * (1 - other)
    return None if chance == 1 else (observed - chance) / (1 - chance)
