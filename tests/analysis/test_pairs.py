"""Counts of pairs of columns: the integers, whichever way they are counted."""

import pytest
import torch

from bae_fast import BinaryCode
from bae_fast.entropy import estimate_entropy
from bae_fast.interpret.facts import neighbours
from bae_fast.ops import registry
from bae_fast.packing import pack_rows
from bae_fast.pairs import joint_counts, pair_counts, sparse_pair_counts

CPP = registry.BACKENDS["cpp"]
COLUMNS = torch.tensor([69, 5, 0, 33, 12])


def drawn(n, k, p, seed=0):
    """Bits ``[n, k]``, a column that is always on and one that never is."""
    bits = torch.rand(n, k, generator=torch.Generator().manual_seed(seed)) < p
    bits[:, 5 % k] = True
    bits[:, 6 % k] = False
    return bits


def counted(bits, columns):
    chosen = bits[:, columns].long()
    return (chosen.T.double() @ chosen.double()).float()


@pytest.fixture
def compiled():
    """The compiled function, which :func:`pair_counts` takes where it is there."""
    if CPP.unavailable is not None:
        pytest.skip(f"needs compiled kernels: {CPP.unavailable}")
    return CPP.extras.pair_counts


@pytest.mark.parametrize("impl", ["auto", "torch"])
@pytest.mark.parametrize("p", [0.0, 0.01, 0.07, 0.3])
def test_counts_are_the_integers_whatever_the_blocks(p, impl, monkeypatch):
    monkeypatch.setenv(registry.ENV_IMPL, impl)
    monkeypatch.setattr("bae_fast.pairs.ROW_BLOCK", 64)
    monkeypatch.setattr("bae_fast.pairs.COLUMN_BLOCK", 2)
    monkeypatch.setattr("bae_fast.pairs.KERNEL_ROWS", 96)
    bits, others = drawn(301, 70, p), drawn(301, 50, 0.2, seed=1)
    code, other = BinaryCode.from_dense(bits), BinaryCode.from_dense(others)
    for count in (pair_counts, sparse_pair_counts):
        assert torch.equal(count(code, COLUMNS), counted(bits, COLUMNS))
    columns = torch.tensor([3, 49, 3])
    right = (bits[:, COLUMNS].double().T @ others[:, columns].double()).float()
    assert torch.equal(joint_counts(code, COLUMNS, other, columns), right)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 33), (33, 31), (500, 257), (70_000, 40)])
def test_lists_and_bits_give_the_same_integers_at_every_level(n, k, threads, compiled, monkeypatch):
    from bae_fast.backends.cpp import extension
    from bae_fast.backends.cpp import pair_counts as body

    before = torch.get_num_threads()
    some = torch.randperm(k, generator=torch.Generator().manual_seed(1))[: (k + 1) // 2]
    try:
        torch.set_num_threads(threads)
        for level in extension.LEVELS:
            if extension.op("simd")(extension.LEVELS[level]) < 0:
                continue
            for p in (0.0, 0.03, 0.5):
                bits = drawn(n, k, p)
                words = BinaryCode.from_dense(bits).words
                for columns in (torch.arange(k), some):
                    for cost in (1e-12, 30.0, 1e12):
                        monkeypatch.setattr(body, "LIST_COST", dict.fromkeys(body.LIST_COST, cost))
                        assert torch.equal(compiled(words, columns, k), counted(bits, columns))
    finally:
        torch.set_num_threads(before)
        extension.use_simd(None)


def test_words_far_apart_and_no_columns(compiled):
    bits = drawn(200, 70, 0.1)
    wide = torch.full((200, 9), -1, dtype=torch.int32)
    wide[:, :3] = BinaryCode.from_dense(bits).words
    assert torch.equal(compiled(wide[:, :3], COLUMNS, 70), counted(bits, COLUMNS))
    assert compiled(wide[:, :3], COLUMNS[:0], 70).shape == (0, 0)


@pytest.mark.parametrize("m", [1, 5, 64, 2049])
def test_ones_in_common_are_the_integers_at_every_level(m, compiled):
    from bae_fast.backends.cpp import extension

    g = torch.Generator().manual_seed(0)
    left = torch.rand(6, 4, 32 * m, generator=g) < 0.5
    others = torch.rand(37, 32 * m, generator=g) < 0.3
    index = torch.randint(37, (6, 9), generator=g)
    right = torch.einsum("gin,gjn->gij", left.double(), others[index].double()).float()
    try:
        for level in extension.LEVELS:
            if extension.op("simd")(extension.LEVELS[level]) >= 0:
                found = CPP.extras.common_ones(pack_rows(left), pack_rows(others), index)
                assert torch.equal(found, right)
    finally:
        extension.use_simd(None)


@pytest.mark.parametrize(("n", "k"), [(2, 3), (333, 20), (1000, 150)])
def test_entropy_and_neighbours_are_the_same_without_compiled_kernels(n, k, compiled, monkeypatch):
    bits = drawn(n, k, 0.2)
    bits[:, 2] = bits[:, 0] ^ bits[:, 1]  # a parity, which only pairs tell
    code = BinaryCode.from_dense(bits)
    found, near = estimate_entropy(code), neighbours(code, k=2)
    with monkeypatch.context() as small:
        small.setattr("bae_fast.entropy.chain.KERNEL_ROWS", 100)
        small.setattr("bae_fast.entropy.chain._SCRATCH", 2000)
        assert estimate_entropy(code) == found
    monkeypatch.setenv(registry.ENV_IMPL, "torch")
    assert estimate_entropy(code) == found
    again = neighbours(code, k=2)
    assert torch.equal(again.indices, near.indices)
    assert torch.equal(again.scores, near.scores)


def test_a_code_without_rows_has_no_pairs():
    code = BinaryCode.from_dense(torch.zeros(0, 40, dtype=torch.bool))
    assert torch.equal(pair_counts(code, torch.arange(40)), torch.zeros(40, 40))
