"""Which tokens go to which feature: against the released way, written out densely."""

from __future__ import annotations

import pytest
import torch

from bae_fast import BinaryCode
from bae_fast.backends.cpp import extension
from bae_fast.interpret import SalientTokens, collect_code, collect_scores
from bae_fast.ops import registry

IMPLS = ["torch"] + ([] if registry.BACKENDS["cpp"].unavailable else ["cpp"])


def bits(n: int, f: int, mean: float, seed: int = 0) -> torch.Tensor:
    """Densities as of a trained code: most small, a few features nearly always on, some dead."""
    g = torch.Generator().manual_seed(seed)
    p = torch.rand(f, generator=g) ** 3 * 4 * mean
    p[: f // 20 + 1] = 0.97
    p[-(f // 20) - 1 :] = 0
    return torch.rand(n, f, generator=g) < p


def by_definition(on: torch.Tensor, p: torch.Tensor, k: int, on_only: bool) -> list[list[int]]:
    """Rows of each feature: |b - p| dense in float64, a stable sort, a loop."""
    key = (on.double() - p.double()).abs()
    if on_only:
        key[~on] = -1
    values, features = key.sort(dim=1, descending=True, stable=True)
    found: list[list[int]] = [[] for _ in range(on.shape[1])]
    for row in range(len(on)):
        for value, f in zip(values[row, :k].tolist(), features[row, :k].tolist(), strict=True):
            if value >= 0:
                found[f].append(row)
    return found


def rows_of(tokens: SalientTokens) -> list[list[int]]:
    return [tokens.of(f)[0].tolist() for f in range(tokens.n_features)]


SHAPES = [
    (300, 200, 0.05),  # sparse
    (300, 200, 0.5),  # half on: the head of the table is enough
    (70, 1000, 0.002),  # fewer than k on in most rows
    (40, 7, 0.3),  # F < k
    (100, 33, 0.2),  # an odd number of words and a tail
    (1, 64, 0.2),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("on_only", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_row_goes_to_the_features_of_the_released_way(shape, on_only, impl):
    on = bits(*shape)
    code = BinaryCode.from_dense(on)
    found = collect_code(code, k=10, on_only=on_only, impl=impl)
    assert rows_of(found) == by_definition(on, code.density(), min(10, shape[1]), on_only)


@pytest.mark.parametrize("impl", IMPLS)
def test_salience_is_the_released_burstiness(impl):
    on = bits(200, 90, 0.1)
    code = BinaryCode.from_dense(on)
    p = code.density()
    found = collect_code(code, impl=impl)
    # the released expression in float64, by torch.topk: values agree whatever happens at ties
    dense = ((on.double() - p).abs() + 1e-6).log2()
    top = dense.topk(10, dim=1).values
    ours = torch.full_like(dense, -torch.inf)
    for f in range(90):
        rows, salience = found.of(f)
        assert salience.dtype == torch.float32
        torch.testing.assert_close(salience, dense[rows.long(), f].float(), rtol=1e-6, atol=1e-7)
        ours[rows.long(), f] = dense[rows.long(), f]
    torch.testing.assert_close(ours.topk(10, dim=1).values, top, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_given_density_a_mask_and_leading_dimensions(impl):
    on = bits(120, 50, 0.2)
    p = torch.rand(50, generator=torch.Generator().manual_seed(1))
    keep = torch.arange(120) % 3 > 0
    code = BinaryCode(
        BinaryCode.from_dense(on & keep[:, None]).words.view(12, 10, -1),
        50,
        row_mask=keep.view(12, 10),
    )
    found = collect_code(code, k=4, density=p, impl=impl)
    kept = keep.nonzero().flatten()
    expected = by_definition(on[keep], p, 4, False)
    assert rows_of(found) == [[int(kept[i]) for i in rows] for rows in expected]
    assert (found.n_rows, found.k) == (120, 4)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_feature_nearly_always_on_collects_the_rows_where_it_is_off(impl):
    on = torch.zeros(100, 20, dtype=torch.bool)
    on[:, 0] = True
    on[[3, 50], 0] = False
    on[torch.arange(100), 1 + torch.arange(100) % 19] = True
    code = BinaryCode.from_dense(on)
    assert collect_code(code, k=1, impl=impl).of(0)[0].tolist() == [3, 50]
    only = collect_code(code, k=1, on_only=True, impl=impl)
    assert only.of(0)[0].tolist() == []
    # two bits are on in a row, so two features get it, and two where the common one is off
    assert int(collect_code(code, k=2, on_only=True, impl=impl).counts().sum()) == 198


@pytest.mark.skipif("cpp" not in IMPLS, reason="the C++ backend is not compiled")
def test_both_ways_of_the_compiled_search_and_the_plain_one_agree_on_many_shapes():
    for seed, (f, mean) in enumerate(
        [(500, 0.02), (500, 0.3), (2000, 0.01), (64, 0.6), (65, 0.05)]
    ):
        code = BinaryCode.from_dense(bits(400, f, mean, seed))
        for k in (1, 3, 10, 32):
            one, other = (collect_code(code, k=k, impl=impl) for impl in IMPLS)
            for a, b in zip(vars(one).values(), vars(other).values(), strict=True):
                assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.skipif("cpp" not in IMPLS, reason="the C++ backend is not compiled")
def test_a_sample_that_misleads_changes_no_result():
    """The sample of rows that sets the reach holds rare bits only; the other rows have none."""
    on = torch.zeros(6400, 300, dtype=torch.bool)
    on[::100, :20] = True
    on[torch.arange(6400), 100 + torch.arange(6400) % 200] = True
    code = BinaryCode.from_dense(on)
    assert rows_of(collect_code(code, impl="cpp")) == by_definition(on, code.density(), 10, False)


@pytest.mark.skipif("cpp" not in IMPLS, reason="the C++ backend is not compiled")
def test_numbers_are_brought_together_in_order():
    numbers = torch.randint(0, 12, (5000,), dtype=torch.int32)
    offsets, at = extension.op("grouped")(numbers, 10)
    for g in range(10):
        part = at[offsets[g] : offsets[g + 1]]
        assert torch.equal(part, (numbers == g).nonzero().flatten())


def test_scores_go_to_the_largest_positive_and_ties_to_the_lower_feature():
    g = torch.Generator().manual_seed(0)
    for n, f, k in [(100, 50, 10), (64, 8, 10), (200, 30, 3)]:
        x = torch.randint(-2, 4, (n, f), generator=g).float()
        found = collect_scores(x.split(30), k=k)
        values, features = x.sort(dim=1, descending=True, stable=True)
        expected: list[list[int]] = [[] for _ in range(f)]
        for row in range(n):
            for value, j in zip(values[row, :k].tolist(), features[row, :k].tolist(), strict=True):
                if value > 0:
                    expected[j].append(row)
        assert rows_of(found) == expected
        rows, score = found.of(3)
        assert torch.equal(score, x[rows.long(), 3])


def test_scores_of_half_precision_and_of_bits():
    x = (torch.rand(90, 40, generator=torch.Generator().manual_seed(0)) < 0.5).to(torch.bfloat16)
    expected = [[r for r in range(90) if x[r, f] and x[r, :f].sum() < 10] for f in range(40)]
    assert rows_of(collect_scores([x[:40], x[40:]])) == expected


def test_the_strongest_rows_come_first_and_equal_ones_in_the_order_of_the_text():
    x = torch.tensor([[1.0], [3.0], [2.0], [3.0], [0.0]])
    found = collect_scores([x], k=1)
    assert found.of(0)[0].tolist() == [0, 1, 2, 3]
    assert found.strongest(0, 3).tolist() == [1, 3, 2]
    assert found.counts().tolist() == [4]


def test_saved_tokens_come_back_and_a_foreign_file_does_not(tmp_path):
    found = collect_code(BinaryCode.from_dense(bits(100, 30, 0.2)))
    loaded = SalientTokens.load(found.save(tmp_path / "tokens.safetensors"))
    for name, value in vars(found).items():
        other = getattr(loaded, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
    BinaryCode.from_dense(bits(4, 4, 0.2)).save(tmp_path / "code.safetensors")
    with pytest.raises(ValueError, match="salient_tokens"):
        SalientTokens.load(tmp_path / "code.safetensors")


def test_bad_input_is_named():
    code = BinaryCode.from_dense(bits(10, 8, 0.2))
    with pytest.raises(ValueError, match="k must be an int >= 1; got 0"):
        collect_code(code, k=0)
    with pytest.raises(ValueError, match=r"density must have shape \[8\]; got \[7\]"):
        collect_code(code, density=torch.rand(7))
    with pytest.raises(ValueError, match=r"density must lie in \[0, 1\]"):
        collect_code(code, density=torch.full((8,), 1.5))
    with pytest.raises(ValueError, match="n_bits=2"):
        collect_code(BinaryCode.from_dense(bits(10, 8, 0.2), n_bits=2))
    with pytest.raises(ValueError, match="must not be empty"):
        collect_scores([])
    with pytest.raises(ValueError, match=r"blocks must be \[rows, 8\]; got \[3, 7\]"):
        collect_scores([torch.rand(3, 8), torch.rand(3, 7)])
    with pytest.raises(ValueError, match="NaN"):
        collect_scores([torch.full((2, 3), float("nan"))])
    with pytest.raises(IndexError, match="feature must lie between 0 and 7; got 8"):
        collect_code(code).of(8)


def test_no_row_gives_no_token():
    found = collect_code(BinaryCode(torch.zeros(0, 2, dtype=torch.int32), 40))
    assert found.n_features == 40
    assert int(found.counts().sum()) == 0
