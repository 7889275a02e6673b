"""The bound that sees dependence of any order: against sets of known entropy."""

from __future__ import annotations

import math

import pytest
import torch

import bae_fast as bf
from bae_fast.entropy import SyntheticSpec, autoregressive_bound, estimate_entropy
from bae_fast.entropy import autoregressive as module


def bits_of(kind: str, r: int, n: int, **options) -> tuple[SyntheticSpec, bf.BinaryCode]:
    spec = SyntheticSpec(kind, r, 8, **options)
    return spec, bf.BinaryCode.from_dense(spec.sample(n, 0)[1])


def test_one_of_eight_is_within_five_percent_where_the_chain_is_not():
    spec, code = bits_of("exclusive", 32, 8192, group=8)
    found = estimate_entropy(code, bound=True)
    assert spec.joint_bits == 12
    assert found.chain > 1.2 * 12
    assert found.bound == pytest.approx(12, rel=0.05)
    assert found.bound_low < found.bound < found.bound_high
    assert found.shared == found.marginal - found.bound
    assert estimate_entropy(code).summary().keys() == found.summary().keys() - {
        "bound", "bound_low", "bound_high", "shared",
    }  # fmt: skip


@pytest.mark.parametrize(("kind", "options"), [("copies", {"group": 4}), ("fair", {})])
def test_where_the_tree_is_exact_it_is_not_worse(kind, options):
    spec, code = bits_of(kind, 16, 4096, **options)
    found = autoregressive_bound(code)
    assert found.bits <= found.tree_bits * 1.005
    assert found.low - 0.1 < spec.joint_bits < found.high + 0.1
    assert found.bits == pytest.approx(spec.joint_bits, rel=0.03)


def test_no_column_sees_itself_or_one_behind_it():
    torch.manual_seed(0)
    model = module._Model(torch.zeros(9), torch.zeros(9, 9), torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    bits = (torch.rand(1, 9) < 0.5).float()
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x)[0], bits)[:, 0]
    assert torch.equal(jacobian.triu(), torch.zeros(9, 9))
    assert bool((jacobian.tril(-1)[1:].abs().sum(1) > 0).all())


def test_it_starts_as_the_tree():
    """By going through the held-out rows bit by bit, with the tree's own probabilities."""
    _, code = bits_of("copies", 8, 640, group=4)
    found = autoregressive_bound(code)
    part = torch.arange(640) // 20 % 8
    fit, held = code.to_dense()[~torch.isin(part, torch.tensor([3, 5, 7]))], code.to_dense()
    held = held[torch.isin(part, torch.tensor([3, 7]))]
    assert (len(fit), len(held)) == (found.n_fitted, found.n_rows)
    order, _, linear = module._tree(bf.BinaryCode.from_dense(fit), torch.arange(8))
    total = 0.0
    for place, column in enumerate(order.tolist()):
        parents = linear[place].nonzero().flatten().tolist()
        assert len(parents) == (place > 0)
        for state in (0, 1):
            own, seen = held, fit
            if parents:
                above = int(order[parents[0]])
                own, seen = held[held[:, above] == state], fit[fit[:, above] == state]
            p = (float(seen[:, column].sum()) + 0.5) / (len(seen) + 1)
            ones = float(own[:, column].sum())
            total -= ones * math.log2(p) + (len(own) - ones) * math.log2(1 - p)
            if not parents:
                break
    assert found.tree_bits == pytest.approx(total / len(held), rel=1e-4)


def test_documents_are_charged_whole_and_rare_columns_counted():
    generator = torch.Generator().manual_seed(0)
    bits = torch.rand(800, 4, generator=generator) < 0.5
    bits[:, 3] = False
    documents = torch.arange(800) // 50
    bits[documents == 3, 3] = True  # only in a document that is charged
    found = autoregressive_bound(bf.BinaryCode.from_dense(bits), documents=documents)
    assert (found.n_documents, found.n_rows, found.n_fitted) == (4, 200, 500)
    never = math.log2(501 / 0.5)
    assert found.bits == pytest.approx(3 + never / 4, rel=0.02)
    again = autoregressive_bound(bf.BinaryCode.from_dense(bits), documents=documents)
    assert again == found


def test_constant_columns_alone_are_charged_without_a_model():
    found = autoregressive_bound(bf.BinaryCode.from_dense(torch.zeros(64, 5)))
    assert found.bits == pytest.approx(-5 * math.log2(1 - 0.5 / 41))
    assert found.steps == 0


def test_what_it_cannot_take_is_named(monkeypatch):
    _, code = bits_of("fair", 8, 128)
    with pytest.raises(ValueError, match="code must have at least 64 rows for the bound; got 63"):
        autoregressive_bound(code[:63])
    with pytest.raises(ValueError, match=r"documents must have shape \[128\]; got \[5\]"):
        autoregressive_bound(code, documents=torch.arange(5))
    with pytest.raises(ValueError, match="documents must be at least 8; got 2"):
        autoregressive_bound(code, documents=torch.arange(128) // 64)
    masked = bf.BinaryCode(code.words, 8, row_mask=torch.ones(128, dtype=torch.bool))
    with pytest.raises(ValueError, match="code must have no row_mask"):
        autoregressive_bound(masked)
    monkeypatch.setattr(module, "MAX_COLUMNS", 7)
    with pytest.raises(ValueError, match="code must have at most 7 columns that vary"):
        autoregressive_bound(code)


@pytest.mark.parametrize("documents", [4, 8, 32])
def test_the_interval_holds_the_truth_in_ninety_five_of_a_hundred(documents):
    g = torch.Generator().manual_seed(0)
    which = torch.arange(documents).repeat_interleave(40)
    held = 0
    for _ in range(300):
        bits = torch.randn(documents, generator=g, dtype=torch.float64)[which]
        bits += torch.randn(len(which), generator=g, dtype=torch.float64)
        low, high = module._interval(bits, which, g)
        held += low <= 0 <= high
    assert 0.91 <= held / 300 <= 0.99
