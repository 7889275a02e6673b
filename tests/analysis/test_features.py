"""Features in context: which features, which tokens, which places, and how they are printed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bae_fast import BinaryCode
from bae_fast.analysis import (
    ContextExample,
    FeatureSummary,
    TokenLift,
    choose_features,
    describe_features,
    format_feature,
)
from bae_fast.analysis import features as features_module
from bae_fast.lm import ActivationCache

WORDS = ["<s>", " the", " cat", " sat", "\n", "   ", " é", "\x1b[2J"]


class Tokenizer:
    def decode(self, ids, skip_special_tokens=True, clean_up_tokenization_spaces=True):
        return "".join(WORDS[i] for i in ids)

    def convert_ids_to_tokens(self, token):
        return WORDS[token]


class SentencePieceTokenizer:
    """Drops the space before the first word of what it decodes."""

    def decode(self, ids, skip_special_tokens=True, clean_up_tokenization_spaces=True):
        return "".join(WORDS[i] for i in ids).removeprefix(" ")

    def convert_ids_to_tokens(self, token):
        return WORDS[token].replace(" ", "▁")


def _cache(tokens):
    """Every position but the first of every window has a row."""
    tokens = torch.as_tensor(tokens, dtype=torch.int32)
    n, context = tokens.shape
    place = torch.arange(n * context).view(n, context)[:, 1:].reshape(-1)
    return ActivationCache(
        folder=Path("unused"),
        manifest={},
        rows=torch.zeros(len(place), 2),
        row_window=(place // context).int(),
        row_position=(place % context).int(),
        tokens=tokens,
    )


@pytest.fixture
def setting():
    generator = torch.Generator().manual_seed(0)
    cache = _cache(torch.randint(1, 5, (200, 9), generator=generator))
    row_tokens = cache.tokens[cache.row_window.long(), cache.row_position.long()]
    bits = torch.zeros(len(cache), 40, dtype=torch.bool)
    bits[:, 5] = row_tokens == 2
    bits[:, 33] = torch.rand(len(cache), generator=generator) < 0.1
    bits[:, 39] = (row_tokens == 3) & (torch.rand(len(cache), generator=generator) < 0.5)
    return cache, row_tokens, bits


def test_features_are_taken_from_the_middle_of_equal_parts_of_the_live_ones():
    density = torch.tensor([0.0, 0.5, 0.1, 0.0, 0.3, 0.2, 0.4, 0.6])
    # live, rarest first: 2 5 4 6 1 7; thirds (2 5) (4 6) (1 7)
    assert choose_features(density, 3).tolist() == [5, 6, 7]
    assert choose_features(density, 2).tolist() == [5, 1]
    assert choose_features(density, 1).tolist() == [6]
    assert choose_features(density, 100).tolist() == [2, 5, 4, 6, 1, 7]
    assert choose_features(torch.zeros(3), 5).tolist() == []


def test_ties_in_density_are_broken_by_number_whatever_k():
    assert choose_features(torch.full((9,), 0.2), 3).tolist() == [1, 4, 7]
    assert choose_features(torch.full((30,), 0.2), 30).tolist() == list(range(30))


def test_choosing_refuses_bad_input():
    with pytest.raises(ValueError, match="k must be an int >= 1; got 0"):
        choose_features(torch.ones(3), 0)
    with pytest.raises(ValueError, match=r"density must have shape \[F\]; got \[1, 3\]"):
        choose_features(torch.ones(1, 3), 1)


def test_tokens_and_counts_equal_a_plain_count(setting):
    cache, row_tokens, bits = setting
    code = BinaryCode.from_dense(bits)
    rows = range(len(cache))
    one, two = describe_features(code, cache, rows, [39, 5], Tokenizer())
    n, n_cat = len(cache), int((row_tokens == 2).sum())
    assert (two.feature, two.n_on, two.n_rows) == (5, n_cat, n)
    assert two.density == n_cat / n
    assert [(t.text, t.n_on, t.n_total) for t in two.tokens] == [(" cat", n_cat, n_cat)]
    assert two.tokens[0].lift == pytest.approx(n / n_cat)
    n_on, n_sat = int(bits[:, 39].sum()), int((row_tokens == 3).sum())
    assert one.tokens[0] == TokenLift(" sat", 3, pytest.approx(n / n_sat), n_on, n_sat)


def test_many_firings_at_a_good_lift_outrank_one_at_the_best(setting):
    tokens = torch.full((50, 9), 1)
    tokens[:, 1:3] = 2
    tokens[7, 8] = 3
    cache = _cache(tokens)
    row_tokens = cache.tokens[cache.row_window.long(), cache.row_position.long()]
    bits = torch.zeros(len(cache), 2, dtype=torch.bool)
    bits[:, 0] = row_tokens == 3
    bits[:, 0] |= (row_tokens == 2) & (torch.arange(len(cache)) % 5 > 0)
    (got,) = describe_features(
        BinaryCode.from_dense(bits), cache, range(len(cache)), [0], Tokenizer()
    )
    assert [t.text for t in got.tokens] == [" cat", " sat"]
    assert got.tokens[1].lift > got.tokens[0].lift


def test_a_range_of_rows_is_looked_at_alone(setting):
    cache, _, bits = setting
    rows = range(800, 1200)
    (got,) = describe_features(
        BinaryCode.from_dense(bits[800:1200]), cache, rows, [33], Tokenizer()
    )
    assert (got.n_on, got.n_rows) == (int(bits[800:1200, 33].sum()), 400)
    firing = (bits[800:1200, 33].nonzero().squeeze(1) + 800).tolist()
    assert [c.row for c in got.contexts] == firing[: len(got.contexts)]


def test_contexts_are_ranked_by_margin_and_show_the_token_of_their_row(setting):
    cache, _, bits = setting
    margin = torch.rand(len(cache), 40, generator=torch.Generator().manual_seed(1))
    asked = []

    def margins(features):
        asked.append(features.tolist())
        return margin[:, features]

    first, second = describe_features(
        BinaryCode.from_dense(bits), cache, range(len(cache)), torch.tensor([33, 5]),
        Tokenizer(), margins=margins, n_contexts=4, before=3, after=2,
    )  # fmt: skip
    assert asked == [[33, 5]]
    on = bits[:, 33]
    best = torch.where(on, margin[:, 33], -1).argsort(descending=True)[:4].tolist()
    assert [c.row for c in first.contexts] == best
    assert [c.margin for c in first.contexts] == pytest.approx(margin[best, 33].tolist())
    for c in first.contexts:
        before, token, after = cache.token_context(c.row, 3, 2)
        assert (c.before, c.token, c.after) == (
            "".join(WORDS[i] for i in before),
            WORDS[token],
            "".join(WORDS[i] for i in after),
        )
    assert {c.token for c in second.contexts} == {" cat"}


def test_a_context_is_shown_once():
    cache = _cache([[0, 1, 2, 3]] * 30 + [[0, 1, 2, 1]])
    bits = torch.zeros(len(cache), 1, dtype=torch.bool)
    bits[1::3] = True
    (got,) = describe_features(
        BinaryCode.from_dense(bits), cache, range(len(cache)), [0], Tokenizer(), n_contexts=2
    )
    assert [(c.row, c.after) for c in got.contexts] == [(1, " sat"), (91, " the")]


def test_unpacking_in_blocks_gives_the_same(setting, monkeypatch):
    cache, _, bits = setting
    code, rows = BinaryCode.from_dense(bits), range(len(cache))
    whole = describe_features(code, cache, rows, [5, 33, 39], Tokenizer())
    monkeypatch.setattr(features_module, "_BLOCK_BYTES", 40 * 7)
    assert describe_features(code, cache, rows, [5, 33, 39], Tokenizer()) == whole


def test_dead_features_and_no_features_are_described_too(setting):
    cache, _, bits = setting
    code, rows = BinaryCode.from_dense(bits), range(len(cache))
    (dead,) = describe_features(code, cache, rows, [0], Tokenizer())
    assert (dead.n_on, dead.tokens, dead.contexts) == (0, (), ())
    assert format_feature(dead).startswith("feature 0: on in 0 % of rows (0 of 1,600)")
    assert describe_features(code, cache, rows, [], Tokenizer()) == []


def test_sentencepiece_keeps_its_spaces(setting):
    cache, _, bits = setting
    (got,) = describe_features(
        BinaryCode.from_dense(bits), cache, range(len(cache)), [5], SentencePieceTokenizer()
    )
    assert got.tokens[0].text == " cat"
    in_the_middle = [c for c in got.contexts if c.before]
    assert in_the_middle
    assert {c.token for c in in_the_middle} == {" cat"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": range(10)}, r"code must have shape \[10, F\], .*; got \[1600, 40\]"),
        ({"rows": range(1601)}, "rows must be a range in steps of 1 within .*; got range"),
        ({"rows": range(0, 1600, 2)}, "rows must be a range in steps of 1 within .*; got range"),
        ({"feature_ids": [40]}, "feature_ids must lie between 0 and 39; got 40 to 40"),
        ({"feature_ids": [-1]}, "feature_ids must lie between 0 and 39; got -1"),
        (
            {"margins": lambda f: torch.zeros(3, len(f))},
            r"margins must give shape \[\d+, 1\]; got \[3, 1\]",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(setting, change, message):
    cache, _, bits = setting
    arguments = {"rows": range(len(cache)), "feature_ids": [5], **change}
    with pytest.raises(ValueError, match=message):
        describe_features(BinaryCode.from_dense(bits), cache, tokenizer=Tokenizer(), **arguments)


def _summary(contexts, tokens=()):
    return FeatureSummary(12, 3, 200, tuple(tokens), tuple(contexts))


def test_the_firing_token_is_marked_and_lined_up():
    text = format_feature(
        _summary(
            [
                ContextExample("one two", " three", " four", 0, None),
                ContextExample("x" * 300, "y", "z" * 300, 1, 0.5),
            ]
        )
    )
    first, second = text.split("\n")[-2:]
    assert first.endswith("one two«␣three» four")
    assert first.index("»") == second.index("»")
    assert second.lstrip().startswith("…x")
    assert second.endswith("z…")
    assert "«y»" in second
    assert len(second) <= 100


@pytest.mark.parametrize("width", [60, 100])
def test_no_line_is_wider_than_asked(width):
    wide = ContextExample("漢字" * 60, "字" * 60, "e\u0301" * 200, 0, None)
    tokens = [TokenLift(" token" * 3, 1, 1234.5, 10**6, 10**7)] * 9
    lines = format_feature(_summary([wide], tokens), width).split("\n")

    def cells(line):
        import unicodedata

        wide = sum(unicodedata.east_asian_width(c) in "WF" for c in line)
        return len(line) + wide - sum(unicodedata.combining(c) > 0 for c in line)

    assert max(map(cells, lines)) <= width
    assert "x1,234 (1,000,000/10,000,000)" in "\n".join(lines)


def test_whitespace_is_drawn_and_control_characters_never_reach_the_terminal():
    text = format_feature(
        _summary([ContextExample("a\n    b\t", "\n", " \x1b[2J", 0, None)],
                 [TokenLift("        ", 1, 2.0, 1, 1), TokenLift("\x07", 2, 2.0, 1, 1)])
    )  # fmt: skip
    assert "a↵␣b→«↵» \\x1b[2J" in text
    assert "␣x8 x2 (1/1)" in text
    assert "\\x07 x2" in text
    assert "\x1b" not in text
