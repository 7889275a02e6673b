"""Facts of features against their definitions, written out on small cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bae_fast import BinaryAutoencoder, BinaryCode
from bae_fast.analysis.features import token_lifts
from bae_fast.baselines import make_baseline
from bae_fast.interpret import facts


def code_of(bits: torch.Tensor) -> BinaryCode:
    return BinaryCode.from_dense(bits)


@pytest.fixture
def g():
    return torch.Generator().manual_seed(0)


# -- burstiness --------------------------------------------------------------------------------


@pytest.mark.parametrize("reach", [1, 2, 5, 8, 32])
def test_burstiness_is_the_share_that_follows_over_that_of_independence(g, reach, monkeypatch):
    monkeypatch.setattr(facts, "_BLOCK_ELEMENTS", 64)  # blocks of a few rows, so that they meet
    bits = torch.rand(211, 37, generator=g) < torch.rand(37, generator=g) * 0.4
    windows = torch.sort(torch.randint(0, 9, (211,), generator=g)).values
    found = facts.burstiness(code_of(bits), windows, reach=reach)
    p, on, of = bits.double().mean(0).tolist(), bits.tolist(), windows.tolist()
    for f in range(37):
        follow, expected = 0, 0.0
        for t in range(211):
            before = [s for s in range(max(t - reach, 0), t) if of[s] == of[t]]
            follow += on[t][f] and any(on[s][f] for s in before)
            expected += 1 - (1 - p[f]) ** len(before)
        assert float(found.observed[f]) == pytest.approx(follow / int(bits[:, f].sum()))
        assert float(found.expected[f]) == pytest.approx(expected / 211)


def test_independent_firing_has_burstiness_one_and_runs_have_more(g):
    bits = torch.rand(40_000, 8, generator=g) < 0.01
    bits[:, 0] = False
    bits[torch.arange(50)[:, None] * 800 + torch.arange(4), 0] = True  # runs of four
    ratio = facts.burstiness(code_of(bits), torch.arange(40_000) // 200).ratio
    assert float((ratio[1:] - 1).abs().max()) < 0.35
    assert float(ratio[0]) > 2
    never = facts.burstiness(code_of(torch.zeros(50, 3, dtype=torch.bool)), torch.zeros(50)).ratio
    assert bool(never.isnan().all())


# -- tokens ------------------------------------------------------------------------------------


def test_top_tokens_are_ranked_as_features_in_context_are(g, monkeypatch):
    monkeypatch.setattr(facts, "_TOKEN_COLUMNS", 32)
    monkeypatch.setattr(facts, "_BLOCK_ELEMENTS", 2048)
    tokens = torch.randint(0, 30, (500,), generator=g) * 7
    bits = torch.rand(500, 70, generator=g) < 0.1
    bits[:, 5] |= tokens == 14
    bits[:, 9] = False
    found = facts.top_tokens(code_of(bits), tokens, k=4)
    vocabulary = tokens.unique()
    n_total = torch.stack([(tokens == v).sum() for v in vocabulary])
    assert int(found.tokens[5, 0]) == 14
    assert found.tokens[9].tolist() == [-1] * 4
    for f in range(70):
        n_on = torch.stack([bits[tokens == v, f].sum() for v in vocabulary])
        lift, rank = token_lifts(n_on, n_total, 500)
        best = rank.sort(descending=True).values
        place = {int(v): i for i, v in enumerate(vocabulary)}
        kept = [t for t in found.tokens[f].tolist() if t >= 0]
        assert len(kept) == min(int((rank > 0).sum()), 4)
        for j, token in enumerate(kept):
            i = place[token]
            assert float(rank[i]) == pytest.approx(float(best[j]))
            assert int(found.n_on[f, j]) == int(n_on[i])
            assert int(found.n_total[f, j]) == int(n_total[i])
            assert float(found.lift[f, j]) == pytest.approx(float(lift[i]))


# -- lens --------------------------------------------------------------------------------------


class Centred(nn.Module):
    """A norm with a formula of its own: gain 1 + w, centring, a bias."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-0.5, 2, d))
        self.b = nn.Parameter(torch.ones(d) * 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + self.w) + self.b


