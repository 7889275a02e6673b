"""Matching of features: exact classes on codes whose answer is known."""

import pytest
import torch

from bae_fast.causal import match_codes, shuffled_rows
from bae_fast.causal.matching import CLASSES
from bae_fast.codes import BinaryCode
from bae_fast.pairs import joint_counts
from bae_fast.report.match import table


def random_bits(n, f, density, seed=0):
    return torch.rand(n, f, generator=torch.Generator().manual_seed(seed)) < density


def names(classes):
    return [CLASSES[i] for i in classes.tolist()]


def test_joint_counts_equal_integer_products():
    a, b = random_bits(2100, 300, 0.3), random_bits(2100, 70, 0.6, seed=1)
    left, right = torch.randperm(300)[:290], torch.tensor([5, 5, 69, 0])
    found = joint_counts(BinaryCode.from_dense(a), left, BinaryCode.from_dense(b), right)
    assert torch.equal(found.long(), a.long()[:, left].T @ b.long()[:, right])
    code = BinaryCode.from_dense(a)
    own = joint_counts(code, left, code, right).long()
    assert torch.equal(own, a.long()[:, left].T @ a.long()[:, right])


@pytest.mark.parametrize("score", ["jaccard", "phi"])
def test_a_permuted_code_matches_itself(score):
    bits = random_bits(3000, 520, 0.05)
    order = torch.randperm(520)
    found = match_codes(
        BinaryCode.from_dense(bits), BinaryCode.from_dense(bits[:, order]), score=score
    )
    assert torch.equal(order[found.partner_a], torch.arange(520))
    assert torch.equal(found.partner_b, order)
    assert set(names(found.class_a)) == set(names(found.class_b)) == {"same"}
    assert torch.allclose(found.score_a, torch.ones(520, dtype=torch.float64), atol=1e-12)


def test_planted_classes_are_found_exactly():
    """Same, half of one, union of two, noise, never on, and on in too few rows to tell."""
    own = random_bits(4000, 8, 0.05)
    other = random_bits(4000, 4, 0.05, seed=1)
    half = own[:, 1] & (torch.arange(4000) % 2 == 0)
    few = torch.zeros(4000, dtype=torch.bool)
    few[:3] = True
    a = torch.stack([own[:, 0], half, own[:, 2] | own[:, 3] | own[:, 4], own[:, 5],
                     torch.zeros(4000, dtype=torch.bool), few], 1)  # fmt: skip
    # the union's Jaccard with each part is about 1/3: below the threshold
    b = torch.stack([own[:, 1], own[:, 0], own[:, 2], own[:, 3], own[:, 4], other[:, 0]], 1)
    found = match_codes(BinaryCode.from_dense(a), BinaryCode.from_dense(b), threshold=0.6)
    assert names(found.class_a) == ["same", "subset", "superset", "unmatched", "dead", "rare"]
    assert names(found.class_b) == ["superset", "same", "subset", "subset", "subset", "unmatched"]
    assert found.partner_a[0] == 1
    assert found.partner_b[1] == 0
    assert found.partner_a[4] == -1


def test_of_duplicates_one_is_the_same_and_the_others_are_subsets():
    bits = random_bits(2000, 3, 0.1)
    a = BinaryCode.from_dense(bits[:, [0, 0, 1]])
    found = match_codes(a, BinaryCode.from_dense(bits))
    assert names(found.class_a) == ["same", "subset", "same"]
    assert names(found.class_b) == ["same", "same", "unmatched"]


def test_a_feature_always_on_holds_no_other_by_that():
    bits = random_bits(2000, 5, 0.1)
    always = torch.ones(2000, 1, dtype=torch.bool)
    nearly = torch.arange(2000)[:, None] > 3
    other = BinaryCode.from_dense(torch.cat([always, nearly], 1))
    found = match_codes(BinaryCode.from_dense(bits[:, 1:]), other, threshold=0.3)
    assert set(names(found.class_a)) == {"unmatched"}


def test_shuffled_rows_keep_densities_and_lose_the_match():
    bits = random_bits(2000, 64, 0.03)
    code = BinaryCode.from_dense(bits)
    mixed = shuffled_rows(code)
    assert torch.equal(mixed.counts(), code.counts())
    assert not mixed.equal(code)
    found = match_codes(code, mixed)
    assert "same" not in names(found.class_a)
    text = table(match_codes(code, code), found, ("one", "two"))
    assert "| one | 64 | 100.0% (0.0%)" in text


@pytest.mark.parametrize("score", ["jaccard", "phi"])
def test_scores_are_those_of_the_definition(score):
    a, b = random_bits(500, 30, 0.2), random_bits(500, 270, 0.3, seed=1)
    found = match_codes(BinaryCode.from_dense(a), BinaryCode.from_dense(b), score=score)
    x, y = a.double(), b.double()
    joint = x.T @ y
    if score == "jaccard":
        expected = joint / (x.sum(0)[:, None] + y.sum(0) - joint)
    else:
        expected = torch.corrcoef(torch.cat([x, y], 1).T)[:30, 30:]
    at = expected.gather(1, found.partner_a[:, None])[:, 0]
    assert torch.allclose(found.score_a, at, atol=1e-12)
    assert torch.allclose(found.score_a, expected.max(1).values, atol=1e-12)
    assert torch.allclose(found.score_b, expected.max(0).values, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": 0.0}, "threshold must lie in"),
        ({"score": "cosine"}, "score must be one of jaccard, phi; got 'cosine'"),
        ({"min_count": 0}, "min_count must be an int >= 1; got 0"),
        ({"b": BinaryCode.from_dense(torch.ones(3, 4))}, "equally many rows"),
        (
            {"b": BinaryCode(torch.zeros(5, 1, dtype=torch.int32), 4,
                             row_mask=torch.ones(5, dtype=torch.bool))},
            "no row_mask",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named(change, message):
    arguments = {"b": BinaryCode.from_dense(torch.ones(5, 4)), **change}
    with pytest.raises(ValueError, match=message):
        match_codes(BinaryCode.from_dense(torch.ones(5, 4)), arguments.pop("b"), **arguments)
