"""Description length under one coder, fitted to some rows and charged on others."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import bae_fast as bf
from bae_fast.analysis import description_length
from bae_fast.analysis.quantisers import FoundValues, ValueSteps
from bae_fast.pairs import edge_counts, tree_parents


def copies(n: int, seed: int, flip: float = 0.05) -> bf.BinaryCode:
    """Four fair bits and three noisy copies of each."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.rand(n, 4, 1, generator=generator) < 0.5
    flips = torch.rand(n, 4, 3, generator=generator) < flip
    return bf.BinaryCode.from_dense(torch.cat([first, first ^ flips], 2).flatten(1))


def dense_length(held: torch.Tensor, train: torch.Tensor, parents: list[int]) -> float:
    """The same by going through the bits one at a time."""
    total = 0.0
    for j, parent in enumerate(parents):
        for state in (0, 1) if parent >= 0 else (None,):
            own, fit = held[:, j], train[:, j]
            if state is not None:
                own, fit = own[held[:, parent] == state], fit[train[:, parent] == state]
            p = (float(fit.sum()) + 0.5) / (len(fit) + 1)
            total -= sum(math.log2(p if bit else 1 - p) for bit in own.tolist())
    return total / len(held)


@pytest.mark.parametrize("coder", ["columns", "tree"])
def test_it_is_the_sum_over_bits_of_minus_log2_p(coder):
    train, held = copies(500, 0), copies(60, 1)
    found = description_length(held, coder, fitted_to=train)
    parents = tree_parents(train).tolist() if coder == "tree" else [-1] * 16
    if coder == "tree":
        # independent groups share nothing that pays
        parents = [p if p >= 0 and p // 4 == j // 4 else -1 for j, p in enumerate(parents)]
    assert found.edges == sum(p >= 0 for p in parents) == (12 if coder == "tree" else 0)
    expected = dense_length(held.to_dense(), train.to_dense(), parents)
    assert found.bits == pytest.approx(expected, rel=1e-9)
    assert (found.n_fitted, found.n_rows) == (500, 60)
    per_edge = (0.5 * math.log2(500) + 4) * found.edges
    assert found.model_bits == pytest.approx(16 * 0.5 * math.log2(500) + per_edge)


def test_the_tree_takes_off_what_copies_share():
    train, held = copies(20000, 0), copies(20000, 1)
    h2 = -(0.05 * math.log2(0.05) + 0.95 * math.log2(0.95))
    found = description_length(held, fitted_to=train)
    assert found.bits == pytest.approx(4 * (1 + 3 * h2), rel=0.01)
    assert description_length(held, "columns", fitted_to=train).bits == pytest.approx(16, rel=0.01)


def test_what_training_rows_do_not_show_costs_much_and_not_without_end():
    train = bf.BinaryCode.from_dense(torch.zeros(999, 3))
    held = bf.BinaryCode.from_dense(torch.tensor([[1.0, 0.0, 0.0]]))
    found = description_length(held, "columns", fitted_to=train)
    assert found.bits == pytest.approx(math.log2(2000) + 2 * math.log2(2000 / 1999))


def test_held_out_rows_of_little_data_cost_more_than_fitted_ones():
    train, held = copies(40, 0), copies(5000, 1)
    assert description_length(held, fitted_to=train).bits > description_length(train).bits


def test_counts_of_edges_are_those_of_dense_bits():
    code = copies(1500, 3)
    dense = code.to_dense()
    left, right = torch.tensor([0, 3, 15, 7]), torch.tensor([1, 3, 0, 8])
    expected = (dense[:, left] & dense[:, right]).sum(0)
    assert torch.equal(edge_counts(code, left, right), expected)


def test_what_it_cannot_take_is_named():
    code = copies(10, 0)
    with pytest.raises(ValueError, match="coder must be one of columns, tree; got 'zip'"):
        description_length(code, "zip")
    with pytest.raises(ValueError, match="fitted_to must have 16 columns; got 3"):
        description_length(code, fitted_to=bf.BinaryCode.from_dense(torch.zeros(5, 3)))
    masked = bf.BinaryCode(code.words, 16, row_mask=torch.ones(10, dtype=torch.bool))
    with pytest.raises(ValueError, match="code must have no row_mask"):
        description_length(masked)
    with pytest.raises(ValueError, match="code must hold at least one row"):
        description_length(code[:0])


def test_values_cost_what_their_steps_take_by_the_shares_of_other_rows():
    g = torch.Generator().manual_seed(0)
    even = (torch.rand(4000, 3, generator=g) * 8).clamp_min(1e-3)
    fitted = FoundValues.of(even.split(700))
    assert torch.equal(fitted.code.to_dense(), torch.ones(4000, 3, dtype=torch.uint8))
    charged = FoundValues.of([even[:1000]])
    assert ValueSteps(fitted, 3).cost(charged) / 3000 == pytest.approx(3, abs=0.01)  # all as likely
    assert ValueSteps(fitted, 0).cost(charged) == pytest.approx(0)
    skewed = torch.empty(4000, 3).exponential_(generator=g) + 1e-3
    steps = ValueSteps(FoundValues.of([skewed[:3000]]), 3)
    low, high = skewed[:3000].amin(0), skewed[:3000].amax(0)
    level = ((skewed - low) / ((high - low) / 8)).floor().clamp(0, 7).long()
    expected = 0.0
    for column in range(3):
        shares = torch.bincount(level[:3000, column], minlength=8) / 3000
        used = torch.bincount(level[3000:, column], minlength=8)
        expected -= float((used * shares.clamp_min(1e-4).log2()).sum()) / 3000
    charged = FoundValues.of([skewed[3000:]])
    assert steps.cost(charged) / 3000 == pytest.approx(expected, abs=0.03)
    # what training never showed costs much, and not without end
    flat = ValueSteps(FoundValues.of([torch.tensor([[1.0], [8.0]] + [[1.1]] * 500)]), 3)
    assert 5 < flat.cost(FoundValues.of([torch.tensor([[5.0]])])) < 20


def test_a_value_is_read_as_the_mean_of_its_steps_training_values():
    g = torch.Generator().manual_seed(1)
    # the last feature is never on, the one before has a single value
    train = torch.randn(600, 5, generator=g).exp() * (torch.rand(600, 5, generator=g) < 0.4)
    train[:, 3] = (train[:, 3] > 0) * 2.5
    train[:, 4] = 0
    held = torch.randn(200, 5, generator=g).exp() * (torch.rand(200, 5, generator=g) < 0.4)
    found = FoundValues.of(train.split(250))
    for bits in (0, 1, 3):
        steps = ValueSteps(found, bits)
        read = steps.read(held.view(2, 100, 5)).view(200, 5)
        assert torch.equal(read > 0, (held > 0) & (torch.arange(5) < 4))
        for column in range(4):
            own = train[:, column][train[:, column] > 0]
            low, high = own.min(), own.max()
            step = (high - low) / 2**bits

            def level(values, low=low, step=step, bits=bits):
                return ((values - low) / step.clamp_min(1e-30)).floor().clamp(0, 2**bits - 1).long()

            for row in (held[:, column] > 0).nonzero().flatten().tolist():
                at = level(held[row, column])
                same = own[level(own) == at]
                middle = low + (at + 0.5) * step
                expected = same.mean() if len(same) else middle
                assert read[row, column] == pytest.approx(float(expected), rel=1e-5)
    error = [(ValueSteps(found, bits).read(train) - train).square().sum() for bits in range(9)]
    assert all(more > less for more, less in itertools.pairwise(error))
    for dtype in (torch.bfloat16, torch.float16):
        narrow = train.to(dtype)
        steps = ValueSteps(FoundValues.of([narrow]), 8)
        whole = ValueSteps(FoundValues.of([narrow.float()]), 8)
        assert torch.equal(steps.counts, whole.counts)
        read = steps.read(narrow)
        assert read.dtype == dtype
        assert torch.equal(read, whole.read(narrow.float()).to(dtype))
    with pytest.raises(ValueError, match="blocks must hold at least one block of rows; got none"):
        FoundValues.of([])
    for bad in (torch.inf, torch.nan):
        with pytest.raises(ValueError, match="blocks must be finite; got NaN or Inf"):
            FoundValues.of([torch.ones(2, 3), torch.tensor([[1.0, bad, 0.0]])])