@pytest.mark.parametrize("score", ["cosine", "dot"])
def test_the_lens_folds_in_the_norm_whatever_its_formula(g, score, monkeypatch):
    monkeypatch.setattr(facts, "_LENS_BLOCK", 3)
    W = torch.randn(10, 16, generator=g) * torch.logspace(-6, 3, 10)[:, None]
    out = torch.randn(40, 16, generator=g)
    norm = Centred(16)
    found = facts.logit_lens(W, out, norm, k=5, score=score)
    direction = (W - W.mean(1, keepdim=True)) * (1 + norm.w)
    direction = direction / direction.norm(dim=1, keepdim=True)
    rows = out - out.mean(0)
    if score == "cosine":
        rows = rows / rows.norm(dim=1, keepdim=True)
    best = (direction @ rows.T).topk(5, dim=1)
    assert torch.equal(found.indices, best.indices)
    torch.testing.assert_close(found.scores, best.values, rtol=1e-4, atol=1e-5)


def test_a_direction_that_is_a_tokens_unembedding_finds_that_token(g):
    out = torch.randn(100, 32, generator=g)
    found = facts.logit_lens(out[:20], out)
    assert found.indices[:, 0].tolist() == list(range(20))
    assert float(found.scores[:, 0].min()) > 0.9


# -- neighbours --------------------------------------------------------------------------------


def test_neighbours_are_those_of_the_largest_correlation(g, monkeypatch):
    monkeypatch.setattr(facts, "_PAIR_BLOCK", 16)
    bits = torch.rand(400, 50, generator=g) < 0.2
    bits[:, 7] = bits[:, 30]
    bits[:, 11] = False
    bits[:, 12] = True
    found = facts.neighbours(code_of(bits), k=3)
    phi = torch.corrcoef(bits.double().T)
    assert found.of(7)[0] == (30, pytest.approx(1))
    assert found.of(30)[0] == (7, pytest.approx(1))
    assert found.of(11) == found.of(12) == []
    phi.fill_diagonal_(-2)
    for f in set(range(50)) - {11, 12}:
        best = phi[f].nan_to_num(nan=-2).sort(descending=True)
        expected = [s for s in best.values[:3].tolist() if s > 0]
        assert [s for _, s in found.of(f)] == pytest.approx(expected)
        assert f not in [j for j, _ in found.of(f)]


# -- histograms and firing ---------------------------------------------------------------------


def test_histograms_count_every_value_once(g):
    x = torch.randn(300, 12, generator=g) * torch.arange(1, 13)
    found = facts.histograms(x.split(70), bins=20)
    assert found.counts.sum(1).tolist() == [300] * 12
    for f in (0, 11):
        h = found.of(f)
        edges = torch.linspace(h.low, h.high, 21, dtype=torch.float64)
        inside = torch.histogram(x[:, f].double().clamp(h.low, h.high), edges).hist
        assert float((inside - torch.tensor(h.counts)).abs().sum()) <= 2  # rounding at an edge
    positive = facts.histograms(x.split(70), bins=20, positive_only=True)
    assert positive.counts.sum(1).tolist() == (x > 0).sum(0).tolist()
    assert positive.low.tolist() == [0] * 12


@pytest.mark.parametrize("method", ["bae", "topk", "binary_topk"])
def test_a_feature_is_on_where_its_activation_is_positive(g, method):
    x = torch.randn(50, 12, generator=g)
    torch.manual_seed(0)
    module = BinaryAutoencoder(12, 40) if method == "bae" else make_baseline(method, 12, 40, k=5)
    module.eval()
    found = module.active(x)
    if method == "bae":
        assert found.equal(module.encode(x))
    else:
        assert torch.equal(found.to_dense(), module.encode(x) > 0)


