"""ComSem with planted features and a judge whose answers can be worked out by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from bae_fast import BinaryAutoencoder, BinaryCode
from bae_fast.baselines import METHODS, make_baseline
from bae_fast.interpret import comsem
from bae_fast.interpret.answers import Answers, Asker
from bae_fast.interpret.collect import SalientTokens
from bae_fast.interpret.comsem import (
    ComSemConfig,
    FeatureTokens,
    Passages,
    choose_tokens,
    cohen_kappa,
    count_questions,
    feature_tokens,
    read_phrase,
    read_verdict,
    score_features,
    score_model,
)
from bae_fast.interpret.judges import Answer, RuleJudge
from bae_fast.lm.cache import ActivationCache
from bae_fast.report.comsem import table

WORDS = ["cat", "dog", "tree", "stone", "river", "cloud", "«", "line\nbreak"]
CONTEXT = 16


class Words:
    """A tokenizer of whole words."""

    def decode(self, ids, **_options):
        return "".join(" " + WORDS[i] for i in ids)

    def convert_ids_to_tokens(self, i):
        return WORDS[i]

    def __call__(self, text, **_options):
        return {"input_ids": text.split()}


def make_cache(tokens, rows=None):
    """One row a token, windows of 16, no token dropped."""
    tokens = torch.as_tensor(tokens, dtype=torch.int32)
    tokens = tokens[: len(tokens) // CONTEXT * CONTEXT]
    places = torch.arange(len(tokens), dtype=torch.int32)
    rows = torch.zeros(len(tokens), 1) if rows is None else rows[: len(tokens)]
    return ActivationCache(
        Path("nowhere"), {}, rows, places // CONTEXT, places % CONTEXT, tokens.view(-1, CONTEXT)
    )


def planted(of_feature, n_rows, salience=None):
    """Features that are on in, and take, exactly the given rows."""
    counts = torch.tensor([0, *map(len, of_feature)])
    rows = torch.tensor([row for part in of_feature for row in part], dtype=torch.int32)
    if salience is None:
        salience = torch.ones(len(rows))
    bits = torch.zeros(n_rows, len(of_feature), dtype=torch.bool)
    for feature, part in enumerate(of_feature):
        bits[part, feature] = True
    tokens = SalientTokens(counts.cumsum(0), rows, salience, 10, n_rows)
    return FeatureTokens(tokens, BinaryCode.from_dense(bits))


def score(found, cache, config, judge=None, **options):
    passages = Passages(cache, range(cache.n_rows), Words(), config)
    return score_features(
        found, passages, judge or RuleJudge(), options.pop("asker", Asker()), config=config,
        **options,
    )  # fmt: skip


class Recording(RuleJudge):
    def __init__(self):
        self.asked = []

    def answer(self, requests, done):
        self.asked += requests
        super().answer(requests, done)


# -- the released way --------------------------------------------------------------------------


def test_the_released_way_is_the_default():
    config = ComSemConfig()
    assert (config.n_named, config.least, config.n_judged) == (5, 6, 8)
    assert (config.order, config.n_negatives, config.draws) == ("corpus", 0, 1)
    assert not config.shuffled


def test_named_from_the_first_five_and_up_to_eight_more_judged():
    text = torch.randint(6, (160,), generator=torch.Generator().manual_seed(0))
    rows = [list(range(3, 3 + n)) for n in (5, 6, 9, 13, 14, 40)]
    judge = Recording()
    result = score(planted(rows, 160), make_cache(text), ComSemConfig(), judge)
    by_feature = {one["feature"]: one["rows"] for one in result["features"]}
    assert sorted(by_feature) == [1, 2, 3, 4, 5]  # five tokens are too few
    for feature, shown in by_feature.items():
        n = len(rows[feature])
        assert list(shown["named"]) == rows[feature][:5]
        assert list(shown["judged"]) == rows[feature][5 : min(n, 13)]
        assert shown["negatives"] == ()
    # one call a token; the features share tokens 1 to 5 and so the question for the name, and
    # its answer; and then those for the same tokens
    assert [request.kind for request in judge.asked] == ["name"] + ["judge"] * 8
    assert all(len(request.tokens) == 1 for request in judge.asked[1:])
    assert result["counts"]["with_enough_tokens"] == 5
    assert result["counts"]["judgments"] == 1 + 4 + 8 + 8 + 8
    assert result["usage"]["calls"] == len(judge.asked)


def test_the_score_is_the_mean_over_features_of_the_share_of_yes():
    # feature 0: five cats, then cat, dog: 1/2; feature 1: five dogs, then eight dogs: 1;
    # feature 2: three trees and two stones, then four trees, four stones: 1/2
    texts = [[0] * 5 + [0, 1], [1] * 13, [2, 3, 2, 3, 2] + [2, 3] * 4]
    text, rows = [], []
    for part in texts:
        rows.append(list(range(len(text), len(text) + len(part))))
        text += part
    text += [4] * (-len(text) % CONTEXT)
    result = score(planted(rows, len(text)), make_cache(text), ComSemConfig())
    by_feature = {one["feature"]: one for one in result["features"]}
    assert [by_feature[f]["comsem"] for f in range(3)] == [0.5, 1.0, 0.5]
    assert [by_feature[f]["phrase"] for f in range(3)] == ["cat", "dog", "tree"]
    assert result["comsem"]["mean"] == pytest.approx(2 / 3)
    assert result["comsem"]["pooled"] == pytest.approx((1 + 8 + 4) / (2 + 8 + 8))
    assert result["comsem"]["low"] >= 0.5
    assert result["comsem"]["high"] <= 1
    assert result["detection"] is None
    assert result["shuffled"] is None


def test_no_number_is_shown():
    found = planted([list(range(20))], 160, torch.full((20,), 0.73519))
    judge = Recording()
    score(found, make_cache(torch.arange(160) % 6), ComSemConfig(n_negatives=4), judge)
    for request in judge.asked:
        assert "73519" not in request.prompt
        assert not set("0123456789") & set(request.prompt)


def test_the_marked_token_stands_in_its_context():
    cache = make_cache([0, 1, 2, 6, 3, 7] + [5] * 10)
    config = ComSemConfig(before=2, after=1)
    passages = Passages(cache, range(cache.n_rows), Words(), config)
    assert passages(2) == ("cat dog «tree» \u2039", " tree")
    assert passages(0) == ("«cat» dog", " cat")
    assert passages(3)[0] == "dog tree «\u2039» stone"  # its own marks are not ours
    assert passages(5)[0] == "\u2039 stone «line↵break» cloud"
    shifted = Passages(cache, range(2, cache.n_rows), Words(), config)
    assert shifted(0) == passages(2)


# -- options -----------------------------------------------------------------------------------


def test_negatives_are_rows_in_which_the_feature_is_off():
    g = torch.Generator().manual_seed(0)
    text = torch.randint(6, (480,), generator=g)
    rows = [(text == word).nonzero().flatten().tolist() for word in range(3)]
    rows.append(sorted(set(range(480)) - set(rows[0])))  # mixed tokens, on in most rows
    found = planted(rows, 480)
    config = ComSemConfig(n_negatives=8)
    result = score(found, make_cache(text), config)
    by_feature = {one["feature"]: one for one in result["features"]}
    for feature, one in by_feature.items():
        negatives = one["rows"]["negatives"]
        assert len(set(negatives)) == 8
        assert not set(negatives) & set(rows[feature])
    for feature in range(3):
        one = by_feature[feature]
        assert (one["comsem"], one["false_yes"], one["detection"]) == (1.0, 0.0, 1.0)
    mixed = by_feature[3]
    assert mixed["detection"] == pytest.approx((mixed["comsem"] + 1 - mixed["false_yes"]) / 2)
    assert mixed["comsem"] < 1
    assert choose_tokens(found, config) == choose_tokens(found, config)
    other = choose_tokens(found, dataclasses.replace(config, seed=1))
    assert [one.negatives for one in other] != [
        by_feature[one.feature]["rows"]["negatives"] for one in other
    ]


def test_a_name_that_fits_everything_is_found_out_by_negatives():
    class Agreeable(RuleJudge):
        identity = "agreeable"

        @staticmethod
        def _say(request):
            return "words" if request.kind == "name" else "Yes"

    text = torch.arange(160) % 6
    rows = [(text == word).nonzero().flatten().tolist() for word in range(3)]
    config = ComSemConfig(n_negatives=8)
    result = score(planted(rows, 160), make_cache(text), config, Agreeable())
    assert result["comsem"]["mean"] == 1
    assert result["detection"]["mean"] == 0.5
    assert (result["sensitivity"], result["specificity"]) == (1, 0)


def test_a_leaning_to_yes_does_not_count_in_the_area_under_the_curve():
    class Leaning(RuleJudge):
        identity = "leaning"

        def answer(self, requests, done):
            for i, request in enumerate(requests):
                text = self._say(request)
                p_yes = None if request.kind == "name" else 0.9 if text == "Yes" else 0.7
                done(i, Answer(text if p_yes is None else "Yes", p_yes=p_yes))

    text = torch.arange(160) % 6
    rows = [(text == word).nonzero().flatten().tolist() for word in range(3)]
    rows[2] = sorted(rows[2] + rows[1])  # half of its tokens are like the others' to this judge
    config = ComSemConfig(n_negatives=8)
    result = score(planted(rows, 160), make_cache(text), config, Leaning())
    assert result["detection"]["mean"] == 0.5
    by_feature = {one["feature"]: one for one in result["features"]}
    assert by_feature[0]["auc"] == by_feature[1]["auc"] == 1
    assert by_feature[2]["auc"] == 0.75
    assert score(planted(rows, 160), make_cache(text), config)["auc"] is None


def test_strongest_first_goes_by_salience_then_by_margin():
    rows = [list(range(20))]
    salience = torch.tensor([1.0] * 10 + [2.0] * 10)
    found = planted(rows, 160, salience)
    config = ComSemConfig(order="strongest")
    (one,) = choose_tokens(found, config)
    assert one.named == (10, 11, 12, 13, 14)
    assert one.judged == (15, 16, 17, 18, 19, 0, 1, 2)
    found = dataclasses.replace(found, strength=lambda _feature, chosen: chosen.float())
    (one,) = choose_tokens(found, config)
    assert one.named == (19, 18, 17, 16, 15)
    assert one.judged == (14, 13, 12, 11, 10, 9, 8, 7)


def test_phrases_of_other_features_show_what_a_judge_says_to_nonsense():
    text = torch.arange(192) % 6
    rows = [(text == word).nonzero().flatten().tolist() for word in range(4)]
    config = ComSemConfig(shuffled=True)
    result = score(planted(rows, 192), make_cache(text), config)
    assert result["comsem"]["mean"] == 1
    assert result["shuffled"]["mean"] == 0
    assert result["above_shuffled"]["mean"] == 1
    for one in result["features"]:
        assert one["shuffled_phrase"] in WORDS
        assert one["shuffled_phrase"] != one["phrase"]
    lonely = score(planted(rows[:1], 192), make_cache(text), config)
    assert lonely["shuffled"] is None


class Noisy(RuleJudge):
    """Says Yes to what the draw, or the identity, decides."""

    def __init__(self, identity, rule):
        self.identity, self.rule = identity, rule

    def answer(self, requests, done):
        for i, request in enumerate(requests):
            text = self._say(request)
            if request.kind == "judge":
                text = "Yes" if self.rule(request) else "No"
            done(i, Answer(text))


def test_agreement_of_draws_and_of_judges():
    text = torch.arange(192) % 6
    rows = [list(range(w, 192, 5)) for w in range(4)]  # every word, unlike the phrase mostly
    found, cache = planted(rows, 192), make_cache(text)

    def fits(request):
        return request.tokens[0].strip() == request.phrase

    config = ComSemConfig(draws=3)
    same = score(found, cache, config, Noisy("same", fits), second=Noisy("as well", fits))
    assert same["agreement"] == {"draws": 1.0, "judges": 1.0}
    turned = Noisy("turned", lambda r: fits(r) != (r.draw > 0))
    result = score(found, cache, config, turned, second=Noisy("against", lambda r: not fits(r)))
    assert -1 <= result["agreement"]["draws"] < 0
    assert -1 <= result["agreement"]["judges"] < 0
    one = result["features"][0]
    assert one["comsem"] == pytest.approx(
        sum(sum(part) for part in one["yes"]) / sum(map(len, one["yes"]))
    )
    assert {len(part) for part in one["yes"]} == {3}


def test_cohen_kappa_by_hand():
    pairs = [(True, True)] * 20 + [(True, False)] * 5 + [(False, True)] * 10
    pairs += [(False, False)] * 15
    # p_o = 0.7, p_e = 0.5 * 0.6 + 0.5 * 0.4 = 0.5
    assert cohen_kappa(pairs) == pytest.approx(0.4)
    assert cohen_kappa([]) is None
    assert cohen_kappa([(True, True)] * 4) is None


def test_features_without_all_answers_are_left_out_and_come_with_more_budget(tmp_path):
    text = torch.arange(960) % 6
    rows = [(text == word).nonzero().flatten().tolist() for word in range(6)]
    found, cache = planted(rows, 960), make_cache(text)
    judge = Recording()
    with Answers(tmp_path / "a.sqlite") as answers:
        # six names, then 8 distinct judgments of the first features
        first = score(found, cache, ComSemConfig(), judge, asker=Asker(answers, budget_calls=20))
        counts = first["counts"]
        assert first["budget_spent"]
        assert 0 < counts["scored"] < counts["chosen"] == 6
        assert counts["scored"] + counts["incomplete"] == 6
        assert len(judge.asked) == 20
        second = score(found, cache, ComSemConfig(), judge, asker=Asker(answers))
    assert second["counts"]["scored"] == 6
    keys = {(request.kind, request.prompt) for request in judge.asked}
    assert len(keys) == len(judge.asked)


def test_what_a_dry_run_counts_is_what_is_asked():
    g = torch.Generator().manual_seed(0)
    text = torch.randint(6, (960,), generator=g)
    rows = [(text == word).nonzero().flatten().tolist() for word in range(5)]
    found, cache = planted(rows, 960), make_cache(text)
    config = ComSemConfig(n_negatives=5, draws=2, shuffled=True)
    passages = Passages(cache, range(cache.n_rows), Words(), config)
    counted = count_questions(
        choose_tokens(found, config), passages, config, lambda text: len(text.split())
    )
    judge = Recording()
    score_features(found, passages, judge, Asker(), config=config)
    assert counted["naming_calls"] == 5
    assert counted["calls"] == 5 * (1 + 2 * (8 + 5) + 8)
    assert counted["calls"] >= len(judge.asked) > 0.9 * counted["calls"]  # equal ones asked once
    words = sum(len(request.prompt.split()) for request in judge.asked)
    assert counted["prompt_tokens"] == pytest.approx(words, rel=0.25)


# -- reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("words about time", "words about time"),
        ('  "Words about time."\nBecause', "Words about time"),
        ("Phrase: **past tense**", "past tense"),
        ("\n\n- \nmonths", "months"),
        ("1. names of months", "names of months"),
        ("- months", "months"),
        ("3.5 and other numbers", "3.5 and other numbers"),
        (",", ","),
        ("", ""),
    ],
)
def test_the_phrase_is_the_first_line(text, phrase):
    assert read_phrase(text) == phrase


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Yes", True), ("no.", False), ("**Yes**, it does", True), ("Answer: No", False),
        ("I cannot tell", None), ("yesterday", None), ("", None), ("No, not yes", False),
    ],
)  # fmt: skip
def test_the_verdict_is_the_first_of_yes_and_no(text, verdict):
    assert read_verdict(text) is verdict


def test_what_is_neither_is_no_and_counted():
    text = torch.arange(160) % 6
    rows = [(text == 0).nonzero().flatten().tolist()]

    class Vague(RuleJudge):
        identity = "vague"

        @staticmethod
        def _say(request):
            return "a" if request.kind == "name" else "perhaps"

    result = score(planted(rows, 160), make_cache(text), ComSemConfig(), Vague())
    assert result["comsem"]["mean"] == 0
    assert result["counts"]["unclear"] == 8
    assert "8 judgments were neither Yes nor No" in table(result)


# -- models ------------------------------------------------------------------------------------


def states(n=800, words=6, d=12):
    """Every token has a direction of its own, and noise."""
    g = torch.Generator().manual_seed(0)
    text = torch.randint(words, (n,), generator=g)
    directions = torch.linalg.qr(torch.randn(d, d, generator=g))[0][:words]
    return text, 4 * directions[text] + 0.05 * torch.randn(n, d, generator=g), directions


def test_a_binary_autoencoder_with_one_feature_a_word_scores_one():
    text, x, directions = states()
    bae = BinaryAutoencoder(12, 6).eval()
    with torch.no_grad():
        bae.W_enc.copy_(directions.T)
        bae.b_enc.fill_(-2)
    cache = make_cache(text, x)
    config = ComSemConfig(n_negatives=8, shuffled=True, order="strongest")
    result = score_model(
        bae, cache, range(160, cache.n_rows), Words(), RuleJudge(), config=config, k=1
    )
    assert result["counts"]["scored"] == 6
    for name in ("comsem", "detection", "above_shuffled"):
        assert result[name]["mean"] == 1, name
    phrases = {one["feature"]: one["phrase"] for one in result["features"]}
    assert phrases == dict(enumerate(WORDS[:6]))
    # strongest: the largest margins first
    found = feature_tokens(bae, x, k=1)
    (first, *_) = choose_tokens(found, config)
    margins = bae.preactivation(x)[:, first.feature].abs()
    assert margins[list(first.named)].min() >= margins[list(first.judged)].max()


@pytest.mark.parametrize("method", METHODS)
def test_every_baseline_is_scored(method):
    text, x, _ = states()
    model = make_baseline(method, 12, 24, k=4, d_out=12 if method == "transcoder" else None)
    model.fit_normalization_(x, x if method == "transcoder" else None)
    model.finish(x)
    model.eval()
    cache = make_cache(text, x)
    result = score_model(model, cache, range(cache.n_rows), Words(), RuleJudge())
    assert 0 < result["counts"]["scored"] <= 24
    assert 0 <= result["comsem"]["mean"] <= 1
    found = feature_tokens(model, x)
    assert found.code.equal(BinaryCode.from_dense(model.encode(x) > 0))


def test_features_that_never_change_are_not_named():
    rows = [list(range(10)), list(range(160)), list(range(20, 30))]
    found = planted(rows, 160)
    never = BinaryCode.from_dense(found.code.to_dense() & torch.tensor([True, True, False]))
    chosen = choose_tokens(dataclasses.replace(found, code=never), ComSemConfig())
    assert [one.feature for one in chosen] == [0]


def test_features_are_chosen_evenly_and_by_the_seed():
    rows = [list(range(60 - f)) for f in range(40)]
    found = planted(rows, 640)

    def features(seed):
        return [one.feature for one in choose_tokens(found, ComSemConfig(n_features=8, seed=seed))]

    assert features(0) == features(0)
    assert features(1) == features(1) != features(2)
    for seed in range(3):
        # rarest first: one of every five
        assert [f // 5 for f in features(seed)] == list(range(8))[::-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_features": 0}, "n_features must be an int >= 1; got 0"),
        ({"least": 5}, "least must be an int >= 6; got 5"),
        ({"order": "random"}, "order must be one of corpus, strongest; got 'random'"),
        ({"draws": 0}, "draws must be an int >= 1; got 0"),
        ({"n_negatives": -1}, "n_negatives must be an int >= 0; got -1"),
    ],
)
def test_a_bad_setting_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        ComSemConfig(**options)


def test_what_does_not_fit_is_said():
    text, x, _ = states()
    cache = make_cache(text, x)
    bae = BinaryAutoencoder(12, 6)
    with pytest.raises(ValueError, match="model must be in eval mode"):
        score_model(bae, cache, range(cache.n_rows), Words(), RuleJudge())
    bae.eval()
    with pytest.raises(ValueError, match=r"rows must be a range in .*; got range\(0, 900\)"):
        score_model(bae, cache, range(900), Words(), RuleJudge())
    with pytest.raises(ValueError, match="no feature has 6 tokens"):
        score_model(bae, cache, range(4), Words(), RuleJudge())
    wide = BinaryAutoencoder(13, 6).eval()
    with pytest.raises(ValueError, match=r"rows must have shape \[n, 13\]; got \[800, 12\]"):
        score_model(wide, cache, range(cache.n_rows), Words(), RuleJudge())
    many = BinaryAutoencoder(12, 6, n_bits=2).eval()
    with pytest.raises(ValueError, match="n_bits=1"):
        score_model(many, cache, range(cache.n_rows), Words(), RuleJudge())


def test_the_prompts_hold_the_phrase_and_the_passages():
    assert comsem.NAMING.count("{passages}") == 1
    assert comsem.JUDGING.index("{phrase}") < comsem.JUDGING.index("{passage}")