@pytest.mark.parametrize("method", ["bae", "topk"])
def test_facts_of_both_kinds_come_together_as_records(g, method):
    x = torch.randn(200, 12, generator=g)
    torch.manual_seed(0)
    module = BinaryAutoencoder(12, 40) if method == "bae" else make_baseline(method, 12, 40, k=5)
    module.eval()
    with torch.no_grad():
        values = [module.preactivation(x) if method == "bae" else module.encode(x)]
    found = facts.gather_facts(
        module.active(x),
        row_tokens=torch.randint(0, 20, (200,), generator=g),
        windows=torch.arange(200) // 50,
        values=values,
        positive_only=method != "bae",
    )
    records = list(
        facts.feature_records(
            found, Letters(), phrases={3: "a name"}, scores={"ComSem": {3: 0.5, 4: 1.0}}
        )
    )
    assert [r.feature for r in records] == list(range(40))
    assert records[3].phrase == "a name"
    assert [r.scores["ComSem"] for r in records[3:6]] == [0.5, 1.0, None]
    assert all(r.burstiness is None or math.isfinite(r.burstiness) for r in records)
    assert sum(sum(r.histogram.counts) for r in records) > 0
    assert any(r.tokens for r in records)
    assert any(r.neighbours for r in records)


class Letters:
    """A tokenizer whose tokens 100 and 101 are the two bytes of one character."""

    def decode(self, ids, skip_special_tokens=False, clean_up_tokenization_spaces=False):
        data = b"".join({100: b"\xc3", 101: b"\xa9"}.get(i, chr(97 + i % 26).encode()) for i in ids)
        return data.decode("utf-8", errors="replace")

    def convert_ids_to_tokens(self, token):
        return str(token)


def test_tokens_that_are_parts_of_a_character_are_one_piece():
    cut = facts.Contexts.__new__(facts.Contexts)
    cut.tokenizer, cut._texts = Letters(), {}
    assert cut._pieces([0, 100, 101, 1]) == (("a", "é", "b"), [0, 1, 1, 2])
    pieces, place = cut._pieces([0, 100, 1])
    assert "".join(pieces) == "a\ufffdb"
    assert place == [0, 1, 2]  # a whole token ends no character that began before it
    assert cut._pieces([101, 100]) == (("\ufffd\ufffd",), [0, 0])


def test_a_context_marks_the_token_and_others_on_which_the_feature_is_on():
    cache = Cache()
    cut = facts.Contexts(cache, Letters(), range(2, 8), before=2, after=2)
    # the rows of the cache are positions 1 to 4 of two windows of 5 tokens
    context = cut.of(1, 0.25, on=lambda row: row in (0, 1, 3))
    assert context.pieces == ("c", "d", "e")
    assert (context.at, context.on, context.row, context.score) == (2, (1,), 1, 0.25)
    assert cut.of(2).pieces == ("f", "g", "h", "i")  # never from another window


class Cache:
    tokens = torch.arange(10).view(2, 5)
    row_window = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    row_position = torch.tensor([1, 2, 3, 4, 1, 2, 3, 4])

    def token_context(self, row, before, after):
        from bae_fast.lm.cache import TokenContext

        window, at = self.tokens[self.row_window[row]].tolist(), int(self.row_position[row])
        return TokenContext(
            window[max(at - before, 0) : at], window[at], window[at + 1 : at + 1 + after]
        )


def test_bad_input_is_named(g):
    code = code_of(torch.rand(20, 8, generator=g) < 0.5)
    with pytest.raises(ValueError, match=r"windows must have shape \[20\]; got \[19\]"):
        facts.burstiness(code, torch.zeros(19))
    with pytest.raises(ValueError, match="reach must be an int >= 1; got 0"):
        facts.burstiness(code, torch.zeros(20), reach=0)
    with pytest.raises(ValueError, match=r"row_tokens must have shape \[20\]"):
        facts.top_tokens(code, torch.zeros(3))
    with pytest.raises(ValueError, match=r"got \[8, 3\] and \[9, 4\]"):
        facts.logit_lens(torch.zeros(8, 3), torch.zeros(9, 4))
    with pytest.raises(ValueError, match="score must be"):
        facts.logit_lens(torch.zeros(8, 3), torch.zeros(9, 3), score="norm")
    with pytest.raises(ValueError, match="finite"):
        facts.histograms([torch.full((2, 2), math.inf)])
    with pytest.raises(ValueError, match="must hold a row"):
        facts.histograms([])
    masked = BinaryCode(code.words, 8, row_mask=torch.ones(20, dtype=torch.bool))
    with pytest.raises(ValueError, match="row_mask"):
        facts.neighbours(masked)
